"""The kernel of `checksum` on a GPU. A module of its own: Triton is there with PyTorch's CUDA builds only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_ROUNDS = 32  # blocks that one program sums up before it adds to the total


@triton.jit
def _kernel(words, total, n, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * BLOCK * ROUNDS
    found = tl.zeros((BLOCK,), dtype=tl.int64)
    for turn in range(ROUNDS):
        place = first + turn * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words + place, mask=place < n, other=0)
        factor = (place * 0x5851F42D4C957F2D) ^ (place >> 7)
        found += word * (factor * 2 + 1)
    tl.atomic_add(total, tl.sum(found, axis=0))


def weighted_sum(words: torch.Tensor, total: torch.Tensor) -> None:
    """Add to `total` (a number, int64) each of `words` (1-dimensional, int64) times the odd number of its place."""
    n = words.numel()
    _kernel[(triton.cdiv(n, _BLOCK * _ROUNDS),)](words, total, n, BLOCK=_BLOCK, ROUNDS=_ROUNDS)
