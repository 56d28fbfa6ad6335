"""On a GPU nothing may stay beside memory that is to go back to the device. Here a CPU takes the rules of a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from patchfastrl import materialise
from patchfastrl.trace import storage_key

PROMPT = tiny.ids(24)


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialise, "_in_segments", lambda device: True)


@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied", "phi3"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_nothing_small_stays_where_it_was(family: str, adapted: bool) -> None:
    model = tiny.adapted(tiny.model(family)) if adapted else tiny.model(family)
    before = {name: (parameter, parameter.data) for name, parameter in model.named_parameters()}
    expected = tiny.logprobs(model, PROMPT)
    llm = tiny.engine(model)
    llm.publish()
    for name, parameter in model.named_parameters():
        was, data = before[name]
        assert parameter is was, name
        assert torch.equal(parameter, data), name
        assert storage_key(parameter) != storage_key(data), name
    assert torch.equal(tiny.logprobs(model, PROMPT), expected)
    torch.testing.assert_close(tiny.engine_logprobs(llm, PROMPT), expected, atol=1e-3, rtol=1e-3)
    llm.close("the test is over.")


def test_what_is_large_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("qwen2")
    layer = model.model.layers[0]
    large, small = layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight
    monkeypatch.setattr(materialise, "_TRIM", large.nbytes)
    monkeypatch.setattr(materialise, "_TRIM_SHARE", 0)
    before = large.data, small.data
    llm = tiny.engine(model)
    assert storage_key(large) == storage_key(before[0])
    assert storage_key(small) != storage_key(before[1])
    llm.close("the test is over.")


def test_it_is_moved_each_time_that_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it moved to may be beside the next weight that is moved."""
    model = tiny.adapted(tiny.model("qwen2"))
    weight = next(p for name, p in model.named_parameters() if "lora_A" in name)
    seen: list[torch.Tensor] = [weight.data]
    monkeypatch.setattr(materialise, "_TRIM", 1)
    monkeypatch.setattr(materialise, "return_freed", lambda: seen.append(weight.data))
    llm = tiny.engine(model)
    assert len({storage_key(data) for data in seen}) == len(seen) > 4
    llm.close("the test is over.")


def test_adapters_that_are_tied_stay_tied() -> None:
    model = nn.Module()
    model.base = nn.Linear(4, 4)
    model.one, model.other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    model.twin = nn.Parameter(model.one.data)
    base = {"base.weight": model.base.weight, "base.bias": model.base.bias}
    assert [id(p) for p in materialise._others(model, base)] == [id(model.other)]


def test_an_adapter_that_was_moved_is_trained(tmp_path: Path, patched: None) -> None:
    trainer = tiny.trainer(
        tmp_path,
        model=tiny.model("qwen2"),
        args={"max_steps": 2, "learning_rate": 1e-2, "vllm_max_model_length": 128},
        peft_config=tiny.lora(),
    )
    before = tiny.logprobs(trainer.model, PROMPT)
    trainer.train()
    after = tiny.logprobs(trainer.model, PROMPT)
    assert (after - before).abs().max() > 1e-2
    llm = trainer.vllm_generation.llm
    llm.publish()
    torch.testing.assert_close(tiny.engine_logprobs(llm, PROMPT), after, atol=1e-3, rtol=1e-3)


