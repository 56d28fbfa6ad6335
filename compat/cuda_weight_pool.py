"""Keep shared weights out of vLLM's sleep-mode memory pool, so that no sleep level can unmap or discard them.

Requirement: vLLM on CUDA with `enable_sleep_mode`, all releases that have `Worker._maybe_get_memory_pool_context`.
Reason: in the pool, level 1 copies the trainer's weights to the host and level 2 discards them.
Link: vllm/v1/worker/gpu_worker.py
Until: vLLM can be told which allocations sleep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .replaced import replaced

OWN_WEIGHTS = "own weights"  # a tag; any but vLLM's "weights", which level 1 would copy to the host


@contextlib.contextmanager
def weights_outside() -> Iterator[Callable[[], Any]]:
    """While an engine is built: what is allocated as "weights" comes from torch's ordinary allocator.

    Yields:
        The pool as a context: what is allocated in it is released with the KV cache, and its contents are lost.
    """
    from vllm.v1.worker.gpu_worker import Worker

    workers: list[Any] = []

    def only_the_kv_cache(self: Any, tag: str) -> Any:
        workers.append(self)
        return contextlib.nullcontext() if tag == "weights" else before(self, tag)

    with replaced(Worker, "_maybe_get_memory_pool_context", only_the_kv_cache) as before:
        yield lambda: before(workers[0], OWN_WEIGHTS)
