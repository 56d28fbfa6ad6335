"""Whether vLLM has emptied its prefix cache.

Requirement: all supported vLLM. 0.11 does not say so, later releases return it from `LLM.reset_prefix_cache`.
Reason: blocks computed with other weights must not be hit; vLLM keeps them while requests are running.
Link: vllm/v1/core/sched/scheduler.py, `reset_prefix_cache`
Until: vLLM 0.11 is no longer supported.
"""

from __future__ import annotations

from typing import Any


def reset(llm: Any) -> bool:
    """Empty the prefix cache of an `LLM` in this process; False when vLLM would not."""
    emptied = llm.reset_prefix_cache()
    if emptied is None:
        emptied = llm.llm_engine.engine_core.engine_core.scheduler.reset_prefix_cache()
    return bool(emptied)
