"""Numbers that stand for the values of many tensors: equal before and after means that nobody wrote to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Changes when any byte of the tensors does, or when they change places."""
    return hash(tuple(digests(tensors).tolist()))


@torch.no_grad()
def digests(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A number for each place in memory where tensors lie, in their order: shape (places,), int64, on their device.

    A tensor in one piece lies there, any other in all of its storage; tensors in the same place count once. On a GPU
    nothing waits for it, and few of Python's objects are touched: before each batch none is in the processor's cache.
    """
    places: dict[tuple[int, int], torch.Tensor] = {}
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' tensors have one, called for each attribute
        for tensor in tensors:
            place = tensor.data_ptr(), tensor.nbytes
            if place[0] % 8 or not tensor.is_contiguous():
                storage = tensor.untyped_storage()
                place = storage.data_ptr(), storage.nbytes()
            places[place] = tensor
        on_gpu = all(tensor.is_cuda for tensor in places.values())
    if not places:
        return torch.zeros(0, dtype=torch.int64)
    if on_gpu:
        from ._checksum_kernel import weighted_sums

        return weighted_sums(tuple(places), next(iter(places.values())).device)
    return torch.stack([_digest(_bytes_at(place, tensor)) for place, tensor in places.items()])


def _bytes_at(place: tuple[int, int], tensor: torch.Tensor) -> torch.Tensor:
    """A place in the tensor's storage as uint8, on its device."""
    storage, (address, nbytes) = tensor.untyped_storage(), place
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        storage, address - storage.data_ptr(), (nbytes,)
    )


def _digest(data: torch.Tensor, width: int = 4096) -> torch.Tensor:
    """A 0-dimensional int64 from all bytes, their places and their number.

    Sums of 8-byte words (of narrower integers they are 20 times slower on a CPU) along rows and along columns, each
    weighted by its number: a change that leaves all of them alone is not one that training makes.
    """
    words, tail = data[: data.numel() // 8 * 8].view(torch.int64), data[data.numel() // 8 * 8 :]
    table = words[: words.numel() // width * width].view(-1, width)
    parts = torch.cat([table.sum(0), table.sum(1), words[table.numel() :], tail.long()])
    return (parts * torch.arange(1, 2 * parts.numel(), 2, device=data.device)).sum() + data.numel()
