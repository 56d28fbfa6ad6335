"""vLLM's CPU worker sizes its KV cache by an environment variable, in whole GiB: give it the number of bytes instead.

Requirement: vLLM on the CPU platform, as long as there is `CacheConfig.cpu_kvcache_space_bytes`; later releases read
`kv_cache_memory_bytes` by themselves.
Reason: the cache is as large as the sequences need that the trainer samples at once; vLLM's default is 4 GiB.
Link: vllm/v1/worker/cpu_worker.py, `determine_available_memory`
Until: the oldest supported vLLM reads `kv_cache_memory_bytes` on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .replaced import replaced


@contextlib.contextmanager
def in_bytes() -> Iterator[None]:
    """While an engine is built: its KV cache gets `kv_cache_memory_bytes`."""
    from vllm.config import CacheConfig
    from vllm.v1.worker.cpu_worker import CPUWorker

    if not hasattr(CacheConfig, "cpu_kvcache_space_bytes"):
        yield
        return

    def determine_available_memory(self: Any) -> int:
        self.cache_config.cpu_kvcache_space_bytes = self.cache_config.kv_cache_memory_bytes
        return before(self)

    with replaced(CPUWorker, "determine_available_memory", determine_available_memory) as before:
        yield
