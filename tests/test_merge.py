"""`home = weight + scaling * B A`, rounded once: by torch, and on a GPU by the kernel."""

from __future__ import annotations

import pytest
import torch

from patchfastrl.merge import MAX_RANK, Merge, merge_all

HALF, FLOAT = torch.bfloat16, torch.float32
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def made(size: tuple[int, int], rank: int, dtype: torch.dtype, adapter: torch.dtype, device: str) -> Merge:
    generator = torch.Generator().manual_seed(rank)
    weight = torch.randn(size, generator=generator)
    a, b = torch.randn(rank, size[1], generator=generator), torch.randn(size[0], rank, generator=generator)
    home = torch.full(size, torch.nan, dtype=dtype, device=device)
    return Merge(home, weight.to(device, dtype), a.to(device, adapter), b.to(device, adapter), 0.25)


def expected(merge: Merge) -> torch.Tensor:
    """In float64, of the adapter in the weight's dtype."""
    a, b = (t.to(merge.weight.dtype).double() for t in (merge.a, merge.b))
    product = b @ a
    return merge.weight.double() + merge.scaling * (product.T if merge.transposed else product)


def assert_rounded(merge: Merge, right: torch.Tensor) -> None:
    """In half precision it is nearly always the nearest number: two roundings would be off far more often."""
    if merge.home.dtype == HALF:
        assert (merge.home != right.to(HALF)).float().mean() < 0.01
    off = (merge.home.double() - right).abs()
    assert (off <= (1e-5 if merge.home.dtype == FLOAT else torch.finfo(HALF).eps * right.abs().clamp(min=1))).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "adapter"), [(HALF, FLOAT), (HALF, HALF), (FLOAT, FLOAT)])
def test_several_of_different_sizes_and_ranks(dtype: torch.dtype, adapter: torch.dtype, device: str) -> None:
    sizes = [((96, 64), 8), ((1100, 300), 5), ((33, 700), MAX_RANK), ((640, 128), 1), ((64, 64), MAX_RANK + 1)]
    merges = [made(size, rank, dtype, adapter, device) for size, rank in sizes]
    assert [m.plain for m in merges] == [device == "cuda"] * 4 + [False]
    before = [(m.weight.clone(), m.a.clone(), m.b.clone()) for m in merges]
    merge_all(iter(merges))
    for merge, kept in zip(merges, before, strict=True):
        assert all(torch.equal(t, k) for t, k in zip((merge.weight, merge.a, merge.b), kept, strict=True))
        assert_rounded(merge, expected(merge))


@pytest.mark.parametrize("device", DEVICES)
def test_in_place(device: str) -> None:
    one = made((700, 260), 16, HALF, FLOAT, device)
    merge = Merge(one.weight, one.weight, one.a, one.b, one.scaling)
    right = expected(merge)
    merge_all([merge])
    assert_rounded(merge, right)


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernel_leaves_to_torch(device: str) -> None:
    one = made((60, 90), 4, HALF, FLOAT, device)
    stored_otherwise = Merge(one.home.T.contiguous(), one.weight.T.contiguous(), one.a, one.b, 0.25, transposed=True)
    float32 = made((60, 90), 4, FLOAT, FLOAT, device)
    cast = Merge(one.home, float32.weight, float32.a, float32.b, 0.25)
    assert not stored_otherwise.plain
    assert not cast.plain
    merge_all([stored_otherwise, cast])
    assert_rounded(stored_otherwise, expected(stored_otherwise))
    assert_rounded(cast, expected(cast))