def test_torch_splits_free_blocks_while_vllm_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM from 0.23 on forbids it then, on a GPU. What it tells torch, which has no GPU here, is noted down."""
    from vllm.v1.worker import gpu_worker

    from patchfastrl.compat import cuda_free_blocks

    def load() -> list[str]:
        told.clear()
        with gpu_worker.Worker._scoped_allocator_max_split(None, max_split_size_mb=20):
            return list(told)

    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(gpu_worker, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    assert load() == ["max_split_size_mb:20"]
    with cuda_free_blocks.split():
        assert load() == []
    assert load() == ["max_split_size_mb:20"]
    monkeypatch.delattr(gpu_worker.Worker, "_scoped_allocator_max_split")
    with cuda_free_blocks.split():  # an older release
        assert not hasattr(gpu_worker.Worker, "_scoped_allocator_max_split")


@pytest.mark.parametrize(("began", "now"), [(5, 7), (7, 7), (9, 7)])
def test_memory_that_went_back_while_an_engine_was_built_is_no_error(
    monkeypatch: pytest.MonkeyPatch, began: int, now: int
) -> None:
    """vLLM on a GPU refuses if more is free than when its worker began. Here the worker for CPUs is made to."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    measure, snapshot = CPUWorker.determine_available_memory, SimpleNamespace(free_memory=began)

    def strict(self: Any) -> int:
        assert self.init_snapshot.free_memory > now
        return measure(self)

    monkeypatch.setattr(CPUWorker, "determine_available_memory", strict)
    monkeypatch.setattr(CPUWorker, "init_snapshot", snapshot, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (now, 10))
    model = tiny.model("llama")
    llm = tiny.engine(model)
    assert tiny.engine_greedy(llm, tiny.ids(8)) == tiny.greedy(model, tiny.ids(8))
    llm.close("the test is over.")


# What a GPU would hold ------------------------------------------------------------------------------------------------


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import loading
    import shapes

    # Of 0.5B every matrix shares its segment; of 1.5B an adapter's fit into what rounding up leaves of a matrix'.
    sizes = {"vocab_size": 2048, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 16}
    monkeypatch.setitem(shapes.SHAPES, "like 0.5b", ("Qwen2", {**sizes, "num_attention_heads": 14, **shapes.QWEN}))
    sizes = {"vocab_size": 2048, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 8}
    monkeypatch.setitem(shapes.SHAPES, "like 1.5b", ("Qwen2", {**sizes, "num_attention_heads": 12, **shapes.QWEN}))
    # Of 32B every matrix has a segment, and would fit into that of a larger one of the layer before.
    sizes = {"vocab_size": 2048, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 48}
    monkeypatch.setitem(
        shapes.SHAPES, "like 32b", ("Qwen3", {**sizes, "num_attention_heads": 64, "head_dim": 128, **shapes.LLAMA})
    )
    return loading


@pytest.mark.parametrize(
    ("shape", "method", "made", "by_name"),
    [
        ("like 0.5b", "full", 0.2, 0.2),
        ("like 1.5b", "lora", 0.2, 0.2),
        ("like 32b", "lora in the slot", 0.01, 0.2),  # read by its name, a layer's place is left in the one segment
    ],
)
def test_what_was_moved_goes_back(
    loading: Any, shape: str, method: str, made: float, by_name: float, patched: None
) -> None:
    recorded = loading.record(shape, method)
    for most, how in (made, False), (by_name, True):
        figures = loading.replay(recorded, how)
        assert figures["kept"] < most * figures["end"], figures


def test_the_rules_of_torchs_allocator(loading: Any) -> None:
    mib = loading.MIB
    allocator = loading.Allocator()
    small = [allocator.allocate(mib // 2) for _ in range(4)]
    assert allocator.reserved == 2 * mib
    third, other = allocator.allocate(8 * mib), allocator.allocate(8 * mib)
    assert allocator.reserved == 22 * mib
    large = allocator.allocate(27 * mib - 5)  # 28 with the rounding, and the rest is not cut off
    assert allocator.reserved == 50 * mib
    between = allocator.allocate(3 * mib)  # the gap of 4 that two of 8 have left
    assert (between.segment, allocator.reserved) == (third.segment, 50 * mib)
    allocator.free(large)
    allocator.free(third)
    allocator.free(small[0])
    allocator.empty_cache()
    assert allocator.reserved == 22 * mib
    for block in (between, other, *small[1:]):
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.allocated, allocator.peak) == (0, 0, 50 * mib)
