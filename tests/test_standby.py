"""Standby: the KV cache is gone while training and back before sampling, the weights never move, whatever happens."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch

from patchfastrl import PatchFastRL, UnpatchFastRL, engine, memory
from patchfastrl.errors import AdapterError, PatchFastRLError, StandbyError, UnsupportedError
from patchfastrl.room import Room

pytestmark = pytest.mark.timeout(120)

MIB = 2**20
PROMPT = tiny.ids(24)


def resident() -> int:
    """Bytes that this process alone holds in memory."""
    gc.collect()
    return psutil.Process().memory_full_info().uss


def close_all() -> None:
    from patchfastrl import engine

    gc.collect()
    for llm in list(engine.live):
        llm.close("the test is over.")


def map_once(llm: Any) -> Any:
    """From now on this engine's memory is as strict as a GPU's: neither released nor taken twice."""
    storages, (release, take) = llm._standby, (llm._standby.release, llm._standby.take)

    def release_once() -> None:
        assert not storages._released.intersection(storages._only), "released twice"
        release()

    def take_once(tags: list[str] | None = None) -> None:
        for number, (tag, _, _) in enumerate(storages._storages):
            taken = number in storages._only and (tags is None or tag in tags)
            assert number in storages._released or not taken, "taken twice"
        take(tags)

    storages.release, storages.take = release_once, take_once
    return llm


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Any, Any]]:
    """An engine and its model."""
    model = tiny.model("qwen2-tied")
    yield map_once(tiny.engine(model, enable_sleep_mode=True)), model
    close_all()


@pytest.fixture
def pair(shared: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """`shared`, awake before and usable after the test."""
    shared[0].wake_up()
    assert_consistent(*shared)
    yield shared
    shared[0].wake_up()
    assert_consistent(*shared)


def assert_consistent(llm: Any, model: Any) -> None:
    """Awake, nothing of an earlier batch left, every completion is its own prompt's."""
    from vllm import SamplingParams

    assert llm.awake
    assert not llm.llm_engine.has_unfinished_requests()
    prompts = [tiny.ids(n, start) for n, start in ((24, 3), (5, 11), (40, 29))]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
    for _ in range(2):  # the second time from the prefix cache
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert [o.prompt_token_ids for o in outputs] == prompts
        assert [list(o.outputs[0].token_ids) for o in outputs] == [tiny.greedy(model, p, 6) for p in prompts]
    free = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert free == llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1  # vLLM keeps one for itself


def assert_asleep(llm: Any) -> None:
    """Every way of sampling is refused at once."""
    from vllm.sampling_params import BeamSearchParams

    start = time.perf_counter()
    with pytest.raises(StandbyError, match="wake_up"):
        tiny.engine_greedy(llm, PROMPT)
    with pytest.raises(StandbyError, match="wake_up"):
        llm.generate("the cat", use_tqdm=False)
    with pytest.raises(StandbyError, match="wake_up"):
        llm.chat([{"role": "user", "content": "the cat"}], use_tqdm=False)
    with pytest.raises(StandbyError, match="wake_up"):
        llm.beam_search(["the cat"], BeamSearchParams(beam_width=2, max_tokens=4))
    with pytest.raises(UnsupportedError, match="enqueue"):
        llm.enqueue(["the cat"])
    assert time.perf_counter() - start < 5
    assert not llm.llm_engine.has_unfinished_requests()


# Memory -------------------------------------------------------------------------------------------------------------


def test_memory_comes_back_and_returns() -> None:
    llm = tiny.engine(tiny.model(), enable_sleep_mode=True, kv_cache_memory_bytes=256 * MIB)
    llm.sleep()
    llm.wake_up()  # now every page of the cache has been touched
    for _ in range(2):
        awake = resident()
        llm.sleep()
        asleep = resident()
        assert 250 * MIB < awake - asleep < 262 * MIB
        assert_asleep(llm)
        llm.wake_up()
        assert abs(resident() - awake) < 6 * MIB


# Every sleep by everyone --------------------------------------------------------------------------------------------

