"""Of the KV cache only what a batch can use has memory, and vLLM hands out no block that has none.

On a CPU the memory is all there: what would have none on a GPU is not a number, so that nothing that was computed with
it passes for right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from patchfastrl.compat import cpu_standby, kv_blocks
from patchfastrl.errors import StandbyError

pytestmark = pytest.mark.timeout(120)

BLOCK = 128  # tokens, on a CPU


class Divided(cpu_standby.Storages):
    """The KV cache in parts, of which each but the first holds as many blocks as those before it."""

    parts: tuple[tuple[int, int], ...] = ()  # first block, and the one after the last
    left: int | None = None  # bytes of the device

    def divide(self, caches: list[torch.Tensor], blocks: int) -> bool:
        assert all(cache.shape[0] == blocks for cache in caches)
        self.caches = caches
        ends = [blocks // 8, blocks // 4, blocks // 2, blocks]
        self.parts = tuple(zip([0, *ends], ends, strict=False))
        self.whole = {n for n, (tag, _, _) in enumerate(self._storages) if tag == "kv_cache"}
        return True

    def sizes(self) -> dict[int, tuple[str, int]]:
        if not self.parts:
            return super().sizes()
        sizes = {n: size for n, size in super().sizes().items() if n not in self.whole}
        per_block = sum(cache.nbytes for cache in self.caches) // self.parts[-1][1]
        return sizes | {1000 + first: ("kv_cache", (end - first) * per_block) for first, end in self.parts}

    def first_block(self, piece: int) -> int:
        return max(0, piece - 1000)

    def free(self) -> int | None:
        return self.left

    def release(self) -> None:
        for first, end in self.parts:
            if 1000 + first in self._only:
                assert 1000 + first not in self._released, "released twice"
                self._released.add(1000 + first)
                for cache in self.caches:
                    cache[first:end].fill_(math.nan)
        super().release()

    def take(self, tags: list[str] | None = None) -> None:
        super().take(tags)
        for first, end in self.parts:
            if 1000 + first in self._only and (tags is None or "kv_cache" in tags):
                assert 1000 + first in self._released, "taken twice"
                self._released.remove(1000 + first)
                for cache in self.caches:
                    cache[first:end].fill_(0)

    def join(self) -> None:
        assert not self._released
        self.parts = ()

    def untouched(self) -> bool:
        """What has no memory was not written to."""
        lacking = [
            cache[first:end] for cache in self.caches for first, end in self.parts if 1000 + first in self._released
        ]
        return all(bool(part.isnan().all()) for part in lacking)


@pytest.fixture(autouse=True)
def divided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_standby, "Storages", Divided)
    yield
    tiny.close_all()


def engine(**kwargs: Any) -> Any:
    """With 64 blocks, 24 of which its sequences can use at once."""
    return tiny.engine(
        tiny.model(positions=512),
        **{
            "enable_sleep_mode": True,
            "max_model_len": 3 * BLOCK,
            "kv_cache_memory_bytes": 64 * 2 * 2 * BLOCK * 32 * 4,
            "max_num_seqs": 8,
            "enable_prefix_caching": True,
            **kwargs,
        },
    )


def pool_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


def handed_out(llm: Any) -> int:
    """Blocks that vLLM may use. Nothing is in use, and what has no memory was not touched."""
    pool = pool_of(llm)
    ids = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert sorted(ids) == list(range(1, pool.num_gpu_blocks))
    assert pool.get_num_free_blocks() == len(ids)
    assert pool.get_usage() == 0
    assert llm._standby.untouched()
    return pool.num_gpu_blocks


def completions(llm: Any, prompts: list[list[int]], tokens: int = 4, n: int = 1) -> list[Any]:
    """What is sampled, with its log-probabilities: the same for the same prompts."""
    from vllm import SamplingParams

    params = SamplingParams(
        n=n, temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False, seed=5, logprobs=0
    )
    found = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    made = [one for output in found for one in output.outputs]
    assert all(len(one.token_ids) == tokens for one in made)
    return [(list(one.token_ids), [next(iter(p.values())).logprob for p in one.logprobs]) for one in made]


SHORT, LONG = [tiny.ids(20, n) for n in (3, 17)], [tiny.ids(200, n) for n in range(8)]


def test_the_cache_wakes_as_far_as_a_batch_can_use_it() -> None:
    llm = engine()
    expected = {}
    assert handed_out(llm) == 64  # nothing has slept yet
    for name, prompts, tokens in (("short", SHORT, 4), ("long", LONG, 150)):
        expected[name] = completions(llm, prompts, tokens)
        assert handed_out(llm) == 64
    llm.sleep()
    assert llm._asleep.left_out() == llm._asleep.released() == llm._standby.nbytes // 2
    llm.wake_up()
    assert handed_out(llm) == 32  # the latest batch can use 24: eight sequences of three
    assert completions(llm, SHORT) == expected["short"]
    assert handed_out(llm) == 32
    llm.sleep()
    assert llm._asleep.left_out() == llm._standby.nbytes // 8 * 7
    llm.wake_up()
    assert handed_out(llm) == 8  # two sequences of a block
    assert completions(llm, SHORT) == expected["short"]
    assert completions(llm, LONG, 150) == expected["long"]  # this is how it grows
    assert handed_out(llm) == 32
    llm.sleep()
    llm.wake_up()
    assert handed_out(llm) == 32
    assert completions(llm, LONG, 150) == expected["long"]
    assert completions(llm, SHORT) == expected["short"]
    assert handed_out(llm) == 32  # an engine that is awake keeps what it has


def test_more_requests_than_run_at_once_use_all_that_there_is() -> None:
    llm = engine(max_num_seqs=4)
    expected = completions(llm, LONG * 4, 150)
    llm.sleep()
    llm.wake_up()
    assert handed_out(llm) == 64  # 96 are wanted
    assert completions(llm, LONG * 4, 150) == expected


def test_several_completions_of_a_prompt_count() -> None:
    llm = engine()
    expected = completions(llm, LONG[:1], 150, n=8)
    completions(llm, SHORT)
    llm.sleep()
    llm.wake_up()
    assert handed_out(llm) == 8
    assert completions(llm, LONG[:1], 150, n=8) == expected
    assert handed_out(llm) == 32


def test_prefixes_stay_cached_when_the_cache_grows() -> None:
    """What comes is free for sure, and used first."""
    llm = engine()
    completions(llm, SHORT)
    llm.sleep()
    llm.wake_up()
    prompt = tiny.ids(260, 50)
    assert tiny.cached_tokens(llm, prompt) == 0
    completions(llm, LONG[:4], 150)  # 12 blocks, of 8
    assert handed_out(llm) == 16
    assert tiny.cached_tokens(llm, prompt) == 2 * BLOCK


def test_what_was_cached_is_forgotten_when_the_cache_shrinks() -> None:
    """By somebody who puts vLLM's worker to sleep past vLLM, too."""
    llm = engine()
    prompt = tiny.ids(260, 50)
    completions(llm, LONG, 150)
    assert tiny.cached_tokens(llm, prompt) == 0
    assert tiny.cached_tokens(llm, prompt) == 2 * BLOCK
    pool = pool_of(llm)
    assert any(block.block_hash is not None for block in pool.blocks[8:])
    llm.collective_rpc("sleep", kwargs={"level": 1})
    llm.wake_up()
    assert handed_out(llm) == 8
    assert all(block.block_hash is None for block in pool.blocks)
    assert tiny.cached_tokens(llm, prompt) == 0
    assert tiny.engine_greedy(llm, prompt) == tiny.greedy(llm.shared.model, prompt)


