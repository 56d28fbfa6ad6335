"""Weights of the engine's own: merged rollouts, and 4-bit models. The trainer's weights are only ever read."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from patchfastrl import FastLanguageModel, PatchFastRL, engine_report, memory, rollouts, runtime
from patchfastrl.checksum import checksum
from patchfastrl.errors import AdapterError, SharingError, StandbyError, UnsupportedError
from patchfastrl.room import Room
from patchfastrl.sharing import base_parameters

PROMPT = tiny.ids(16)


pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture(autouse=True)
def with_the_default_settings(patched: None) -> None:
    PatchFastRL()


def quantised(nested: bool = True, dtype: torch.dtype = torch.float32, skip: list[str] | None = None) -> Any:
    """A bitsandbytes model as `from_pretrained` makes it."""
    import tempfile

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )
    with tempfile.TemporaryDirectory() as folder:
        tiny.checkpoint(folder, "qwen2", dtype)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=dtype)


def merged(model: Any, **kwargs: Any) -> Any:
    PatchFastRL(rollouts="merged")
    return tiny.engine(model, **kwargs)


def assert_alike(llm: Any, model: Any, limit: float = 1e-4) -> None:
    assert (tiny.engine_logprobs(llm, PROMPT) - tiny.logprobs(model, PROMPT)).abs().max() < limit


# Merged rollouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "lora"),
    [("qwen2", {}), ("phi3", {}), ("qwen2-tied", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True})],
)
def test_the_engine_follows_the_adapter_and_the_base_stays(family: str, lora: dict[str, Any]) -> None:
    model = tiny.adapted(tiny.model(family), **lora)
    before = {name: p.clone() for name, p in base_parameters(model).items()}
    base = tiny.logprobs(tiny.model(family), PROMPT)
    llm = merged(model)
    assert llm.merges
    assert llm.slot is None
    assert_alike(llm, model)
    for seed in (2, 3):
        tiny.scramble(model, seed=seed)
        with pytest.raises(SharingError, match="Publish first"):
            tiny.engine_greedy(llm, PROMPT)
        assert llm.publish()
        assert not llm.publish()
        assert_alike(llm, model)
        assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    # The base model, asked for by name, and the adapter again after it, neither from a cached prefix.
    assert (tiny.engine_logprobs(llm, PROMPT, lora_request=None) - base).abs().max() < 1e-4
    assert_alike(llm, model)
    with model.disable_adapter():
        llm.publish()
        assert_alike(llm, model)
    llm.publish()
    assert_alike(llm, model)
    for name, parameter in base_parameters(model).items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("rollouts", ["adapter", "merged"])
def test_trls_sync_publishes_when_the_batch_begins(rollouts: str) -> None:
    PatchFastRL(rollouts=rollouts)
    model = tiny.adapted(tiny.model("qwen2"))
    llm = tiny.engine(model, enable_sleep_mode=True)
    tiny.scramble(model, seed=5)
    llm.sleep()
    publishes = llm.publishes
    runtime.publish(SimpleNamespace(llm=llm))  # asleep, as TRL's may come
    assert llm.publishes == publishes
    llm.wake_up()
    tiny.scramble(model, seed=6)
    assert (tiny.engine_logprobs(llm, PROMPT) - tiny.logprobs(model, PROMPT)).abs().max() < 1e-4
    assert llm.publishes > publishes
    tiny.scramble(model, seed=7)
    with pytest.raises((AdapterError, SharingError), match=r"sync_weights\(\)"):
        tiny.engine_logprobs(llm, PROMPT)


@pytest.mark.parametrize(("rollouts", "compares"), [("adapter", "_apart"), ("merged", "_now")])
def test_trls_call_publishes_when_the_batch_begins(
    rollouts: str, compares: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    PatchFastRL(rollouts=rollouts)
    model = tiny.adapted(tiny.model("qwen2"))
    llm = tiny.engine(model)
    llm.publish()
    keeper, compared = llm.slot or llm.copies, []
    before = getattr(keeper, compares)
    monkeypatch.setattr(keeper, compares, lambda *args: compared.append(args) or before(*args))
    request = runtime.lora_request(llm)
    assert isinstance(request, LoRARequest)
    assert not compared
    tiny.scramble(model, seed=5)  # after the request was made: what counts is what the trainer has when it samples
    publishes = llm.publishes
    theirs = tiny.logprobs(model, PROMPT)
    assert (tiny.engine_logprobs(llm, PROMPT, lora_request=request) - theirs).abs().max() < 1e-4
    assert llm.publishes == publishes + 1
    compared.clear()
    request = runtime.lora_request(llm)
    assert (tiny.engine_logprobs(llm, PROMPT, lora_request=request) - theirs).abs().max() < 1e-4
    assert len(compared) == 1  # one pass over the weights a batch
    assert llm.publishes == publishes + 1
    with model.disable_adapter():
        base = tiny.logprobs(model, PROMPT)
        for request in (runtime.lora_request(llm), None):
            assert (tiny.engine_logprobs(llm, PROMPT, lora_request=request) - base).abs().max() < 1e-4
    assert (tiny.engine_logprobs(llm, PROMPT, lora_request=runtime.lora_request(llm)) - theirs).abs().max() < 1e-4


def test_only_what_the_adapter_changes_is_copied() -> None:
    model = tiny.adapted(tiny.model("qwen2"), target_modules=["down_proj"])
    llm = merged(model)
    own = {name for name, (place, _) in llm.shared.plan.views.items() if place in llm.shared.plan.own}
    assert own == {name for name in base_parameters(model) if "down_proj" in name}
    assert llm.shared.own_bytes == sum(base_parameters(model)[name].nbytes for name in own)
    assert engine_report_of(llm)["bytes_shared"] == llm.shared.bytes > llm.shared.own_bytes


def engine_report_of(llm: Any) -> dict[str, Any]:
    class Owner:
        pass

    owner = Owner()
    owner.llm = llm  # type: ignore[attr-defined]
    return engine_report(owner)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What vLLM's worker finds when it measures the memory for its KV cache, and a small answer of its own."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    found = {"left": 8 * 2**20}
    before = CPUWorker.determine_available_memory

    def measure(self: Any) -> int:
        before(self)
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in self.model_runner.model.parameters()}
        found["weights"] = sum(storage.nbytes() for storage in storages.values())
        return found["left"]

    monkeypatch.setattr(CPUWorker, "determine_available_memory", measure)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_there_is_one_copy_until_vllm_has_measured_the_memory(packed: bool, measured: dict[str, int]) -> None:
    model = tiny.adapted(quantised() if packed else tiny.model("qwen2"))
    llm = merged(model)
    largest = max(home.nbytes for home in llm.copies.storages())
    assert llm.shared.own_bytes > 4 * largest
    assert measured["weights"] == llm.shared.bytes + largest
    assert_alike(llm, model)


@pytest.mark.parametrize("given", [False, True])
def test_the_copy_is_taken_from_what_is_left_for_the_kv_cache(given: bool, measured: dict[str, int]) -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model, kv_cache_memory_bytes=measured["left"] if given else None)
    stood_in = max(home.nbytes for home in llm.copies.storages())
    room = measured["left"] - (0 if given else llm.shared.own_bytes - stood_in)
    cache = llm.llm_engine.vllm_config.cache_config
    block = sum(t.nbytes for t in llm.model_runner.kv_caches) // cache.num_gpu_blocks
    assert cache.num_gpu_blocks == room // block
    assert llm.shared.own_bytes - stood_in > block


def test_a_weight_that_vllm_replaces_while_it_measures_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    measure = CPUWorker.determine_available_memory

    def and_replace(self: Any) -> int:
        layer = self.model_runner.model.model.layers[1].mlp.down_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        return measure(self)

    monkeypatch.setattr(CPUWorker, "determine_available_memory", and_replace)
    with pytest.raises(SharingError, match=r"replaced model\.layers\.1\.mlp\.down_proj\.weight"):
        merged(tiny.adapted(tiny.model("qwen2")))


COMPILED = """
import sys
sys.path.insert(0, {tests!r})
from patchfastrl import PatchFastRL
PatchFastRL(rollouts="merged")
import tiny
from vllm.compilation.counter import compilation_counter
from vllm.config import CompilationMode
from vllm.platforms.cpu import CpuPlatform

