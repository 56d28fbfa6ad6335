"""Run every cell of the support table for real.

Each CPU row of compat/support.json that is not known to be broken gets an environment of its own, built from
requirements/matrix/trl-X.txt (every package, pinned); each tests/cell*.py runs in it; then the environment is removed.
A cell that fails does not stop the others. build/matrix/ gets report.md, report.json, and a log of each cell. The exit
status is 1 when a cell failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "compat" / "support.json"
REQUIREMENTS = ROOT / "requirements" / "matrix"
OUT = ROOT / "build" / "matrix"
# What runs in a cell: `python X --json FILE` leaves its "versions" and "checks" there; it exits with 1 when one fails.
SCRIPTS = sorted((ROOT / "tests").glob("cell*.py"))
# With --ci the trainers whose engine TRL moved most are enough, and the long comparison with stock TRL in two cells.
CI_TRAINERS = ("RLOO", "Online DPO")
CI_COMPARED = ("0.21.0", "1.8.0")
PACKAGES = ("trl", "vllm", "torch", "transformers", "peft", "accelerate")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# The first release of each era: TRL moved its engine, its sampling call or its sleep mode there.
ERAS = ("0.18", "0.20", "0.23", "0.24", "0.25", "0.26", "0.28", "0.29.1", "1.0", "1.10")

EXAMPLES = """\
examples:
  nox -s matrix                          all rows
  nox -s matrix -- 0.29.1 1.16.0         two of them
  nox -s matrix -- --ci --jobs 2         the oldest, one for each era, the newest; two at a time
  nox -s matrix -- --ci --list           which these are
  nox -s matrix -- 1.6.0 --keep          leaves build/matrix/trl-1.6.0/, to look into a failure with
                                         build/matrix/trl-1.6.0/bin/python tests/cell.py

With `uv` on the PATH environments are built in seconds (it is given pip's find-links, index-url and cert, unless its
own variables are set); without it, by venv and pip. A row's Python must be installed, or be one that uv can fetch.
A new row: add it to compat/support.json, then `python scripts/lock.py X` writes its requirements.
"""


@dataclass
class Cell:
    """One row, and what came of it."""

    row: dict[str, Any]
    ci: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = "did not run"

    @property
    def trl(self) -> str:
        return self.row["trl"]

    def arguments(self, script: Path) -> tuple[str, ...] | None:
        """What `script` is called with here; None: it is not run."""
        if self.ci and script.stem == "cell_generate" and self.trl not in CI_COMPARED:
            return None
        return CI_TRAINERS if self.ci and script.stem == "cell_trainers" else ()

    @property
    def passed(self) -> int:
        return sum(check["ok"] for check in self.checks.values())


class Failed(Exception):
    """A cell failed; the text says how."""


# Which rows -----------------------------------------------------------------------------------------------------------


def read_rows(table: Path = TABLE) -> dict[str, dict[str, Any]]:
    """The CPU rows that can run, by TRL release, oldest first."""
    rows = [r for r in json.loads(table.read_text(encoding="utf-8")) if r["platform"] == "cpu"]
    rows = sorted((r for r in rows if r["status"] != "broken"), key=lambda r: Version(r["trl"]))
    by_release = {row["trl"]: row for row in rows}
    if len(by_release) < len(rows):
        raise SystemExit(f"{table.name} has two CPU rows for one TRL release; the matrix names its cells by it.")
    return by_release


def one_per_era(releases: Iterable[str]) -> list[str]:
    """The oldest release, the newest one of each later era."""
    found = sorted(releases, key=Version)
    chosen: dict[int, str] = {}
    for release in found:
        era = sum(Version(first) <= Version(release) for first in ERAS)
        if chosen.setdefault(era, release) != found[0]:
            chosen[era] = release
    return list(chosen.values())


def choose(rows: Mapping[str, dict[str, Any]], names: list[str], ci: bool) -> list[str]:
    if unknown := [name for name in names if name not in rows]:
        raise SystemExit(f"No CPU row for TRL {', '.join(unknown)}. The table has: {', '.join(rows)}.")
    return [name for name in rows if name in names] or (one_per_era(rows) if ci else list(rows))


# One cell -------------------------------------------------------------------------------------------------------------


@functools.cache
def pip_settings() -> dict[str, str]:
    """pip's own configuration in uv's environment variables, as uv does not read it."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = value.strip("'\"")
    known = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    return {uv: ",".join(found[pip].split()) for pip, uv in known.items() if pip in found}


