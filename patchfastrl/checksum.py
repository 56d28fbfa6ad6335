"""Numbers that stand for the values of many tensors: equal before and after means that nobody wrote to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .trace import storage_key


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Changes when any byte of the tensors' storages does, or when they change places."""
    return hash(tuple(digests(tensors).tolist()))


@torch.no_grad()
def digests(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A number for each storage of the tensors, in their order: shape (storages,), int64, on their device.

    On a GPU nothing waits for it.
    """
    one_each = list({storage_key(t): t for t in tensors}.values())
    if one_each and all(t.is_cuda for t in one_each):
        from ._checksum_kernel import weighted_sums

        whole = [t if t.untyped_storage().nbytes() % 8 == 0 else _padded(_bytes_of(t)) for t in one_each]
        return weighted_sums([t.untyped_storage() for t in whole], one_each[0].device)
    return torch.stack([_digest(_bytes_of(t)) for t in one_each]) if one_each else torch.zeros(0, dtype=torch.int64)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of the tensor's storage, uint8, on its device."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),))


def _padded(data: torch.Tensor) -> torch.Tensor:
    """A copy with zeros up to a whole word."""
    return torch.nn.functional.pad(data, (0, -data.numel() % 8))


def _digest(data: torch.Tensor, width: int = 4096) -> torch.Tensor:
    """A 0-dimensional int64 from all bytes, their places and their number.

    Sums of 8-byte words (of narrower integers they are 20 times slower on a CPU) along rows and along columns, each
    weighted by its number: a change that leaves all of them alone is not one that training makes.
    """
    words, tail = data[: data.numel() // 8 * 8].view(torch.int64), data[data.numel() // 8 * 8 :]
    table = words[: words.numel() // width * width].view(-1, width)
    parts = torch.cat([table.sum(0), table.sum(1), words[table.numel() :], tail.long()])
    return (parts * torch.arange(1, 2 * parts.numel(), 2, device=data.device)).sum() + data.numel()