choose = CpuPlatform.check_and_update_config

def as_on_a_gpu(vllm_config):
    choose(vllm_config)
    vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    vllm_config.compilation_config.compile_sizes = []

CpuPlatform.check_and_update_config = staticmethod(as_on_a_gpu)
model = tiny.adapted(tiny.model("qwen2"))
llm = tiny.engine(model, enforce_eager=False)
loaded = {loaded}
assert compilation_counter.num_aot_artifacts_loaded == loaded, compilation_counter
assert bool(compilation_counter.num_inductor_compiles) != loaded, compilation_counter
prompt = tiny.ids(16)
for seed in (2, 3):
    tiny.scramble(model, seed=seed)
    llm.publish()
    difference = (tiny.engine_logprobs(llm, prompt) - tiny.logprobs(model, prompt)).abs().max()
    assert difference < 1e-4, difference
print("FOLLOWED")
"""


@pytest.mark.timeout(240)
def test_a_compiled_engine_follows(tmp_path: Path) -> None:
    """Compiled while vLLM measures, before there is memory for the copy. The next process finds the graphs."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "VLLM_CACHE_ROOT": str(tmp_path)}
    del environment["TORCHDYNAMO_DISABLE"]
    for loaded in (False, True):
        code = COMPILED.format(tests=str(Path(__file__).parent), loaded=loaded)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert "FOLLOWED" in done.stdout, done.stderr[-2000:]


