"""Fused training operations: PEFT's function, and PEFT's own code wherever it is more than the plain case."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional

from patchfastrl.structure import looked_at_once, remembered
from patchfastrl.training import _Adapted, fuse

IDS = torch.tensor([tiny.ids(12), tiny.ids(12, start=5)])


def logits_and_gradients(model: Any, autocast: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return logits.detach().float(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def pair(**lora: Any) -> tuple[Any, Any]:
    plain = tiny.adapted(tiny.model("qwen2", torch.bfloat16), **lora)
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "r": 8}, {"target_modules": ["q_proj"]}])
def test_no_further_from_the_exact_result_than_pefts_own(lora: dict[str, Any]) -> None:
    plain, fused = pair(**lora)
    exact, exact_gradients = logits_and_gradients(copy.deepcopy(plain).float(), autocast=False)
    logits, gradients = logits_and_gradients(plain)
    fused_logits, fused_gradients = logits_and_gradients(fused)
    assert not torch.equal(logits, fused_logits)  # they do compute in different ways
    assert (fused_logits - exact).norm() <= 1.1 * (logits - exact).norm()
    assert fused_gradients.keys() == gradients.keys() == exact_gradients.keys()
    theirs = sum((gradients[n].float() - g).norm() ** 2 for n, g in exact_gradients.items()) ** 0.5
    ours = sum((fused_gradients[n].float() - g).norm() ** 2 for n, g in exact_gradients.items()) ** 0.5
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("case", ["disabled", "merged", "no autocast", "two adapters"])
def test_pefts_own_code_for_the_rest(case: str) -> None:
    plain, fused = pair()
    for model in (plain, fused):
        if case == "disabled":
            model.disable_adapter_layers()
        elif case == "merged":
            model.merge_adapter()
        elif case == "two adapters":
            model.add_adapter("other", tiny.lora())
            tiny.scramble(model, "other", seed=4)
            model.base_model.set_adapter(["default", "other"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case != "no autocast"):
        assert torch.equal(plain(input_ids=IDS).logits, fused(input_ids=IDS).logits)


def test_a_copy_computes_with_its_own_weights() -> None:
    _, fused = pair()
    other = copy.deepcopy(fused)
    tiny.scramble(other, seed=8)
    before, _ = logits_and_gradients(fused)
    after, _ = logits_and_gradients(other)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(("scaling", "bias"), [(1.0, True), (0.5, False)])
def test_gradients_of_an_adapted_layer(scaling: float, bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 7), "weight": (5, 7), "bias": (5,), "a": (4, 7), "b": (5, 4)}
    given: dict[str, Any] = {n: torch.randn(s, generator=random, dtype=torch.float64) for n, s in shapes.items()}
    given["bias"] = given["bias"] if bias else None
    learned = [given[name].requires_grad_() for name in ("x", "a", "b")]

    def adapted(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _Adapted.apply(x, given["weight"], given["bias"], a, b, scaling)
        return result

    expected = functional.linear(given["x"], given["weight"], given["bias"])
    expected = expected + scaling * given["x"] @ given["a"].T @ given["b"].T
    torch.testing.assert_close(adapted(*learned), expected)
    assert torch.autograd.gradcheck(adapted, learned)


@pytest.mark.parametrize("case", ["a base that learns", "dropout", "rounded weights"])
def test_layers_that_are_not_of_the_plainest_kind(case: str) -> None:
    """Their sum is in place of PEFT's, too; gradients by torch's own rules."""
    plain, fused = pair(**({"lora_dropout": 0.5} if case == "dropout" else {}))
    for model in (plain, fused):
        if case == "a base that learns":
            model.get_base_model().requires_grad_(True)
        elif case == "rounded weights":
            model.get_base_model().float()
    torch.manual_seed(0)
    logits, gradients = logits_and_gradients(plain)
    torch.manual_seed(0)
    fused_logits, fused_gradients = logits_and_gradients(fused)
    assert (fused_logits - logits).norm() < 0.05 * logits.norm()
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(fused_gradients[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B"])
def test_hooks_of_the_layers_inside_are_called(where: str) -> None:
    plain, fused = pair()
    heard: list[str] = []
    for name, model in (("plain", plain), ("fused", fused)):
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        inner = layer.base_layer if where == "base_layer" else getattr(layer, where)["default"]
        inner.register_forward_hook(lambda *_, name=name: heard.append(name))
        logits_and_gradients(model)
    assert heard == ["plain", "fused"]


def test_what_a_model_consists_of_is_found_again_when_it_changes() -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    asked = []

    @remembered
    def count(model: Any) -> int:
        asked.append(model)
        return len(list(model.parameters()))

    layer = model.get_base_model().model.layers[0].mlp.up_proj

    def replace() -> None:
        layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.detach().clone())

    changes = [
        replace,
        lambda: model.get_base_model().register_parameter("more", torch.nn.Parameter(torch.zeros(1))),
        lambda: model.add_adapter("other", tiny.lora()),
        lambda: model.set_adapter("other"),
        lambda: model.disable_adapter_layers(),
        lambda: layer.base_layer.weight.requires_grad_(False),
        lambda: model.merge_adapter(),
    ]
    for number, change in enumerate(changes, 1):
        assert count(model) == count(model)
        assert len(asked) == number
        change()
    count(model)
    assert len(asked) == len(changes) + 1
    with looked_at_once():
        count(model)
        replace()
        count(model)
        assert len(asked) == len(changes) + 1
    count(model)
    assert len(asked) == len(changes) + 2
