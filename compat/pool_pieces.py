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

from .replaced import replaced

_GRANULE = 2 << 20  # bytes: what a GPU maps at once


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
        segments = {s["address"]: s["blocks"] for s in torch.cuda.memory_snapshot()}
        found = {t.untyped_storage().data_ptr(): t for t in caches}
        for address, tensor in found.items():
            piece = pool.pointer_to_data.get(address)
            nbytes = tensor.untyped_storage().nbytes()
            in_a_row = tensor.shape[0] % blocks == 0 and tensor.stride(0) * tensor.itemsize * tensor.shape[0] == nbytes
            known = piece is not None and isinstance(piece.handle[3], int)  # a list on ROCm
            if not known or not in_a_row or tensor.itemsize == 1:
                return False
        torch.cuda.synchronize()
        for address, tensor in found.items():
            whole = pool.pointer_to_data.pop(address)
            device, size, _, _ = whole.handle
            nbytes = tensor.untyped_storage().nbytes()
            shared = sum(block["state"] != "inactive" for block in segments[address]) > 1
            tail = nbytes // _GRANULE * _GRANULE if shared else size  # from there on something else lies there, too
            kept = torch.empty(size - tail, dtype=torch.uint8)
            libcudart.cudaMemcpy(kept.data_ptr(), address + tail, size - tail)
            unmap_and_release(whole.handle)
            ends = sorted({min(-(-(size >> half) // _GRANULE) * _GRANULE, tail) for half in range(5)} | {size})
            for start, end in zip([0, *ends], ends, strict=False):
                self._handles.append(ctypes.c_ulonglong())
                handle = (device, end - start, address + start, ctypes.addressof(self._handles[-1]))
                create_and_map(handle)
                pool.pointer_to_data[address + start] = dataclasses.replace(whole, handle=handle)
                self._first[address + start] = 0 if start == tail else start * blocks // nbytes
                self._wholes.setdefault(address, (whole, []))[1].append(address + start)
            libcudart.cudaMemcpy(address + tail, kept.data_ptr(), size - tail)
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
