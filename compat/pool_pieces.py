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
import ctypes
import dataclasses
import gc
from collections.abc import Collection, Iterator
from typing import Any

import torch

from .pieces import Span, divided
from .replaced import replaced


class PoolPieces:
    """Those of vLLM's pool, by address. Nothing may be freed inside of `only`."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}  # block, in a part of a tensor
        self._wholes: dict[int, tuple[Any, list[int]]] = {}  # vLLM's piece, and the addresses of its parts
        self._handles: list[ctypes.c_ulonglong] = []  # the driver's, of the parts

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

    def first_block(self, piece: int) -> int:
        return self._first.get(piece, 0)

    def divide(self, caches: list[torch.Tensor], blocks: int) -> bool:
        """Make pieces of these tensors, each the KV cache of a layer: the first sixteenth, then always as much again.

        False, and nothing is done, where blocks do not follow each other, and with 8 bits a value: vLLM writes zeros
        into all of such a cache when it wakes.
        """
        from vllm.device_allocator.cumem import CuMemAllocator, create_and_map, libcudart, unmap_and_release

        if (pool := CuMemAllocator.instance) is None:
            return False
        rows: dict[int, set[Span]] = {}
        for cache in caches:
            storage, span = cache.untyped_storage(), cache.stride(0) * cache.shape[0] * cache.itemsize
            start = cache.data_ptr() if span == cache.nbytes else storage.data_ptr()  # of one layer, or of all together
            inside = [a for a, p in pool.pointer_to_data.items() if a <= start and start + span <= a + p.handle[1]]
            in_a_row = span in (cache.nbytes, storage.nbytes()) and cache.shape[0] % blocks == 0
            if not inside or not in_a_row or cache.itemsize == 1:
                return False
            rows.setdefault(inside[0], set()).add((start - inside[0], start - inside[0] + span))
        if not all(isinstance(pool.pointer_to_data[address].handle[3], int) for address in rows):
            return False  # ROCm's are lists
        beside = _beside({cache.untyped_storage().data_ptr() for cache in caches})
        torch.cuda.synchronize()
        for address, where in rows.items():
            whole = pool.pointer_to_data.pop(address)
            device, size, _, _ = whole.handle
            others = [(a, b) for start, end in beside if 0 <= (a := start - address) < (b := end - address) <= size]
            kept = [torch.empty(end - start, dtype=torch.uint8) for start, end in others]
            for (start, end), copy in zip(others, kept, strict=True):
                libcudart.cudaMemcpy(copy.data_ptr(), address + start, end - start)
            unmap_and_release(whole.handle)
            self._wholes[address] = whole, []
            for (start, end), first in divided(size, where, others, blocks).items():
                self._handles.append(ctypes.c_ulonglong())
                handle = (device, end - start, address + start, ctypes.addressof(self._handles[-1]))
                create_and_map(handle)
                pool.pointer_to_data[address + start] = dataclasses.replace(whole, handle=handle)
                self._first[address + start] = first
                self._wholes[address][1].append(address + start)
            for (start, end), copy in zip(others, kept, strict=True):
                libcudart.cudaMemcpy(address + start, copy.data_ptr(), end - start)
        return True

    def join(self) -> None:
        from vllm.device_allocator.cumem import CuMemAllocator, create_and_map, unmap_and_release

        pool = CuMemAllocator.instance
        if self._wholes:
            torch.cuda.synchronize()
        while self._wholes and pool is not None:
            address, (whole, parts) = self._wholes.popitem()
            for part in parts:
                unmap_and_release(pool.pointer_to_data.pop(part).handle)
            create_and_map(whole.handle)
            pool.pointer_to_data[address] = whole
        self._first.clear()
        self._handles.clear()


def _beside(ours: set[int]) -> list[Span]:
    """Where torch has something else, by addresses, in segments in which something of ours lies."""
    found = []
    for segment in torch.cuda.memory_snapshot():
        start, spans = segment["address"], []
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                spans.append((start, start + block["size"]))
            start += block["size"]
        if any(first in ours for first, _ in spans):
            found += [span for span in spans if span[0] not in ours]
    return found


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
