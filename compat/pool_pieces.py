"""vLLM's `sleep` and `wake_up` for some pieces of its memory pool, not all.

Requirement: vLLM on a GPU, all releases so far.
Reason: its allocator releases and maps everything, some 4 ms a GiB, and a training step mostly lacks a part of it. And
with the memory torch's own would go, which a training step then takes anew (some 2 ms a GiB), and Python's collector
would run, 0.7 s for all that TRL and vLLM import.
Link: vllm/device_allocator/cumem.py
Until: vLLM can be told how much to release.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator
from typing import Protocol

import torch

from .replaced import replaced


class Pieces(Protocol):
    """What standby can release of a worker's memory, in pieces. `cpu_standby.Storages` is the same for a CPU."""

    def sizes(self) -> dict[int, tuple[str, int]]:
        """Of each piece, there or released: its tag and bytes."""

    def only(self, chosen: Collection[int]) -> contextlib.AbstractContextManager[None]:
        """Inside the block the worker's own `sleep` and `wake_up` know only of these."""

    def free(self) -> int | None:
        """Bytes that the device has left; None: it is not asked."""


class PoolPieces:
    """Those of vLLM's pool, by address. Nothing may be freed inside of `only`."""

    def sizes(self) -> dict[int, tuple[str, int]]:
        from vllm.device_allocator.cumem import CuMemAllocator

        pieces = {} if CuMemAllocator.instance is None else CuMemAllocator.instance.pointer_to_data
        return {address: (piece.tag, piece.handle[1]) for address, piece in pieces.items()}

    @contextlib.contextmanager
    def only(self, chosen: Collection[int]) -> Iterator[None]:
        from vllm.device_allocator.cumem import CuMemAllocator

        pool = CuMemAllocator.instance
        assert pool is not None
        everything = pool.pointer_to_data
        pool.pointer_to_data = {address: piece for address, piece in everything.items() if address in chosen}
        try:
            yield
        finally:
            pool.pointer_to_data = everything

    def free(self) -> int | None:
        return torch.cuda.mem_get_info()[0]


@contextlib.contextmanager
def nothing_else() -> Iterator[None]:
    """Nothing is collected (what there is, is frozen), and torch keeps the memory that it has at hand."""
    with contextlib.ExitStack() as stack:
        for module in (torch.cuda, getattr(torch, "accelerator", None)):
            if hasattr(module, "empty_cache"):
                stack.enter_context(replaced(module, "empty_cache", lambda: None))
        stack.callback(gc.unfreeze)
        gc.freeze()
        yield
