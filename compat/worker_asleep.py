"""Know what of a worker's memory sleeps, whoever put it to sleep; release and take it once, and nothing else.

Requirement: vLLM, all releases so far; from 0.30 on its pool itself skips what is awake, or asleep, already.
Reason: the engine knows only of its own calls. Sampling into unmapped memory kills the process on a GPU; mapping memory
twice, or part of it, is an error that vLLM's allocator does not recover from; and our tag would stay asleep. And with
the memory, torch's own would go, which a training step then takes anew (some 2 ms a GiB), and Python's collector would
run, 0.7 s for all that TRL and vLLM import.
Link: vllm/v1/worker/gpu_worker.py, vllm/device_allocator/cumem.py
Until: vLLM's worker can be asked what sleeps, refuses to wake where there is no room, and leaves torch's memory alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from patchfastrl import memory
from patchfastrl.errors import StandbyError

from . import cuda_weight_pool
from .replaced import replaced


class Asleep:
    """What of a worker's memory is released, whoever put it to sleep and woke it: past the engine, too.

    Whoever wakes only the KV cache wakes our tag as well; and no adapter is loaded while that sleeps. What sleeps is
    not put to sleep again, and what is awake is not woken again: releases before 0.30 would release or map the memory
    a second time, which CUDA refuses.

    Memory that nobody needs may stay where it is (`stays`). What was in it counts as lost all the same.

    Args:
        able: whether it was built to sleep.

    Attributes:
        able: the same.
        stays: the memory stays when the worker falls asleep next, until `give_back`.
        releases: how often the contents were lost.
    """

    def __init__(self, worker: Any, able: bool) -> None:
        self.able = able
        self._sleep, self._wake_up = worker.sleep, worker.wake_up
        self._tags: set[str] = set()
        self._put_off: Callable[[], Any] | None = None  # what would release the memory that has stayed
        self.stays = False
        self.releases = 0
        worker.sleep, worker.wake_up = self.release, self.take
        worker.add_lora, worker.pin_lora = self._refusing(worker.add_lora), self._refusing(worker.pin_lora)

    @property
    def resident(self) -> bool:
        return not self._tags

    def need_standby(self) -> None:
        """Raises StandbyError if the worker was not built to sleep."""
        if not self.able:
            raise StandbyError("This engine was built without standby. Set UNSLOTH_VLLM_STANDBY=1 before it is built.")

    def release(self, *args: Any, **kwargs: Any) -> None:
        self.need_standby()
        stays, self.stays = self.stays, False
        if self.resident:
            self._tags.update(("kv_cache", cuda_weight_pool.OWN_WEIGHTS))
            self.releases += 1
            self._put_off = functools.partial(self._sleep, *args, **kwargs)
        if not stays:
            self.give_back()

    def give_back(self) -> bool:
        """Release memory that has stayed. Returns whether there was any."""
        if self._put_off is None:
            return False
        release, self._put_off = self._put_off, None
        with _nothing_else():
            release()
        memory.make_room(0)  # whether torch gives back what it keeps goes by the rule for waking
        return True

    def take(self, tags: list[str] | None = None) -> None:
        """Raises StandbyError, with nothing taken, if the device has not enough left."""
        wanted = {"kv_cache", cuda_weight_pool.OWN_WEIGHTS} if tags is None or "kv_cache" in tags else {*tags}
        taking = sorted(wanted & self._tags)
        if taking and self._put_off is not None:
            self._put_off = None
            self._tags.clear()  # all of it is there
        elif taking:
            self.need_room(taking)
            with _nothing_else():
                self._wake_up(taking)
            self._tags.difference_update(taking)

    def released(self, tags: Collection[str] | None = None) -> int:
        """Bytes that taking these tags takes from the device; None: all."""
        return 0 if self._put_off is not None else cuda_weight_pool.nbytes(self._tags if tags is None else tags)

    def need_room(self, tags: Collection[str] | None = None) -> None:
        """Raises StandbyError if the device has not enough left to take these tags; None: all that is released."""
        needed = self.released(tags)
        if needed and torch.cuda.mem_get_info()[0] < needed:
            memory.return_cached()
        if needed and (free := torch.cuda.mem_get_info()[0]) < needed:
            raise StandbyError(
                f"Waking the engine takes {memory.gib(needed)} of the GPU, and {memory.gib(free)} are left. Free what "
                "else the script keeps there, and try again; or lower vllm_gpu_memory_utilization."
            )

    def _refusing(self, call: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if cuda_weight_pool.OWN_WEIGHTS in self._tags:
                raise StandbyError("The engine's LoRA slot is released (standby). Call wake_up() first.")
            return call(*args, **kwargs)

        return refuse


@contextlib.contextmanager
def _nothing_else() -> Iterator[None]:
    """Nothing is collected (what there is, is frozen), and torch keeps the memory that it has at hand."""
    with contextlib.ExitStack() as stack:
        for module in (torch.cuda, getattr(torch, "accelerator", None)):
            if hasattr(module, "empty_cache"):
                stack.enter_context(replaced(module, "empty_cache", lambda: None))
        stack.callback(gc.unfreeze)
        gc.freeze()
        yield
