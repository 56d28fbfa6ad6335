"""OpenEnv's helper for rollout functions samples from the adapter in training, and reloads no checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam

from .lora_request import LoraRequest
from .releases import ENGINE_CLASS, between, outside
from .reload_weights import ReloadWeights

FIRST, END = "0.26", "1.9"


class RolloutOverrides(Rewrite):
    """``trainer.args.generation_kwargs`` is ``sampling_overrides(trainer.args)``; a call's own overrides follow it."""

    words = ("generation_kwargs",)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        if not reads(original_node, "trainer.args.generation_kwargs"):
            return updated_node
        self.found += 1
        return expression("@sampling_overrides(trainer.args)")


# Until 0.28 the trainer holds the engine; from then on VLLMGeneration does.
ERAS = (
    (FIRST, ENGINE_CLASS, "trainer.llm", "generate_rollout_completions", "_build_colocate_sampling_params"),
    (
        ENGINE_CLASS,
        END,
        "trainer.vllm_generation.llm",
        "_generate_rollout_completions_colocate",
        "_build_base_generation_kwargs",
    ),
)


def _seam(
    part: str, method: str, first: str, end: str, count: int, reason: str, rewrite: Callable[[], Rewrite]
) -> Seam:
    return Seam(
        name=f"openenv.{part}",
        target=f"trl.experimental.openenv.utils:{method}",
        requires=between(first, end),
        absent=outside(FIRST, END),
        count=count,
        reason=reason,
        link="https://github.com/huggingface/trl/blob/v1.8.0/trl/experimental/openenv/utils.py",
        until="releases before 1.9 are no longer supported",
        rewrite=rewrite,
    )


SEAMS = tuple(
    seam
    for first, end, engine, samples, settings in ERAS
    for seam in (
        _seam(
            "lora_request",
            samples,
            first,
            end,
            2,
            "without a request vLLM samples from the base model, and says nothing",
            functools.partial(LoraRequest, engine),
        ),
        _seam(
            "reload",
            samples,
            first,
            end,
            1,
            "the checkpoint's weights would be written over the ones in training",
            functools.partial(ReloadWeights, engine),
        ),
        _seam(
            "sampling_overrides",
            settings,
            first,
            end,
            2,
            "vllm_sampling_params are checked against what TRL must control, then sent along with generation_kwargs",
            RolloutOverrides,
        ),
    )
)
