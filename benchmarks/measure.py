"""Seconds of each phase of each step, and the device's memory over time, on one clock."""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SUMS = ("step", "rollout", "generate", "weights", "standby", "logprobs")


class Clock:
    """Seconds of each phase of each step, and when they were, for the plot. One for each trainer."""

    def __init__(self, trainer: Any, llm: Any, begin: float, on_gpu: bool) -> None:
        self._begin = begin
        self._on_gpu = on_gpu
        self._inside: list[str] = []
        self.profile_step: int | None = None
        self.start_over()
        generation = getattr(trainer, "vllm_generation", None)
        kind = type(trainer)  # replaced on the instance they would look like somebody else's
        for owner, name, phase in (
            (kind, "_generate_and_score_completions", "rollout"),
            (llm, "generate", "generate"),
            (generation, "sync_weights", "weights"),
            (llm, "sleep", "standby"),
            (llm, "wake_up", "standby"),
            (llm, "publish", "weights"),
            (kind, "_get_per_token_logps_and_entropies", "logprobs"),
            (kind, "training_step", "training_step"),
        ):
            if hasattr(owner, name):  # only ours can publish; not every side's trainer is TRL's
                self._wrap(owner, name, phase)
        before, clock = kind.training_step, self

        @functools.wraps(before)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if clock.profile_step == len(clock.steps) and len(clock._now["training_step"]) == 1:
                return clock._profiled(lambda: before(*args, **kwargs))
            return before(*args, **kwargs)

        kind.training_step = counted
        from transformers import TrainerCallback

        class Steps(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                clock._now["processor"].append(processor())
                clock._step_began = clock.now()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock._end_step()

        trainer.add_callback(Steps())

    def start_over(self) -> None:
        """What was measured is forgotten: another cell begins."""
        self.spans: list[tuple[str, float, float]] = []
        self.steps: list[dict[str, list[float]]] = []
        self._now: dict[str, list[float]] = defaultdict(list)
        self._step_began = 0.0

    def now(self) -> float:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter() - self._begin

    def _wrap(self, owner: Any, name: str, phase: str) -> None:
        before: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(before)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # What generating does before it begins is part of it (publishing is a phase as well); scoring with the
            # model is a phase of the rollout, and the training step's own is not.
            part = "generate" in self._inside and phase != "weights"
            outside = phase == "logprobs" and "rollout" not in self._inside
            if phase in self._inside or part or outside:
                return before(*args, **kwargs)
            start, standby = self.now(), sum(self._now["standby"])
            self._inside.append(phase)
            try:
                return before(*args, **kwargs)
            finally:
                self._inside.remove(phase)
                end = self.now()
                # Stock TRL wakes its engine within its weight sync, which is a phase of its own.
                within = sum(self._now["standby"]) - standby if phase == "weights" else 0.0
                self._now[phase].append(end - start - within)
                self.spans.append((phase, round(start, 4), round(end, 4)))

        setattr(owner, name, timed)

    def _end_step(self) -> None:
        self._now["step"].append(self.now() - self._step_began)
        self.steps.append(dict(self._now))
        self._now = defaultdict(list)

    def _profiled(self, call: Callable[[], Any]) -> Any:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
        with profile(activities=kinds) as found:
            result = call()
            self.now()
        key = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        for line in found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90).splitlines():
            print("\nSHOW " + line[:95] + line[-110:], end="")
        print(flush=True)
        return result

    def medians(self, warm_up: int) -> dict[str, float]:
        """Of the steps after `warm_up` of them; those show how long the first one took."""
        late = self.steps[warm_up:]
        figures = {phase: statistics.median(sum(step.get(phase, [0.0])) for step in late) for phase in SUMS}
        figures["weights"] *= 1e3
        figures["standby"] *= 1e3
        loops = [t * 1e3 for step in late for t in step["processor"]]
        figures |= {"processor": statistics.median(loops), "processor_max": max(loops)}
        figures["micro"] = statistics.median(t for step in late for t in _micro_steps(step))
        return figures | ({"first": sum(self.steps[0]["step"])} if warm_up else {})


def processor() -> float:
    """Seconds of a loop in Python. Small models wait for the processor, which others may slow down."""
    start = time.perf_counter()
    for _ in range(200_000):
        pass
    return time.perf_counter() - start


def _micro_steps(step: dict[str, list[float]]) -> list[float]:
    """The first micro-step of a step contains the rollout, and what it leaves in the caches."""
    first, *others = step["training_step"]
    return others or [first - sum(step["rollout"])]


