"""Shared weights stay out of vLLM's sleep-mode memory pool; what the engine has for itself goes there.

Requirement: vLLM on CUDA, all releases that have `Worker._maybe_get_memory_pool_context`.
Reason: in the pool, sleep level 1 copies the trainer's weights to the host and level 2 discards them.
Link: vllm/v1/worker/gpu_worker.py, vllm/device_allocator/cumem.py
Until: vLLM can be told which allocations sleep.
"""

from __future__ import annotations

import contextlib
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


def wake_with_the_cache(worker: Any) -> None:
    """Whoever wakes only the KV cache of this worker wakes our tag too; and no adapter is loaded while that sleeps.

    What sleeps is not put to sleep again, and what is awake is not woken again: releases before 0.30 would release or
    map the memory a second time, which CUDA refuses.
    """
    sleep, wake_up = worker.sleep, worker.wake_up
    asleep: set[str] = set()

    def asleep_once(*args: Any, **kwargs: Any) -> None:
        if not asleep:
            asleep.update(("kv_cache", OWN_WEIGHTS))
            sleep(*args, **kwargs)

    def woken_once(tags: list[str] | None = None) -> None:
        wanted = {"kv_cache", OWN_WEIGHTS} if tags is None or "kv_cache" in tags else {*tags}
        if waking := sorted(wanted & asleep):
            wake_up(waking)
            asleep.difference_update(waking)

    def refusing(call: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if OWN_WEIGHTS in asleep:
                raise StandbyError("The engine's LoRA slot is released (standby). Call wake_up() first.")
            return call(*args, **kwargs)

        return refuse

    worker.sleep, worker.wake_up = asleep_once, woken_once
    worker.add_lora, worker.pin_lora = refusing(worker.add_lora), refusing(worker.pin_lora)


def nbytes() -> int:
    """Of all that was allocated in vLLM's pool, whether it is there or released."""
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    return 0 if allocator is None else sum(piece.handle[1] for piece in allocator.pointer_to_data.values())


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