SLEEPS: dict[str, Callable[[Any], Any]] = {
    "sleep()": lambda llm: llm.sleep(),
    "sleep(0)": lambda llm: llm.sleep(0),
    "sleep(1)": lambda llm: llm.sleep(1),
    "sleep(level=2)": lambda llm: llm.sleep(level=2),
    "sleep(0), sleep(2)": lambda llm: (llm.sleep(0), llm.sleep(2)),
    "engine.sleep(0)": lambda llm: llm.llm_engine.sleep(0),
    "engine.sleep(1)": lambda llm: llm.llm_engine.sleep(1),
    "engine.sleep(2)": lambda llm: llm.llm_engine.sleep(level=2),
    "core.sleep(2)": lambda llm: llm.llm_engine.engine_core.sleep(2),
    "executor.sleep(2)": lambda llm: llm.llm_engine.model_executor.sleep(2),
    "rpc sleep(2)": lambda llm: llm.collective_rpc("sleep", kwargs={"level": 2}),
    "rpc sleep(1)": lambda llm: llm.collective_rpc("sleep", args=(1,)),
    "worker.sleep(2)": lambda llm: llm.worker.sleep(2),
}
FREES_MEMORY = [name for name in SLEEPS if name not in ("sleep(0)", "engine.sleep(0)")]


@pytest.mark.parametrize("by", SLEEPS)
def test_no_sleep_loses_weights(pair: tuple[Any, Any], by: str) -> None:
    llm, model = pair
    block = llm.llm_engine.vllm_config.cache_config.block_size
    long = tiny.ids(block + 9)
    expected = tiny.engine_greedy(llm, long)
    assert tiny.cached_tokens(llm, long) == block
    weights = {n: p.clone() for n, p in model.named_parameters()}
    SLEEPS[by](llm)
    assert_asleep(llm)
    assert (llm._standby.resident is False) == (by in FREES_MEMORY)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    llm.shared.check()
    llm.wake_up()
    assert llm._standby.resident
    # What the cache held is gone, so no prefix may be taken for one that is there.
    assert tiny.engine_greedy(llm, long) == expected == tiny.greedy(model, long)