def test_standby_releases_the_copy_and_waking_makes_it_anew_before_the_kv_cache_is_there() -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model, enable_sleep_mode=True)
    storages = [t.untyped_storage() for t in llm.copies.storages()]
    assert all(s.nbytes() for s in storages)
    llm.sleep()
    assert not any(s.nbytes() for s in storages)
    assert not llm.publish()  # there is no memory to put it into
    tiny.scramble(model, seed=2)
    asleep, publishes = [], llm.publishes
    refresh = llm.copies.refresh
    llm.copies.refresh = lambda *args: asleep.append(not llm.awake) or refresh(*args)
    llm.wake_up()
    del llm.copies.refresh
    assert asleep == [True]
    assert llm.publishes == publishes + 1
    assert not llm.publish()  # nothing has changed since
    assert_alike(llm, model)


def test_without_standby_the_copy_is_there_while_a_batch_runs() -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model)
    storages = [t.untyped_storage() for t in llm.copies.storages()]
    sizes: list[int] = []
    step = llm.llm_engine.engine_core.get_output
    llm.llm_engine.engine_core.get_output = lambda: sizes.append(sum(s.nbytes() for s in storages)) or step()
    for seed in (2, 3):
        assert not any(s.nbytes() for s in storages)
        tiny.scramble(model, seed=seed)
        with pytest.raises(SharingError, match="Publish first"):
            tiny.engine_greedy(llm, PROMPT)
        assert llm.publish()
        assert not llm.publish()
        assert not sizes
        assert_alike(llm, model)
        assert set(sizes) == {llm.shared.own_bytes}
        sizes.clear()
    # The base model, asked for by name, and the adapter after it.
    with model.disable_adapter():
        base = tiny.logprobs(model, PROMPT)
    assert (tiny.engine_logprobs(llm, PROMPT, lora_request=None) - base).abs().max() < 1e-4
    assert_alike(llm, model)
    # A batch of one policy after another may use the prefixes of the first.
    cached = []
    for _ in range(2):
        params = SamplingParams(temperature=0.0, max_tokens=2, detokenize=False)
        output = llm.generate([{"prompt_token_ids": tiny.ids(160)}], sampling_params=params, use_tqdm=False)
        cached.append(output[0].num_cached_tokens)
    assert cached[0] == 0
    assert cached[1] > 0
    sizes.clear()
    llm.llm_engine.engine_core.get_output = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tiny.engine_greedy(llm, PROMPT)
    assert not any(s.nbytes() for s in storages)
    llm.close("the test is over.")