class Environment:
    """A virtual environment for one row; everything that happens in it is written to `log`."""

    building = threading.Lock()  # all of them install this checkout, and its setuptools writes into it
    running: ClassVar[set[int]] = set()  # process groups

    def __init__(self, folder: Path, log: Path, limit: float) -> None:
        self.folder, self.log, self.limit = folder, log, limit
        self.python = folder / "bin" / "python"
        self.uv = shutil.which("uv")

    def run(self, *command: str | Path, cwd: Path = ROOT) -> None:
        """Raises `Failed` when the command fails, or takes longer than the limit."""
        inherited = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
        inherited = pip_settings() | inherited
        inherited |= {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            process = subprocess.Popen(
                list(map(str, command)), cwd=cwd, env=inherited, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            self.running.add(process.pid)
            try:
                code = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                raise Failed(f"no end after {self.limit:g} s: {Path(command[0]).name} ... {command[-1]}") from None
            finally:
                self.running.discard(process.pid)
                if process.poll() is None:  # late, or interrupted: with all that it started
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            raise Failed(_last_error(self.log) or f"exit status {code}")

    def build(self, row: dict[str, Any], requirements: Path) -> None:
        if not requirements.exists():
            raise Failed(f"{requirements.name} is missing: python scripts/lock.py {row['trl']}")
        shutil.rmtree(self.folder, ignore_errors=True)
        version = row["python"][0]
        if self.uv:
            self.run(self.uv, "venv", "-q", "--python", version, self.folder)
        elif python := shutil.which(f"python{version}"):
            self.run(python, "-m", "venv", self.folder)
        else:
            raise Failed(f"python{version} is not on the PATH, and neither is uv, which could fetch it")
        lines = requirements.read_text(encoding="utf-8").splitlines()
        torch = next(line for line in lines if line.startswith("torch=="))
        try:
            self.install(torch)
        except Failed:  # the CPU build is on PyTorch's own index, unless this machine has it elsewhere
            self.install(torch, "--index-url", TORCH_CPU_INDEX)
        # The list is complete. Following dependencies would bring CUDA's torchvision, with which transformers does not
        # import.
        self.install("-r", requirements)
        self.install("--no-build-isolation", "-e", ROOT)
        self.run(self.python, "-P", "-m", "patchfastrl.compat.cpu_name")

    def install(self, *what: str | Path) -> None:
        pip = [self.uv, "pip", "install", "--python", self.python] if self.uv else [self.python, "-m", "pip", "install"]
        self.run(*pip, "-q", "--no-deps", *what)


def run_cell(cell: Cell, out: Path, limit: float, keep: bool) -> None:
    """Build, check, remove; what came of it is in `cell`."""
    name = f"trl-{cell.trl}"
    environment = Environment(out / name, out / f"{name}.log", limit)
    environment.log.unlink(missing_ok=True)
    errors = []
    try:
        with Environment.building, _timed(cell, "install"):
            environment.build(cell.row, REQUIREMENTS / f"{name}.txt")
        with tempfile.TemporaryDirectory() as folder, _timed(cell, "run"):
            for script in SCRIPTS:
                try:
                    run_script(script, cell, environment, Path(folder))
                except Failed as failed:
                    errors.append(str(failed))
    except Failed as failed:
        errors.append(str(failed))
    finally:
        if not keep:
            shutil.rmtree(environment.folder, ignore_errors=True)
    cell.error = judge(cell, errors)


def run_script(script: Path, cell: Cell, environment: Environment, folder: Path) -> None:
    """In `folder`, as a working directory without a folder called patchfastrl."""
    if (arguments := cell.arguments(script)) is None:
        return
    result, error = folder / f"{script.stem}.json", ""
    try:
        environment.run(environment.python, script, *arguments, "--json", result, cwd=folder)
    except Failed as failed:
        error = str(failed)
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
        cell.versions |= found.get("versions", {})
        cell.checks |= {f"{script.stem}: {name}": check for name, check in found["checks"].items()}
        failed_checks = [f"{name} ({check['detail']})" for name, check in found["checks"].items() if not check["ok"]]
        error = "; ".join(failed_checks) or error
    elif not error:
        error = f"tests/{script.name} wrote no results"
    if error:
        raise Failed(error)


@contextlib.contextmanager
def _timed(cell: Cell, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        cell.seconds[phase] = round(time.perf_counter() - start, 1)


def judge(cell: Cell, errors: list[str]) -> str | None:
    """What is wrong with a cell, None when it passed. `errors`: what its commands and scripts ended with."""
    if errors:
        return "; ".join(errors)
    if not cell.checks:
        return "nothing was checked"
    other = [n for n in PACKAGES if Version(cell.versions[n]).public != Version(cell.row[n]).public]
    if other:
        return "not the row's releases: " + ", ".join(f"{n} {cell.versions[n]}, row {cell.row[n]}" for n in other)
    return None


def _last_error(log: Path) -> str:
    """The line of a log that says what went wrong: Python's last exception, or else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    lines = lines[max((n for n, line in enumerate(lines) if line.startswith("$ ")), default=-1) + 1 :]
    exceptions = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception", "Interrupt"))]
    return (exceptions or lines or [""])[-1]


# All of them ----------------------------------------------------------------------------------------------------------


def write_report(cells: list[Cell], out: Path) -> None:
    (out / "report.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n", encoding="utf-8")
    head = [*PACKAGES, "Python", "result", "checks", "install, s", "run, s", "error"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for cell in cells:
        versions = [cell.versions.get(name, cell.row[name]) for name in PACKAGES]
        checks = f"{cell.passed}/{len(cell.checks)}"
        seconds = [str(cell.seconds.get(name, "")) for name in ("install", "run")]
        error = (cell.error or "").replace("|", "\\|").replace("\n", " ")
        texts = [*versions, cell.row["python"][0], "FAILED" if cell.error else "passed", checks, *seconds, error]
        lines.append("| " + " | ".join(texts) + " |")
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_cells(cells: list[Cell], jobs: int, limit: float, keep: bool) -> Iterator[Cell]:
    """Each cell when it is done. Interrupted, none is left running."""
    with ThreadPoolExecutor(jobs) as pool:
        done = {pool.submit(run_cell, cell, OUT, limit, keep): cell for cell in cells}
        try:
            for future in as_completed(done):
                future.result()
                yield done[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for group in list(Environment.running):
                os.killpg(group, signal.SIGKILL)
            raise


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="nox -s matrix --", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("release", nargs="*", help="TRL releases of the table (default: all)")
    parser.add_argument("--ci", action="store_true", help="the oldest, one for each era, the newest; fewer trainers")
    parser.add_argument("--list", action="store_true", help="print the chosen rows and stop")
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/matrix/")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many cells at a time (1)")
    parser.add_argument("--timeout", type=float, default=1200, metavar="SECONDS", help="for each command (1200)")
    options = parser.parse_args(arguments)
    rows = read_rows()
    cells = [Cell(rows[release], options.ci) for release in choose(rows, options.release, options.ci)]
    if options.list:
        for cell in cells:
            print(" ".join(f"{name} {cell.row[name]}" for name in PACKAGES))
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    write_report(cells, OUT)
    for number, cell in enumerate(run_cells(cells, options.jobs, options.timeout, options.keep), 1):
        write_report(cells, OUT)
        what = f"FAILED: {cell.error}" if cell.error else "passed"
        seconds = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in cell.seconds.items())
        print(f"[{number}/{len(cells)}] TRL {cell.trl} with vLLM {cell.row['vllm']}: {what}", flush=True)
        print(f"    {cell.passed} of {len(cell.checks)} checks; {seconds}", flush=True)
    failed = [cell.trl for cell in cells if cell.error]
    print(f"{len(cells) - len(failed)} of {len(cells)} cells passed; the report is {OUT / 'report.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}; the logs lie beside the report")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
