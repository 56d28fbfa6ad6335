"""Draws what `grid.py --json` measured: memory over time through two steps, and the phases of a step, side by side.

    python benchmarks/plot.py out.json [more.json ...] --model 8b --method lora --folder benchmarks/figures

Writes memory.png and phases.png. Files are read in order; of two results for the same side the later one counts, which
is the largest cell of this model and method (without these two: of `grid.py`'s last).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"stock": "#888888", "patched": "#1f77b4", "adapter": "#9ecae1", "needed": "#08519c", "unsloth": "#ff7f0e"}
PARTS = (
    ("generate", "llm.generate", 1.0),
    ("weights", "weights to the engine", 1e-3),
    ("standby", "sleep and wake", 1e-3),
    ("logprobs", "old log-probabilities", 1.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the plots go")
    parser.add_argument("--model", help="of all that is in the files")
    parser.add_argument("--method", help="likewise")
    options = parser.parse_args()
    wanted = {name: getattr(options, name) for name in ("model", "method") if getattr(options, name) is not None}
    results: dict[str, Any] = {}
    for file in options.files:
        for result in json.loads(file.read_text()):
            if "error" not in result and all(result[name] == value for name, value in wanted.items()):
                results[result["side"]] = result
    if not results:
        parser.error("no such result in these files")
    results = {side: results[side] for side in COLOURS if side in results}
    options.folder.mkdir(parents=True, exist_ok=True)
    memory(results, options.folder / "memory.png")
    phases(results, options.folder / "phases.png")


def memory(results: dict[str, Any], file: Path) -> None:
    """The driver's memory through the third and the fourth step."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for side, result in results.items():
        starts = [start for phase, start, _ in result["spans"] if phase == "rollout"]
        begin, end = starts[2], starts[4] if len(starts) > 4 else result["spans"][-1][2]
        points = [(t - begin, size) for t, size in result["memory"] if begin <= t <= end]
        axes.step(*zip(*points, strict=True), where="post", label=side, color=COLOURS[side])
    axes.set_xlabel("seconds from the beginning of a step")
    axes.set_ylabel("device memory in use, GiB")
    axes.set_ylim(bottom=0)
    _finish(figure, axes, results, file)


def phases(results: dict[str, Any], file: Path) -> None:
    """A step's seconds, by phase."""
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.6 * len(results)), layout="constrained")
    names = list(results)
    left = [0.0] * len(names)
    for key, label, unit in PARTS:
        widths = [result[key] * unit for result in results.values()]
        axes.barh(names, widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    rollout_rest = [max(r["rollout"] - done, 0) for r, done in zip(results.values(), left, strict=True)]
    training = [r["step"] - r["rollout"] for r in results.values()]
    axes.barh(names, rollout_rest, left=left, label="rest of the rollout")
    left = [a + b for a, b in zip(left, rollout_rest, strict=True)]
    axes.barh(names, training, left=left, label="training")
    axes.set_xlabel("seconds of a step")
    axes.invert_yaxis()
    _finish(figure, axes, results, file)


def _finish(figure: Any, axes: Any, results: dict[str, Any], file: Path) -> None:
    one = next(iter(results.values()))
    axes.set_title(f"{one['model']} {one['method']}, {one['completions']} x {one['tokens']} tokens", fontsize=10)
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