def test_without_standby_the_copy_stays_where_training_fits_beside_it() -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)

    def trainers_batch() -> None:
        request = runtime.lora_request(llm)
        output = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False, lora_request=request)[0]
        assert list(output.outputs[0].token_ids) == tiny.greedy(model, PROMPT)

    trainers_batch()
    assert not llm.copies.resident
    llm.room = Room(model, tiny.Roomy(), llm.give_back)
    model.train()
    llm.room._trained_on, llm.room._batches = 2, [(1000, 1000)]
    llm.room._complete = True
    optimizer = torch.optim.SGD(model.parameters())
    llm.room._optimizer = weakref.ref(optimizer)
    llm.room._forwards = [(10**6, 10**6, 10**6)]  # forwards here compare
    for seed in (2, 3, 4):
        tiny.scramble(model, seed=seed)
        trainers_batch()
        assert llm.copies.resident
    releases = llm.copies.releases
    assert not llm.publish()  # what stayed is not made again
    trainers_batch()
    assert llm.copies.releases == releases
    assert llm.give_back()
    assert not llm.give_back()
    assert not llm.copies.resident
    trainers_batch()
    assert llm.copies.resident
    assert_alike(llm, model)  # a batch that nobody trains on
    assert not llm.copies.resident
    llm.room._device = tiny.Roomy(100)
    trainers_batch()
    assert not llm.copies.resident
    llm.room._device = tiny.Roomy()
    trainers_batch()
    llm.llm_engine.engine_core.get_output = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainers_batch()
    assert not llm.copies.resident
    llm.close("the test is over.")


@pytest.mark.parametrize("standby", [False, True])
def test_a_batch_inside_a_batch_has_the_same_weights(standby: bool) -> None:
    """`chat` of some vLLM releases calls `generate` with the request that it was given, `beam_search` once a token."""
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model, enable_sleep_mode=standby)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)

    def as_in_older_releases(prompts: Any, **kwargs: Any) -> Any:
        first = llm.generate(prompts, **kwargs)
        return first, llm.generate(prompts, **kwargs)

    for seed in (2, 3):
        tiny.scramble(model, seed=seed)
        llm.publish()
        for request in (llm.current_request(), runtime.lora_request(llm)):
            prompts, settings = [{"prompt_token_ids": PROMPT}], {"sampling_params": params, "use_tqdm": False}
            outputs = llm._sample(as_in_older_releases, (prompts,), settings, request)
            assert [list(o[0].outputs[0].token_ids) for o in outputs] == [tiny.greedy(model, PROMPT)] * 2
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    beams = BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True)
    found = llm.beam_search([{"prompt_token_ids": PROMPT}], beams)
    assert found[0].sequences[0].tokens[-12:] == tiny.greedy(model, PROMPT)


