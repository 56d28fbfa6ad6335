"""Liger's rotation is for models that rotate as Llama does, on a GPU; all else is computed as before."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from transformers.models.llama import modeling_llama

from patchfastrl import PatchFastRL, UnpatchFastRL, rotary


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of Liger's, which needs a GPU: its calls."""
    calls: list[Any] = []

    class LigerRopeFunction:
        @staticmethod
        def apply(q: Any, k: Any, *angles: Any) -> Any:
            calls.append((q, k, *angles))
            return q, k

    module = types.ModuleType("liger_kernel.ops.rope")
    module.LigerRopeFunction = LigerRopeFunction  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rope", module)
    monkeypatch.setattr(rotary, "installed", lambda _: Version("0.8.5"))
    return calls


def modeling(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def model_of(name: str) -> Any:
    return type("Model", (), {"__module__": modeling(name).__name__})()


@pytest.fixture
def patched() -> Iterator[None]:
    PatchFastRL()
    yield
    UnpatchFastRL()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_models_that_rotate_as_llama_does(name: str, kernel: list[Any], patched: None) -> None:
    module = modeling(name)
    stock = module.apply_rotary_pos_emb
    rotary.use_liger(model_of(name))
    replaced = module.apply_rotary_pos_emb
    assert replaced is not stock
    rotary.use_liger(model_of(name))
    assert module.apply_rotary_pos_emb is replaced  # not twice
    q, k, cos, sin = (torch.randn(1, 2, 3, 4) for _ in range(4))
    for one, other in zip(replaced(q, k, cos[0], sin[0]), stock(q, k, cos[0], sin[0]), strict=True):
        assert torch.equal(one, other)
    assert not kernel  # not on a CPU
    UnpatchFastRL()
    assert module.apply_rotary_pos_emb is stock


def test_only_while_trl_is_patched(kernel: list[Any]) -> None:
    stock = modeling("llama").apply_rotary_pos_emb
    rotary.use_liger(model_of("llama"))
    assert modeling("llama").apply_rotary_pos_emb is stock


def test_on_a_gpu(kernel: list[Any]) -> None:
    def stock(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> str:
        return "stock"

    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    liger = sys.modules["liger_kernel.ops.rope"].LigerRopeFunction.apply  # type: ignore[attr-defined]
    rotate = rotary._on_gpu(liger, stock)
    one: Any = OnGpu()
    assert rotate(one, one, 1, 2) == (one, one)
    assert kernel == [(one, one, 1, 2)]
    assert rotate(one, one, 1, 2, 2) == rotate(one, one, 1, 2, unsqueeze_dim=2) == "stock"
    assert len(kernel) == 1


def test_compiled_ahead_for_what_comes_later(kernel: list[Any]) -> None:
    model = tiny.model("llama", torch.bfloat16)
    seen: list[Any] = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(kwargs["position_embeddings"]), with_kwargs=True
    )
    model(input_ids=torch.tensor([tiny.ids(16)] * 3))
    rotary.compile_ahead(model, 3, torch.bfloat16)
    assert len(kernel) == 2
    q, k, cos, sin = kernel[0]
    heads, size = model.config.num_attention_heads, layer.head_dim
    assert q.shape == (3, heads, 16, size)
    assert k.shape == (3, model.config.num_key_value_heads, 16, size)
    assert q.transpose(1, 2).is_contiguous()  # as a projection leaves it
    assert [(t.shape, t.dtype) for t in (cos, sin)] == [(t.shape, t.dtype) for t in seen]
    assert kernel[1][0].shape[2] % 16  # Triton compiles for lengths that 16 divides, and once more for others


def test_a_replacement_of_somebody_elses_stays(
    kernel: list[Any], patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = modeling("llama")

    def own(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return q, k

    monkeypatch.setattr(module, rotary.NAME, own)
    rotary.use_liger(model_of("llama"))
    assert module.apply_rotary_pos_emb is own


def test_nothing_to_compile(kernel: list[Any]) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    rotary.compile_ahead(model, 3, torch.bfloat16)
    assert not kernel


@pytest.mark.parametrize("name", ["phi3", "cohere", "gpt_neox", "glm4"])
def test_others_are_left_alone(name: str, kernel: list[Any], patched: None) -> None:
    module = modeling(name)
    stock = getattr(module, rotary.NAME)
    rotary.use_liger(model_of(name))
    assert getattr(module, rotary.NAME) is stock
    assert stock is not modeling_llama.apply_rotary_pos_emb


def test_a_model_without_such_a_function(kernel: list[Any], patched: None) -> None:
    assert not hasattr(modeling("gpt2"), rotary.NAME)
    rotary.use_liger(model_of("gpt2"))
    assert not hasattr(modeling("gpt2"), rotary.NAME)
