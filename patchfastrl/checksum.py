"""Numbers that stand for the values of many tensors: equal before and after means that nobody wrote to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Changes when any byte of the tensors' storages does, or when they change places."""
    return hash(tuple(digests(tensors).tolist()))


@torch.no_grad()
def digests(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A number for each storage of the tensors, in their order: shape (storages,), int64, on their device.

    On a GPU nothing waits for it.
    """
    storages = {storage._cdata: storage for storage in map(torch.Tensor.untyped_storage, tensors)}.values()
    if not storages:
        return torch.zeros(0, dtype=torch.int64)
    if all(storage.is_cuda for storage in storages):
        from ._checksum_kernel import weighted_sums

        places = [(storage.data_ptr(), storage.nbytes()) for storage in storages]
        return weighted_sums(places, next(iter(storages)).device)
    return torch.stack([_digest(_bytes_of(storage)) for storage in storages])


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """All of the storage, uint8, on its device."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),))


def _digest(data: torch.Tensor, width: int = 4096) -> torch.Tensor:
    """A 0-dimensional int64 from all bytes, their places and their number.

    Sums of 8-byte words (of narrower integers they are 20 times slower on a CPU) along rows and along columns, each
    weighted by its number: a change that leaves all of them alone is not one that training makes.
    """
    words, tail = data[: data.numel() // 8 * 8].view(torch.int64), data[data.numel() // 8 * 8 :]
    table = words[: words.numel() // width * width].view(-1, width)
    parts = torch.cat([table.sum(0), table.sum(1), words[table.numel() :], tail.long()])
    return (parts * torch.arange(1, 2 * parts.numel(), 2, device=data.device)).sum() + data.numel()
