"""Trainers one after another in one process, as in a notebook: each follows its model, and leaves the memory free.

    python benchmarks/again.py                         # 0.5b
    python benchmarks/again.py --only slot --only merged --rounds 3 --json out.json
    python benchmarks/again.py --model tiny            # on a CPU

A trainer of each kind trains two steps and ends in one way or another: while it sleeps, because the next one is built;
closed by hand; or deleted and collected. Engine and trainer are compared as in `correct.py`: after training, after
another adapter was published, after another one (or a write into the weights) while the engine slept, and the same
where vLLM's worker was put to sleep past the engine. They may differ on average by a fifth of what they would if the
engine had not followed (after training: of what other tokens' differ by). On a GPU a sleeping engine is also
woken, and closed, with too little memory left: that must be refused, and work once there is some.

Then trainers fail: the engine of one is not built to its end (on a GPU also because its KV cache is too large), and one
runs out of memory while its engine sleeps, and is deleted while the memory is still taken. On a GPU the next one must
be refused as long as that is so; then it must follow its model, and leave the memory free.

PASS or FAIL, with the figures; the exit status is the number of checks that failed. "In use" is what the driver counts
(on a CPU: the resident set) when a trainer is gone; of the same kinds once more it may be 64 MiB more (on a CPU it is
only told).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from correct import CONTROL, another_adapter, difference, sample, score, sleeps, trainer_of, write
from measure import Memory
from shapes import SHAPES, versions

KINDS: dict[str, dict[str, Any]] = {
    "slot": {"rollouts": "adapter", "method": "lora", "end": "the next one"},
    "merged": {"rollouts": "merged", "method": "lora", "end": "deleted"},
    "merged-no-standby": {"rollouts": "merged", "method": "lora", "end": "the next one"},
    "qlora": {"rollouts": "merged", "method": "qlora", "end": "closed"},
    "full": {"rollouts": None, "method": "full", "end": "deleted"},
}
GROWTH = 64  # MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="0.5b")
    parser.add_argument("--only", choices=KINDS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="all kinds, N times over (default: 2)")
    parser.add_argument("--share", type=float, default=0.2, help="vllm_gpu_memory_utilization")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    rounds = Rounds(options)
    for number in range(options.rounds):
        for kind in options.only or KINDS:
            rounds.run(kind, number)
    rounds.end()
    rounds.run_failing()
    failed = sum(not found["passed"] for found in rounds.found)
    print(f"{len(rounds.found) - failed} of {len(rounds.found)} passed")
    raise SystemExit(min(failed, 100))


class Rounds:
    """The trainers, and what was found of each."""

    def __init__(self, options: Any) -> None:
        import torch

        self._options, self._gpu = options, torch.cuda.is_available()
        self._memory = Memory(self._gpu)
        self._trainer: Any = None  # the latest one, alive until the next is built
        self._in_use: dict[str, float] = {}
        self._name = ""
        self.found: list[dict[str, Any]] = []

    def say(self, check: str, passed: bool, **figures: Any) -> None:
        self.found.append({"trainer": self._name, "check": check, "passed": passed, **figures})
        print(f"{'PASS' if passed else 'FAIL'} {self._name}: {check} {figures or ''}", flush=True)
        if self._options.json:
            self._options.json.write_text(json.dumps([versions(), *self.found], indent=1))

    def run(self, kind: str, number: int) -> None:
        settings, self._name = KINDS[kind], f"{kind} {number + 1}"
        self._train(kind)
        self._check(settings["method"] != "full", sleeps({"kind": kind}))
        if settings["end"] == "closed":
            self._trainer.vllm_generation.llm.close("it is closed by hand.")
        if settings["end"] != "the next one":
            self.end()
            self._tell_memory(kind)

    def run_failing(self) -> None:
        """Trainers that fail, and the one after them, which does not; before them one to compare the memory with."""
        kind, self._name = "merged", "failing"
        self._train(kind)
        self.end()
        self._tell_memory(kind)
        with _warm_up_fails(self._gpu):
            self._raises("an engine is not built to its end", ArithmeticError, lambda: self._train(kind))
        self.end()
        self._tell_memory(kind)
        if self._gpu:
            with _too_large_a_cache() as error:
                self._raises("an engine's KV cache takes more than there is", error, lambda: self._train(kind))
            self.end()
            self._tell_memory(kind)
        ballast = _ballast(self._gpu)
        self._raises("training runs out of memory", ballast.error, lambda: self._train(kind, ballast))
        self.end()
        if self._gpu:
            self._refused("building while the memory is taken", lambda: self._train(kind))
            ballast.memory = None
            self.end()
        self._train(kind)
        self._check(True, True)
        self.end()
        self._tell_memory(kind)

    def _train(self, kind: str, *callbacks: Any) -> None:
        settings = KINDS[kind]
        os.environ["UNSLOTH_VLLM_STANDBY"] = "1" if sleeps({"kind": kind}) else "0"
        from patchfastrl import PatchFastRL

        PatchFastRL(rollouts=settings["rollouts"])
        job = {
            "kind": kind, "side": "patched", "method": settings["method"],
            "model": self._options.model, "share": self._options.share, "rank": 16, "steps": 2, "cells": [[64, 16]],
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            self._trainer = trainer_of(job, folder, stack)
            for callback in callbacks:
                self._trainer.add_callback(callback)
            self._trainer.train()

    def end(self) -> None:
        self._trainer = None
        gc.collect()
        self._memory.give_back()

    def _check(self, adapted: bool, standby: bool) -> None:
        trainer, llm = self._trainer, self._trainer.vllm_generation.llm
        llm.wake_up()
        llm.publish()
        before = self._compare("after training", llm, trainer.model, None)
        if adapted:
            self._change(trainer.model, adapted)
            llm.publish()
            before = self._compare("after another adapter was published", llm, trainer.model, before)
        change = "another adapter" if adapted else "a write"
        if standby:
            llm.sleep()
            self._change(trainer.model, adapted)
            if self._gpu:
                self._without_room("waking", llm.wake_up)
            llm.wake_up()
            llm.publish()
            before = self._compare(f"after {change} while it slept", llm, trainer.model, before)
            llm.collective_rpc("sleep", kwargs={"level": 1})
            self._refused("sampling after the worker was put to sleep", lambda: sample(llm))
            self._change(trainer.model, adapted)
            llm.wake_up()
            llm.publish()
            self._compare(f"after that, and {change}", llm, trainer.model, before)
            llm.sleep()
            if self._gpu:
                self._without_room("closing", lambda: llm.close("not yet"))
        elif self._gpu:  # on a CPU every engine can
            self._refused("sleeping", llm.sleep)

    def _change(self, model: Any, adapted: bool) -> None:
        if adapted:
            another_adapter(model, seed=len(self.found))
        else:
            write(model)

    def _compare(self, check: str, llm: Any, model: Any, before: Any) -> Any:
        """`before`: what was sampled before the model changed; None: it is as it was."""
        sequences, engine = sample(llm)
        found = difference(engine, score(model, sequences))
        if before is None:
            control = difference(engine, engine.roll(1, 0))["mean"]  # somebody else's tokens
        else:
            control = difference(before[1], score(model, before[0]))["mean"]
        self.say(check, control >= CONTROL * found["mean"], **found, control=control)
        return sequences, engine

    def _refused(self, check: str, call: Callable[[], Any]) -> None:
        from patchfastrl.errors import PatchFastRLError

        self._raises(f"{check} is refused", PatchFastRLError, call)

    def _raises(self, check: str, expected: type[Exception], call: Callable[[], Any]) -> None:
        try:
            call()
        except expected as error:
            self.say(check, True, said=str(error)[:80])
        else:
            self.say(check, False)

    def _without_room(self, check: str, call: Callable[[], Any]) -> None:
        import torch

        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(free - 2**30, dtype=torch.uint8, device="cuda")
        self._refused(f"{check} with 1 GiB left", call)
        del ballast
        torch.cuda.empty_cache()

    def _tell_memory(self, kind: str) -> None:
        used = self._memory.used() * 1024
        more = used - self._in_use.setdefault(kind, used)
        figures = {"in_use": used, "more_than_the_first_time": more}
        if self._gpu:
            import torch

            figures["of_torch"] = torch.cuda.memory_reserved() / 2**20
        self.say("in use afterwards, MiB", more <= GROWTH or not self._gpu, **figures)


def _ballast(gpu: bool) -> Any:
    """A callback: what the next trainer's model needs is left of the GPU when there are gradients; then more is asked.

    The engine sleeps then, and needs more than that to wake.
    """
    import torch
    from transformers import TrainerCallback

    class Ballast(TrainerCallback):
        memory: Any = None
        error = torch.OutOfMemoryError if gpu else MemoryError

        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            if not gpu:
                raise MemoryError("as if there was none left")
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            needed = 2 * 2**30 + sum(p.nbytes for p in model.parameters())
            self.memory = torch.empty(free - needed, dtype=torch.uint8, device="cuda")
            torch.empty(total, dtype=torch.uint8, device="cuda")

    return Ballast()


@contextlib.contextmanager
def _warm_up_fails(gpu: bool) -> Iterator[None]:
    """The last that a worker does when an engine is built: it has its KV cache and its graphs."""
    if gpu:
        from vllm.v1.worker.gpu_worker import Worker as owner
    else:  # (which takes what vLLM uses of CUDA out of the process)
        from vllm.v1.worker.cpu_worker import CPUWorker as owner
    before = owner.compile_or_warm_up_model

    def fail(self: Any) -> None:
        before(self)
        raise ArithmeticError("as if warming up had failed")

    with mock.patch.object(owner, "compile_or_warm_up_model", fail):
        yield


@contextlib.contextmanager
def _too_large_a_cache() -> Iterator[type[Exception]]:
    """vLLM finds 256 GiB more than there are, and its pool runs out of memory in the middle of the KV cache."""
    import torch
    from vllm.v1.worker.gpu_worker import Worker

    before = Worker.determine_available_memory
    with mock.patch.object(Worker, "determine_available_memory", lambda self: before(self) + 256 * 2**30):
        yield torch.OutOfMemoryError


if __name__ == "__main__":
    main()
