"""What training takes, and so what it lacks beside an engine that sleeps."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_recompute import Engine, Script
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

from patchfastrl import engine, memory, room
from patchfastrl.recompute import Recompute
from patchfastrl.room import Room, batch_of

pytestmark = pytest.mark.timeout(180)

SIZE = (3, 12)
BATCH = (36, 12)


class Device(Engine):
    """The same, which notices as `memory.Device` does that somebody made the peak start anew."""

    def __init__(self) -> None:
        super().__init__()
        self.resets, self._before = 0, 0

    def read(self) -> memory.Reading:
        now = super().read()
        self.resets += now.peak < self._before
        self._before = now.peak
        return now

    def forget_peak(self) -> None:
        super().forget_peak()
        self._before = 0


class Training:
    """A script that trains in batches of two micro-batches and a step of the optimizer."""

    def __init__(self, steps: int = 2) -> None:
        self.device, self.script = Device(), Script()
        self.script.recompute.remove()
        self.script.tensors = self.device
        self.model = self.script.model
        self.script.recompute = Recompute(self.model, self.device, True, self.device.give_back)
        self.room = Room(self.model, self.device, self.device.give_back)
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad])
        self.sampled()
        for _ in range(steps):
            self.batch()

    def sampled(self, batch: Any = BATCH) -> int | None:
        self.script.sleep()
        self.room.sampled(batch)
        return self.room.lacking()

    def trains(self, *size: int, steps: bool = True) -> None:
        for _ in range(2):
            self.script.step(*(size or SIZE))
        if steps:
            with self.device:
                self.optimizer.step()

    def batch(self, *size: int, batch: Any = BATCH, steps: bool = True) -> int | None:
        """Trained on, and the next one of this size sampled."""
        self.trains(*size, steps=steps)
        return self.sampled(batch)


def test_two_batches_show_what_training_takes(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(0)
    assert training.batch() is None
    assert training.batch() == 0
    device, most = training.device, training.room._growth
    before = device.bytes()
    training.trains()
    training.model.zero_grad()
    assert device.peak - before == most > 100_000
    device.stays = True
    for lacking in (0, 900_000, 2_000_000_000, 0):
        device.total = (3_000_000 + device.bytes() + most - lacking) * 10 // 9
        assert lacking <= (training.room.lacking() or 0) <= lacking + 2
    with caplog.at_level(logging.INFO, logger="patchfastrl"):
        other = Training()
        assert [other.room.lacking() for _ in range(2)] == [0, 0]
    (said,) = [record.getMessage() for record in caplog.records if "lacks" in record.getMessage()]
    assert said.startswith("PatchFastRL: training takes ")


def test_nothing_is_known_before_an_optimizer_has_stepped() -> None:
    """A gradient scaler leaves steps out, and the optimizer's state is still to come."""
    training = Training(0)
    for _ in range(3):
        assert training.batch(steps=False) is None
    assert training.batch() is None
    assert training.batch() == 0
    other = tiny.model()
    other(torch.tensor([tiny.ids()])).logits.sum().backward()
    training = Training(0)
    for _ in range(3):
        torch.optim.SGD(other.parameters()).step()  # another model's
        assert training.batch(steps=False) is None


def test_nothing_is_known_where_gradients_wait_for_the_optimizer() -> None:
    training = Training()
    assert training.room.lacking() == 0
    training.trains(steps=False)
    assert training.room.lacking() is None
    training.model.zero_grad()
    assert training.room.lacking() == 0


def test_nothing_is_known_of_an_optimizer_that_is_gone() -> None:
    training = Training()
    training.optimizer = torch.optim.Adam([p for p in training.model.parameters() if p.requires_grad])
    gc.collect()
    assert training.room.lacking() is None
    assert training.batch() == 0


def test_batches_that_nobody_trains_on_show_nothing() -> None:
    training = Training(1)
    for _ in range(3):
        with torch.no_grad():
            training.script.forward()
        assert training.sampled() is None
    assert training.batch() == 0


def test_nothing_is_known_of_a_batch_that_is_larger_than_all_before_it() -> None:
    """A reward model may take more for it, and no forward of the policy comes before that."""
    training = Training()
    for batch, known in (
        ((35, 12), True),
        ((37, 12), False),
        ((37, 12), True),
        ((36, 13), False),
        ((37, 13), False),
        (None, False),
        ((38, 12), False),
        (BATCH, True),
    ):
        assert (training.batch(batch=batch) is not None) == known


def test_a_batch_may_be_sampled_in_parts() -> None:
    """The turns of a conversation, or a prompt at a time."""
    training = Training()
    assert training.batch(batch=(20, 12)) == 0
    assert training.sampled((16, 5)) == 0
    assert training.sampled((1, 1)) is None
    training.trains()  # on (37, 12)
    assert training.sampled((37, 12)) == 0
    assert training.batch(batch=None) is None
    assert training.sampled((1, 1)) is None


def test_nothing_is_known_of_an_evaluation() -> None:
    training = Training()
    training.model.eval()
    for _ in range(2):
        assert training.sampled() is None
    training.model.train()
    assert training.sampled() == 0  # not a part of the evaluation's


