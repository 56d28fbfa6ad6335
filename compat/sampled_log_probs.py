"""The log-probabilities of sampled tokens are computed in one pass: 15 microseconds a token, not 112 (H200, 8 rows).

Requirement: vLLM on CUDA whose newer model runner has `compute_topk_scores`: seen in 0.26 to 0.30.
Reason: TRL asks for the log-probability of each token that it samples. vLLM's kernels go three times through a row's
vocabulary, twice with 1,024 logits at a time, in a program for each row, and of 8 rows most of a GPU has nothing to do.
Link: vllm/v1/worker/gpu/sample/logprob.py
Until: vLLM reads more at once, or splits a row among programs.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from vllm.platforms import current_platform

from .replaced import replaced

_NAME = "compute_topk_scores"


def in_one_pass() -> contextlib.AbstractContextManager[Any]:
    """While an engine is built, which compiles the kernel, and while it samples. What else is asked for is vLLM's."""
    return _replaced() if current_platform.is_cuda() else contextlib.nullcontext()


def _replaced() -> contextlib.AbstractContextManager[Any]:
    try:
        module = importlib.import_module("vllm.v1.worker.gpu.sample.sampler")
        usual: Any = vars(module)[_NAME]
    except (ModuleNotFoundError, KeyError):  # a release without it
        return contextlib.nullcontext()
    from vllm.v1.outputs import LogprobsTensors

    def scores(logits: torch.Tensor, num_logprobs: int, sampled: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        more = num_logprobs or kwargs.get("max_per_req_token_ids") or kwargs.get("logits_mode")
        if more or any(a is not None for a in args) or logits.stride(-1) != 1:
            return usual(logits, num_logprobs, sampled, *args, **kwargs)
        from patchfastrl._sampled_log_probs_kernel import log_probs_and_ranks

        log_probs, ranks = log_probs_and_ranks(logits, sampled)
        return LogprobsTensors(sampled.unsqueeze(-1), log_probs.unsqueeze(-1), ranks)

    return replaced(module, _NAME, scores)
