"""The scripts of benchmarks/ in their small CPU mode: real runs in processes of their own."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str, *arguments: Any, status: int = 0) -> str:
    """What `benchmarks/NAME ARGUMENTS` prints."""
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_grid_measures_several_cells_in_one_process_and_draws_them(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    said = script("grid.py", "--model", "tiny", "--side", "patched", "--tokens", 24, "--tokens", 16,
                  "--completions", 16, "--completions", 4, "--steps", 5, "--verbose", "--json", file)  # fmt: skip
    results = json.loads(file.read_text())
    sizes = [(r["completions"], r["tokens"]) for r in results]
    assert sizes == [(4, 16), (4, 24), (16, 16), (16, 24)]  # small ones first
    for result in results:
        assert "error" not in result
        assert result["steps_measured"] == 5
        assert 0 < result["generate"] < result["rollout"] < result["step"]
        assert 0 < result["micro"] < result["step"]
        assert result["difference_max"] < 1e-4
        assert result["memory_peak"] >= max(size for _, size in result["memory"])
        begin, end = result["memory"][0][0], result["memory"][-1][0]
        assert all(begin - 0.1 < start <= stop < end + 0.1 for _, start, stop in result["spans"])
    assert "first" in results[0]
    assert not any("first" in result for result in results[1:])
    assert said.count("| whole step, s") == 4
    assert "audit of the shared engine" in said
    assert "until context: driver" in said
    file.write_text(json.dumps([*results, {**results[-1], "model": "0.5b", "spans": []}]))  # which could not be drawn
    script("plot.py", file, "--model", "8b", "--folder", tmp_path, status=2)
    script("plot.py", file, "--model", "tiny", "--method", "lora", "--folder", tmp_path)
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert (tmp_path / "phases.png").stat().st_size > 1000


def test_sides_at_the_same_time_from_a_checkpoint_and_one_that_cannot_run(tmp_path: Path) -> None:
    """Unsloth needs a GPU: its error is its cell's, and nothing else is lost."""
    file = tmp_path / "out.json"
    said = script("grid.py", "--model", "tiny", "--side", "unsloth", "--side", "stock", "--tokens", 16,
                  "--completions", 8, "--steps", 3, "--parallel", 2, "--checkpoint", "--json", file)  # fmt: skip
    results = {result["side"]: result for result in json.loads(file.read_text())}
    assert results["unsloth"]["error"].startswith(("ModuleNotFoundError: ", "ImportError: "))
    assert "unsloth did not run: " in said
    assert results["stock"]["step"] > 0
    assert results["stock"]["from_checkpoint"]
    assert results["stock"]["difference_max"] < 1e-4
    assert "2 processes at the same time" in said


def test_sides_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    said = script("grid.py", "--model", "tiny", "--side", "stock", "--side", "patched", "--tokens", 8, "--tokens", 16,
                  "--completions", 8, "--steps", 2, "--in-turn", 3, "--json", file)  # fmt: skip
    results = json.loads(file.read_text())
    assert [(r["side"], r["tokens"]) for r in results] == [("stock", 8), ("patched", 8), ("stock", 16), ("patched", 16)]
    assert all(r["steps_measured"] == 6 for r in results)
    assert all(r["step"] > 0 and 0 < r["processor"] <= r["processor_max"] for r in results)
    assert not any("memory_peak" in r for r in results)
    turns = sorted((begin, end, r["side"]) for r in results for begin, end in r["turns"])
    assert [side for *_, side in turns] == ["stock", "patched"] * 6
    assert all(end <= begin for (_, end, _), (begin, *_) in itertools.pairwise(turns))
    assert "tiny lora, 8 x 16 tokens, 3 times in turn" in said


