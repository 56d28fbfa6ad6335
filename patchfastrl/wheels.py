"""TRL's published wheels, fetched by pip and read where they lie; and checkouts of TRL."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from .errors import PatchFastRLError

NEWEST = "newest"


@dataclass(frozen=True)
class Package:
    """The folder that holds `trl/`. `published`: it came from the index, as that release."""

    root: Path
    version: Version
    published: bool


class Wheels(AbstractContextManager["Wheels"]):
    """A folder of TRL's wheels, filled by pip (with its own settings: index, proxy, certificates)."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self._unpacked = tempfile.TemporaryDirectory(prefix="patchfastrl-trl-")
        self._folder = Path(self._unpacked.name) if folder is None else Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._unpacked.cleanup()

    def release(self, name: str) -> Path:
        """The wheel of a release (or of `NEWEST`), fetched unless it lies here."""
        for wheel in [] if name == NEWEST else self._folder.glob("trl-*.whl"):
            if parse_wheel_filename(wheel.name)[1] == Version(name):
                return wheel
        wanted = "trl" if name == NEWEST else f"trl=={name}"
        # Nothing of it will run, so this Python need not be one that it supports.
        options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--disable-pip-version-check"]
        with tempfile.TemporaryDirectory(dir=self._folder) as arriving:
            command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", arriving, wanted]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            fetched = list(Path(arriving).glob("trl-*.whl"))
            if done.returncode != 0 or len(fetched) != 1:
                raise PatchFastRLError(
                    f"pip could not fetch {wanted}: {done.stderr.strip() or 'no wheel came'}. Expected: the wheel of a "
                    "TRL release. Check the version and pip's settings (pip config list), or name a checkout."
                )
            return Path(shutil.move(fetched[0], self._folder / fetched[0].name))

    def unpack(self, wheel: Path) -> Path:
        """A folder with the wheel's files that seams aim at."""
        root = Path(tempfile.mkdtemp(dir=self._unpacked.name))
        with zipfile.ZipFile(wheel) as archive:
            wanted = {seam.file for seam in importlib.import_module("patchfastrl.patches").SEAMS}
            archive.extractall(root, [name for name in archive.namelist() if name in wanted])
        return root


def find(name: str, wheels: Wheels) -> Package:
    """What a VERSION, WHEEL or CHECKOUT of the command line stands for.

    Raises:
        PatchFastRLError: it stands for nothing, or its release cannot be told.
    """
    path = Path(name)
    if path.is_dir():
        return Package(path, _version_of(path), published=False)
    try:
        if path.suffix == ".whl" and path.is_file():
            return Package(wheels.unpack(path), parse_wheel_filename(path.name)[1], published=False)
        if name != NEWEST:
            Version(name)
    except (InvalidWheelFilename, InvalidVersion, zipfile.BadZipFile) as error:
        raise PatchFastRLError(
            f"{name!r} cannot be checked: {error}. Expected: a version (1.16.0), a wheel of TRL, or a folder with trl/."
        ) from error
    return published(name, wheels)


def published(release: str, wheels: Wheels) -> Package:
    wheel = wheels.release(release)
    return Package(wheels.unpack(wheel), parse_wheel_filename(wheel.name)[1], published=True)


def _version_of(root: Path) -> Version:
    """The release of a checkout, or of a folder in which TRL is installed."""
    candidates = [path.name.removesuffix(".dist-info").partition("-")[2] for path in root.glob("trl-*.dist-info")]
    for file in ("VERSION", "trl/VERSION"):
        if (root / file).is_file():
            candidates.append((root / file).read_text(encoding="utf-8").strip())
    if (root / "trl/__init__.py").is_file():
        text = (root / "trl/__init__.py").read_text(encoding="utf-8")
        candidates += re.findall(r"""(?m)^__version__ = ["']([^"']+)["']""", text)
    try:
        return Version(candidates[0])
    except (IndexError, InvalidVersion) as error:
        raise PatchFastRLError(
            f"{root} does not say which release of TRL it holds: {candidates or 'no version'} was found. Expected: "
            "trl/ with a VERSION file beside it or in it, a trl-*.dist-info, or __version__ in trl/__init__.py."
        ) from error
