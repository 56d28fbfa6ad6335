"""Shared weights stay out of vLLM's sleep-mode memory pool; what the engine has for itself goes there.

Requirement: vLLM on CUDA, all releases that have `Worker._maybe_get_memory_pool_context`.
Reason: in the pool, sleep level 1 copies the trainer's weights to the host and level 2 discards them.
Link: vllm/v1/worker/gpu_worker.py, vllm/device_allocator/cumem.py
Until: vLLM can be told which allocations sleep.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
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


class Asleep:
    """What of a worker's memory is released, whoever put it to sleep and woke it: past the engine, too.

    Whoever wakes only the KV cache wakes our tag as well; and no adapter is loaded while that sleeps. What sleeps is
    not put to sleep again, and what is awake is not woken again: releases before 0.30 would release or map the memory
    a second time, which CUDA refuses.

    Args:
        able: whether there is anything that could sleep.

    Attributes:
        releases: how often the contents were lost.
    """

    def __init__(self, worker: Any, able: bool) -> None:
        self._able = able
        self._sleep, self._wake_up = worker.sleep, worker.wake_up
        self._tags: set[str] = set()
        self.releases = 0
        worker.sleep, worker.wake_up = self.release, self.take
        worker.add_lora, worker.pin_lora = self._refusing(worker.add_lora), self._refusing(worker.pin_lora)

    @property
    def resident(self) -> bool:
        return not self._tags

    def release(self, *args: Any, **kwargs: Any) -> None:
        if not self._able:
            raise StandbyError("This engine was built without standby. Set UNSLOTH_VLLM_STANDBY=1 before it is built.")
        if self.resident:
            self._tags.update(("kv_cache", OWN_WEIGHTS))
            self.releases += 1
            self._sleep(*args, **kwargs)

    def take(self, tags: list[str] | None = None) -> None:
        """Raises StandbyError, with nothing taken, if the device has not enough left."""
        wanted = {"kv_cache", OWN_WEIGHTS} if tags is None or "kv_cache" in tags else {*tags}
        if taking := sorted(wanted & self._tags):
            self.need_room(taking)
            self._wake_up(taking)
            self._tags.difference_update(taking)

    def need_room(self, tags: Collection[str] | None = None) -> None:
        """Raises StandbyError if the device has not enough left to take these tags; None: all that is released."""
        needed = nbytes(self._tags if tags is None else tags)
        if needed and torch.cuda.mem_get_info()[0] < needed:
            memory.return_cached()
        if needed and (free := torch.cuda.mem_get_info()[0]) < needed:
            raise StandbyError(
                f"Waking the engine takes {memory.gib(needed)} of the GPU, and {memory.gib(free)} are left. Free what "
                "else the script keeps there, and try again; or lower vllm_gpu_memory_utilization."
            )

    def _refusing(self, call: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if OWN_WEIGHTS in self._tags:
                raise StandbyError("The engine's LoRA slot is released (standby). Call wake_up() first.")
            return call(*args, **kwargs)

        return refuse


def nbytes(tags: Collection[str] | None = None) -> int:
    """Of what was allocated in vLLM's pool under these tags, or any, whether it is there or released."""
    from vllm.device_allocator.cumem import CuMemAllocator

    pieces = () if CuMemAllocator.instance is None else CuMemAllocator.instance.pointer_to_data.values()
    return sum(piece.handle[1] for piece in pieces if tags is None or piece.tag in tags)


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
