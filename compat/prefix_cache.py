"""Empty vLLM's prefix cache, and say whether it is.

Requirement: all supported vLLM. 0.11 does not say so, later releases return it from `LLM.reset_prefix_cache`.
Reason: blocks computed with other weights must not be hit; vLLM keeps them while requests are running. And it goes
through every block of the KV cache even if none is cached, as after its `sleep`: 3 ms for 14,000 (8B, 28 GiB).
Link: vllm/v1/core/block_pool.py, `reset_prefix_cache`
Until: vLLM 0.11 is no longer supported, and an empty cache is not emptied again.
"""

from __future__ import annotations

from typing import Any


def reset(llm: Any) -> bool:
    """Empty the prefix cache of an `LLM` in this process; False when vLLM would not."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    cached = scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
    if not scheduler.has_unfinished_requests() and len(cached) == 0:
        return True
    emptied = llm.reset_prefix_cache()
    if emptied is None:
        emptied = scheduler.reset_prefix_cache()
    return bool(emptied)
