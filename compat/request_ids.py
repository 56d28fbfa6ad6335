"""Whose request ids `LLMEngine.abort_request` takes.

Requirement: all supported vLLM. Newer releases give a request a second, internal id, under which the output processor
keeps it, and take either with `internal=`; older ones have one id.
Reason: after a batch that failed, what is left of it must not come back with the next batch.
Link: vllm/v1/engine/llm_engine.py, `abort_request`
Until: the oldest supported vLLM has `internal=`.
"""

from __future__ import annotations

import inspect
from typing import Any


def abort_all(engine: Any) -> None:
    """Abort every request that `engine` (an `LLMEngine`) still knows."""
    ids = list(engine.output_processor.request_states)
    if "internal" in inspect.signature(engine.abort_request).parameters:
        engine.abort_request(ids, internal=True)
    else:
        engine.abort_request(ids)