def test_block_tables_forget_blocks_without_memory() -> None:
    llm = engine()
    completions(llm, LONG, 150)
    table = llm.model_runner.input_batch.block_table[0].block_table
    assert int(table.gpu.max()) > 8
    completions(llm, SHORT)
    llm.sleep()
    llm.wake_up()
    assert handed_out(llm) == 8
    assert int(table.gpu.max()) == int(table.cpu.max()) == 0


def test_a_device_without_room_for_more_is_said_and_nothing_is_lost() -> None:
    llm = engine()
    expected = completions(llm, LONG, 150)
    completions(llm, SHORT)
    llm.sleep()
    llm.wake_up()
    llm._standby.left = 0
    with pytest.raises(StandbyError, match="Free what else"):
        completions(llm, LONG, 150)
    assert not llm.llm_engine.has_unfinished_requests()
    assert handed_out(llm) == 8
    short = completions(llm, SHORT)
    llm.sleep()
    llm._standby.left = llm._standby.nbytes // 8
    llm.wake_up()  # what was refused is not wanted any more
    assert handed_out(llm) == 8
    llm._standby.left = None
    assert completions(llm, LONG, 150) == expected
    assert completions(llm, SHORT) == short
    assert handed_out(llm) == 32


@pytest.mark.parametrize("by", ["close", "next engine"])
@pytest.mark.parametrize("asleep", [False, True])
def test_an_engine_ends_with_all_of_its_cache(by: str, asleep: bool) -> None:
    """What is not there cannot be freed on a GPU. Without room for it that is refused, and nothing changes."""
    from patchfastrl import end

    llm = engine()
    completions(llm, SHORT)
    llm.sleep()
    if not asleep:
        llm.wake_up()
        assert handed_out(llm) == 8
    storages = llm._standby
    llm._reachable = lambda: end.reachable(llm._asleep, None, None)  # as on a GPU
    lacking = storages.nbytes if asleep else storages.nbytes // 8 * 7
    storages.left = lacking - 1
    with pytest.raises(StandbyError, match="Free what else"):
        llm.close("not yet")
    assert storages.parts
    assert llm.awake != asleep
    llm.wake_up()
    assert handed_out(llm) == 8
    assert completions(llm, SHORT)
    if asleep:
        llm.sleep()
    storages.left = lacking
    engine() if by == "next engine" else llm.close("the test is over.")
    assert not storages.parts


