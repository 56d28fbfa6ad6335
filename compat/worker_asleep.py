"""Know what of a worker's memory sleeps, whoever put it to sleep; release and take it once, and nothing else.

Requirement: vLLM, all releases so far; from 0.30 on its pool itself skips what is awake, or asleep, already.
Reason: the engine knows only of its own calls. Sampling into unmapped memory kills the process on a GPU; mapping memory
twice, or part of it, is an error that vLLM's allocator does not recover from; and our tag would stay asleep.
Link: vllm/v1/worker/gpu_worker.py, vllm/device_allocator/cumem.py
Until: vLLM's worker can be asked what sleeps, refuses to wake where there is no room, and leaves torch's memory alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from patchfastrl import memory
from patchfastrl.errors import StandbyError

from . import cuda_weight_pool
from .pieces import Parts, Pieces
from .pool_pieces import nothing_else

_TAGS = frozenset(("kv_cache", cuda_weight_pool.OWN_WEIGHTS))


class Asleep:
    """What of a worker's memory is released, whoever put it to sleep and woke it: past the engine, too.

    Whoever wakes only the KV cache wakes our tag as well; and no adapter is loaded while that sleeps. Nothing is
    released or mapped twice, which CUDA refuses, and releases before 0.30 would do. Memory that training does not lack
    may stay (`releasing`); what was in it counts as lost all the same. Of the KV cache what `parts.blocks` wants wakes.

    Attributes:
        able: whether it was built to sleep.
        parts: what it is that is released, and taken.
        releases: how often the contents were lost.
    """

    def __init__(self, worker: Any, able: bool, pieces: Pieces) -> None:
        self.able = able
        self.parts = Parts(pieces)
        self._sleep, self._wake_up = worker.sleep, worker.wake_up
        self._asked: tuple[Any, Any] = ((), {})  # how it was put to sleep
        self._tags: set[str] = set()
        self._nbytes: int | None = None  # to release when it falls asleep; None: all
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

    @contextlib.contextmanager
    def releasing(self, nbytes: int | None) -> Iterator[None]:
        """Falling asleep inside the block releases only so many bytes; None: all."""
        self._nbytes = nbytes
        try:
            yield
        finally:
            self._nbytes = None

    def release(self, *args: Any, **kwargs: Any) -> None:
        self.need_standby()
        if self.resident:
            self._tags.update(_TAGS)
            self.releases += 1
            self._asked = args, kwargs
        self.give_back(self._nbytes)

    def give_back(self, nbytes: int | None = None) -> bool:
        """Release what has stayed of a worker that sleeps, or as much as makes up `nbytes`. Returns whether it did."""
        if not (going := self.parts.choose(self._tags, nbytes)):
            return False
        args, kwargs = self._asked
        with nothing_else(), self.parts.pieces.only(going):
            try:
                self._sleep(*args, **kwargs)
            except AssertionError as error:  # of vLLM: others took more of the GPU meanwhile than was released
                if "Memory usage increased" not in str(error):
                    raise
        memory.make_room(0)  # whether torch gives back what it keeps goes by the rule for waking
        return True

    def take(self, tags: list[str] | None = None) -> None:
        """Raises StandbyError, with nothing taken, if the device has not enough left."""
        self._take((_TAGS if tags is None or "kv_cache" in tags else {*tags}) & self._tags)

    def extend(self) -> None:
        """Of the KV cache of an engine that is awake: as many blocks as are wanted now. Raises as `take` does."""
        if self.resident:
            memory.make_room(self.released())
            self._take(_TAGS)

    def take_all(self) -> None:
        """Before the end, what nobody wanted of the KV cache as well. Raises as `take` does."""
        blocks, self.parts.blocks = self.parts.blocks, None
        try:
            self._take(_TAGS)
        except StandbyError:
            self.parts.blocks = blocks
            raise
        self.parts.pieces.join()

    def _take(self, tags: Collection[str]) -> None:
        self.need_room(tags)
        if missing := self.parts.missing(tags):
            with nothing_else(), self.parts.pieces.only(missing):
                self._wake_up(sorted(tags))
            self.parts.back(missing)
        self._tags.difference_update(tags)
        if self.resident:
            self.parts.hand_out()

    def released(self, tags: Collection[str] = _TAGS) -> int:
        """Bytes that taking these tags takes from the device."""
        return sum(self.parts.missing(tags).values())

    def left_out(self) -> int:
        """Bytes of the KV cache that have no memory, or will have none, while the engine is awake."""
        return self.parts.nbytes() - self.released()

    def need_room(self, tags: Collection[str] = _TAGS) -> None:
        """Raises StandbyError if the device has not enough left to take these tags."""
        needed, free = self.released(tags), self.parts.pieces.free()
        if free is not None and free < needed:
            memory.return_cached()
            free = self.parts.pieces.free()
        if free is not None and free < needed:
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