@pytest.mark.parametrize("rollouts", ["merged", "adapter"])
def test_prefixes_of_an_older_adapter_go_when_the_next_batch_begins(
    rollouts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the adapter is published: vLLM goes through all its blocks for it, and a GPU can merge meanwhile."""
    PatchFastRL(rollouts=rollouts)
    model = tiny.adapted(tiny.model("qwen2"))
    llm = tiny.engine(model)
    long = tiny.ids(llm.llm_engine.vllm_config.cache_config.block_size + 9)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    reset, emptied = pool.reset_prefix_cache, []
    monkeypatch.setattr(pool, "reset_prefix_cache", lambda *args: emptied.append(1) or reset(*args))
    for seed in (5, 6):
        tiny.scramble(model, seed=seed)
        assert llm.publish()
        assert not emptied
        assert tiny.cached_tokens(llm, long) == 0 < tiny.cached_tokens(llm, long)
        assert len(emptied) == (seed == 6)
        assert (tiny.engine_logprobs(llm, long) - tiny.logprobs(model, long)).abs().max() < 1e-4
        emptied.clear()


def test_the_first_lines_say_when_the_copy_is_there() -> None:
    from patchfastrl import start_block

    llm = merged(tiny.adapted(tiny.model("qwen2")))
    assert "to be merged into, released while nothing is sampled" in start_block.of(llm, sleep_mode=False)
    assert "to be merged into, released by standby" in start_block.of(llm, sleep_mode=True)
    llm.copies._scratch.take()
    llm.copies.live_in(None)  # as with expandable segments on a GPU
    assert "to be merged into, there for good" in start_block.of(llm, sleep_mode=False)


def test_memory_that_cannot_be_taken_is_an_error_and_the_next_batch_may_have_it() -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model)
    scratch = llm.copies._scratch
    take = scratch.take

    def fail() -> None:
        raise StandbyError("nothing is left")

    scratch.take = fail
    with pytest.raises(StandbyError, match="nothing is left"):
        tiny.engine_greedy(llm, PROMPT)
    scratch.take = take
    assert_alike(llm, model)


def test_an_error_while_the_copy_is_made_leaves_an_engine_that_is_awake() -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model, enable_sleep_mode=True)
    llm.sleep()
    model.add_adapter("other", tiny.lora(target_modules=["lm_head"]))
    model.set_adapter("other")
    with pytest.raises(AdapterError, match="not built to merge"):
        llm.wake_up()
    assert llm.awake
    model.set_adapter("default")
    with pytest.raises(SharingError, match="released.*Publish first"):
        tiny.engine_greedy(llm, PROMPT)
    assert llm.publish()
    assert_alike(llm, model)


def test_without_room_to_wake_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the memory were a GPU's, with room for the copy and not for the KV cache."""
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model, enable_sleep_mode=True)
    llm.sleep()
    with monkeypatch.context() as full:
        full.setattr(llm._standby, "free", lambda: llm.shared.own_bytes)
        with pytest.raises(StandbyError, match="Free what else"):
            llm.wake_up()
        assert all(copy.untyped_storage().nbytes() == 0 for copy in llm.copies.storages())
    llm.wake_up()
    assert_alike(llm, model)


def test_a_worker_that_slept_past_the_engine_is_noticed() -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model, enable_sleep_mode=True)
    llm.worker.sleep()
    llm.worker.wake_up()
    with pytest.raises(SharingError, match="Publish first"):
        tiny.engine_greedy(llm, PROMPT)
    llm.publish()
    assert_alike(llm, model)


@pytest.mark.parametrize("write", ["weight", "adapter", "scaling"])
def test_every_change_is_noticed(write: str) -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    llm = merged(model)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    with torch.no_grad():
        if write == "weight":
            layer.base_layer.weight.data[0, 0] += 1
        elif write == "adapter":
            layer.lora_B["default"].weight.data[0, 0] += 1
        else:
            layer.scaling["default"] *= 2
    with pytest.raises(SharingError, match="Publish first"):
        tiny.engine_greedy(llm, PROMPT)
    assert llm.publish()
    assert_alike(llm, model)


def test_an_adapter_on_weights_that_have_no_copy_is_refused() -> None:
    model = tiny.adapted(tiny.model("qwen2"), target_modules=["down_proj"])
    llm = merged(model)
    model.add_adapter("other", tiny.lora(target_modules=["up_proj"]))
    model.set_adapter("other")
    with pytest.raises(AdapterError, match="not built to merge"):
        llm.publish()


def test_another_adapter_needs_a_slot() -> None:
    from vllm.lora.request import LoRARequest

    llm = merged(tiny.adapted(tiny.model("qwen2")))
    with pytest.raises(UnsupportedError, match=r"no slot.*max_lora_rank"):
        tiny.engine_greedy(llm, PROMPT, lora_request=LoRARequest("other", 7, "nowhere"))


