"""Do the seams fit a TRL release? Answered from its source alone: neither TRL nor vLLM is imported or installed."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from . import garbage
from .errors import SeamError
from .hook import ModulePatch
from .rewrite import Source, locate, rewrite
from .seam import Seam, choose, variants
from .wheels import Package, Wheels, published

# Every release that the seams are declared for, oldest first.
# fmt: off
RELEASES = (
    "0.18.0", "0.18.1", "0.18.2", "0.19.0", "0.19.1", "0.20.0", "0.21.0", "0.22.0", "0.22.1", "0.22.2", "0.23.0",
    "0.23.1", "0.24.0", "0.25.0", "0.25.1", "0.26.0", "0.26.1", "0.26.2", "0.27.0", "0.27.1", "0.27.2", "0.28.0",
    "0.29.0", "0.29.1", "1.0.0", "1.1.0", "1.2.0", "1.3.0", "1.4.0", "1.5.0", "1.5.1", "1.6.0", "1.7.0", "1.7.1",
    "1.8.0", "1.9.0", "1.9.1", "1.9.2", "1.10.0", "1.11.0", "1.12.0", "1.13.0", "1.14.0", "1.14.1", "1.14.2",
    "1.15.0", "1.16.0",
)
# fmt: on


@dataclass(frozen=True)
class Break:
    """A seam that does not fit; `found`: how often it matched, or what is wrong instead."""

    seam: Seam
    found: int | str


@dataclass(frozen=True)
class Check:
    """`written_for`: the release whose seams were tried, which is not the package's own when none are declared."""

    package: Package
    written_for: Version
    seams: tuple[Seam, ...]
    breaks: tuple[Break, ...]

    @property
    def declared(self) -> bool:
        return self.written_for == self.package.version

    @property
    def fits(self) -> bool:
        return self.declared and not self.breaks


def _seams() -> Sequence[Seam]:
    return importlib.import_module("patchfastrl.patches").SEAMS


def check(package: Package) -> Check:
    """Rewrite and compile every target in a package, and count."""
    seams = _declared(package.version)
    written_for = package.version
    if seams is None:
        older = [release for release in map(Version, RELEASES) if release <= package.version]
        written_for = older[-1] if older else Version(RELEASES[0])
        seams = _declared(written_for)
        assert seams is not None, f"{written_for} is in RELEASES, and a seam is not declared for it"
    by_file: dict[str, list[Seam]] = {}
    for seam in seams:
        by_file.setdefault(seam.file, []).append(seam)
    with garbage.left():
        breaks = [found for file, group in by_file.items() for found in _breaks(package.root / file, group)]
    return Check(package, written_for, tuple(seams), tuple(breaks))


def _declared(version: Version) -> list[Seam] | None:
    """The seams for a release; None when one of them was not declared for it."""
    try:
        chosen = [choose(candidates, lambda _: version) for candidates in variants(_seams()).values()]
    except SeamError:
        return None
    return [seam for seam in chosen if seam is not None]


def _breaks(path: Path, seams: list[Seam]) -> list[Break]:
    try:
        rewritten = rewrite(Source.read(seams[0].module, path, seams[0]), seams)
        counted = [Break(seam, rewritten.found[seam.name]) for seam in seams]
        if broken := [found for found in counted if found.found != found.seam.count]:
            return broken
        ModulePatch(rewritten, path)
    except SeamError as error:
        return [Break(seam, str(error.found)) for seam in seams]
    except SyntaxError as error:
        return [Break(seam, f"rewritten text that does not compile: {error}") for seam in seams]
    return []


def explain(checked: Check, wheels: Wheels) -> str:
    """What the command prints about one package."""
    name, count = f"trl {checked.package.version}", len(checked.seams)
    if checked.fits:
        return f"{name}: ok, {count} seams"
    lines = [f"{name}: {'BROKEN' if checked.breaks else 'NOT DECLARED'}"]
    if not checked.declared:
        lines.append(f"  no seam is declared for {name}; tried were the {count} of {checked.written_for}")
    if not checked.breaks:
        return "\n".join([*lines, "  all of them fit: run the tests with this release, then widen the declarations"])
    for found in checked.breaks:
        lines.append(f"  {found.seam.name} in {found.seam.target}")
        lines.append(f"    expected {found.seam.count} match(es), found {found.found}")
    good = _last_good(checked.package, wheels)
    if good is None:
        return "\n".join([*lines, "  no earlier release fits, so there is none to compare with"])
    for target, seam in {found.seam.target: found.seam for found in checked.breaks}.items():
        before, after = (_definition(package.root / seam.file, seam) for package in (good, checked.package))
        labels = f"{good.version} {target}", f"{checked.package.version} {target}"
        lines += difflib.unified_diff(before, after, labels[0], labels[1], lineterm="")
    return "\n".join(lines)


def _last_good(package: Package, wheels: Wheels) -> Package | None:
    """The newest release up to this one whose source fits (a published one is not compared with itself)."""
    for release in reversed(RELEASES):
        older = Version(release) < package.version or (Version(release) == package.version and not package.published)
        if older and not check(good := published(release, wheels)).breaks:
            return good
    return None


def _definition(path: Path, seam: Seam) -> list[str]:
    """The lines of every definition of the seam's target; none when the file is not there or not Python."""
    try:
        source = Source.read(seam.module, path, seam)
    except SeamError:
        return []
    lines = source.text.split("\n")
    return [line for target in locate(source.tree, seam.qualname) for line in lines[target.first - 1 : target.last]]
