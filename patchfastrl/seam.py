"""What a seam is: one expression of someone else's function that PatchFastRL replaces, and when that may be done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from .errors import SeamError

if TYPE_CHECKING:
    from .rewrite import Rewrite


@dataclass(frozen=True)
class Seam:
    """A declaration: where, for which releases, how often, and why.

    Several seams may share a name: they are the variants of one seam for different releases, and at most one of them
    holds for any release.

    Args:
        name: what errors, `patchfastrl show` and `patchfastrl doctor` call it, e.g. ``"engine.build"``.
        target: ``"module:Qualified.name"`` of the function that holds the expression, or of the class attribute.
        requires: the releases whose source this was written for, e.g. ``"trl>=0.28,<1.17"``.
        count: how many nodes of the target it must match; any other number stops the installation.
        reason: why it exists.
        link: the upstream code or issue.
        until: when it can be deleted.
        rewrite: makes the transformer that matches, counts and replaces.
        absent: the known releases in which there is nothing to replace; every other release is refused.
    """

    name: str
    target: str
    requires: str
    count: int
    reason: str
    link: str
    until: str
    rewrite: Callable[[], Rewrite]
    absent: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def file(self) -> str:
        """The module's file, from the folder that holds the package."""
        return self.module.replace(".", "/") + ".py"

    @property
    def qualname(self) -> str:
        return self.target.partition(":")[2]

    @cached_property
    def requirement(self) -> Requirement:
        return Requirement(self.requires)

    def holds_for(self, version: Version) -> bool:
        return self.requirement.specifier.contains(version, prereleases=True)

    def absent_in(self, version: Version) -> bool:
        return any(Requirement(known).specifier.contains(version, prereleases=True) for known in self.absent)


@dataclass(frozen=True)
class SeamReport:
    """What `patchfastrl doctor` prints about one seam on this machine."""

    name: str
    target: str
    requires: str
    reason: str
    link: str
    expected: int
    found: int | None
    status: Literal["ok", "refused", "not for this version"]
    detail: str


def variants(seams: Iterable[Seam]) -> dict[str, list[Seam]]:
    """The declarations, by name."""
    by_name: dict[str, list[Seam]] = {}
    for seam in seams:
        by_name.setdefault(seam.name, []).append(seam)
    return by_name


def choose(candidates: list[Seam], version: Callable[[str], Version | None]) -> Seam | None:
    """The variant of a seam that was written for what is installed; None when that release has nothing to replace.

    Args:
        candidates: all variants of one seam.
        version: the installed release of a package, None when it is not installed.

    Raises:
        SeamError: the package is missing, or no variant (or more than one) was written for its release.
    """
    name, package = candidates[0].name, candidates[0].requirement.name
    supported = " or ".join(seam.requires for seam in candidates)
    found = version(package)
    if found is None:
        raise SeamError(
            f"{package} is not installed in this environment, and seam {name!r} rewrites it. Expected: {supported}. "
            f'Install it (pip install "{candidates[-1].requires}") and call PatchFastRL() again.',
            seam=name,
            found=None,
            expected=supported,
        )
    fitting = [seam for seam in candidates if seam.holds_for(found)]
    if not fitting and any(seam.absent_in(found) for seam in candidates):
        return None
    if len(fitting) != 1:
        raise SeamError(
            f"Seam {name!r} was not written for {package} {found}: found {package} {found}, expected {supported}. "
            f'Nothing was changed. Install a supported release (pip install "{candidates[-1].requires}"), look for a '
            "newer PatchFastRL, or call PatchFastRL(strict=False) to go on with stock TRL.",
            seam=name,
            found=str(found),
            expected=supported,
        )
    return fitting[0]
