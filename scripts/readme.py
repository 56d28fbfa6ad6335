"""Writes the three generated tables of README.md anew: the support table, the trainers, and what is patched.

python scripts/readme.py [README.md]
"""

from __future__ import annotations

import sys
from pathlib import Path

from patchfastrl.compat import support
from patchfastrl.errors import PatchFastRLError
from patchfastrl.patches import SEAMS, trainers
from patchfastrl.seam import variants


def generated(text: str) -> str:
    """`text` with what stands between the markers replaced."""
    text = _between(text, "support table", _rows())
    return _between(_between(text, "trainers", trainers.markdown_table()), "seams", _seams())


def _rows() -> str:
    head = ["TRL", "vLLM", *support.PACKAGES[2:], "Python", "platform", "pair", "status", "notes"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in support.rows():
        versions = [getattr(row, name) for name in support.PACKAGES]
        pair = "TRL's own" if row.pair == "trl" else "ours"
        cells = [*versions, ", ".join(row.python), row.platform, pair, row.status, row.notes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seams() -> str:
    """One line per change: it has a name for each class that it is made in."""
    names: dict[tuple[str, str], list[str]] = {}
    releases: dict[tuple[str, str], list[str]] = {}
    for seams in variants(SEAMS).values():
        oldest, newest = seams[0], seams[-1]
        change = (oldest.reason, oldest.until)
        names.setdefault(change, []).append(f"[`{oldest.name}`]({newest.link})")
        span = f"`{oldest.requires.partition(',')[0]},{newest.requires.partition(',')[2]}`"
        releases.setdefault(change, []).append(span)
    lines = ["| seam | why | written for | until |", "| --- | --- | --- | --- |"]
    for change, which in names.items():
        reason, until = change
        spans = ", ".join(dict.fromkeys(releases[change]))
        lines.append(f"| {' '.join(which)} | {reason} | {spans} | {until} |")
    return "\n".join(lines)


def _between(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise PatchFastRLError(f"The page lacks the lines {begin!r} and {end!r}: the table goes between them.")
    return f"{before}{begin}\n{table}\n{end}{after}"


if __name__ == "__main__":
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    readme.write_text(generated(readme.read_text(encoding="utf-8")), encoding="utf-8")
