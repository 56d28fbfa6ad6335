"""A worker's memory in pieces: which of them are released, and which an engine that wakes needs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection
from typing import Protocol

import torch

from .kv_blocks import Blocks

GRANULE = 2 << 20  # bytes: what a GPU maps at once

Span = tuple[int, int]  # from one byte to another


def divided(size: int, rows: Collection[Span], others: Collection[Span], blocks: int) -> dict[Span, int]:
    """How to divide a piece of so many bytes in which blocks lie, and the first block of each part.

    A row of blocks is cut behind its first sixteenth, and whenever as much again has come. What others have is part of
    what is always needed.

    Args:
        rows: where `blocks` blocks follow each other.
        others: where something else lies.
    """

    def first(start: int, end: int) -> int:
        if any(a < end and start < b for a, b in others):
            return 0
        return min((max(start - a, 0) * blocks // (b - a) for a, b in rows if a < end and start < b), default=0)

    cuts = {0, size}
    for start, end in rows:
        cuts |= {min(-(-(start + ((end - start) >> half)) // GRANULE) * GRANULE, size) for half in range(1, 5)}
        edge = end // GRANULE * GRANULE
        if edge < size and first(edge, edge + GRANULE) == 0:  # another row begins there, or others have the rest
            cuts |= {edge, edge + GRANULE}
    ends = sorted(cuts)
    return {span: first(*span) for span in itertools.pairwise(ends)}


class Pieces(Protocol):
    """What standby can release of a worker's memory, in pieces. `cpu_standby.Storages` is the same for a CPU."""

    def sizes(self) -> dict[int, tuple[str, int]]:
        """Of each piece, there or released: its tag and bytes."""

    def only(self, chosen: Collection[int]) -> contextlib.AbstractContextManager[None]:
        """Inside the block the worker's own `sleep` and `wake_up` know only of these."""

    def free(self) -> int | None:
        """Bytes that the device has left; None: it is not asked."""

    def divide(self, caches: list[torch.Tensor], blocks: int) -> bool:
        """Make pieces of these tensors, the KV cache with so many blocks. False, and nothing is done, if it cannot."""

    def first_block(self, piece: int) -> int:
        """Of the KV cache, in a piece of it: without that block, and those after it, the piece is not needed."""

    def join(self) -> None:
        """Before any of it is freed. All pieces must be there."""


class Parts:
    """Which pieces of a worker's memory are released.

    Attributes:
        pieces: all of them.
        blocks: of the KV cache, that vLLM hands out; None: all of them.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.blocks: Blocks | None = None
        self._released: set[int] = set()

    def choose(self, tags: Collection[str], nbytes: int | None) -> set[int]:
        """Of what is there, what makes up `nbytes` (None: all of it), which counts as released from now on.

        The KV cache first, from its end: what is woken before it is there sooner.
        """
        going, left = set(), nbytes
        first = self.pieces.first_block
        order = sorted(self.pieces.sizes().items(), key=lambda item: (item[1][0] != "kv_cache", -first(item[0])))
        for piece, (tag, size) in order:
            if tag in tags and piece not in self._released and (left is None or left > 0):
                going.add(piece)
                left = None if left is None else left - size
        self._released |= going
        return going

    def missing(self, tags: Collection[str]) -> dict[int, int]:
        """What is released of what is needed, and its bytes."""
        wanted, first = None if self.blocks is None else self.blocks.wanted, self.pieces.first_block
        return {
            piece: size
            for piece, (tag, size) in self.pieces.sizes().items()
            if tag in tags and piece in self._released and (wanted is None or first(piece) < wanted)
        }

    def back(self, pieces: Collection[int]) -> None:
        """These are there again."""
        self._released.difference_update(pieces)

    def hand_out(self) -> None:
        """vLLM may use the KV cache up to the first block that is not there."""
        if self.blocks is not None:
            absent = [first for piece in self._released if (first := self.pieces.first_block(piece))]
            self.blocks.hand_out(min([self.blocks.all, *absent]))

    def nbytes(self) -> int:
        """Of all that is released, needed or not."""
        return sum(size for piece, (_, size) in self.pieces.sizes().items() if piece in self._released)
