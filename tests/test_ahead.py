"""Kernels that are compiled in a thread while vLLM starts: each by being called; here on a CPU, where none is."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from packaging.version import Version

from patchfastrl import ahead, checksum, log_probs, merge, rotary
from patchfastrl.compat import trl_log_probs


def heard(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: list[Any]) -> None:
    before: Callable[..., Any] = getattr(owner, name)

    def spy(*given: Any) -> Any:
        given = tuple(list(one) if name in ("digests", "merge_all") else one for one in given)
        calls.append((name, *given))
        return before(*given)

    monkeypatch.setattr(owner, name, spy)


def test_one_after_the_other_in_a_thread() -> None:
    names: list[str] = []
    tasks = [lambda: names.append(threading.current_thread().name)] * 3
    assert ahead.compile_ahead(tasks).result() is None
    assert len(names) == 3
    assert all(name.startswith("patchfastrl-compile") for name in names)
    assert ahead.compile_ahead([]).result() is None


def test_an_error_comes_out_where_it_is_waited_for() -> None:
    def fails() -> None:
        raise RuntimeError("no compiler")

    compiling = ahead.compile_ahead([fails])
    with pytest.raises(RuntimeError, match="no compiler"):
        compiling.result()


@pytest.mark.parametrize("trl", ["1.10.0", "1.14.0"])
def test_of_a_training_step(trl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    model = tiny.adapted(tiny.model("qwen2", torch.bfloat16))
    heard(monkeypatch, log_probs, "_forward", calls)
    monkeypatch.setattr(trl_log_probs, "installed", lambda _: Version(trl))
    monkeypatch.setattr(rotary, "compile_ahead", lambda *given: calls.append(given))
    ahead.for_training(model, types.SimpleNamespace(per_device_train_batch_size=4, fp16=True))
    rotated, *own = calls
    assert rotated == (model.get_base_model(), 4, torch.float16)
    assert len(own) == (trl == "1.10.0")
    for _, logits, _ in own:
        assert logits.shape[-1] % 16 == model.config.vocab_size % 16
        assert logits.dtype == torch.float32


@pytest.mark.parametrize("merging", [True, False])
def test_of_a_batch(merging: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge like the adapter's: its rank and dtype, and the engine's."""
    calls: list[Any] = []
    model = tiny.adapted(tiny.model("qwen2", torch.bfloat16))
    before = {name: p.clone() for name, p in model.named_parameters()}
    heard(monkeypatch, checksum, "digests", calls)
    heard(monkeypatch, merge, "merge_all", calls)
    ahead.for_sampling(model, torch.bfloat16, merging)
    (_, tensors), *merges = calls
    assert all(t.dtype == torch.int64 for t in tensors)
    assert len(merges) == merging
    for _, (one,) in merges:
        adapter = next(p for name, p in model.named_parameters() if "lora_A" in name)
        assert one.a.shape[0] == one.b.shape[1] == len(adapter)
        assert one.a.dtype == one.b.dtype == adapter.dtype
        assert one.home.dtype == one.weight.dtype == torch.bfloat16
        assert one.home.data_ptr() != one.weight.data_ptr()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_merge_without_an_adapter_is_compiled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    heard(monkeypatch, merge, "merge_all", calls)
    ahead.for_sampling(tiny.model("qwen2", torch.bfloat16), torch.bfloat16, True)
    assert not calls
