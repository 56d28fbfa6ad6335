"""The kernel of `merge` on a GPU. A module of its own: Triton is there with PyTorch's CUDA builds only."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .merge import Merge

# A tile has _ROWS x _COLUMNS elements; one program does _TILES of them, one below the other. (On an H200: 10.8 ms for
# the 8B shape, where a plain copy takes 9.9.)
_ROWS, _COLUMNS, _TILES = 32, 128, 16


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    merges, scalings, programs, weight_like, adapter_like,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    program = programs + tl.program_id(0).to(tl.int64) * 3
    number = tl.load(program)
    merge = merges + number.to(tl.int64) * 7
    home = tl.load(merge).to(tl.pointer_type(weight_like.dtype.element_ty))
    weight = tl.load(merge + 1).to(tl.pointer_type(weight_like.dtype.element_ty))
    a = tl.load(merge + 2).to(tl.pointer_type(adapter_like.dtype.element_ty))
    b = tl.load(merge + 3).to(tl.pointer_type(adapter_like.dtype.element_ty))
    out, inner, rank = tl.load(merge + 4), tl.load(merge + 5), tl.load(merge + 6)
    scaling = tl.load(scalings + number)
    first = tl.load(program + 1).to(tl.int64)
    column = (tl.load(program + 2).to(tl.int64) + tl.arange(0, COLUMNS))[None, :]
    k = tl.arange(0, RANK)
    right = tl.load(a + k[:, None] * inner + column, mask=(k[:, None] < rank) & (column < inner), other=0.0)
    right = right.to(weight_like.dtype.element_ty)
    for tile in tl.range(0, TILES, num_stages=3):
        row = (first + tile * ROWS + tl.arange(0, ROWS))[:, None]
        place = row * inner + column
        inside = (row < out) & (column < inner)
        values = tl.load(weight + place, mask=inside, other=0.0)
        left = tl.load(b + row * rank + k[None, :], mask=(row < out) & (k[None, :] < rank), other=0.0)
        product = tl.dot(left.to(values.dtype), right, input_precision="ieee")
        tl.store(home + place, (values.to(tl.float32) + scaling * product).to(values.dtype), mask=inside)


def merge_all(merges: list[Merge]) -> None:
    """Carry out merges that are `plain`: one pass over the weights, one launch for all of one dtype."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[Merge]] = {}
    for merge in merges:
        groups.setdefault((merge.weight.dtype, merge.a.dtype), []).append(merge)
    for group in groups.values():
        one = group[0]
        places = tuple(
            (m.home.data_ptr(), m.weight.data_ptr(), m.a.data_ptr(), m.b.data_ptr(), *m.weight.shape, m.a.shape[0])
            for m in group
        )
        table, programs = tables(one.home.device, places)
        scalings = torch.tensor([m.scaling for m in group], dtype=torch.float32).to(one.home.device, non_blocking=True)
        rank = max(16, triton.next_power_of_2(max(m.a.shape[0] for m in group)))
        sizes = {"RANK": rank, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "TILES": _TILES}
        _kernel[(len(programs),)](table, scalings, programs, one.weight, one.a, **sizes)


@functools.lru_cache(maxsize=4)
def tables(device: torch.device, places: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Addresses and sizes of each merge, (merges, 7), int64; number, first row and column of each program, int32."""
    programs = []
    for number, (*_, out, inner, _rank) in enumerate(places):
        first = torch.cartesian_prod(torch.arange(0, out, _ROWS * _TILES), torch.arange(0, inner, _COLUMNS)).int()
        programs.append(torch.cat([torch.full((len(first), 1), number, dtype=torch.int32), first], dim=1))
    return torch.tensor(places, dtype=torch.int64).to(device), torch.cat(programs).to(device)
