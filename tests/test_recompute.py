"""Layers that keep their activations: the same numbers, and never more memory than may be held."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from patchfastrl import PatchFastRL, engine, memory, recompute
from patchfastrl.compat.pool_pieces import PoolPieces
from patchfastrl.compat.worker_asleep import Asleep
from patchfastrl.errors import StandbyError, UnsupportedError
from patchfastrl.recompute import Recompute, layers_kept

pytestmark = pytest.mark.timeout(180)

LAYERS = 4
ROOM = 2**40


class Tensors(TorchDispatchMode):
    """The bytes of all tensors that were made since this was entered: a memory reading for the CPU, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(size for _, size in self._storages.values())

    # As `memory.Device` -------------------------------------------------------------------------------------------

    def read(self) -> memory.Reading:
        allocated = self.bytes()
        return memory.Reading(self.total, held=allocated, cached=0, allocated=allocated, peak=self.peak)

    def forget_peak(self) -> None:
        self.peak = self.bytes()


class Script:
    """A model in training, its decisions, and what each of its steps took."""

    def __init__(self, reentrant: bool = False, lora: bool = True, device: Any = None) -> None:
        base = tiny.model("qwen2", layers=LAYERS)
        self.model = tiny.adapted(base, lora_dropout=0.1) if lora else base
        self.layers = list(base.model.layers)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        base.enable_input_require_grads()
        self.model.train()
        self.stock = [layer._gradient_checkpointing_func for layer in self.layers]
        self.tensors = Tensors()
        self.recompute = Recompute(self.model, device or self.tensors, least=False)
        self.calls: list[int] = []
        for number, layer in enumerate(self.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: self.calls.append(number))

    def sleep(self, room: int = ROOM) -> None:
        self.model.zero_grad()
        self.recompute.sampled()
        assert self.recompute.limit is not None
        self.recompute.limit += room + 1024  # the token ids, which come before the forward

    def measured(self, *size: int, **kwargs: Any) -> Script:
        """After a generation batch of which all is recomputed."""
        self.sleep()
        self.step(*size, **kwargs)
        self.sleep()
        return self

    def forward(self, rows: int = 3, length: int = 12, **kwargs: Any) -> torch.Tensor:
        ids = torch.tensor([tiny.ids(length, start=3 + row) for row in range(rows)])
        logits = self.model(input_ids=ids, use_cache=False, **kwargs).logits
        assert [layer._gradient_checkpointing_func for layer in self.layers] == self.stock
        return logits.log_softmax(-1)[..., 3].sum()

    def step(self, *size: int, **kwargs: Any) -> dict[str, torch.Tensor]:
        """One micro-step. Returns the gradients."""
        self.calls.clear()
        self.model.zero_grad()
        torch.manual_seed(0)
        with self.tensors:
            self.forward(*size, **kwargs).backward()
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    @property
    def recomputed(self) -> list[int]:
        return [n for n in range(LAYERS) if self.calls.count(n) == 2]


def test_what_a_batch_could_not_use_counts_as_far_as_it_is_free() -> None:
    script = Script()
    held = script.tensors.bytes()
    for total, left_out, limit in ((100, 60, 60), (100, 300, 100), (0, 60, 0), (100, 0, 0)):
        script.tensors.total = held + total
        script.recompute.sampled(left_out)
        assert script.recompute.limit == held + limit


# The policy -----------------------------------------------------------------------------------------------------------

SIZES = st.integers(0, 1000)
LISTS = st.lists(st.integers(1, 300), max_size=12)


@given(SIZES, SIZES, SIZES, LISTS)
def test_as_many_as_fit_and_never_more(limit: int, held: int, rest: int, layers: list[int]) -> None:
    kept = layers_kept(limit, held, rest, layers)
    assert 0 <= kept <= len(layers)
    if kept:
        assert held + rest + sum(layers[-kept:]) <= limit
    if kept < len(layers):
        assert held + rest + sum(layers[-kept - 1 :]) > limit


