"""The demo learns, and only through the shared engine; the example scripts run with and without the one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS, WINDOW = 60, 5


def python(*arguments: str | Path, folder: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` in a process of its own, as a user does; fails the test unless it ends well."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def demo(folder: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """What the demo printed, and its figures."""
    done = python(EXAMPLES / "demo.py", "--steps", str(STEPS), *arguments, folder=folder)
    return done.stdout, json.loads((folder / "outputs" / "demo" / "runs.json").read_text())


def before(runs: list[dict[str, Any]]) -> float:
    return mean(mean(run["rewards"][:WINDOW]) for run in runs)


def after(runs: list[dict[str, Any]]) -> float:
    return mean(mean(run["rewards"][-WINDOW:]) for run in runs)


def test_reward_doubles_over_three_seeds(tmp_path: Path) -> None:
    printed, runs = demo(tmp_path)
    assert len(runs) == 3
    assert after(runs) >= 2 * before(runs)
    for run in runs:
        assert len(run["rewards"]) == STEPS
        assert STEPS - 1 <= run["publishes"] <= STEPS + 1  # one a step
        assert run["bytes_shared"] > 2 * 84_000  # parameters, of two bytes at least
        assert all(spent > 0 for spent in run["seconds"].values()), run["seconds"]
    rows = ("reward before", "reward after", "sampling", "publish", "training", "standby", "bytes shared")
    assert all(row in printed for row in rows)
    assert (tmp_path / "outputs/demo/reward.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_without_publishing_it_does_not_double(tmp_path: Path) -> None:
    """Control: the samples stay the base model's, so what the adapter learns cannot be seen in the reward."""
    _, runs = demo(tmp_path, "--seeds", "1", "--no-publish")
    assert runs[0]["publishes"] <= 1
    assert after(runs) < 1.5 * before(runs)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = ["demo.py", "--help"]
try:
    runpy.run_path({str(EXAMPLES / "demo.py")!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "trl", "vllm", "transformers", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    printed = python("-c", code, folder=tmp_path, timeout=30).stdout
    for option in ("--seed", "--seeds", "--steps", "--output-dir", "--no-publish"):
        assert option in printed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples' model without its warm-up: two steps teach nothing anyway."""
    folder = tmp_path_factory.mktemp("checkpoint")
    code = "import sys; from arithmetic import make_checkpoint; make_checkpoint(sys.argv[1], warmed_up=False)"
    python("-c", code, folder, folder=EXAMPLES)
    return folder


@pytest.mark.parametrize("script", ["grpo_lora", "grpo_full", "rloo_lora"])
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_script(script: str, patched: bool, checkpoint: Path, tmp_path: Path) -> None:
    start = ["-m", "patchfastrl", "run"] if patched else []
    done = python(*start, EXAMPLES / f"{script}.py", "--model", checkpoint, "--steps", "2", folder=tmp_path)
    assert "train_runtime" in done.stdout
    assert ("PatchFastRL: engine ready" in done.stderr) == patched
    assert list(tmp_path.iterdir()) == []


def test_fast_language_model_script(checkpoint: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "grpo_fast_language_model.py"
    done = python(script, "--model", checkpoint, "--steps", "2", folder=tmp_path)
    assert "train_runtime" in done.stdout
    assert "PatchFastRL: engine ready" in done.stderr
    assert "standby   on" in done.stderr
    assert "7+12=" in done.stdout
    assert list(tmp_path.iterdir()) == []