def test_too_small_a_share_is_refused_with_what_to_set() -> None:
    with pytest.raises(UnsupportedError, match=r"copied .* Raise vllm_gpu_memory_utilization, or .*'adapter'"):
        merged(tiny.adapted(tiny.model("qwen2")), gpu_memory_utilization=1e-6)


def test_how_much_room_the_default_wants_to_merge() -> None:
    from transformers import LlamaConfig

    eight = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131072,
    )  # fmt: skip

    def room(**engine: Any) -> float:
        new = engine.pop("new", None)
        return rollouts.room_to_merge(13 * 2**30, eight, torch.bfloat16, engine, new) / 2**30

    assert 13 + 2 + 0.75 * 8.25 < room(max_num_seqs=32, max_model_len=2112, new=2048) < 0.3 * 79.2
    # Without a length of the engine: what the completions need, and vLLM's one longest sequence.
    assert room(max_num_seqs=32, new=512) == 13 + 2 + 16 + 1 / 64
    assert room(max_num_seqs=64, new=4096) > 13 + 2 + 0.75 * 64
    assert room(max_num_seqs=32) > 13 + 2 + 0.75 * 32 * 16
    assert room() == room(max_num_seqs=16)


def test_where_the_default_does_not_merge_a_line_says_what_would(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rollouts, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(memory, "device_bytes", lambda: 80 * 2**30)
    model = tiny.adapted(tiny.model("qwen2"))

    def merges(share: float, most: float = 0.95) -> bool:
        caplog.clear()
        engine = {"gpu_memory_utilization": share, "max_model_len": 64, "max_num_seqs": 8}
        copied, merges = rollouts.merged(model, torch.float32, True, engine, most=most)
        assert bool(copied) == merges != bool(caplog.text)
        return merges

    assert not merges(0.02)
    assert "From vllm_gpu_memory_utilization=0.03 on (now 0.02)" in caplog.text
    assert not merges(0.02, most=0.02)  # the trainer has the rest
    assert "no room for one on this device" in caplog.text
    assert merges(0.03)
    monkeypatch.setattr(memory, "device_bytes", lambda: 2 * 2**30)
    assert not merges(0.9)
    assert "no room for one on this device" in caplog.text


def test_a_wrong_word_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="rollouts='sometimes'"):
        PatchFastRL(rollouts="sometimes")  # type: ignore[arg-type]


def test_the_default_on_a_cpu_is_the_adapter() -> None:
    llm = tiny.engine(tiny.adapted(tiny.model("qwen2")), enable_sleep_mode=True)
    assert not llm.merges
    assert llm.slot is not None


def test_grpo_with_merged_rollouts(tmp_path: Any) -> None:
    PatchFastRL(rollouts="merged")
    from trl import GRPOTrainer

    model = tiny.model("qwen2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=tiny.length_reward,
        args=tiny.config(tmp_path, vllm_enable_sleep_mode=True, max_steps=3),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(),
    )
    trainer.train()
    llm = trainer.vllm_generation.llm
    logs = [line["sampling/sampling_logp_difference/max"] for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 3
    assert max(logs) < 1e-4
    assert llm.publishes >= 3
    assert llm.copies.releases >= 3
    for name, parameter in base_parameters(trainer.model).items():
        assert torch.equal(parameter, before[name]), name
    llm.close("the test is over.")


# 4-bit models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nested", "skip"), [(True, None), (False, None), (True, ["lm_head", "model.layers.0.mlp.up_proj"])]
)
def test_a_4_bit_model(nested: bool, skip: list[str] | None) -> None:
    model = quantised(nested, skip=skip)
    packed = {n: p.data.clone() for n, p in model.named_parameters()}
    assert any(p.dtype == torch.uint8 for p in packed.values())
    model = tiny.adapted(model)
    llm = tiny.engine(model)
    assert llm.merges
    assert_alike(llm, model)
    tiny.scramble(model, seed=5)
    llm.publish()
    assert_alike(llm, model)
    assert {p.dtype for p in llm.shared.engine_model.parameters()} == {torch.float32}
    for name, parameter in base_parameters(model).items():
        assert torch.equal(parameter.data, packed[name]), name


