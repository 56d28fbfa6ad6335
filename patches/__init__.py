"""Every seam: one small file each, TRL's source is the target. The installer lists them when it runs."""

from __future__ import annotations

from patchfastrl.seam import Seam

from . import (
    broken_paths,
    chat_template,
    colocate_mode,
    config_field,
    configure_trainer,
    elsewhere,
    generate_call,
    load_policy,
    log_probs,
    lora_request,
    old_logprobs,
    openenv,
    publish_adapter,
    reload_weights,
    sampling_overrides,
    shared_engine,
    token_ids,
)

SEAMS: tuple[Seam, ...] = (
    *configure_trainer.SEAMS,
    *load_policy.SEAMS,
    *colocate_mode.SEAMS,
    *sampling_overrides.SEAMS,
    *config_field.SEAMS,
    *shared_engine.SEAMS,
    *publish_adapter.SEAMS,
    *lora_request.SEAMS,
    *token_ids.SEAMS,
    *reload_weights.SEAMS,
    *openenv.SEAMS,
    *chat_template.SEAMS,
    *broken_paths.SEAMS,
    *old_logprobs.SEAMS,
    *log_probs.SEAMS,
    *generate_call.SEAMS,
    *elsewhere.SEAMS,
)