class Memory(contextlib.AbstractContextManager[Any]):
    """GiB in use on the device, every 20 ms, seen from the driver (on a CPU: the resident set).

    Args:
        besides: GiB of somebody else's, which are not counted.

    Attributes:
        begin: when the clock started (`time.perf_counter()`).
        samples: (seconds, GiB). marks: GiB, by name. times: seconds, by name.
    """

    def __init__(self, on_gpu: bool, besides: float = 0.0) -> None:
        self._on_gpu = on_gpu
        self._besides = besides
        self.begin = time.perf_counter()
        self.samples: list[tuple[float, float]] = []
        self.marks: dict[str, float] = {}
        self.times: dict[str, float] = {}
        self.details: dict[str, dict[str, float]] = {}
        self._stop = threading.Event()

    def used(self) -> float:
        if self._on_gpu:
            import torch

            free, total = torch.cuda.mem_get_info()
            return (total - free) / 2**30 - self._besides
        import psutil

        return psutil.Process().memory_info().rss / 2**30

    def mark(self, name: str) -> None:
        self.marks[name], self.times[name] = self.used(), time.perf_counter() - self.begin
        self.details[name] = {"driver": self.marks[name]}
        if self._on_gpu:
            import torch

            self.details[name] |= {
                "reserved": torch.cuda.memory_reserved() / 2**30,
                "allocated": torch.cuda.memory_allocated() / 2**30,
            }

    def give_back(self) -> None:
        """What torch keeps for later allocations."""
        if self._on_gpu:
            import torch

            torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        """What is in use now is torch's peak so far: what the model was made with does not count."""
        self.give_back()
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def retried(self) -> int:
        """How often torch found no room and gave back what it kept for later allocations, since the process began."""
        if not self._on_gpu:
            return 0
        import torch

        return int(torch.cuda.memory_stats()["num_alloc_retries"])

    def mark_after(self, owner: Any, name: str, mark: str) -> None:
        """Let a function of somebody else's set a mark when it ends, with torch's peak until then."""
        before = getattr(owner, name)

        @functools.wraps(before)
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = before(*args, **kwargs)
            self.mark(mark)
            if self._on_gpu:
                import torch

                self.details[mark]["peak"] = self.marks["context"] + torch.cuda.max_memory_reserved() / 2**30
            return result

        setattr(owner, name, marked)

    def between(self, begin: float, end: float) -> list[tuple[float, float]]:
        return [(t, size) for t, size in self.samples if begin <= t <= end]

    def __enter__(self) -> Memory:
        if self._on_gpu:
            import torch

            torch.zeros(1, device="cuda")
        self.mark("context")  # of CUDA, before there is anything in it

        def watch() -> None:
            while not self._stop.wait(0.02):
                self.samples.append((round(time.perf_counter() - self.begin, 3), round(self.used(), 3)))

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def no_more_samples(self) -> None:
        self._stop.set()
        self._thread.join()

    def __exit__(self, *args: Any) -> None:
        self.no_more_samples()


def gib_of(tensors: Iterable[Any]) -> float:
    """GiB of the storages that the tensors lie in."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values()) / 2**30


def kv_cache(llm: Any) -> Iterator[Any]:
    """The tensors of an engine's KV cache."""
    import torch

    worker = llm.llm_engine.model_executor.driver_worker
    waiting = list(getattr(worker, "worker", worker).model_runner.kv_caches)
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            yield one
        else:
            waiting.extend(one)


def gaps() -> list[str]:
    """What torch's allocator cannot give back although nobody uses it: it lies beside blocks that are in use."""
    import torch

    found = []
    for segment in torch.cuda.memory_snapshot():
        free = sum(block["size"] for block in segment["blocks"] if block["state"] == "inactive")
        used = [block["size"] / 2**20 for block in segment["blocks"] if block["state"] != "inactive"]
        if used and free > 32 * 2**20:
            beside = ", ".join(f"{size:.2f}" for size in sorted(used, reverse=True)[:6])
            found.append(f"{free / 2**20:.0f} MiB are kept beside {len(used)} blocks in use (MiB: {beside})")
    return found


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """Print how long it took, for `--verbose`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        print(f"\nTOOK {time.perf_counter() - start:8.2f} s  {what}", flush=True)


def say_times(owner: Any, name: str, what: str) -> None:
    """Let a function of somebody else's say how long each call took."""
    before = getattr(owner, name)

    @functools.wraps(before)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with said(what):
            return before(*args, **kwargs)

    setattr(owner, name, timed)
