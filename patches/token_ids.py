"""TRL reads token ids and log-probabilities: the engine makes no text of them, nor an object for each."""

from __future__ import annotations

import functools

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, with_leading
from patchfastrl.seam import Seam

from .expressions import Instead
from .releases import ENGINE_CLASS, between, outside, upstream

EXTRACTED = "0.29"  # before, the log-probabilities were read where they came


class TokenIds(Rewrite):
    """``SamplingParams(...)`` becomes ``token_params(SamplingParams, ...)``, every argument kept."""

    words = ("SamplingParams",)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "SamplingParams"):
            return updated_node
        self.found += 1
        return with_leading(updated_node, "@token_params", "SamplingParams")


# In older releases, and in Online DPO, `sampling_params` does it.
SEAMS = (
    Seam(
        name="engine.token_ids",
        target="trl.generation.vllm_generation:VLLMGeneration.generate",
        requires=between(ENGINE_CLASS),
        absent=outside(ENGINE_CLASS),
        count=1,
        reason="vLLM makes text of every token as it comes, and TRL does not look at it",
        link=upstream("generation/vllm_generation.py"),
        until="TRL passes detokenize=False",
        rewrite=TokenIds,
    ),
    Seam(
        name="engine.token_log_probs",
        target="trl.generation.vllm_generation:VLLMGeneration.generate",
        requires=between(EXTRACTED),
        absent=outside(EXTRACTED),
        count=1,
        reason="TRL sorts a dictionary for each token, 0.1 to 0.2 s for 32 completions of 2,048",
        link=upstream("generation/vllm_generation.py"),
        until="TRL asks vLLM for flat log-probabilities",
        rewrite=functools.partial(
            Instead,
            "extract_logprobs(all_outputs)",
            "@token_log_probs(extract_logprobs, all_outputs)",
            "extract_logprobs",
        ),
    ),
)