def test_sleeping_and_waking_twice(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    llm.wake_up()
    assert_consistent(llm, model)
    llm.sleep(1)
    llm.sleep(2)
    llm.sleep(0)
    assert_asleep(llm)
    llm.wake_up()
    llm.wake_up()
    llm.wake_up(tags=["kv_cache"])
    assert_consistent(llm, model)


def test_waking_by_tags(pair: tuple[Any, Any]) -> None:
    """TRL wakes "weights", writes them, then wakes "kv_cache"."""
    llm, model = pair
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    assert not llm._standby.resident
    assert_asleep(llm)
    llm.wake_up(tags=["kv_cache"])
    assert_consistent(llm, model)
    llm.sleep(level=2)
    llm.wake_up(tags=["kv_cache"])
    llm.wake_up(tags=["weights"])
    assert_consistent(llm, model)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights", "kv_cache"])
    assert_consistent(llm, model)
    llm.sleep(0)
    llm.wake_up(tags=["scheduling"])
    assert_consistent(llm, model)


def test_waking_behind_our_back(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    llm.sleep(level=2)
    llm.llm_engine.wake_up(["kv_cache"])
    assert_asleep(llm)  # vLLM would spin: it counts as asleep until all tags are awake
    llm.wake_up()
    assert_consistent(llm, model)
    llm.sleep(level=2)
    llm.llm_engine.wake_up(["weights"])
    assert_asleep(llm)
    llm.llm_engine.wake_up(["kv_cache"])
    assert_consistent(llm, model)
    llm.collective_rpc("sleep", kwargs={"level": 2})
    llm.collective_rpc("wake_up")
    assert_consistent(llm, model)
    llm.sleep()
    llm.collective_rpc("sleep")
    llm.collective_rpc("wake_up", kwargs={"tags": ["kv_cache"]})
    llm.collective_rpc("wake_up")
    assert_asleep(llm)
    llm.wake_up()
    assert_consistent(llm, model)


@pytest.fixture
def full_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The engine's memory is as if it were a GPU's, of which too little is left. `undo()` frees enough."""
    from patchfastrl.compat.cpu_standby import Storages

    monkeypatch.setattr(Storages, "free", lambda *_: 100)
    return monkeypatch


def test_waking_without_room_changes_nothing(pair: tuple[Any, Any], full_gpu: pytest.MonkeyPatch) -> None:
    llm, model = pair
    llm.sleep()
    for _ in range(2):
        with pytest.raises(StandbyError, match=r"takes [1-9].* MiB .* 0.0 MiB are left"):
            llm.wake_up()
        assert_asleep(llm)
    full_gpu.undo()
    llm.wake_up()
    assert_consistent(llm, model)


def test_an_engine_without_standby_does_not_sleep(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, model = pair
    monkeypatch.setattr(llm._asleep, "able", False)
    for sleep in (llm.sleep, llm.worker.sleep):
        with pytest.raises(StandbyError, match="built without standby"):
            sleep()
    assert_consistent(llm, model)
    llm.sleep(0)  # only pauses
    llm.wake_up()


def test_weights_written_while_asleep_are_followed(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    block = llm.llm_engine.vllm_config.cache_config.block_size
    long = tiny.ids(block + 9)
    before = tiny.engine_greedy(llm, long)
    llm.sleep(level=2)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.5)
    llm.wake_up()
    after = tiny.engine_greedy(llm, long)
    assert before != after == tiny.greedy(model, long)


def test_the_prefix_cache_is_emptied_only_where_there_is_something_in_it(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM goes through all blocks for it, and has done so already when the engine falls asleep."""
    llm, model = pair
    long = tiny.ids(llm.llm_engine.vllm_config.cache_config.block_size + 9)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    llm.drop_prefixes()
    emptied = []
    reset = pool.reset_prefix_cache
    monkeypatch.setattr(pool, "reset_prefix_cache", lambda *args: emptied.append(1) or reset(*args))

    def write() -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.neg_()

    assert tiny.cached_tokens(llm, long) == 0 < tiny.cached_tokens(llm, long)
    llm.sleep()
    asleep = len(emptied)
    assert asleep >= 1
    write()
    llm.wake_up()
    assert tiny.cached_tokens(llm, long) == 0 < tiny.cached_tokens(llm, long)
    assert len(emptied) == asleep
    write()
    assert tiny.cached_tokens(llm, long) == 0
    assert len(emptied) == asleep + 1


def test_awakened_sleeps_again(pair: tuple[Any, Any]) -> None:
    llm, _ = pair
    llm.sleep()
    with pytest.raises(ZeroDivisionError), llm.awakened():
        tiny.engine_greedy(llm, PROMPT)
        raise ZeroDivisionError
    assert_asleep(llm)


# Interruptions ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted_by_ctrl_c(after: float) -> Iterator[None]:
    """Expects the block to be left by a Ctrl-C that is pressed after so many seconds.

    It is pressed again every five seconds: Python drops one that hits while garbage is collected.
    """
    over = threading.Event()

    def press() -> None:
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)
        while not over.wait(5):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        try:
            yield
        finally:
            over.set()
    thread.join()


def generate_much(llm: Any) -> None:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": tiny.ids(20, n)} for n in range(16)]  # more than run at once
    params = SamplingParams(temperature=1.0, max_tokens=220, ignore_eos=True, detokenize=False)
    for _ in range(50):
        llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize("after", [0.02, 0.1, 0.35])
def test_ctrl_c_while_sampling(pair: tuple[Any, Any], after: float) -> None:
    llm, model = pair
    with interrupted_by_ctrl_c(after):
        generate_much(llm)
    assert_consistent(llm, model)
    llm.sleep(level=2)
    assert_asleep(llm)
    llm.wake_up()
    assert_consistent(llm, model)


def test_ctrl_c_while_sleeping_and_waking(pair: tuple[Any, Any]) -> None:
    llm, model = pair

    def sleep_and_wake() -> None:
        while True:
            llm.sleep(level=2)
            llm.wake_up()

    for after in (0.01, 0.023, 0.05, 0.087, 0.11, 0.2):
        with interrupted_by_ctrl_c(after):
            sleep_and_wake()
        llm.wake_up()
        assert_consistent(llm, model)


class InterruptAtLine:
    """Sends SIGINT at the n-th line that vLLM or PatchFastRL executes: every place where Ctrl-C can hit."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.seen = 0

    def __enter__(self) -> InterruptAtLine:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(None)

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_globals.get("__name__", "")
        return self._step if name.startswith(("vllm.", "patchfastrl.")) else None

    def _step(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self._step


def lines_of(action: Callable[[], Any]) -> int:
    with InterruptAtLine(0) as count:
        action()
    return count.seen


def test_interrupted_at_any_line_of_sleep_and_wake(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    sleeping = lines_of(lambda: llm.sleep(level=2))
    waking = lines_of(llm.wake_up)
    assert min(sleeping, waking) > 20
    for line in range(1, sleeping + 1):
        with pytest.raises(KeyboardInterrupt), InterruptAtLine(line):
            llm.sleep(level=2)
        assert llm.awake or pytest.raises(StandbyError, tiny.engine_greedy, llm, PROMPT)
        if line % 2:
            llm.sleep(level=2)
            assert not llm._standby.resident, line
        llm.wake_up()
        assert tiny.engine_greedy(llm, PROMPT, 4) == tiny.greedy(model, PROMPT, 4), line
    for line in range(1, waking + 1):
        llm.sleep(level=2)
        with pytest.raises(KeyboardInterrupt), InterruptAtLine(line):
            llm.wake_up()
        assert llm.awake or pytest.raises(StandbyError, tiny.engine_greedy, llm, PROMPT)
        llm.wake_up()
        assert tiny.engine_greedy(llm, PROMPT, 4) == tiny.greedy(model, PROMPT, 4), line


def test_interrupted_at_many_lines_of_a_batch(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": tiny.ids(10, n)} for n in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, detokenize=False)
    total = lines_of(lambda: llm.generate(prompts, params, use_tqdm=False))
    other = tiny.ids(17, 40)
    expected = tiny.greedy(model, other, 4)
    interrupted = 0
    for line in range(1, total, max(1, total // 150)):
        try:
            with InterruptAtLine(line):
                llm.generate(prompts, params, use_tqdm=False)
        except KeyboardInterrupt:
            interrupted += 1
        assert not llm.llm_engine.has_unfinished_requests(), line
        assert tiny.engine_greedy(llm, other, 4) == expected, line
    assert interrupted > 120
    assert_consistent(llm, model)


def test_a_second_ctrl_c_goes_through_at_once() -> None:
    """A step that hangs can be left; the engine then says that it cannot go on, instead of returning garbage."""
    llm = tiny.engine(tiny.model(), enable_sleep_mode=True)
    runner = llm.model_runner
    execute = runner.execute_model

    def hang(*args: Any, **kwargs: Any) -> Any:
        execute(*args, **kwargs)
        time.sleep(60)

    runner.execute_model = hang
    start = time.perf_counter()
    with interrupted_by_ctrl_c(0.3):
        tiny.engine_greedy(llm, PROMPT)
    assert 4 < time.perf_counter() - start < 30
    runner.execute_model = execute
    with pytest.raises(
        PatchFastRLError, match=r"failed in the middle of a batch \(KeyboardInterrupt\(\)\).*new trainer"
    ):
        tiny.engine_greedy(llm, PROMPT)
    llm.close("the test is over.")


# The adapter's slot -------------------------------------------------------------------------------------------------


@pytest.fixture
def with_slot() -> Iterator[tuple[Any, Any, Any]]:
    """An engine, its model with an adapter on some of the layers, and the memory of the engine's slot."""
    from patchfastrl.slot import memory_of

    model = tiny.adapted(tiny.model("llama"), r=4, target_modules=["q_proj", "down_proj"])
    llm = map_once(tiny.engine(model, enable_sleep_mode=True))
    yield llm, model, memory_of(llm.worker)
    close_all()


def lose(llm: Any, memory: list[torch.Tensor], by: str = "sleep(1)") -> None:
    """Sleep and wake. On a GPU, what is in the slot's memory then may be anything."""
    SLEEPS[by](llm)
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in memory)
    llm.wake_up()
    for tensor in memory:
        tensor.fill_(float("nan"))


