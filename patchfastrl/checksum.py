"""A number that stands for the values of many tensors: equal before and after means that nobody wrote to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .trace import storage_key

_SMALL = 16 * 2**20  # bytes


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Changes when any byte of the tensors' storages does, or when they change places."""
    storages = {storage_key(t): _bytes_of(t) for t in tensors}
    digests = [_digest_on_gpu(data) if data.is_cuda else _digest(data) for data in _together(storages.values())]
    values = torch.stack(digests).tolist() if digests else []
    return hash((*(s.numel() for s in storages.values()), *values))


def _together(storages: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """On a GPU, small storages one behind the other, up to `_SMALL` bytes at a time: an adapter has hundreds."""
    waiting: list[torch.Tensor] = []
    for data in storages:
        if waiting and sum(map(torch.numel, waiting)) + data.numel() > _SMALL:
            yield torch.cat(waiting)
            waiting = []
        if data.numel() > _SMALL or not data.is_cuda:
            yield data
        else:
            waiting.append(_padded(data))
    if waiting:
        yield torch.cat(waiting)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of the tensor's storage, uint8, on its device."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),))


def _padded(data: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(data, (0, -data.numel() % 8)) if data.numel() % 8 else data


def _digest(data: torch.Tensor, width: int = 4096) -> torch.Tensor:
    """A 0-dimensional int64 from all bytes and their places.

    Sums of 8-byte words (of narrower integers they are 20 times slower on a CPU) along rows and along columns, each
    weighted by its number: a change that leaves all of them alone is not one that training makes.
    """
    words, tail = data[: data.numel() // 8 * 8].view(torch.int64), data[data.numel() // 8 * 8 :]
    table = words[: words.numel() // width * width].view(-1, width)
    parts = torch.cat([table.sum(0), table.sum(1), words[table.numel() :], tail.long()])
    return (parts * torch.arange(1, 2 * parts.numel(), 2, device=data.device)).sum()


def _digest_on_gpu(data: torch.Tensor) -> torch.Tensor:
    """The same in one pass at the speed of the memory: each word times an odd number of its own, summed.

    A change of one word always changes the sum, because odd factors can be undone modulo 2**64.
    """
    from ._checksum_kernel import weighted_sum

    data = _padded(data)
    sum_: Any = torch.zeros((), dtype=torch.int64, device=data.device)
    weighted_sum(data.view(torch.int64), sum_)
    return sum_
