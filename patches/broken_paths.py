"""TRL's vLLM path trips where its transformers path does not: a script that ran has to run with the engine too."""

from __future__ import annotations

import functools

from patchfastrl.seam import Seam

from .expressions import Instead
from .releases import between, outside
from .trainers import GOLD, RLOO

MESSAGES = "[prepare_multimodal_messages_vllm(prompt) for prompt in prompts]"

SEAMS = (
    Seam(
        name="rloo.text_prompts",
        target=RLOO.homes[0].target("_generate_single_turn"),
        requires=between("0.25", "0.27"),
        absent=outside("0.25", "0.27"),
        count=1,
        reason="these releases take every prompt for a conversation on their way to vLLM, and fail on plain text",
        link="https://github.com/huggingface/trl/blob/v0.26.2/trl/trainer/rloo_trainer.py",
        until="releases before 0.27 are no longer supported",
        rewrite=functools.partial(
            Instead,
            MESSAGES,
            f'{MESSAGES} if is_conversational({{"prompt": prompts[0]}}) else prompts',
            "prepare_multimodal_messages_vllm",
        ),
    ),
    Seam(
        name="gold.completion_length",
        target=GOLD.homes[0].target("_generate_on_policy_outputs_vllm"),
        requires=between("0.25", "0.26"),
        absent=outside("0.25", "0.26"),
        count=1,
        reason="this release asks transformers' GenerationConfig for a max_completion_length, which it has not",
        link="https://github.com/huggingface/trl/blob/v0.25.1/trl/experimental/gold/gold_trainer.py",
        until="releases before 0.26 are no longer supported",
        rewrite=functools.partial(
            Instead,
            "generation_config.max_completion_length",
            "generation_config.max_new_tokens",
            "max_completion_length",
        ),
    ),
)