@pytest.mark.parametrize(
    ("nested", "part"),
    [
        (False, "quant_state.absmax"),
        (True, "data"),
        (True, "quant_state.absmax"),
        (True, "quant_state.state2.absmax"),
        (True, "quant_state.offset"),
    ],
)
def test_no_part_of_a_packed_weight_changes_unnoticed(nested: bool, part: str) -> None:
    model = tiny.adapted(quantised(nested))
    llm = tiny.engine(model)
    weight = base_parameters(model)["model.layers.0.mlp.up_proj.weight"]
    llm.publish()
    llm.copies.check()
    operator.attrgetter(part)(weight).view(-1)[0].add_(1)
    with pytest.raises(SharingError, match="was trained \\(or written to\\) since"):
        llm.copies.check()
    assert llm.publish()
    llm.copies.check()
    assert_alike(llm, model)


def test_the_audit_alters_packed_weights_too() -> None:
    """An engine that computes with something else than what is unpacked into it does not pass."""
    from patchfastrl.audit import audit

    llm = tiny.engine(tiny.adapted(quantised()), enable_sleep_mode=True)
    audit(llm)
    copies = llm.copies
    stale = copies._held
    copies.refresh = lambda adapter=True: False  # unpacks nothing any more
    copies.check = lambda adapter=True: None
    copies._held = stale
    with pytest.raises(SharingError, match="after writing into the trainer's parameters"):
        audit(llm)


def test_grpo_on_a_4_bit_model(tmp_path: Any) -> None:
    from transformers import BitsAndBytesConfig
    from trl import GRPOTrainer

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    trainer = GRPOTrainer(
        model=tiny.checkpoint(tmp_path / "model"),
        reward_funcs=tiny.length_reward,
        args=tiny.config(tmp_path, max_steps=3, model_init_kwargs={"quantization_config": how, "dtype": "float32"}),
        train_dataset=tiny.prompts(),
        peft_config=tiny.lora(),
    )
    packed = {n: p.data.clone() for n, p in base_parameters(trainer.model).items()}
    assert any(p.dtype == torch.uint8 for p in packed.values())
    trainer.train()
    logs = [line["sampling/sampling_logp_difference/mean"] for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 3
    assert max(logs) < 0.02  # TRL keeps the adapter of a 4-bit model in bfloat16
    for name, parameter in base_parameters(trainer.model).items():
        assert torch.equal(parameter.data, packed[name]), name
    trainer.vllm_generation.llm.close("the test is over.")


def test_fast_language_model_in_4_bits(tmp_path: Any) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        tiny.checkpoint(tmp_path, "qwen2"), max_seq_length=256, max_lora_rank=8, gpu_memory_utilization=0.2
    )
    llm = model.vllm_engine
    assert_alike(llm, model)
    model = FastLanguageModel.get_peft_model(model, r=8)
    llm.publish()
    assert llm.merges
    tiny.scramble(model)
    llm.publish()
    assert_alike(llm, model)
    first = tiny.engine_logprobs(llm, PROMPT)
    model.save_lora(str(tmp_path / "saved"))
    request = model.load_lora(str(tmp_path / "saved"))
    tiny.scramble(model, seed=9)
    llm.publish()
    assert (tiny.engine_logprobs(llm, PROMPT, lora_request=request) - first).abs().max() < 1e-3
    assert_alike(llm, model)


# Checksums ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=5), data=st.data())
def test_a_checksum_changes_with_any_byte_and_with_any_order(sizes: list[int], data: Any) -> None:
    tensors = [torch.randint(0, 255, (n,), dtype=torch.uint8) for n in sizes]
    before = checksum(tensors)
    assert checksum(tensors) == before
    which = data.draw(st.integers(0, len(sizes) - 1))
    place = data.draw(st.integers(0, sizes[which] - 1))
    tensors[which][place] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(tensors) != before
    if len(tensors) > 1 and not torch.equal(tensors[0], tensors[1]):
        assert checksum([tensors[1], tensors[0], *tensors[2:]]) != checksum(tensors)
