"""An adapter merged into a copy of the weights that it changes: `home = weight + scaling * B A`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

MAX_RANK = 128  # of the kernel: its tiles have to fit into a multiprocessor's shared memory


class Merge(NamedTuple):
    """One weight. All tensors are on one device.

    Attributes:
        home: (out, in), where the sum goes. weight: (out, in), only read; it may be `home`.
        a: lora_A, (rank, in). b: lora_B, (out, rank). Live, in their own dtype.
        transposed: the weight is stored the other way round, (in, out), as transformers' Conv1D does.
    """

    home: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool = False

    @property
    def plain(self) -> bool:
        """Whether the kernel can do it: on a GPU, row by row, a rank that fits, no change of the weight's dtype."""
        home, weight, a, b, _, transposed = self
        return (
            home.is_cuda
            and not transposed
            and a.shape[0] <= MAX_RANK
            and home.dtype == weight.dtype
            and a.dtype == b.dtype
            and home.is_contiguous()
            and weight.is_contiguous()
            and a.is_contiguous()
            and b.is_contiguous()
        )


@torch.no_grad()
def merge_all(merges: Iterable[Merge]) -> None:
    """Carry the merges out, queued on a GPU: the adapter in the weight's dtype, sums in float32, one rounding.

    The plain ones come last, together; the others as they are asked for, so that their weight can be temporary.
    """
    by_kernel = []
    for merge in merges:
        if merge.plain:
            by_kernel.append(merge)
        else:
            _merge(merge)
    if by_kernel:
        from . import _merge_kernel

        _merge_kernel.merge_all(by_kernel)


def _merge(merge: Merge) -> None:
    a, b = (t.to(merge.weight.dtype) for t in (merge.a, merge.b))
    if merge.transposed:
        a, b = b.T, a.T
    if merge.weight.dtype == merge.home.dtype:
        torch.addmm(merge.weight, b, a, alpha=merge.scaling, out=merge.home)
    else:
        merge.home.copy_(torch.addmm(merge.weight, b, a, alpha=merge.scaling))