def train(folder: Path, adapted: bool) -> tuple[list[int], list[torch.Tensor]]:
    """Steps with completions of these lengths: the blocks that were handed out in each, and what was trained."""
    from transformers import TrainerCallback

    lengths, there = (8, 8, 500, 8, 8), []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        there.append(pool_of(trainer.vllm_generation.llm).num_gpu_blocks)
        return tiny.length_reward(completions)

    class Lengths(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            trainer.vllm_generation.max_completion_length = lengths[state.global_step]

    trainer = tiny.trainer(
        folder,
        model=tiny.model(positions=1024),
        reward_funcs=reward,
        callbacks=[Lengths()],
        peft_config=tiny.lora(init_lora_weights=False) if adapted else None,
        args={"max_steps": len(lengths), "max_completion_length": max(lengths), "learning_rate": 1e-2},
    )
    trainer.train()
    return there, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_trainer_computes_the_same_with_a_part_of_the_cache(
    patched: None, adapted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")
    there, ours = train(tmp_path / "ours", adapted)
    monkeypatch.setattr(Divided, "divide", lambda *_: False)
    whole, stock = train(tmp_path / "stock", adapted)
    assert len({*whole}) == 1
    assert there[0] < there[2] <= whole[0]
    assert there[-1] == there[0]
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def test_blocks_that_vllm_keeps_free_are_there_as_well() -> None:
    llm = engine()
    llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.watermark_blocks = 10
    kv_blocks.limit(llm)
    completions(llm, SHORT)
    llm.sleep()
    llm.wake_up()
    assert handed_out(llm) == 16


@pytest.mark.parametrize(("divides", "back"), [(True, "as far as a batch can use it"), (False, "whole")])
def test_the_start_says_what_comes_back(
    divides: bool, back: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not divides:
        monkeypatch.setattr(Divided, "divide", lambda *_: False)
    with caplog.at_level("WARNING", logger="patchfastrl"):
        engine()
    assert f"standby   on: the KV cache is released while training, and comes back {back}" in caplog.text


def test_an_engine_that_cannot_sleep_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine()
    before = llm._asleep.parts.blocks
    monkeypatch.setattr(llm._asleep, "able", False)
    monkeypatch.setattr(kv_blocks, "_clear_tables", lambda runner: pytest.fail("looked at"))
    kv_blocks.limit(llm)
    assert llm._asleep.parts.blocks is before


def test_tables_of_both_model_runners_are_cleared() -> None:
    def ones() -> torch.Tensor:
        with torch.inference_mode():
            return torch.ones(2, 3, dtype=torch.int32)

    staged, plain, used = SimpleNamespace(gpu=ones()), ones(), ones()
    second = SimpleNamespace(block_tables=SimpleNamespace(block_tables=[staged, plain], input_block_tables=[used]))
    assert kv_blocks._clear_tables(second)
    assert not any(bool(table.any()) for table in (staged.gpu, plain, used))
    assert not kv_blocks._clear_tables(SimpleNamespace())
