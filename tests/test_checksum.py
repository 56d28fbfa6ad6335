"""Every byte counts, and its place."""

from __future__ import annotations

import pytest
import torch

from patchfastrl.checksum import checksum, digests

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
SIZES = (1, 4, 7, 8, 9, 4096, 4099, 262144 + 5, 3 * 262144)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_a_change_of_any_byte_is_noticed_and_undone(size: int, device: str) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8).to(device)
    before = checksum([data])
    for place in sorted({0, size // 2, max(size - 9, 0), size - 1}):
        data[place] += 1
        assert checksum([data]) != before
        data[place] -= 1
        assert checksum([data]) == before


@pytest.mark.parametrize("device", DEVICES)
def test_what_lies_beyond_a_tensor_does_not_count(device: str) -> None:
    """And numbers of several tensors are those that each has alone."""
    tensors = [torch.arange(size, device=device).to(torch.uint8) for size in SIZES]
    together = digests(tensors)
    for number, tensor in enumerate(tensors):
        copy = torch.full((4 * tensor.numel() + 64,), 255, dtype=torch.uint8, device=device)
        del copy  # its memory is likely to be the next tensor's
        assert torch.equal(digests([tensor.clone()]), together[number : number + 1])


def test_two_that_change_places_and_nothing_at_all() -> None:
    one, two = torch.ones(8), torch.zeros(8)
    assert checksum([one, two]) != checksum([two, one])
    assert digests([one, one[:], one.view(2, 4)]).shape == (1,)
    assert digests([]).shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_storage(device: str) -> None:
    whole = torch.randint(0, 256, (96, 64), dtype=torch.uint8, device=device)
    part, columns, odd = whole[32:], whole[:, :8], whole.view(-1)[5:]
    before = digests([part, columns, odd])
    assert before.shape == (2,)  # of columns, and where no word begins, all of the storage
    assert torch.equal(before[:1], digests([part.clone()]))
    assert torch.equal(before[1:], digests([whole]))
    whole[31, 63] += 1
    assert (digests([part, columns, odd]) == before).tolist() == [True, False]
    whole[95, 63] += 1
    assert (digests([part, columns, odd]) == before).tolist() == [False, False]
