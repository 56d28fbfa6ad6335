"""What is remembered of a model holds until the model consists of something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from patchfastrl.structure import looked_at_once, remembered


def _model() -> Any:
    blocks = nn.ModuleList([nn.Sequential(), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(2, 2)})


def _replace_parameter(model: Any) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def _replace_the_table(model: Any) -> None:
    model.head._parameters = {"weight": nn.Parameter(torch.ones(2, 2)), "bias": None}


def _freeze(model: Any) -> None:
    model.head.bias.requires_grad_(False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a parameter replaced": _replace_parameter,
    "a parameter replaced in its table": lambda m: m.head._parameters.update(bias=nn.Parameter(torch.ones(2))),
    "a table replaced": _replace_the_table,
    "a parameter removed": lambda m: m.head.register_parameter("bias", None),
    "a parameter added last": lambda m: m.head.register_parameter("more", nn.Parameter(torch.ones(1))),
    "a parameter frozen": _freeze,
    "two parameters tied": lambda m: setattr(m.blocks[1], "weight", m.head.weight),
    "a module replaced": lambda m: m.blocks.__setitem__(1, nn.Linear(2, 2)),
    "a module added last": lambda m: m.head.add_module("more", nn.Linear(2, 2)),
    "a module removed": lambda m: m.blocks.pop(-1),
    "a module moved into an empty one": lambda m: m.blocks[0].append(m.blocks.pop(-1)),
    "two modules swapped": lambda m: m._modules.update(blocks=m.head, head=m.blocks),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: str) -> None:
    asked: list[nn.Module] = []
    answer = remembered(lambda model: asked.append(model) or dict(model.named_parameters()))
    model = _model()
    assert answer(model) is answer(model)
    with looked_at_once():
        assert answer(model) is answer(model)
    assert len(asked) == 1
    CHANGES[change](model)
    assert {n: id(p) for n, p in answer(model).items()} == {n: id(p) for n, p in model.named_parameters()}
    assert len(asked) == 2