@pytest.mark.parametrize("by", FREES_MEMORY)
def test_the_slot_is_released_and_filled_again(with_slot: tuple[Any, Any, Any], by: str) -> None:
    llm, model, memory = with_slot
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    lose(llm, memory, by)
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    lose(llm, memory, by)
    with model.disable_adapter():
        assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    assert not any(tensor.isnan().any() for tensor in memory)


def test_waking_the_slot_behind_our_back(with_slot: tuple[Any, Any, Any]) -> None:
    llm, model, memory = with_slot
    llm.sleep(level=2)
    llm.llm_engine.wake_up(["weights"])
    llm.llm_engine.wake_up(["kv_cache"])
    assert all(tensor.untyped_storage().nbytes() for tensor in memory)
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    llm.collective_rpc("sleep", kwargs={"level": 1})
    llm.collective_rpc("wake_up", kwargs={"tags": ["kv_cache"]})
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)


def test_no_adapter_is_loaded_into_a_released_slot(with_slot: tuple[Any, Any, Any], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    llm, model, _ = with_slot
    model.save_pretrained(tmp_path)
    request = LoRARequest("saved", 7, str(tmp_path))
    llm.sleep()
    with pytest.raises(StandbyError, match="wake_up"):
        llm.llm_engine.add_lora(request)
    llm.wake_up()
    assert llm.llm_engine.add_lora(request)
    assert tiny.engine_greedy(llm, PROMPT, lora_request=request) == tiny.greedy(model, PROMPT)


def test_the_engine_is_collected_with_its_model() -> None:
    model = tiny.adapted(tiny.model("llama"))
    llm = model.get_base_model().vllm_engine = tiny.engine(model, enable_sleep_mode=True)
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    left = weakref.ref(llm)
    del llm, model
    gc.collect()
    assert left() is None


def test_closing_without_room_changes_nothing(full_gpu: pytest.MonkeyPatch) -> None:
    """A GPU's memory can be freed where it is mapped, so an engine that is asleep wakes for its end."""
    from patchfastrl import end

    model = tiny.adapted(tiny.model("llama"))
    llm = tiny.engine(model, enable_sleep_mode=True)
    llm._reachable = lambda: end.reachable(llm._asleep, None, None)
    llm.sleep()
    with pytest.raises(StandbyError, match="Free what else"):
        tiny.engine(tiny.model("qwen2"))
    full_gpu.undo()
    llm.wake_up()
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    llm.close("the test is over.")


def test_an_end_without_room_is_put_off(full_gpu: pytest.MonkeyPatch) -> None:
    """Nobody can be told that there is none where an engine is collected; the next one finds out."""
    from patchfastrl import end

    before = gc.get_threshold()[2]
    model = tiny.adapted(tiny.model("llama"))
    llm = tiny.engine(model, enable_sleep_mode=True)
    threshold = gc.get_threshold()[2]
    arguments = list(llm._end.peek()[2])
    arguments[4] = functools.partial(end.reachable, llm._asleep, None, None)
    llm._end.detach()
    weakref.finalize(llm, end.discard, *arguments)
    llm.sleep()
    caches = weakref.ref(llm.worker.model_runner.kv_caches[0])
    del llm, arguments
    gc.collect()
    assert threshold != before
    assert gc.get_threshold()[2] == before
    model.get_base_model().resize_token_embeddings(50)  # nobody shares it any more
    other = tiny.model("qwen2")
    for _ in range(2):
        with pytest.raises(StandbyError, match="nobody uses any more is asleep"):
            tiny.engine(other)
    assert caches() is not None
    full_gpu.undo()
    llm = tiny.engine(other)
    assert caches() is None
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(other, PROMPT)


def test_the_end_lets_go_of_the_memory_whoever_keeps_the_engines_model() -> None:
    """On a GPU vLLM and torch's compiler do, until the garbage collector has come by twice."""
    model = tiny.adapted(tiny.model("llama"))
    expected = tiny.greedy(model, PROMPT)
    llm = tiny.engine(model, enable_sleep_mode=True)
    kept = llm.shared.engine_model
    layers = [m for m in kept.modules() if hasattr(m, "kv_cache")]
    slots = [m for m in kept.modules() if hasattr(m, "lora_a_stacked")]
    held = [weakref.ref(t) for t in [*llm.worker.model_runner.kv_caches, *kept.parameters()]]
    held += [weakref.ref(t) for m in slots for t in m.lora_a_stacked]
    assert layers
    assert slots
    del llm
    gc.collect()
    assert [p.numel() for p in kept.parameters()] == [0] * len(list(kept.parameters()))
    assert not any(len(m.kv_cache) for m in layers)
    assert not any(len(m.lora_a_stacked) + len(m.lora_b_stacked) for m in slots)
    assert all(ref() is None or ref().numel() == 0 for ref in held)
    assert tiny.greedy(model, PROMPT) == expected


@pytest.mark.parametrize(
    "method", ["load_model", "initialize_from_config", "compile_or_warm_up_model", "Asleep", "Slot", "audit"]
)
def test_a_build_that_fails_lets_go_of_the_memory(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps the engine's model, and as long as the error is there. The trainer's model is as it was."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    from patchfastrl import engine
    from patchfastrl import slot as slots
    from patchfastrl.compat import worker_asleep

    model = tiny.adapted(tiny.model("llama"))
    expected = tiny.greedy(model, PROMPT)
    kept: list[Any] = []
    held: list[Any] = []
    owner = next(o for o in (CPUWorker, worker_asleep, slots, engine) if hasattr(o, method))
    before = getattr(owner, method)

    def fail(asked: Any, *args: Any, **kwargs: Any) -> None:
        result, worker = before(asked, *args, **kwargs), getattr(asked, "worker", asked)
        kept.append(worker.model_runner.model)
        local = [] if method == "load_model" else [*worker.model_runner.kv_caches, *slots.memory_of(worker)]
        held.extend(weakref.ref(tensor.untyped_storage()) for tensor in local)
        raise ArithmeticError("as if there was no memory") from RuntimeError(str(result))

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, fail)
        with pytest.raises(ArithmeticError) as error:
            tiny.engine(model, enable_sleep_mode=True, max_lora_rank=8)
        sizes = [p.numel() for p in kept[0].parameters()]
        assert sizes == [0] * len(sizes)
        assert held or method == "load_model"
        assert all(ref() is None or ref().nbytes() == 0 for ref in held)
        assert error.value.__traceback__ is not None
    assert tiny.greedy(model, PROMPT) == expected
    assert tiny.engine_greedy(tiny.engine(model, enable_sleep_mode=True), PROMPT) == expected


def test_what_goes_wrong_while_a_failed_build_is_cleaned_up_is_told_beside_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from patchfastrl import end
    from patchfastrl.compat import worker_asleep

    def fail(text: str) -> None:
        raise ArithmeticError(text)

    with monkeypatch.context() as patched:
        patched.setattr(end, "_let_go", lambda *_: fail("the second"))
        patched.setattr(worker_asleep, "Asleep", lambda *_, **__: fail("the first"))
        with pytest.raises(ArithmeticError, match="the first"):
            tiny.engine(tiny.model("llama"), enable_sleep_mode=True)
    assert "the second" in caplog.text
    assert "not all of its memory could be freed" in caplog.text


def test_an_adapter_published_while_asleep_is_there_when_awake(with_slot: tuple[Any, Any, Any]) -> None:
    llm, model, memory = with_slot
    llm.sleep()
    tiny.scramble(model, seed=4)
    assert not llm.publish()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in memory)
    llm.wake_up()
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    for asleep in False, True:  # once: afterwards the trainer says when
        tiny.scramble(model, seed=5)
        if asleep:
            lose(llm, memory)
        with pytest.raises(AdapterError, match="Publish it before sampling"):
            tiny.engine_greedy(llm, PROMPT)
    llm.publish()
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "beside ours"])
def test_another_adapter_is_loaded_again_after_standby(adapted: bool, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    from patchfastrl.slot import memory_of

    model = tiny.adapted(tiny.model("llama")) if adapted else tiny.model("llama")
    llm = tiny.engine(model, enable_sleep_mode=True, max_lora_rank=8)
    saved = tiny.adapted(tiny.model("llama"), r=2, target_modules=["k_proj", "up_proj"])
    tiny.scramble(saved, seed=21)
    saved.save_pretrained(tmp_path)
    request, other = LoRARequest("saved", 7, str(tmp_path)), tiny.greedy(saved, PROMPT)
    for _ in range(2):
        assert tiny.engine_greedy(llm, PROMPT, lora_request=request) == other
        lose(llm, memory_of(llm.worker))
        assert tiny.engine_greedy(llm, PROMPT, lora_request=request) == other
        lose(llm, memory_of(llm.worker))
        assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    close_all()


# In a trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    PatchFastRL()
    yield
    close_all()
    UnpatchFastRL()


@pytest.fixture
def standby(monkeypatch: pytest.MonkeyPatch, patched: None) -> None:
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")


def big_cache_model() -> Any:
    """With 8 sequences of this length, the cache of the engine is some 256 MiB."""
    return tiny.model(positions=65536)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_grpo_trains_without_the_cache(standby: None, adapted: bool, tmp_path: Path, monkeypatch: Any) -> None:
    while_sampling: list[int] = []
    while_training: list[int] = []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        while_training.append(resident())
        return tiny.length_reward(completions)

    trainer = tiny.trainer(
        tmp_path,
        model=big_cache_model(),
        reward_funcs=reward,
        peft_config=tiny.lora() if adapted else None,
        args={"max_steps": 3},
    )
    llm = trainer.vllm_generation.llm
    size = llm._standby.nbytes
    assert size > 200 * MIB
    assert not llm.awake  # TRL puts it to sleep as soon as it is there
    before = {n: p.clone() for n, p in llm.shared.parameters.items()}
    generate = llm.generate

    def measured(*args: Any, **kwargs: Any) -> Any:
        while_sampling.append(resident())
        return generate(*args, **kwargs)

    monkeypatch.setattr(llm, "generate", measured)
    gc.collect()  # what tests before left is not to go while this is measured
    memory.return_freed()
    trainer.train()
    assert len(while_sampling) == len(while_training) == 3
    for sampling, training in zip(while_sampling, while_training, strict=True):
        assert 0.95 * size < sampling - training < 1.05 * size
    assert not llm.awake
    differences = [h["sampling/sampling_logp_difference/max"] for h in trainer.state.log_history if "loss" in h]
    assert len(differences) == 3
    assert max(differences) < 1e-4
    for name, parameter in llm.shared.parameters.items():
        assert torch.equal(parameter, before[name]) == adapted, name
    assert_asleep(llm)
    llm.wake_up()
    llm.publish()
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(trainer.model, PROMPT)


def train_beside(folder: Path, total: int | None, adapted: bool, lengths: tuple[int, ...] = (8,) * 5) -> Any:
    """A training of a step for each of these lengths.

    Returns the trainer, whether the engine's memory was there in each step's reward and at its optimizer, and the
    trained parameters. Whatever the memory is, the engine counts as asleep.
    """
    from transformers import TrainerCallback

    there: list[tuple[bool, bool]] = []
    rewarded: list[bool] = []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        rewarded.append(llm._standby.resident)
        assert_asleep(llm)
        return tiny.length_reward(completions)

    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            there.append((rewarded[-1], llm._standby.resident))

        def on_step_begin(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            trainer.vllm_generation.max_completion_length = lengths[state.global_step]

    trainer = tiny.trainer(
        folder,
        reward_funcs=reward,
        callbacks=[Watching()],
        peft_config=tiny.lora(init_lora_weights=False) if adapted else None,
        args={"max_steps": len(lengths), "max_completion_length": max(lengths), "learning_rate": 1e-2},
    )
    llm = map_once(trainer.vllm_generation.llm)
    trainer.vllm_generation.max_completion_length = lengths[0]
    if total is not None:
        give_back = functools.partial(engine._give_back, weakref.ref(llm))
        llm.room = Room(trainer.model, tiny.Roomy(total), give_back)  # type: ignore[arg-type]
    trainer.train()
    assert not llm.awake
    return trainer, there, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("adapted", "rollouts"), [(False, "adapter"), (True, "adapter"), (True, "merged")])
def test_the_memory_stays_where_training_fits_beside_it(
    standby: None, adapted: bool, rollouts: Any, tmp_path: Path
) -> None:
    PatchFastRL(rollouts=rollouts)
    released, stays = (False, False), (True, True)
    trainer, there, stock = train_beside(tmp_path / "stock", None, adapted)
    assert there == [released] * 5
    trainer.vllm_generation.llm.wake_up()  # on a CPU an engine's end releases what is there
    trainer, there, full = train_beside(tmp_path / "full", 100, adapted)
    assert there == [released] * 5
    llm = trainer.vllm_generation.llm
    some = llm._asleep.released()  # as much as it lacks, in whole pieces
    llm.sleep()
    assert 0 < some <= llm._asleep.released() == llm._standby.nbytes
    assert (some < llm._standby.nbytes) == adapted  # the KV cache is one piece
    llm.wake_up()
    trainer, there, ours = train_beside(tmp_path / "ours", 1000, adapted)
    assert there == [released] * 2 + [stays] * 3
    for one, other in ((full, stock), (ours, stock)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    llm = trainer.vllm_generation.llm
    differences = [h["sampling/sampling_logp_difference/max"] for h in trainer.state.log_history if "loss" in h]
    assert max(differences) < 1e-4
    assert llm._standby.resident
    assert_asleep(llm)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    llm.wake_up()
    llm.publish()
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(trainer.model, PROMPT)
    llm.sleep()  # not for training: nobody asked for what to publish
    assert not llm._standby.resident
    llm.wake_up()
    PatchFastRL()


def test_longer_completions_than_ever_have_all_of_the_memory(standby: None, tmp_path: Path) -> None:
    _, there, _ = train_beside(tmp_path, 1000, True, lengths=(8, 8, 8, 16, 12, 8))
    assert there == [(False, False)] * 2 + [(True, True), (False, False), (True, True), (True, True)]


ASKED: dict[str, Callable[[Any], Any]] = {
    "sleep()": lambda llm: llm.sleep(),
    "sleep(2)": lambda llm: llm.sleep(level=2),
    "collective_rpc": lambda llm: llm.collective_rpc("sleep", kwargs={"level": 1}),
    "give_back": lambda llm: llm.give_back(),
}


@pytest.mark.parametrize("by", ASKED)
def test_memory_that_stayed_goes_when_it_is_asked_for(standby: None, by: str, tmp_path: Path) -> None:
    trainer, _, _ = train_beside(tmp_path, 1000, True)
    llm = trainer.vllm_generation.llm
    assert llm._standby.resident
    for _ in range(2):  # it is released once, as on a GPU
        ASKED[by](llm)
        assert not llm._standby.resident
        assert_asleep(llm)
    llm.wake_up()
    llm.publish()
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(trainer.model, PROMPT)


def test_an_engine_whose_memory_stayed_can_be_closed_and_collected(standby: None, tmp_path: Path) -> None:
    trainer, _, _ = train_beside(tmp_path, 1000, True)
    model, engine_ref = trainer.model, weakref.ref(trainer.vllm_generation.llm)
    del trainer
    tiny.trainer(tmp_path)  # another engine closes the first
    gc.collect()
    assert engine_ref() is None
    model(torch.tensor([tiny.ids(40)]))  # a larger forward asks an engine that is gone


def test_waking_what_stayed_takes_no_memory(standby: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = train_beside(tmp_path, 1000, True)
    llm = trainer.vllm_generation.llm
    monkeypatch.setattr(llm._standby, "free", lambda: 0)
    llm.wake_up()
    llm.sleep()
    with pytest.raises(StandbyError, match=r"takes [1-9].* MiB .* 0.0 MiB are left"):
        llm.wake_up()
    monkeypatch.undo()
    llm.wake_up()


@pytest.mark.parametrize("where", ["reward", "optimizer"])
def test_an_exception_between_sleep_and_wake(standby: None, where: str, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    armed = True

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        if armed and where == "reward":
            raise ZeroDivisionError
        return tiny.length_reward(completions)

    class Failing(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if armed and where == "optimizer":
                raise ZeroDivisionError

    trainer = tiny.trainer(tmp_path, reward_funcs=reward, callbacks=[Failing()], peft_config=tiny.lora())
    llm = trainer.vllm_generation.llm
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert_asleep(llm)
    armed = False
    trainer.train()
    assert max(h["sampling/sampling_logp_difference/max"] for h in trainer.state.log_history if "loss" in h) < 1e-4
    llm.wake_up()
    llm.publish()
    assert_consistent(llm, trainer.model)


def test_ctrl_c_in_training(standby: None, tmp_path: Path) -> None:
    """A notebook user stops the cell, and runs it again."""
    trainer = tiny.trainer(tmp_path, peft_config=tiny.lora(), args={"max_steps": 10_000, "logging_steps": 100_000})
    llm = trainer.vllm_generation.llm
    for after in (0.15, 0.4, 0.71):
        with interrupted_by_ctrl_c(after):
            trainer.train()
        assert llm.awake or pytest.raises(StandbyError, tiny.engine_greedy, llm, PROMPT)
    trainer.args.max_steps, trainer.args.logging_steps = 2, 1
    trainer.train()
    assert max(h["sampling/sampling_logp_difference/max"] for h in trainer.state.log_history if "loss" in h) < 1e-4
    llm.wake_up()
    llm.publish()
    assert_consistent(llm, trainer.model)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_same_states_after_two_trainings(standby: None, adapted: bool, tmp_path: Path) -> None:
    for run in range(2):
        trainer = tiny.trainer(tmp_path / str(run), peft_config=tiny.lora() if adapted else None)
        trainer.train()
        llm = trainer.vllm_generation.llm
        assert_asleep(llm)
        llm.wake_up(tags=["weights"])
        assert_asleep(llm)
        llm.wake_up(tags=["kv_cache"])
        llm.publish()
        assert_consistent(llm, trainer.model)
        llm.sleep(level=2)
        assert_asleep(llm)
        trainer.train()
        assert_asleep(llm)


@pytest.mark.parametrize(
    ("value", "script", "sleeps"),
    [("1", False, True), ("0", True, False), (None, False, False), (None, True, True), ("", True, True)],
)
def test_the_variable(
    patched: None, value: str | None, script: bool, sleeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 and 0 win over the script's own setting; without the variable that holds."""
    if value is None:
        monkeypatch.delenv("UNSLOTH_VLLM_STANDBY", raising=False)
    else:
        monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", value)
    trainer = tiny.trainer(tmp_path, args={"vllm_enable_sleep_mode": script, "max_steps": 1})
    trainer.train()
    assert trainer.vllm_generation.llm.awake is not sleeps


@pytest.mark.parametrize("value", ["2", "maybe", "-1"])
def test_an_unreadable_variable(patched: None, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", value)
    with pytest.raises(UnsupportedError, match=f"UNSLOTH_VLLM_STANDBY='{value}': set it to 1 or 0"):
        tiny.trainer(tmp_path, model="there/is-no-such-model")
