"""vLLM warms its sampler up with what a trainer samples with; other settings are compiled when they are first used.

Requirement: vLLM that has `SamplingParams.for_sampler_warmup`: seen in 0.26, the newer model runner on CUDA.
Reason: it compiles the kernels of every sampling setting there is (penalties, bias, bad words, ...), seconds when they
are not in Triton's cache. Trainers set a temperature and want log-probabilities; our audit wants those of a prompt.
Link: vllm/v1/worker/gpu/warmup.py
Until: vLLM compiles them when they are used, or ships them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .replaced import replaced


@contextlib.contextmanager
def of_a_trainer() -> Iterator[None]:
    """While an engine is built."""
    from vllm import SamplingParams

    if not hasattr(SamplingParams, "for_sampler_warmup"):
        yield
        return
    usual: Any = staticmethod(lambda: SamplingParams(temperature=0.9, logprobs=0, prompt_logprobs=0))
    with replaced(SamplingParams, "for_sampler_warmup", usual):
        yield