def test_a_second_run_is_measured_and_its_first_is_not(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    said = script("grid.py", "--model", "tiny", "--side", "patched", "--tokens", 8, "--completions", 8, "--steps", 2,
                  "--warm", "--verbose", "--json", file)  # fmt: skip
    (result,) = json.loads(file.read_text())
    assert result["warm"]
    assert result["from_checkpoint"]
    assert result["steps_measured"] == 2
    assert "8 x 8 tokens, from a checkpoint, second run" in said
    assert said.count("what took how long") == 2


def test_a_time_limit_is_kept_and_said(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    script("grid.py", "--model", "tiny", "--side", "patched", "--tokens", 8, "--completions", 8, "--completions", 16,
           "--limit", 1, "--json", file)  # fmt: skip
    results = json.loads(file.read_text())
    assert [result["completions"] for result in results] == [8, 16]
    assert "time limit" in results[0]["error"]  # before the first cell, or killed while it was imported
    assert "error" in results[1]


def test_correctness_checks_pass_and_have_controls_that_do_not(tmp_path: Path) -> None:
    """But one: a CPU has no 8-bit KV cache. The exit status says how many failed."""
    file = tmp_path / "out.json"
    both = ("--only", "lora", "--only", "lora-no-standby")
    small = ("--model", "tiny", *both, "--only", "fp8-cache", "--steps", 3, "--long", 10, "--rank", 8)
    said = script("correct.py", *small, "--json", file, status=1)
    found = {(f["kind"], f["check"]): f for f in json.loads(file.read_text())}
    failed = [f for f in found.values() if not f["passed"]]
    assert [f["kind"] for f in failed] == ["fp8-cache"]
    assert "float8_kv_cache=True" in failed[0]["said"]
    assert said.count("FAIL") == said.count("FAIL fp8-cache") == 1
    assert ("stock-lora", "after the sync of another adapter") in found
    compared = {kind: [f for (k, _), f in found.items() if k == kind and "control" in f] for kind in both[1::2]}
    assert [len(some) for some in compared.values()] == [6, 5]
    for f in [*compared["lora"], *compared["lora-no-standby"]]:
        assert f["stock_mean"] > 0
        assert f["mean"] < 1e-5 < 1e-3 < f["control"]
    assert found["lora", "after 3 steps the base is bit-identical"]["same_base"]
    assert len(found["lora", "memory from step 3 to step 10"]["series"]) == 10


def test_trainers_one_after_another(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    kinds = ("--only", "slot", "--only", "merged-no-standby", "--only", "full")
    said = script("again.py", "--model", "tiny", *kinds, "--rounds", 1, "--json", file)
    _, *found = json.loads(file.read_text())
    assert all(f["passed"] for f in found)
    assert [sum(f["trainer"] == f"{kind} 1" for f in found) for kind in kinds[1::2]] == [5, 2, 5]
    refused = [f["check"] for f in found if f["trainer"] == "failing" and "said" in f]
    assert refused == [
        "an engine is not built to its end",
        "training runs out of memory",
        "sampling after the worker was put to sleep is refused",
    ]
    assert all(f["mean"] < 1e-5 < 1e-2 < f["control"] for f in found if "control" in f)
    assert "22 of 22 passed" in said


def test_limits_say_where_the_bytes_are_and_what_does_not_train(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    said = script("limits.py", "--model", "tiny", "--tokens", 128, "--tokens", 70000, "--completion", 32, "--cap", 1,
                  "--json", file)  # fmt: skip
    trains, refused = json.loads(file.read_text())
    assert trains["phase"] == "done"
    assert trains["tokens_trained_on"] == 128
    assert all(trains["bytes"][name] > 0 for name in ("weights", "adapter", "gradients", "optimizer"))
    assert trains["marks"]["ready"] > trains["marks"]["context"] > 0
    assert "building the engine" in refused["error"]  # the model has 65,536 positions
    assert said.count("  TRAINS") == 1
    assert said.count("  DOES NOT TRAIN: ") == 1


def test_limits_with_the_engine_before_the_adapter(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    script("limits.py", "--model", "tiny", "--tokens", 64, "--completion", 32, "--engine-first", "--json", file)
    (trains,) = json.loads(file.read_text())
    assert trains["phase"] == "done"
    assert list(trains["marks"])[2:4] == ["engine asleep", "ready"]
    script("limits.py", "--model", "tiny", "--engine-first", "--side", "stock", status=2)


def test_the_peak_while_loading_is_worked_out(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    said = script("loading.py", "--model", "tiny", "--method", "lora in the slot", "--json", file)
    made, by_name = json.loads(file.read_text())
    assert (made["how"], by_name["how"]) == ("made", "by name")
    for figures in made, by_name:
        assert figures["kept"] < figures["end"] <= figures["peak"]
        assert said.count(f"{figures['in copies']:.3f} |")


JOB = """
import json, os, sys, time
sys.path.insert(0, {folder!r})
import processes
job = json.loads(sys.argv[2])
processes.my_turn(job)
began = time.time()
time.sleep(2)
processes.report(
    job,
    {{
        "turn": (began, time.time()),
        "processors": sorted(os.sched_getaffinity(0)),
        "caches": [os.environ[name] for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")],
        "gpu": os.environ["CUDA_VISIBLE_DEVICES"],
        "port": os.environ["MASTER_PORT"],
    }},
)
"""


def test_at_once_each_process_has_a_gpu_processors_and_caches_of_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # two of them are made up
    import processes

    (tmp_path / "job.py").write_text(JOB.format(folder=str(FOLDER)))
    found: list[dict[str, Any]] = []
    processes.run(
        str(tmp_path / "job.py"),
        [{"side": name, "ahead": True} for name in "ab"],
        lambda job, result: found.append(result),
        lambda child: None,
        limit=60,
        at_once=2,
    )
    first, second = sorted(found, key=lambda result: result["turn"])
    assert second["turn"][0] < first["turn"][1]  # neither GPU waits while the other one's next job imports
    assert {first["gpu"], second["gpu"]} == {"0", "1"}
    assert len({*first["caches"], *second["caches"]}) == 6
    assert first["port"] != second["port"]
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) > 1:
        assert not set(first["processors"]) & set(second["processors"])
    assert set(first["processors"]) | set(second["processors"]) <= set(mine)
    assert len(first["processors"]) == len(second["processors"]) == max(1, len(mine) // 2)


def test_a_micro_step_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    said = script("micro_step.py", "--model", "tiny", "--tokens", 16, "--tokens", 32, "--rows", 4, "--json", file)
    results = json.loads(file.read_text())
    cells = [(16, False), (16, True), (32, False), (32, True)]
    assert [(r["side"], r["tokens"], r["padded"]) for r in results] == [
        (side, *cell) for side in ("stock", "patched") for cell in cells
    ]
    for stock, patched in zip(results[:4], results[4:], strict=True):
        assert stock["micro"] > 0
        assert patched["micro"] > 0
        assert len(stock["logps"]) == len(patched["logps"]) <= 4 * stock["tokens"]
        assert (len(stock["logps"]) < 4 * stock["tokens"]) == stock["padded"]
        assert max(abs(a - b) for a, b in zip(stock["logps"], patched["logps"], strict=True)) < 1e-4
    assert "| 32, padded |" in said


def test_a_micro_step_that_does_not_fit_on_one_side(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import micro_step

    def runs_out(*args: Any) -> Any:
        raise torch.OutOfMemoryError("as a GPU says it")

    monkeypatch.setattr(micro_step, "one_cell", runs_out)
    options = argparse.Namespace(model="tiny", method="lora", tokens=[16], rows=4, rank=4)
    stock = micro_step.measure("stock", options)
    assert [r["micro"] for r in stock] == [None, None]
    micro_step.print_table(stock + [{**r, "side": "patched", "micro": 0.5, "peak": 1.0} for r in stock])
    assert "| 16, padded | out of memory | 500 |  |  | 1.0 |  |" in capfd.readouterr().out