def test_nothing_is_known_where_the_script_makes_the_peak_start_anew() -> None:
    training = Training()
    for resets in (True, True, False, False):
        training.trains()
        training.model.zero_grad()
        if resets:
            training.device.peak = training.device.bytes()
        known = training.sampled()
        assert known is None or not resets
    assert known == 0
    assert training.room._trained_on == 2
    training.device.stays = True
    training.trains(4, 12)
    training.device.peak = 0
    training.sampled()
    training.batch()
    training.batch()
    training.device.stays, training.device.given_back = True, 0
    training.trains(4, 12)  # as if it had never been
    assert training.device.given_back == 1


@pytest.mark.parametrize("grad", [True, False])
def test_a_larger_forward_releases_all(grad: bool) -> None:
    training = Training()

    def released(rows: int, length: int) -> bool:
        training.device.stays, training.device.given_back = True, 0
        with torch.set_grad_enabled(grad):
            training.script.forward(rows, length)
        return bool(training.device.given_back)

    assert not released(3, 12)
    assert not released(2, 12)
    assert released(4, 12)
    assert training.device.asked is None
    assert released(4, 12) is not grad  # what computed no gradients does not show what those take
    assert released(3, 13)
    assert not released(3, 12)


def test_a_forward_of_unknown_size_releases_all() -> None:
    training = Training()
    training.device.stays = True
    embedded = training.model.get_input_embeddings()(torch.tensor([tiny.ids()]))
    training.model(inputs_embeds=embedded)
    assert training.device.stays
    training.room._before(training.model, (), {})
    assert not training.device.stays


@pytest.mark.parametrize("model", [lambda model: model, lambda model: model.get_base_model()])
def test_generating_with_transformers_releases_all(model: Any) -> None:
    """Its cache grows with each token, while each forward is small."""
    training = Training()
    training.device.stays = True
    with torch.no_grad():
        model(training.model).generate(torch.tensor([tiny.ids(3)]), max_new_tokens=2, do_sample=False)
    assert not training.device.stays


def test_a_copy_of_the_model_neither_shows_nor_releases_anything() -> None:
    model, released = tiny.model(), []
    known = Room(model, tiny.Roomy(), lambda: released.append(1))  # type: ignore[arg-type]
    other = copy.deepcopy(model)
    other(torch.tensor([tiny.ids(40)]))
    assert (released, known._forwards) == ([], [])
    model(torch.tensor([tiny.ids(40)]))
    assert (released, known._forwards) == ([1], [(40, 40, 40)])


@pytest.mark.parametrize("collected", [False, True])
def test_removed(collected: bool) -> None:
    gc.collect()
    before = len(hooks)
    training = Training()
    assert len(hooks) == before + 1
    training.room.remove()
    if collected:
        training = Training()
        training.model = training.script = training.room = None  # type: ignore[assignment]
        gc.collect()
    else:
        assert training.batch() is None
    assert len(hooks) == before


def test_what_was_sampled() -> None:
    def output(prompt: int, *made: int) -> Any:
        outputs = [SimpleNamespace(token_ids=[0] * n) for n in made]
        return SimpleNamespace(prompt_token_ids=[0] * prompt, outputs=outputs)

    assert batch_of([output(3, 5, 1), output(1, 2)]) == (24, 8)
    assert batch_of([SimpleNamespace(prompt_token_ids=None, outputs=[SimpleNamespace(token_ids=[0])])]) == (1, 1)
    assert batch_of([]) is None
    assert batch_of([SimpleNamespace(sequences=[])]) is None  # a beam search's


def as_on_a_gpu(llm: Any, trainer: Any, least: bool = True) -> Any:
    give_back = functools.partial(engine._give_back, weakref.ref(llm))
    llm.recompute = Recompute(trainer.model, tiny.Roomy(), least, give_back)  # type: ignore[arg-type]
    room.watch(llm, trainer)
    return llm.room


@pytest.mark.usefixtures("patched")
def test_a_trainer_gives_the_memory_back_when_it_has_trained(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, args={"vllm_enable_sleep_mode": True, "max_steps": 4})
    llm = trainer.vllm_generation.llm
    there: list[bool] = []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        there.append(llm._standby.resident)
        return tiny.length_reward(completions)

    trainer.reward_funcs = [reward]
    assert as_on_a_gpu(llm, trainer) is not None
    trainer.train()
    assert there == [False, False, True, True]
    assert not llm._standby.resident
    trainer.evaluate(tiny.prompts())
    assert not any(there[4:])
    llm.close("the test is over.")
    trainer.callback_handler.call_event("on_evaluate", trainer.args, trainer.state, trainer.control)


@pytest.mark.usefixtures("patched")
def test_who_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(room, "watch", lambda *both: watched.append(both))
        trainer = tiny.trainer(tmp_path, args={"vllm_enable_sleep_mode": True})
    llm = trainer.vllm_generation.llm
    assert watched == [(llm, trainer)]
    assert as_on_a_gpu(llm, trainer, least=False) is None
    assert as_on_a_gpu(llm, SimpleNamespace(model=trainer.model)) is None  # no trainer yet
    monkeypatch.setattr(llm._asleep, "able", False)
    assert as_on_a_gpu(llm, trainer) is None  # there is nothing to release
    llm.close("the test is over.")
