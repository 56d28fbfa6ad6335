"""What `vllm.SamplingParams` raises for a value that it refuses.

Requirement: all supported vLLM. Older releases raise ValueError and have no class of their own.
Reason: newer releases raise `VLLMValidationError`, which is no ValueError.
Link: vllm/exceptions.py
Until: the oldest supported vLLM has `VLLMValidationError`.
"""

from __future__ import annotations


def refusals() -> tuple[type[Exception], ...]:
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:
        return (TypeError, ValueError)
    return (TypeError, ValueError, VLLMValidationError)