@given(SIZES, SIZES, SIZES, LISTS, SIZES)
def test_more_memory_never_keeps_fewer(limit: int, held: int, rest: int, layers: list[int], more: int) -> None:
    kept = layers_kept(limit, held, rest, layers)
    assert layers_kept(limit + more, held, rest, layers) >= kept
    assert layers_kept(limit, held + more, rest, layers) <= kept
    assert layers_kept(limit, held, rest + more, layers) <= kept


@given(SIZES, SIZES, LISTS)
def test_nothing_is_kept_where_nothing_is_free(held: int, rest: int, layers: list[int]) -> None:
    assert not layers or layers_kept(held + rest, held, rest, layers) == 0
    assert not layers or layers_kept(0, held, rest, layers) == 0


# What is measured, and that it holds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_never_beyond_the_limit(reentrant: bool, lora: bool) -> None:
    """Bytes counted tensor by tensor, from nothing free to room for all layers. The gradients stay the same bits."""
    script = Script(reentrant, lora)
    script.tensors.forget_peak()
    expected = script.step()
    assert script.recompute.limit is None
    assert script.recomputed == [0, 1, 2, 3]
    stock = script.tensors.peak
    script.measured()
    assert script.recomputed == [0, 1, 2, 3]
    (found,) = script.recompute._measured.values()
    one, all_of_them = min(found.layers.values()), sum(found.layers.values())
    kept = []
    for room in (0, *(found.rest + all_of_them * part // 10 for part in range(12))):
        script.sleep(room)
        held = script.tensors.bytes()
        script.tensors.forget_peak()
        gradients = script.step()
        kept.append(script.recompute.kept)
        assert script.recomputed == list(range(LAYERS - script.recompute.kept))
        assert script.tensors.peak <= max(script.recompute.limit, held + stock)
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert kept == sorted(kept)
    assert set(kept) == set(range(LAYERS + 1))
    assert one > 3 * 12 * 64 * 4  # a layer keeps more than its own input


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_keeps_what_was_measured(reentrant: bool) -> None:
    script = Script(reentrant).measured()
    (found,) = script.recompute._measured.values()

    def after_forward(room: int) -> int:
        script.sleep(room)
        script.model.zero_grad()
        with script.tensors:
            before = script.tensors.bytes()
            loss = script.forward()
            taken = script.tensors.bytes() - before
            loss.backward()
        return taken

    nothing, everything = after_forward(0), after_forward(ROOM)
    assert script.recompute.kept == LAYERS
    assert everything - nothing <= sum(found.layers.values()) <= 1.3 * (everything - nothing)


def test_a_part_of_the_device_stays_free() -> None:
    script = Script().measured()
    (found,) = script.recompute._measured.values()
    kept = []
    for part in (0, 1, 2):
        script.tensors.total = 20 * part * found.layers[script.layers[0]]
        script.sleep(found.rest + sum(found.layers.values()))
        script.step()
        kept.append(script.recompute.kept)
    assert kept == [4, 3, 2]


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_least_counts_what_is_free_on_the_device(kept: int) -> None:
    """What the engine held does not matter, and a tenth of the device stays free."""
    script = Script().measured()
    (found,) = script.recompute._measured.values()
    script.recompute.remove()
    script.recompute = Recompute(script.model, script.tensors, least=True)
    script.recompute._first, script.recompute._measured = 0, {found.size: found}
    layers = list(found.layers.values())
    script.model.zero_grad()
    script.tensors.total = -(-10 * (script.tensors.bytes() + 1024 + found.rest + kept * layers[0]) // 9)
    script.recompute.sampled()
    script.tensors.forget_peak()
    script.step()
    assert script.recompute.kept == kept
    assert script.tensors.peak <= script.tensors.total * 9 // 10


class Gpu:
    """What torch says of a GPU of 100 bytes, 30 of which are free, asked as strictly as torch does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch.cuda._utils import _get_device_index

        self.fraction = 1.0
        self.given_back = 0
        self.stats = {
            "allocated_bytes.all.current": 40,
            "reserved_bytes.all.current": 55,
            "allocated_bytes.all.peak": 50,
        }

        def answer(name: str, ask: Any) -> None:
            monkeypatch.setattr(torch.cuda, name, lambda device=0: (_get_device_index(device), ask())[1])

        answer("mem_get_info", lambda: (30, 100))
        answer("memory_stats", lambda: self.stats)
        monkeypatch.setattr(memory, "_free_segments", list)
        answer("get_per_process_memory_fraction", lambda: self.fraction)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.give_back)

    def give_back(self) -> None:
        self.given_back += 1


def test_what_is_read_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch keeps for its own next allocations is not held."""
    gpu, device = Gpu(monkeypatch), memory.Device(torch.device("cuda:0"))
    for gpu.fraction, total in ((1.0, 100), (0.9, 100), (0.7, 85)):  # others hold 15
        assert device.read() == memory.Reading(total=total, held=55, cached=15, allocated=40, peak=50)


def test_what_torch_cannot_give_back_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gpu.stats.update({"reserved_bytes.all.current": 43}))
    device = memory.Device(torch.device("cuda:0"), memory.idle())
    for reserved, held, cached in ((43, 70, 0), (55, 58, 12), (41, 70, 0)):
        gpu.stats["reserved_bytes.all.current"] = reserved
        assert device.read() == memory.Reading(total=100, held=held, cached=cached, allocated=40, peak=50)


def test_a_peak_that_somebody_else_made_start_anew_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, device = Gpu(monkeypatch), memory.Device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for peak, resets in ((50, 0), (60, 0), (41, 1), (41, 1), (70, 1)):
        gpu.stats["allocated_bytes.all.peak"] = peak
        device.read()
        assert device.resets == resets
    device.forget_peak()
    gpu.stats["allocated_bytes.all.peak"] = 40
    device.read()
    assert device.resets == 1


@pytest.mark.parametrize(
    ("recompute", "nbytes", "given_back"), [("least", 20, 0), ("least", 21, 1), ("needed", 1, 1), ("always", 1, 1)]
)
def test_what_torch_keeps_is_given_back_where_the_engine_needs_it(
    recompute: Any, nbytes: int, given_back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the device stays free."""
    PatchFastRL(recompute=recompute)
    gpu = Gpu(monkeypatch)
    memory.make_room(nbytes)
    assert gpu.given_back == given_back


@pytest.mark.parametrize(("nbytes", "lacking"), [(20, None), (21, 1), (35, 15), (40, 20)])
def test_as_much_is_given_back_as_lacks(nbytes: int, lacking: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what torch gets for it meanwhile may be as large as its peak is above what it has."""
    asked: list[Any] = []
    PatchFastRL()
    Gpu(monkeypatch)
    monkeypatch.setattr(memory, "return_some", lambda *both: asked.append(both))
    memory.make_room(nbytes)
    assert asked == ([] if lacking is None else [(lacking, 10)])


@given(st.lists(st.integers(1, 50)), st.integers(1, 200), st.integers(0, 200))
def test_no_more_is_given_back_than_has_to_be(free: list[int], nbytes: int, hidden: int) -> None:
    """Of free segments those that stay leave enough to give back, and are not larger than torch's peak hides."""
    stay = memory.to_stay(iter(free), nbytes, hidden)
    rest = sorted((Counter(free) - Counter(stay)).elements())
    assert Counter(stay) <= Counter(free)
    assert sum(stay) <= hidden
    assert not rest or not stay or max(stay) <= rest[0]
    if stay:
        assert sum(rest) >= nbytes
    if rest:  # no other one could have stayed
        assert sum(rest) - rest[0] < nbytes or sum(stay) + rest[0] > hidden


@pytest.mark.skipif(not tiny.GPU, reason="needs a GPU")
def test_torch_gives_a_part_of_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole segments that are free, not all of them, and its peak stays as it was."""

    def tensors(*mib: int) -> list[torch.Tensor]:
        return [torch.empty(n << 20, dtype=torch.uint8, device="cuda") for n in mib]

    def given_back(mib: int, hidden: int) -> int:
        before, peak = torch.cuda.mem_get_info()[0], torch.cuda.max_memory_allocated()
        memory.return_some(mib << 20, hidden << 20)
        assert torch.cuda.max_memory_allocated() == peak
        return (torch.cuda.mem_get_info()[0] - before) >> 20

    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    gone = tensors(300, 300, 100, 100, 64)
    del gone
    part = tensors(50)  # of the 64, which cannot go
    assert given_back(350, 800) == 600
    free = torch.cuda.mem_get_info()[0]
    gone = tensors(100, 100)
    assert torch.cuda.mem_get_info()[0] == free  # torch had kept them
    del gone
    assert given_back(1, 150) == 100  # no more than one of them can lie there unnoticed
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert given_back(1, 150) == 100
    del part


def test_which_segments_torch_would_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the current stream in torch's own pool in which nothing lies, and nothing waits for another stream."""
    told = {  # by torch: of the one that can be filled, and what keeps another from it
        "device": (0, 1),
        "stream": (7, 0),
        "segment_pool_id": ((0, 0), (0, 1)),
        "segment_type": ("large", "small"),
        "active_size": (0, 5),
        "is_expandable": (False, True),
    }
    usual = {name: value for name, (value, _) in told.items()}
    segments = [{**usual, "total_size": 100}, *({**usual, name: value} for name, (_, value) in told.items())]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert memory._free_segments() == [100]
    monkeypatch.setenv(name, "garbage_collection_threshold:0.8")
    assert memory._free_segments() == []


class Pool:
    """vLLM's own record of its pool; the driver's calls, which only a GPU's build of vLLM has, are noted down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
        from vllm.device_allocator import cumem

        self.called: list[tuple[str, int]] = []
        for name in ("unmap_and_release", "create_and_map"):
            monkeypatch.setattr(cumem, name, lambda handle, name=name: self.called.append((name[0], handle[2])))
        self.allocator = cumem.CuMemAllocator()
        monkeypatch.setattr(cumem.CuMemAllocator, "instance", self.allocator)
        for number, (name, size) in enumerate(sizes.items(), 1):
            self.allocator.current_tag = "own weights" if name.startswith("own") else "kv_cache"
            self.allocator._python_malloc_callback((0, size, 1000 * number, 0))
        self.worker = SimpleNamespace(
            sleep=lambda: self.allocator.sleep("weights"),
            wake_up=self.allocator.wake_up,
            add_lora=None,
            pin_lora=None,
        )

    def calls(self) -> list[tuple[str, int]]:
        """Since this was asked last: "u" for what was unmapped, "c" for what was mapped, and the address."""
        calls = self.called[:]
        self.called.clear()
        return calls


@pytest.mark.parametrize(("recompute", "given_back"), [("least", 0), ("needed", 1)])
def test_torch_keeps_its_memory_when_an_engine_sleeps(
    recompute: Any, given_back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own allocator gives it back and collects garbage."""
    PatchFastRL(recompute=recompute)
    gpu, frozen, pool = Gpu(monkeypatch), [], Pool(monkeypatch, cache=10)
    monkeypatch.setattr(torch.accelerator, "empty_cache", gpu.give_back)
    monkeypatch.setattr(gc, "collect", lambda: frozen.append(gc.get_freeze_count() > before))
    asleep, before = Asleep(pool.worker, True, PoolPieces()), gc.get_freeze_count()
    pool.worker.sleep()
    assert gpu.given_back == given_back
    pool.worker.wake_up(None)
    assert gpu.given_back == given_back
    assert asleep.resident
    assert pool.calls() == [("u", 1000), ("c", 1000)]
    assert frozen
    assert all(frozen)
    assert gc.get_freeze_count() == before
    torch.cuda.empty_cache()
    assert gpu.given_back == given_back + 1


def test_no_more_is_released_than_training_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    pool = Pool(monkeypatch, cache_1=10, own=5, cache_2=10, cache_3=10)
    asleep = Asleep(pool.worker, True, PoolPieces())
    with asleep.releasing(0):
        pool.worker.sleep()
    assert (asleep.resident, asleep.released(), asleep.releases) == (False, 0, 1)
    pool.worker.wake_up(None)
    assert asleep.resident
    assert pool.calls() == []
    with asleep.releasing(11):
        pool.worker.sleep()
    assert pool.calls() == [("u", 1000), ("u", 3000)]
    assert asleep.released() == 20
    assert not asleep.give_back(0)
    assert asleep.give_back(1)
    assert pool.calls() == [("u", 4000)]
    pool.worker.wake_up(["own weights"])  # is there
    assert not asleep.give_back(1)  # what is awake is needed
    assert pool.calls() == []
    pool.worker.wake_up(["kv_cache"])
    assert pool.calls() == [("c", 1000), ("c", 3000), ("c", 4000)]
    assert asleep.resident
    assert asleep.released() == 0
    assert not asleep.give_back()
    pool.worker.sleep()  # by somebody else, who wants all of it
    assert [address for _, address in pool.calls()] == [1000, 2000, 3000, 4000]
    pool.worker.sleep()
    assert pool.calls() == []
    with pytest.raises(StandbyError, match="Free what else"):
        pool.worker.wake_up(None)  # 35, where 30 are left
    assert pool.calls() == []
    pool.worker.wake_up(["own weights"])
    assert pool.calls() == [("c", 2000)]


ACTS = st.one_of(
    st.tuples(st.just("sleep"), st.none() | st.integers(0, 40)),
    st.tuples(st.just("give back"), st.none() | st.integers(0, 40)),
    st.tuples(st.just("wake"), st.sampled_from([None, ["own weights"], ["kv_cache"], ["weights", "kv_cache"]])),
)


@given(st.lists(ACTS, max_size=12), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_nothing_is_released_or_mapped_twice(acts: list[tuple[str, Any]], sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        Gpu(monkeypatch)
        pool = Pool(monkeypatch, own=3, **{f"cache_{number}": size for number, size in enumerate(sizes)})
        asleep, pieces = Asleep(pool.worker, True, PoolPieces()), dict(pool.allocator.pointer_to_data)
        mapped = set(pieces)
        for act, argument in [*acts, ("wake", None)]:
            if act == "sleep":
                with asleep.releasing(argument):
                    pool.worker.sleep()
            elif act == "give back":
                asleep.give_back(argument)
            else:
                pool.worker.wake_up(argument)
            for call, address in pool.calls():
                assert (address in mapped) == (call == "u")
                mapped ^= {address}
            assert asleep.released() == sum(pieces[a].handle[1] for a in pieces if a not in mapped)
            assert pool.allocator.pointer_to_data == pieces
            assert not asleep.resident or mapped == set(pieces)
        assert asleep.resident


def test_a_larger_micro_batch_is_measured_first() -> None:
    script = Script().measured(2, 12)
    kept = []
    for rows, length, wanted in (
        (2, 12, None),
        (1, 8, None),  # smaller
        (3, 12, None),  # more tokens
        (3, 12, None),
        (1, 20, None),  # a longer row
        (1, 20, None),
        (2, 12, 5),  # fewer logits
    ):
        script.step(rows, length, **({} if wanted is None else {"logits_to_keep": wanted}))
        kept.append(script.recompute.kept)
    assert kept == [4, 4, 0, 4, 0, 4, 4]


def test_more_logits_are_measured_first() -> None:
    script = Script().measured(3, 12, logits_to_keep=2)
    kept = []
    for wanted in (2, 1, 6, 6, 0, 12):
        script.step(3, 12, logits_to_keep=wanted)
        kept.append(script.recompute.kept)
    assert kept == [4, 4, 0, 4, 0, 4]


def test_the_first_generation_batch_is_recomputed() -> None:
    script = Script()
    script.step()
    assert script.recomputed == [0, 1, 2, 3]
    script.sleep()
    for _ in range(3):
        script.step()
        assert script.recomputed == [0, 1, 2, 3]
    script.sleep()
    script.step()
    assert script.recomputed == []


def test_what_took_more_than_expected_is_remembered() -> None:
    script = Script().measured()
    (found,) = script.recompute._measured.values()
    before = found.rest
    with script.tensors:
        loss = script.forward()
        more = torch.zeros(2**20)
        loss.backward()
    assert script.recompute.kept == LAYERS
    assert found.rest >= before + more.nbytes / 2
    del more
    script.sleep(before + sum(found.layers.values()))
    script.step()
    assert script.recompute.kept == 0


def test_layers_of_different_size() -> None:
    """Each counts with what itself keeps."""
    script = Script(lora=False)
    for layer, width in ((script.layers[0], 96), (script.layers[3], 960)):
        for name in ("gate_proj", "up_proj"):
            setattr(layer.mlp, name, torch.nn.Linear(64, width, bias=False))
        layer.mlp.down_proj = torch.nn.Linear(width, 64, bias=False)
    script.measured()
    (found,) = script.recompute._measured.values()
    first, second, third, last = found.layers.values()
    assert first == second == third < last / 3
    script.sleep(found.rest + last - 2048)
    script.step()
    assert script.recompute.kept == 0
    script.sleep(found.rest + last + first)
    script.step()
    assert script.recompute.kept == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_several_forwards_before_backward(reentrant: bool) -> None:
    """Only the first keeps; what it is measured by includes the others."""
    script = Script(reentrant)

    def step(*sizes: tuple[int, int]) -> tuple[list[int], dict[str, torch.Tensor]]:
        script.model.zero_grad()
        torch.manual_seed(0)
        kept, losses = [], []
        with script.tensors:
            script.tensors.forget_peak()
            for size in sizes:
                losses.append(script.forward(*size))
                kept.append(script.recompute.kept)
            torch.stack(losses).sum().backward()
            script.forward(*sizes[0]).backward()
        return kept, {n: p.grad.clone() for n, p in script.model.named_parameters() if p.grad is not None}

    sizes = ((1, 9), (1, 9), (1, 5))
    _, expected = step(*sizes)
    script.sleep()
    assert step(*sizes)[0] == [0, 0, 0]
    (found,) = script.recompute._measured.values()
    seen = []
    for part in (0, 3, 6, 9, 11):
        script.sleep(found.rest + sum(found.layers.values()) * part // 10)
        kept, gradients = step(*sizes)
        seen.append(kept[0])
        assert kept[1:] == [0, 0]
        assert script.tensors.peak <= script.recompute.limit
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert seen == [0, 1, 2, 3, 4]


def test_a_forward_without_backward() -> None:
    script = Script()
    script.sleep()
    for kept in (0, LAYERS):
        with script.tensors:
            loss = script.forward()
        script.step()
        assert script.recomputed == [0, 1, 2, 3]  # it may still come
        del loss
        script.step()
        assert script.recompute.kept == kept
        script.sleep()


# What stays as it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["evaluation", "no gradients", "compiled", "router logits", "hidden states", "set"])
def test_nothing_is_decided(case: str) -> None:
    script = Script().measured()
    kwargs = {"router logits": {"output_router_logits": True}, "hidden states": {"output_hidden_states": True}}
    if case == "evaluation":
        script.model.eval()
    elif case == "set":
        script.model.config.output_hidden_states = True
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(script.tensors, "read", None)
        if case == "compiled":
            patched.setattr(torch.compiler, "is_compiling", lambda: True)
        script.calls.clear()
        with torch.set_grad_enabled(case != "no gradients"):
            loss = script.forward(**kwargs.get(case, {}))
        if loss.requires_grad:
            loss.backward()
    assert script.recomputed == ([] if case in ("evaluation", "no gradients") else [0, 1, 2, 3])


def test_a_layer_without_a_gradient_to_pass_on_is_recomputed() -> None:
    """A reentrant checkpoint gives it no gradients of its own either."""
    script = Script().measured()
    script.model.get_input_embeddings()._forward_hooks.clear()
    script.step()
    assert script.recompute.kept == LAYERS
    assert script.recomputed == [0]


def test_a_layer_that_is_called_twice_keeps_once() -> None:
    script = Script(lora=False)
    script.model.model.layers = torch.nn.ModuleList([*script.layers[:3], script.layers[2]])
    script.recompute.remove()
    script.recompute = Recompute(script.model, script.tensors, least=False)  # type: ignore[arg-type]
    script.sleep()
    expected = script.step()
    script.sleep()
    gradients = script.step()
    assert script.recompute.kept == 3
    assert [script.calls.count(n) for n in range(3)] == [1, 1, 3]
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_every_other_layer_as_the_script_wants() -> None:
    script = Script()
    for layer in script.layers[::2]:
        layer.gradient_checkpointing = False
    script.measured()
    assert script.recomputed == [1, 3]
    script.step()
    assert script.recomputed == []
    script.layers[0].gradient_checkpointing = True  # measured without it
    script.step()
    assert script.recomputed == [0, 1, 3]


def test_an_error_in_a_forward_leaves_the_layers_as_they_were() -> None:
    script = Script().measured()
    with pytest.raises(RuntimeError, match="here"), pytest.MonkeyPatch.context() as patched:
        patched.setattr(script.layers[2].mlp, "forward", _fail)
        script.forward()
    script.step()
    assert script.recompute.kept == LAYERS


def _fail(*args: Any) -> None:
    raise RuntimeError("here")


def test_a_copy_decides_for_itself() -> None:
    script = Script(device=Numbers()).measured()
    other = copy.deepcopy(script.model)
    script.sleep(-ROOM)
    other(input_ids=torch.tensor([tiny.ids()]), logits_to_keep=1).logits.sum().backward()
    assert script.calls.count(0) == 1 + 2  # a hook of the test is not copied: the copy's layers count as well
    script.step()
    assert script.recomputed == [0, 1, 2, 3]


def test_removed() -> None:
    script = Script().measured()
    script.recompute.remove()
    script.step()
    assert script.recomputed == [0, 1, 2, 3]


def test_models_with_more_than_one_stack_are_left_alone() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    two = T5ForConditionalGeneration(T5Config(**sizes))
    assert recompute._stack(two) == []
    one = tiny.model(layers=3)
    assert recompute._stack(one) == list(one.model.layers)


def test_it_is_said_once_and_again_when_fewer_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    script = Script().measured()
    (found,) = script.recompute._measured.values()
    with caplog.at_level(logging.INFO, logger="patchfastrl"):
        for room in (ROOM, ROOM, found.rest + sum(found.layers.values()) // 2, ROOM, 0, ROOM):
            script.sleep(room)
            script.step()
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[2].split(" layers")[0] for line in said] == ["4 of 4", "2 of 4", "0 of 4"]
    assert "2 are recomputed" in said[1]
    assert "MiB" in said[0]


# What the engine still holds ------------------------------------------------------------------------------------------


class Engine(Tensors):
    """A device, and an engine that holds 3,000,000 bytes of it, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.stays, self.given_back = 100_000_000, False, 0
        self.asked: int | None = 0

    def read(self) -> memory.Reading:
        now = super().read()
        return dataclasses.replace(now, held=now.held + 3_000_000 * self.stays)

    def give_back(self, nbytes: int | None = None) -> bool:
        had, self.stays, self.asked = self.stays, False, nbytes
        self.given_back += had
        return had


def test_it_is_given_back_where_layers_then_keep_more() -> None:
    device, script = Engine(), Script()
    script.recompute.remove()
    script.tensors, script.recompute = device, Recompute(script.model, device, True, device.give_back)
    script.measured()
    (found,) = script.recompute._measured.values()
    needed = device.bytes() + found.rest + sum(found.layers.values())
    for total, given_back, kept in (
        (needed + 3_000_000, 0, LAYERS),
        (needed + 2_990_000, 1, LAYERS),
        (needed, 1, LAYERS),
        (needed - 10_000, 1, LAYERS - 1),
    ):
        device.total = total * 10 // 9 + 2000
        device.stays, device.given_back = True, 0
        script.step()
        assert (device.given_back, script.recompute.kept) == (given_back, kept)
        if given_back:
            assert device.asked is not None
            assert abs(device.asked - (needed + 3_000_000 - total)) < 10_000
        script.sleep()


# In a trainer ---------------------------------------------------------------------------------------------------------


class Numbers:
    """Readings that only ever grow: what is decided here is forced."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self) -> memory.Reading:
        self.reads += 1
        return memory.Reading(0, self.reads, 0, self.reads, self.reads)

    def forget_peak(self) -> None:
        pass


def run(folder: Path, kept: int | None, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    """Three steps of two micro-batches each, and everything that they leave."""
    found: dict[str, Any] = {"gradients": [], "kept": [], "calls": 0, "awake": []}

    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["gradients"].append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
            found["kept"].append(trainer.vllm_generation.llm.recompute.kept if kept is not None else None)

    class Seen(Numbers):
        def read(self) -> memory.Reading:
            found["awake"].append(llm.awake)
            return super().read()

    def count(*args: Any) -> None:
        found["calls"] += 1

    reentrant = settings.pop("reentrant")
    model = tiny.model("qwen2", layers=LAYERS)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(count)
    trainer = tiny.trainer(
        folder,
        model=model,
        peft_config=settings.pop("peft_config", None),
        callbacks=[Watching()],
        args={
            "max_steps": 3,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            "vllm_enable_sleep_mode": True,
            **settings,
        },
    )
    llm = trainer.vllm_generation.llm
    assert llm.recompute is None  # on a CPU
    hooks = dict(trainer.model._forward_pre_hooks)
    if kept is not None:
        monkeypatch.setattr(recompute, "layers_kept", lambda *_: kept)
        llm.recompute = Recompute(trainer.model, Seen(), least=True)  # type: ignore[arg-type]
    found["calls"] = 0
    trainer.train()
    found["parameters"] = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    found["logs"] = [
        {k: v for k, v in h.items() if "time" not in k and "per_second" not in k} for h in trainer.state.log_history
    ]
    found["report"] = llm.report()
    llm.close("the test is over.")
    assert dict(trainer.model._forward_pre_hooks) == hooks
    return found


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "full", "without standby"])
def test_a_training_is_the_same_bit_by_bit(
    method: str, reentrant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"reentrant": reentrant}
    if method == "without standby":
        settings["vllm_enable_sleep_mode"] = False
    if method != "full":
        settings |= {"peft_config": tiny.lora(lora_dropout=0.1), "beta": 0.1, "bf16": True}
    stock = run(tmp_path / "stock", None, monkeypatch, **settings)
    assert len(stock["gradients"]) == 3
    for kept in (1, LAYERS):
        ours = run(tmp_path / str(kept), kept, monkeypatch, **settings)
        assert ours["kept"] == [0, kept, kept]
        assert ours["report"]["layers_kept"] == kept
        if method == "without standby":
            assert all(ours["awake"])
        else:
            assert ours["awake"][0]
            assert ours["awake"].count(True) == 3  # once for each generation batch, before the memory is gone
        assert stock["calls"] - ours["calls"] == kept * 2 * 2  # micro-batches of the second and the third step
        assert ours["logs"] == stock["logs"]
        for one, other in (
            (ours["parameters"], stock["parameters"]),
            *zip(ours["gradients"], stock["gradients"], strict=True),
        ):
            assert len(one) == len(other) > 0
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("standby", [True, False])
@pytest.mark.parametrize(("wanted", "least"), [("least", True), ("needed", False), ("always", None), (None, True)])
def test_what_an_engine_on_a_gpu_does(wanted: Any, least: bool | None, standby: bool, tmp_path: Path) -> None:
    PatchFastRL(**({} if wanted is None else {"recompute": wanted}))
    trainer = tiny.trainer(tmp_path, args={"vllm_enable_sleep_mode": standby})
    llm = trainer.vllm_generation.llm
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine.current_platform, "is_cpu", lambda: False)
        patched.setattr(memory, "idle", lambda: 0)
        engine._prepare_training(llm, trainer.model)
    assert (None if llm.recompute is None else llm.recompute.least) is least
    llm.close("the test is over.")


# Settings -------------------------------------------------------------------------------------------------------------


def test_a_wrong_word_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"recompute='never'.*'least', 'needed' or 'always'"):
        PatchFastRL(recompute="never")  # type: ignore[arg-type]
