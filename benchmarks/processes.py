"""Measuring in processes of their own: results one by one as they come, and an end for each process.

A script calls `run` with a list of jobs; each becomes `script --child JOB`, which calls `report` for each of its
results. What a process printed is kept and shown if it fails. No process outlives its limit or the script.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

GRACE = 30  # seconds after its limit until a process that did not end by itself is killed


class Child:
    """One process, which imports and then waits for its turn.

    Args:
        device: which of the visible GPUs it may see; None: all.
        cache: folder for those of vLLM, torch and Triton.
        processors: those that it may use; None: all that this process may.
    """

    def __init__(
        self, script: str, job: dict[str, Any], device: int | None, cache: str, processors: list[int] | None = None
    ) -> None:
        self.job = job
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._results, self._log = Path(self._folder.name, "results"), Path(self._folder.name, "log")
        self._results.touch()
        self._read = 0
        self._until = float("inf")
        self._killed = False
        self._turn = Path(self._folder.name, "turn")
        given = {**job, "results": str(self._results), "turn": str(self._turn), "at_once": device is not None}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, script, "--child", json.dumps(given)],
                env=_environment(job, device, cache),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if processors is not None:
            os.sched_setaffinity(self._process.pid, processors)

    def begin(self, limit: float) -> None:
        """It is this process' turn, for so many seconds."""
        self._until = time.time() + limit + GRACE
        begun = self._turn.with_suffix(".begun")
        begun.write_text(str(time.time() + limit))
        begun.rename(self._turn)

    def passed_on(self) -> bool:
        """Whether it has given its turn back."""
        return not self._turn.exists()

    def over(self) -> bool:
        if self._process.poll() is None and time.time() > self._until:
            self._killed = True
            self.kill()
        return self._process.poll() is not None

    def kill(self) -> None:
        """This process and what it started, by their ids."""
        import psutil

        if self._process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for started in psutil.Process(self._process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        started.kill()
            self._process.kill()
            self._process.wait()

    def clean_up(self) -> None:
        self._folder.cleanup()

    def results(self) -> Iterator[dict[str, Any]]:
        """Those that have come since the last call."""
        with self._results.open() as file:
            file.seek(self._read)
            while (line := file.readline()).endswith("\n"):
                self._read = file.tell()
                yield json.loads(line)

    def lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()

    def problem(self) -> str | None:
        """Why it did not end well; None if it did."""
        if self._killed:
            return "killed: it did not end by itself after its time limit"
        code = self._process.returncode
        return None if code == 0 else f"the process ended with status {code}"


def _environment(job: dict[str, Any], device: int | None, cache: str) -> dict[str, str]:
    # vLLM's cache is keyed by its configuration, not by what is patched, and has what a model's class is like. The
    # kernels of others are kept by torch and Triton.
    name = "-".join(job[key] for key in ("side", "model", "method") if key in job)
    caches = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    env = {**os.environ, **{variable: str(Path(cache, name, folder)) for variable, folder in caches.items()}}
    env |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    env.setdefault("VLLM_LOGGING_LEVEL", "INFO" if job.get("verbose") else "ERROR")
    if device is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        env["CUDA_VISIBLE_DEVICES"] = visible[device] if visible != [""] else str(device)
    return env


def run(
    script: str,
    jobs: list[dict[str, Any]],
    on_result: Callable[[dict[str, Any], dict[str, Any]], None],
    on_end: Callable[[Child], None],
    *,
    limit: float,
    at_once: int = 1,
) -> None:
    """Run the jobs in their order. A job that says `ahead` is imported while the one before it is measured.

    vLLM, torch and Triton find empty caches, which only jobs of the same model, method and side share.

    Args:
        on_result: called with the job and each of its results, as they come.
        on_end: called when a job's process is over.
        limit: seconds for each process.
        at_once: how many run at the same time, each with a GPU and its share of the processors of its own.
    """
    waiting: list[dict[str, Any]] = list(jobs)
    running: dict[int, Child] = {}
    ahead: dict[int, Child] = {}
    cache = tempfile.TemporaryDirectory(prefix="cache-", ignore_cleanup_errors=True)

    def start(device: int) -> Child:
        if at_once == 1:
            return Child(script, waiting.pop(0), None, cache.name)
        return Child(script, waiting.pop(0), device, cache.name, share_of_processors(device, at_once))

    try:
        while waiting or running or ahead:
            for device in range(at_once):
                if device not in running and (device in ahead or waiting):
                    child = running[device] = ahead.pop(device, None) or start(device)
                    child.begin(limit)
                    shown = " ".join(f"{k}={v}" for k, v in child.job.items())
                    print(f"{time.strftime('%H:%M:%S')} {shown}", file=sys.stderr, flush=True)
            for device in range(at_once):  # once all have something to do
                if device not in ahead and waiting and waiting[0].get("ahead"):
                    ahead[device] = start(device)
            for device, child in list(running.items()):
                over = child.over()
                for result in child.results():
                    on_result(child.job, result)
                if over:
                    del running[device]
                    on_end(child)
                    child.clean_up()
            time.sleep(0.1)
    finally:
        for child in [*running.values(), *ahead.values()]:
            child.kill()
        cache.cleanup()


def share_of_processors(number: int, at_once: int) -> list[int]:
    """Those of one of so many processes that run at the same time."""
    mine = sorted(os.sched_getaffinity(0))
    each = max(1, len(mine) // at_once)
    first = number * each % len(mine)
    return mine[first : first + each]


def run_in_turn(
    script: str,
    jobs: list[dict[str, Any]],
    on_result: Callable[[dict[str, Any], dict[str, Any]], None],
    on_end: Callable[[Child], None],
    *,
    limit: float,
) -> None:
    """Run the jobs on one device, where one after the other goes on, in their order, until it calls `pass_on`.

    Args:
        limit: seconds for each turn; the other arguments are those of `run`.
    """
    cache = tempfile.TemporaryDirectory(prefix="cache-", ignore_cleanup_errors=True)
    waiting: list[Child] = []
    try:
        for job in jobs:
            waiting.append(Child(script, job, None, cache.name))
        while waiting:
            child = waiting[0]
            child.begin(limit)
            while not (over := child.over()) and not child.passed_on():
                time.sleep(0.05)
            for result in child.results():
                on_result(child.job, result)
            del waiting[0]
            if over:
                on_end(child)
                child.clean_up()
            else:
                waiting.append(child)
    finally:
        for child in waiting:
            child.kill()
        cache.cleanup()


def my_turn(job: dict[str, Any]) -> None:
    """In the process: wait until it may begin. Sets the job's deadline (`time.time()`)."""
    turn = Path(job["turn"])
    while not turn.exists():
        if not turn.parent.exists():
            raise SystemExit("the script that started this process is gone")
        time.sleep(0.05)
    job["deadline"] = float(turn.read_text())
    if job["at_once"]:  # TRL would choose the same port in all
        os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("", 0))
        return int(asked.getsockname()[1])


def pass_on(job: dict[str, Any]) -> None:
    """In a process of `run_in_turn`: let the others have theirs, and wait for the next one."""
    Path(job["turn"]).unlink()
    my_turn(job)


def report(job: dict[str, Any], result: dict[str, Any]) -> None:
    """In the process: a result of this job."""
    with open(job["results"], "a") as file:
        file.write(json.dumps(result) + "\n")


@contextlib.contextmanager
def reported(job: dict[str, Any]) -> Iterator[None]:
    """In the process: an error is the last result."""
    try:
        yield
    except BaseException as error:
        text = str(error).strip() or repr(error)
        report(job, {"error": f"{type(error).__name__}: {text}"})
        raise


def show_failure(child: Child) -> None:
    """The end of what a process printed."""
    said = [line for line in child.lines() if not line.startswith("frame #")]
    print("\n".join(said[-40:]), file=sys.stderr, flush=True)


def seconds_said(lines: Iterable[str]) -> list[str]:
    """The lines of a log that say how long something took."""

    def says(line: str) -> bool:
        words = [word.strip(",.;:()[]") for word in line.split()]
        return any(_number(a) and b in ("s", "sec", "secs", "seconds") for a, b in itertools.pairwise(words))

    return [line.strip() for line in lines if says(line)]


def _number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()
