"""Log-probabilities of sampled tokens in one list a completion, where TRL goes through a dictionary for each token.

Requirement: vLLM that has `SamplingParams.flat_logprobs` (0.12 has, 0.11.0 has not); without, TRL's own way.
Reason: 65,000 tokens (32 completions of 2,048) take TRL 0.1 to 0.2 s, in which nothing is computed on a GPU.
Link: vllm/logprobs.py, `FlatLogprobs`; trl/generation/vllm_generation.py, `extract_logprobs`
Until: TRL asks for them like this.
"""

from __future__ import annotations

import sys
from typing import Any


def asked_for(params_class: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of `SamplingParams` that ask for flat log-probabilities, if only those of sampled tokens are wanted."""
    if settings.get("logprobs") == 0 and hasattr(params_class, "flat_logprobs"):
        return {"flat_logprobs": True, **settings}
    return settings


def extracted(outputs: list[Any]) -> tuple[list[list[list[float | None]]], list[list[list[int]]]] | None:
    """What TRL's `extract_logprobs` returns: log-probabilities and token ids, (sequences, tokens, 1).

    None where a completion has none, or more than one for a token.
    """
    kind = getattr(sys.modules.get("vllm.logprobs"), "FlatLogprobs", None)
    flat = [completion.logprobs for output in outputs for completion in output.outputs]
    if kind is None or not all(isinstance(f, kind) and f.start_indices == [*range(len(f.token_ids))] for f in flat):
        return None
    log_probs = [[[None if value != value else value] for value in f.logprobs] for f in flat]  # NaN is not itself
    return log_probs, [[[token] for token in f.token_ids] for f in flat]
