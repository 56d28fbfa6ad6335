"""Log-probabilities and entropies in one pass: TRL's numbers and its gradients, and TRL's own code for the rest.

On a machine with a GPU these run there, and so through the kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from patchfastrl import install, log_probs


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the kernel."""
    monkeypatch.setattr(install, "_settings", dataclasses.replace(install.settings(), fused_training=True))


def logits(*shape: int, grad: bool = True) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 6
    return made.to(tiny.DEVICE).requires_grad_(grad)


INDEX = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1)).to(tiny.DEVICE)
# What TRL does to a model's logits before it computes log-probabilities of the last 7 tokens.
SLICED: dict[str, Any] = {
    "as they are": lambda given: given[:, 1:-1],
    "slice of a slice": lambda given: given[:, :-1][:, -7:],
    "copied": lambda given: given[:, 1:-1] / 0.7,
    "divided in place": lambda given: (given * 1)[:, 1:-1].div_(0.7),
    "part of the vocabulary": lambda given: given[:, 1:-1, 3:-4],
    "some rows": lambda given: given.repeat(2, 1, 1)[1:4, 1:-1],
    "transposed": lambda given: given.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:-1],
}


@pytest.mark.parametrize("how", SLICED)
def test_trls_numbers_and_gradients(how: str) -> None:
    found, gradients = [], []
    weights = torch.linspace(-1, 2, 21, device=tiny.DEVICE).view(3, 7)
    for function in (selective_log_softmax, log_probs.selected_log_probs):
        given = logits(3, 9, 57)
        selected = function(SLICED[how](given), INDEX)
        assert selected is not None
        (selected * weights).sum().backward()
        found.append(selected.detach())
        gradients.append(given.grad)
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)


def test_the_gradient_is_computed_where_the_logits_are_a_slice_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no slice copies it."""
    given = logits(3, 9, 57)
    model_output = given * 1
    arrived: list[torch.Tensor] = []
    model_output.register_hook(arrived.append)
    made: list[torch.Tensor] = []
    before = log_probs._backward
    monkeypatch.setattr(log_probs, "_backward", lambda *args: (made.append(args[-1]), before(*args)))
    selected = log_probs.selected_log_probs(model_output[:, 1:][:, :7], INDEX)
    assert selected is not None
    selected.sum().backward()
    assert arrived[0].shape == (3, 9, 57)
    assert made[0]._base is arrived[0]
    assert not arrived[0][:, 0].any()
    assert not arrived[0][:, 8].any()


def test_other_uses_of_the_same_logits_keep_their_gradients() -> None:
    gradients = []
    for function in (selective_log_softmax, log_probs.selected_log_probs):
        given = logits(3, 9, 57)
        output = given * 1
        part = output[:, 1:-1]
        (function(part, INDEX).sum() + part.square().sum() + output[:, 0].sum()).backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", ["a leaf of a detached slice", "a leaf of a slice", "its gradient is kept"])
def test_slices_whose_own_gradient_is_asked_for(case: str) -> None:
    output = logits(3, 9, 57) * 1
    if case == "its gradient is kept":
        given = output[:, 1:-1]
        given.retain_grad()
    else:
        with torch.no_grad():
            given = (output.detach() if "detached" in case else output)[:, 1:-1]
        given.requires_grad_()
    selected = log_probs.selected_log_probs(given, INDEX)
    assert selected is not None
    selected.sum().backward()
    mine = given.grad
    other = given.detach().clone().requires_grad_()
    selective_log_softmax(other, INDEX).sum().backward()
    torch.testing.assert_close(mine, other.grad)


def test_entropies() -> None:
    given = logits(3, 9, 57, grad=False)
    torch.testing.assert_close(log_probs.entropies(given[:, 1:-1]), entropy_from_logits(given[:, 1:-1]))
    learned = logits(3, 9, 57)
    assert log_probs.entropies(learned) is None  # a bonus that is trained on
    with torch.no_grad():
        torch.testing.assert_close(log_probs.entropies(learned), entropy_from_logits(learned))


def test_without_a_gradient() -> None:
    given = logits(3, 7, 57)
    with torch.no_grad():
        selected = log_probs.selected_log_probs(given, INDEX)
    assert selected is not None
    assert not selected.requires_grad
    torch.testing.assert_close(selected, selective_log_softmax(given, INDEX).detach())


@pytest.mark.parametrize("case", ["not wanted", "on a CPU", "rounded", "two dimensions", "several of a token"])
def test_trls_own_code_for_the_rest(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, index = logits(3, 7, 57), INDEX
    if case == "on a CPU":
        given, index = given.cpu(), index.cpu()
    if case in ("not wanted", "on a CPU"):
        wanted = dataclasses.replace(install.settings(), fused_training=False if case == "not wanted" else None)
        monkeypatch.setattr(install, "_settings", wanted)
    elif case == "rounded":
        given = given.bfloat16()
    elif case == "two dimensions":
        given, index = given[0], index[0]
    else:
        index = index[..., None]
    assert log_probs.selected_log_probs(given, index) is None
    if case != "several of a token":
        with torch.no_grad():
            assert log_probs.entropies(given) is None
