"""What the seams find and change in the installed release, for `patchfastrl show` and `doctor`."""

from __future__ import annotations

import difflib
from typing import Literal

from . import install
from .errors import PatchFastRLError
from .seam import Seam, SeamReport, choose, variants


def diff(seam_name: str | None = None) -> str:
    """The unified diff of TRL's files against their rewritten text. Imports nothing of TRL's and changes nothing.

    Args:
        seam_name: show this seam alone.

    Raises:
        SeamError: a seam does not fit the installed release.
        PatchFastRLError: the installed release has no seam of that name.
    """
    chosen = install._chosen()
    wanted = [seam for seam in chosen if seam_name in (None, seam.name)]
    if not wanted:
        names = ", ".join(seam.name for seam in chosen)
        raise PatchFastRLError(f"There is no seam {seam_name!r} in the installed release. Expected one of: {names}.")
    files = install._rewritten(wanted)
    install._judge(files, wanted)
    text: list[str] = []
    for file in files:
        name = file.source.module.replace(".", "/") + ".py"
        before, after = (source.splitlines(keepends=True) for source in (file.source.text, file.text))
        text += difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
    return "".join(text)


def seams() -> list[SeamReport]:
    """How every seam fits what is installed, for `patchfastrl doctor`. What does not fit is told, not raised."""
    from patchfastrl.compat.versions import installed

    chosen: dict[str, Seam | None] = {}
    details: dict[str, str] = {}
    for name, candidates in variants(install._seams()).items():
        try:
            chosen[name] = choose(candidates, installed)
        except PatchFastRLError as error:
            details[name] = str(error)
    found = _found([seam for seam in chosen.values() if seam is not None], details)
    reports: list[SeamReport] = []
    for seam in install._seams():
        count, detail = None, details.get(seam.name, "")
        status: Literal["ok", "refused", "not for this version"] = "refused"
        if seam.name in chosen and chosen[seam.name] is not seam:
            status, detail = "not for this version", ""
        elif seam.name in found:
            count = found[seam.name]
            if count == seam.count:
                status = "ok"
            else:
                detail = f"expected {seam.count} match(es), found {count}"
        reports.append(
            SeamReport(seam.name, seam.target, seam.requires, seam.reason, seam.link, seam.count, count, status, detail)
        )
    return reports


def _found(seams: list[Seam], details: dict[str, str]) -> dict[str, int]:
    """The matches of every seam whose file can be read; why it cannot goes to `details`."""
    found: dict[str, int] = {}
    for module in dict.fromkeys(seam.module for seam in seams):
        group = [seam for seam in seams if seam.module == module]
        try:
            found.update(install._rewritten(group)[0].found)
        except PatchFastRLError as error:
            details.update({seam.name: str(error) for seam in group})
    return found
