"""Attention without padding: the numbers of transformers' own, for every token that is none."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import torch.nn.attention.varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patchfastrl import PatchFastRL, UnpatchFastRL, attention

IDS = torch.tensor([tiny.ids(12), tiny.ids(12, start=5), tiny.ids(12, start=9)])
# Prompts are padded on the left, completions on the right.
MASK = torch.tensor([[0, 0, 0, *[1] * 9], [1] * 12, [0, *[1] * 8, 0, 0, 0]])
KINDS = ["qwen2", "qwen3", "llama"]


def flash(q: Any, k: Any, v: Any, starts: Any, _: Any, longest: int, __: int, *, scale: float, window_size: Any) -> Any:
    """What torch's kernel computes, which runs on a GPU only."""
    assert window_size == (-1, 0)
    assert starts.dtype == torch.int32
    assert q.shape == k.shape == v.shape
    lengths = starts.diff().tolist()
    assert max(lengths) == longest
    assert sum(lengths) == len(q)
    rows = []
    for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        row = scaled_dot_product_attention(*(t.transpose(0, 1) for t in parts), is_causal=True, scale=scale)
        rows.append(row.transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU; the calls of its kernel: how many tokens each."""
    calls = []

    def counted(q: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(q))
        return flash(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention, "_fits", lambda *args: True)
    return calls


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And small batches count, too."""
    monkeypatch.setattr(attention, "_WORTH_IT", 0)
    PatchFastRL()
    yield
    UnpatchFastRL()


def computed(model: Any, mask: torch.Tensor | None = MASK, **kwargs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities of the tokens that are not padding, and all gradients."""
    model.zero_grad()
    logits = model(input_ids=IDS, attention_mask=mask, use_cache=False, **kwargs).logits
    logps = logits.log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    real = logps if mask is None else logps[mask.bool()]
    (real * torch.linspace(-1, 1, len(real.flatten())).view_as(real)).sum().backward()
    return real.detach(), [p.grad.clone() for p in model.parameters()]


def changed(kind: str) -> tuple[Any, Any]:
    stock, ours = tiny.model(kind), tiny.model(kind)
    attention.leave_padding_out(ours)
    return stock, ours


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_of_padding_is_computed(kind: str, on_gpu: list[int]) -> None:
    stock, ours = changed(kind)
    (logps, gradients), (our_logps, our_gradients) = computed(stock), computed(ours)
    torch.testing.assert_close(our_logps, logps, rtol=1e-4, atol=1e-5)
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert on_gpu == [int(MASK.sum())] * stock.config.num_hidden_layers


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernel_cannot_do_is_computed_as_before(kind: str) -> None:
    stock, ours = changed(kind)
    (logps, gradients), (our_logps, our_gradients) = computed(stock), computed(ours)
    assert torch.equal(our_logps, logps)
    assert all(map(torch.equal, our_gradients, gradients))


@pytest.mark.parametrize("mask", [None, torch.ones_like(IDS)])
def test_without_padding_nothing_changes(mask: torch.Tensor | None, on_gpu: list[int]) -> None:
    stock, ours = changed("qwen2")
    assert torch.equal(computed(stock, mask)[0], computed(ours, mask)[0])
    assert not on_gpu


def test_small_batches_keep_their_mask(on_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = changed("qwen2")
    monkeypatch.setattr(attention, "_WORTH_IT", 3 * 12 * 12 * stock.config.hidden_size + 1)
    assert torch.equal(computed(stock)[0], computed(ours)[0])
    assert not on_gpu


def test_other_masks_stay_what_they_are(on_gpu: list[int]) -> None:
    stock, ours = changed("qwen2")
    whole = (torch.ones(12, 12).tril(2).bool() & MASK[:, None, None, :].bool()).float().sub(1) * 1e9
    with torch.no_grad():
        assert torch.equal(*(m(input_ids=IDS, attention_mask=whole, use_cache=False).logits for m in (stock, ours)))
        packed = torch.arange(6).repeat(3, 2)
        assert torch.equal(*(m(input_ids=IDS, position_ids=packed, use_cache=False).logits for m in (stock, ours)))
    assert not on_gpu


def test_generating_with_a_cache() -> None:
    stock, ours = changed("qwen2")
    left = torch.tensor([[0, 0, *[1] * 10], [1] * 12, [0, *[1] * 11]])
    told = {"input_ids": IDS, "attention_mask": left, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(m.generate(**told) for m in (stock, ours)))


def test_a_sliding_window(on_gpu: list[int]) -> None:
    config = tiny.model("qwen2").config
    config.use_sliding_window, config.sliding_window = True, 4
    config.layer_types = ["full_attention", "sliding_attention"]
    stock, ours = (type(tiny.model("qwen2"))(copy.deepcopy(config)) for _ in range(2))
    ours.load_state_dict(stock.state_dict())
    attention.leave_padding_out(ours)
    torch.testing.assert_close(computed(ours)[0], computed(stock)[0], rtol=1e-4, atol=1e-5)
    assert len(on_gpu) == 1  # of two layers


def test_recomputed_layers(on_gpu: list[int]) -> None:
    stock, ours = changed("qwen2")
    for use_reentrant in (True, False):
        for model in (stock, ours):
            model.train()
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.testing.assert_close(computed(ours)[1], computed(stock)[1], rtol=1e-3, atol=1e-5)
    assert len(on_gpu) == 2 * 2 * stock.config.num_hidden_layers


def test_a_choice_of_the_script_stays(on_gpu: list[int]) -> None:
    model = tiny.model("qwen2")
    model.set_attn_implementation("eager")
    attention.leave_padding_out(model)
    computed(model)
    model.set_attn_implementation("sdpa")
    computed(model)
    assert not on_gpu


@pytest.mark.parametrize("case", ["it asks for sdpa", "no source"])
def test_a_model_whose_source_may_treat_it_in_a_way_of_its_own(
    case: str, on_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def source(module: Any) -> str:
        if case == "no source":
            raise OSError
        return 'if self.config._attn_implementation == "sdpa": ...'

    monkeypatch.setattr(attention.inspect, "getsource", source)
    _, ours = changed("qwen2")
    computed(ours)
    assert not on_gpu


def test_a_class_of_a_notebook(on_gpu: list[int]) -> None:
    _, ours = changed("qwen2")
    kind = type("Mine", (type(ours),), {"__module__": "builtins"})
    attention._configs.clear()
    attention.leave_padding_out(kind(ours.config))
    computed(ours)
    assert not on_gpu


def test_only_this_model_and_only_while_trl_is_patched(on_gpu: list[int]) -> None:
    stock, ours = changed("qwen2")
    interfaces = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    replaced = [interface["sdpa"] for interface in interfaces]
    attention.leave_padding_out(ours)
    assert [interface["sdpa"] for interface in interfaces] == replaced  # not twice
    computed(copy.deepcopy(ours))
    assert not on_gpu
    computed(ours)
    assert on_gpu
    on_gpu.clear()
    UnpatchFastRL()
    assert [interface["sdpa"] for interface in interfaces] == [sdpa_attention_forward, sdpa_mask]
    attention.leave_padding_out(ours)
    assert [interface["sdpa"] for interface in interfaces] == [sdpa_attention_forward, sdpa_mask]
    assert torch.equal(computed(ours)[0], computed(stock)[0])
    assert not on_gpu


def test_a_mask_that_is_changed_in_place(on_gpu: list[int]) -> None:
    stock, ours = changed("qwen2")
    mask = MASK.bool()
    computed(ours, mask)
    mask[1, :5] = False
    torch.testing.assert_close(computed(ours, mask)[0], computed(stock, mask)[0], rtol=1e-4, atol=1e-5)
    assert on_gpu[-1] == int(mask.sum())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any, on_gpu: list[int]) -> None:
    stock, ours = changed("qwen2")
    with context():
        logits = [m(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()] for m in (stock, ours)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert on_gpu


def test_weights_in_float32_under_autocast(on_gpu: list[int]) -> None:
    """Queries and keys are rotated in float32 there, and values are not."""
    stock, ours = changed("qwen2")
    with torch.autocast("cpu", torch.bfloat16):
        (logps, _), (our_logps, _) = computed(stock), computed(ours)
    torch.testing.assert_close(our_logps, logps, rtol=0.1, atol=0.3)
    assert on_gpu


def test_nothing_of_a_batch_is_kept(on_gpu: list[int]) -> None:
    _, ours = changed("qwen2")
    mask = MASK.bool().clone()  # transformers hands it on as it is
    computed(ours, mask)
    assert attention._latest is not None
    assert attention._latest[0]() is mask
    gone = weakref.ref(mask)
    del mask
    assert gone() is None
