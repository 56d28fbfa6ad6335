"""What is built without memory, and gets it when somebody does something with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from patchfastrl.weightless import without_memory

LARGE = 5000


def build(make: Callable[[], Any]) -> Any:
    with without_memory(), torch.device("cpu"):
        return make()


class Weight(nn.Module):
    def __init__(self, data: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(data(), requires_grad=False)


@pytest.mark.parametrize("size", [(LARGE,), (100, 100)])
def test_a_parameter_never_has_memory(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: made.append(args) or empty_like(*args, **kwargs))
    weight = build(lambda: Weight(lambda: torch.empty(*size, dtype=torch.bfloat16))).weight
    assert weight.is_meta
    assert (weight.shape, weight.dtype) == (size, torch.bfloat16)
    assert made == []  # neither for a moment, nor by the way back from a registered parameter


def test_small_parameters_and_those_with_values_are_as_before() -> None:
    assert not build(lambda: Weight(lambda: torch.empty(16))).weight.is_meta
    assert build(lambda: Weight(lambda: torch.ones(16))).weight.sum() == 16
    assert build(lambda: Weight(lambda: torch.ones(LARGE))).weight.is_meta  # registered: a checkpoint fills it


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.fill_(3.0),
        lambda t: t.data.fill_(3.0),
        lambda t: t.view(-1).fill_(3.0),
        lambda t: t.__setitem__(slice(None), 3.0),
        lambda t: torch.add(torch.zeros(LARGE), 3.0, out=t),
        lambda t: nn.init.constant_(t, 3.0),
    ],
)
def test_what_is_written_to_keeps_what_was_written(write: Callable[[torch.Tensor], Any]) -> None:
    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = torch.empty(LARGE)
            assert table.numel() == LARGE
            write(table)
            self.register_buffer("table", table)

    assert build(Buffer).table.eq(3.0).all()


def test_what_is_left_without_memory_gets_it_at_the_end() -> None:
    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.empty(LARGE))
            self.list = [torch.empty(LARGE)]

    made = build(Buffer)
    assert not made.table.is_meta
    assert not made.list[0].is_meta


def test_afterwards_torch_is_as_it_was() -> None:
    build(lambda: torch.empty(LARGE))
    assert not torch.empty(LARGE).is_meta
    assert not Weight(lambda: torch.empty(LARGE)).weight.is_meta
