"""The kernel of `checksum` on a GPU. A module of its own: Triton is there with PyTorch's CUDA builds only."""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl

_BLOCK = 1024
_ROUNDS = 32  # blocks that one program sums up before it adds to the total
_CHUNK = _BLOCK * _ROUNDS


@triton.jit
def _kernel(table, totals, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = table + tl.program_id(0).to(tl.int64) * 5
    words = tl.load(row).to(tl.pointer_type(tl.int64))
    n, first, owner, bits = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    found = tl.zeros((BLOCK,), dtype=tl.int64)
    for turn in tl.range(ROUNDS, num_stages=2):
        place = turn * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words + place, mask=place < n, other=0)
        number = first + place
        factor = (number * 0x5851F42D4C957F2D) ^ (number >> 7)
        found += word * (factor * 2 + 1)
    # Of a last word that is not whole, the bytes that are the place's. (Memory comes in larger pieces.)
    word = tl.load(words + n, mask=bits != 0, other=0) & bits
    number = first + n
    factor = (number * 0x5851F42D4C957F2D) ^ (number >> 7)
    total = tl.sum(found, axis=0) + word * (factor * 2 + 1)
    tl.atomic_add(totals + owner, total)


@functools.lru_cache(maxsize=8)
def tables(device: torch.device, places: tuple[tuple[int, int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row for each chunk of each place: address, words, number of its first word, whose it is, bits after these.

    Args:
        places: address and bytes of each.

    Returns:
        The rows, (chunks, 5), and the bytes of each place, (places,), int64, on the device.
    """
    addresses, sizes = np.array(places, dtype=np.int64).T
    words = sizes // 8
    chunks = np.maximum(-(-words // _CHUNK), 1)
    owner = np.repeat(np.arange(len(places)), chunks)
    first = (np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * _CHUNK
    lengths = np.minimum(words[owner] - first, _CHUNK)
    rest = np.where(first + lengths == words[owner], sizes[owner] % 8, 0)
    rows = np.stack([addresses[owner] + 8 * first, lengths, first, owner, (1 << 8 * rest) - 1], axis=1)
    return torch.from_numpy(rows).to(device), torch.from_numpy(sizes.copy()).to(device)


def weighted_sums(places: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """For each place the sum of its 8-byte words, each times an odd number, int64.

    One pass at the speed of the memory. The number is that of the word's place, so a change of one word always changes
    the sum: odd factors can be undone modulo 2**64.

    Args:
        places: address, a multiple of 8, and bytes of each; at least one; all on `device`.
    """
    table, sizes = tables(device, places)
    totals = sizes.clone()
    _kernel[(len(table),)](table, totals, BLOCK=_BLOCK, ROUNDS=_ROUNDS)
    return totals
