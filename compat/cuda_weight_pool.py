"""Shared weights stay out of vLLM's sleep-mode memory pool; what the engine has for itself goes there.

Requirement: vLLM on CUDA, all releases that have `Worker._maybe_get_memory_pool_context`.
Reason: in the pool, sleep level 1 copies the trainer's weights to the host and level 2 discards them.
Link: vllm/v1/worker/gpu_worker.py, vllm/device_allocator/cumem.py
Until: vLLM can be told which allocations sleep.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import torch

from patchfastrl import memory
from patchfastrl.errors import StandbyError

from .replaced import replaced

OWN_WEIGHTS = "own weights"  # a tag, of the LoRA slot too; not vLLM's "weights", which level 1 would copy to the host


@contextlib.contextmanager
def weights_outside() -> Iterator[None]:
    """While an engine is built: what is allocated as "weights" comes from torch's ordinary allocator."""
    from vllm.v1.worker.gpu_worker import Worker

    def only_the_kv_cache(self: Any, tag: str) -> Any:
        return contextlib.nullcontext() if tag == "weights" else before(self, tag)

    with replaced(Worker, "_maybe_get_memory_pool_context", only_the_kv_cache) as before:
        yield


def usable() -> bool:
    """Whether memory can come from vLLM's pool: not with expandable segments, where some releases refuse."""
    from vllm.device_allocator.cumem import cumem_available

    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return cumem_available and not any("expandable_segments:True" in os.environ.get(name, "") for name in names)


def pool() -> contextlib.AbstractContextManager[Any]:
    """What is allocated inside can be given back and taken again, at the same addresses; its contents are lost."""
    from vllm.device_allocator.cumem import CuMemAllocator

    return CuMemAllocator.get_instance().use_memory_pool(tag=OWN_WEIGHTS)


def leave() -> None:
    """What is in vLLM's pool now belongs to no engine any more: it is there to be freed, and nobody puts it to sleep.

    Tensors outlive their engine until the collector has been round, and torch keeps their memory a while longer. A
    later engine that sleeps would release it, and freeing what is released is an error, inherited by whoever wakes
    next. So: all of it is to be there (not asleep) when it is left.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    if (pool := CuMemAllocator.instance) is not None:
        left = pool.pointer_to_data.left if isinstance(pool.pointer_to_data, _Pieces) else {}
        pool.pointer_to_data = _Pieces(left | pool.pointer_to_data)


def forget_error() -> None:
    """Once vLLM's pool had too little memory it neither takes nor gives any, until it has raised that: as here."""
    from vllm.device_allocator.cumem import CuMemAllocator, create_and_map

    if CuMemAllocator.instance is not None:
        handle = ctypes.c_ulonglong()
        with contextlib.suppress(RuntimeError):  # to map nothing is an error, too
            create_and_map((torch.cuda.current_device(), 0, 0, ctypes.addressof(handle)))


class _Pieces(dict[int, Any]):
    """What vLLM knows of its pool, by addresses. What was left is found only by who frees it."""

    def __init__(self, left: dict[int, Any]) -> None:
        super().__init__()
        self.left = left

    def pop(self, address: int, *default: Any) -> Any:
        return super().pop(address) if address in self else self.left.pop(address, *default)


_allocators: list[Any] = []  # torch before 2.11 does not own what its pools free their memory with


def release_pools() -> None:
    """Torch keeps what was allocated in a pool as long as vLLM does: before 0.26, until the next engine has its own."""
    from vllm.device_allocator.cumem import CuMemAllocator

    if (pool := CuMemAllocator.instance) is not None:
        _allocators.extend(allocator for _, allocator in pool.allocator_and_pools.values())
        pool.allocator_and_pools.clear()


class Scratch:
    """What was allocated in `pool`, where no standby releases it. It is there to begin with."""

    def __init__(self) -> None:
        from vllm.device_allocator.cumem import CuMemAllocator

        pieces = CuMemAllocator.get_instance().pointer_to_data.values()
        self._handles = [piece.handle for piece in pieces if piece.tag == OWN_WEIGHTS]
        self._nbytes = sum(handle[1] for handle in self._handles)
        self.resident = True

    def take(self) -> None:
        """Raises StandbyError, with nothing taken, if the device has not enough left."""
        from vllm.device_allocator.cumem import create_and_map, unmap_and_release

        if self.resident:
            return
        memory.make_room(self._nbytes)
        free, _ = torch.cuda.mem_get_info()
        if free < self._nbytes:
            raise StandbyError(
                f"The engine's own weights need {memory.gib(self._nbytes)} while a batch is sampled, "
                f"and {memory.gib(free)} are left. Lower vllm_gpu_memory_utilization, set UNSLOTH_VLLM_STANDBY=1, or "
                "use PatchFastRL(rollouts='adapter')."
            )
        with contextlib.ExitStack() as undo:
            for handle in self._handles:
                create_and_map(handle)
                undo.callback(unmap_and_release, handle)
            undo.pop_all()
        self.resident = True

    def release(self) -> None:
        from vllm.device_allocator.cumem import unmap_and_release

        torch.cuda.synchronize()  # vLLM computes a step ahead
        self.resident = False
        for handle in self._handles:
            unmap_and_release(handle)
