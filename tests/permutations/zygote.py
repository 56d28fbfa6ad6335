"""Runs cases, each in a forked child, and prints what became of them as JSON.

TRL's imports take seconds, so their dependencies are imported once, here; TRL itself is not.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "vllm", "transformers.training_args", "libcst")
LAZY = (("transformers", "Trainer"), ("transformers", "AutoModelForCausalLM"), ("vllm", "LLM"), ("datasets", "Dataset"))
SECONDS = 120


def names() -> list[str]:
    """The cases, in the order in which they are written; nothing heavy is imported for it."""
    import ast

    tree = ast.parse((Path(__file__).parent / "cases.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if [arg.arg for arg in node.args.args] == ["tmp"]]


def main() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    for name, attribute in LAZY:
        getattr(importlib.import_module(name), attribute)
    assert "trl" not in sys.modules
    wanted = sys.argv[1:] or names()
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["TMPDIR"] = tmp  # a forked child runs no exit handlers: what it leaves behind goes with this folder
        outcome = {name: _forked(name, Path(tmp)) for name in wanted}
    print(json.dumps(outcome))


def _forked(name: str, tmp: Path) -> str:
    """Run one case; returns what went wrong, or nothing."""
    receive, send = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _child(name, tmp, send)
    os.close(send)
    with os.fdopen(receive) as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    return answer.removeprefix("done") if answer.startswith("done") else f"{answer} (exit status {status})"


def _child(name: str, tmp: Path, send: int) -> Any:
    signal.alarm(SECONDS)
    os.dup2(2, 1)  # standard output is the parent's answer
    answer = ""
    try:
        getattr(importlib.import_module(f"{__package__}.cases"), name)(tmp)
    except BaseException:  # noqa: BLE001  (pytest shows it in the parent)
        answer = traceback.format_exc()
    os.write(send, f"done{answer}".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
