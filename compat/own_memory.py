"""Give the engine memory of its own once vLLM has measured what a batch takes, not while it lays the weights out.

Requirement: vLLM, all releases.
Reason: weights of the engine's own beside the trainer's would be a second copy while loading, and while vLLM measures.
Link: vllm/v1/worker/gpu_worker.py, `determine_available_memory`
Until: vLLM has a step between loading and the KV cache.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.platforms import current_platform

from patchfastrl import memory
from patchfastrl.errors import SharingError

from .replaced import replaced


@contextlib.contextmanager
def after_profiling(allocate: Callable[[Any], int], made: dict[str, Any]) -> Iterator[None]:
    """While an engine is built: `allocate(worker)` runs before the KV cache, which gets less by the bytes it returns.

    A KV cache whose size is given (`kv_cache_memory_bytes`) is that size. `made` gets the "worker" before it measures.
    """
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    else:
        from vllm.v1.worker.gpu_worker import Worker

    allocated = False

    def then_allocate(self: Any) -> int:
        nonlocal allocated
        allocated, made["worker"] = True, self
        _know_of_what_was_freed(self)
        available = measure(self)
        taken = allocate(self)
        return available if getattr(self.cache_config, "kv_cache_memory_bytes", None) else available - taken

    with replaced(Worker, "determine_available_memory", then_allocate) as measure:
        yield
    if not allocated:
        raise SharingError("vLLM built an engine without asking what memory is left: its own weights have no memory.")


def _know_of_what_was_freed(worker: Any) -> None:
    """What of the trainer's, or of an engine before, went back to the device since this worker began.

    vLLM takes it for another process that ends, and refuses (0.11 and 0.12 even if as much is free as then).
    """
    snapshot = getattr(worker, "init_snapshot", None)
    if snapshot is not None:
        gc.collect()
        memory.return_cached()
        snapshot.free_memory = max(snapshot.free_memory, torch.cuda.mem_get_info()[0] + 1)
