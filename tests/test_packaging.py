"""Wheel, sdist and editable install; what `import patchfastrl` costs; what must not be in the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "outputs")

PROBE = """
import json, pathlib
import patchfastrl, patchfastrl.patches, patchfastrl.compat
from patchfastrl.compat import support
from patchfastrl.errors import PatchFastRLError
assert support.rows()[0].trl
packages = (patchfastrl, patchfastrl.patches, patchfastrl.compat)
print(json.dumps([str(pathlib.Path(package.__file__).parent) for package in packages]))
"""


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _pip_install(python: Path, *arguments: str | Path, cwd: Path) -> None:
    # Nothing is downloaded: setuptools is here, dependencies are not followed. The running environment's own
    # installation is visible through the .pth file and must be left alone.
    install = ("-m", "pip", "install", "--no-deps", "--ignore-installed")
    # A fresh environment of Python 3.11 has a setuptools of its own, too old to build this: ours goes first.
    env = {"PYTHONPATH": str(Path(setuptools.__file__).parents[1])}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0"}
    _run(python, *install, *arguments, cwd=cwd, **env)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository: building writes into the folder that it builds."""
    copy = tmp_path_factory.mktemp("checkout") / "patchfastrl"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    _run(sys.executable, "-c", code, cwd=checkout)
    (archive,) = folder.glob("patchfastrl-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _wheel_of(checkout, tmp_path_factory.mktemp("wheel"))


def _wheel_of(source: Path, folder: Path) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    _run(sys.executable, "-c", code, cwd=source)
    (archive,) = folder.glob("patchfastrl-*.whl")
    return archive


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A fresh virtual environment whose only packages besides ours are the running environment's dependencies."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Path entries of a .pth file do not run the .pth files behind them, so an editable install there stays out of it.
    here = [str(Path(entry)) for entry in sys.path if Path(entry).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(here), encoding="utf-8")
    return folder


def _probe(environment: Path, cwd: Path) -> list[Path]:
    return [Path(folder) for folder in json.loads(_run(environment / "bin" / "python", "-c", PROBE, cwd=cwd))]


def test_wheel_holds_the_three_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"patchfastrl/py.typed", "patchfastrl/compat/support.json"} <= names
    sources = {"patchfastrl": "patchfastrl", "patches": "patchfastrl/patches", "compat": "patchfastrl/compat"}
    for folder, installed in sources.items():
        for file in (ROOT / folder).glob("*.py"):
            assert f"{installed}/{file.name}" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"patchfastrl"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_no_folder_of_modules_is_forgotten() -> None:
    """setuptools takes the packages that pyproject.toml lists: a new sub-package has to be listed as well."""
    nested = [p for top in ("patchfastrl", "patches", "compat") for p in (ROOT / top).rglob("__init__.py")]
    assert sorted(p.parent.name for p in nested) == ["compat", "patches", "patchfastrl"]


@pytest.mark.timeout(180)
def test_wheel(wheel: Path, environment: Path, tmp_path: Path) -> None:
    _pip_install(environment / "bin" / "python", wheel, cwd=tmp_path)
    folders = _probe(environment, cwd=tmp_path)
    assert all(folder.is_relative_to(environment) for folder in folders)
    assert [folder.name for folder in folders] == ["patchfastrl", "patches", "compat"]
    # The command, not the bare checkout, also where the working directory is the repository.
    out = _run(environment / "bin" / "patchfastrl", "--version", cwd=ROOT)
    assert out.startswith("patchfastrl ")


@pytest.mark.timeout(180)
def test_sdist(sdist: Path, environment: Path, tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    _run("tar", "-xzf", sdist, cwd=tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert (source / "LICENSE").is_file()
    (tmp_path / "built").mkdir()
    wheel = _wheel_of(source, tmp_path / "built")
    _pip_install(environment / "bin" / "python", wheel, cwd=tmp_path)
    assert all(folder.is_relative_to(environment) for folder in _probe(environment, cwd=tmp_path))


@pytest.mark.timeout(180)
def test_editable(checkout: Path, environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    _pip_install(python, "--no-build-isolation", "-e", checkout, cwd=tmp_path)
    expected = [checkout / "patchfastrl", checkout / "patches", checkout / "compat"]
    assert _probe(environment, cwd=tmp_path) == expected
    assert _probe(environment, cwd=checkout) == expected


def test_importing_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys, time
start = time.perf_counter()
import patchfastrl
seconds = time.perf_counter() - start
heavy = {"torch", "vllm", "trl", "libcst", "transformers", "peft", "accelerate", "rich", "numpy"} & sys.modules.keys()
print(seconds, *heavy)
"""
    runs = [_run(sys.executable, "-c", code, cwd=tmp_path).split() for _ in range(5)]
    assert {tuple(run[1:]) for run in runs} == {()}
    assert min(float(run[0]) for run in runs) < 0.1


def test_version_stands_in_one_place() -> None:
    from importlib import metadata

    import patchfastrl

    assert metadata.version("patchfastrl") == patchfastrl.__version__
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():  # a copy or an unpacked sdist
        folders = ("patchfastrl", "patches", "compat", "tests", "scripts", "examples", "benchmarks")
        return [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    # Git refuses a checkout that belongs to somebody else, as in some CI containers.
    command = ("git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z")
    listed = _run(*command, cwd=ROOT).split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_no_path_of_somebodys_machine_in_the_repository() -> None:
    home = re.compile(rb"(?<![\w.])/(home|root|Users|work|farm|opt)/[\w.-]+")
    found = [
        f"{file.relative_to(ROOT)}: {match.group().decode()}"
        for file in _tracked()
        if file.suffix not in (".png", ".gz", ".safetensors")
        for match in home.finditer(file.read_bytes())
    ]
    assert not found


def test_two_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make matrix" in readme
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^make test\b", ci, re.MULTILINE)
    assert re.search(r'^make matrix ARGS="--ci\b', ci, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
