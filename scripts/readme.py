"""Writes the two generated tables of README.md anew: the support table, and what is patched.

python scripts/readme.py [README.md]
"""

from __future__ import annotations

import sys
from pathlib import Path

from patchfastrl.compat import support
from patchfastrl.errors import PatchFastRLError
from patchfastrl.patches import SEAMS


def generated(text: str) -> str:
    """`text` with what stands between the markers replaced."""
    return _between(_between(text, "support table", support.markdown_table()), "seams", _seams())


def _seams() -> str:
    """One line per change: GRPO's and RLOO's trainers have the same one, under two names."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for seam in SEAMS:
        names.setdefault((seam.reason, seam.requires, seam.until), []).append(f"[`{seam.name}`]({seam.link})")
    lines = ["| seam | why | written for | until |", "| --- | --- | --- | --- |"]
    for (reason, requires, until), which in names.items():
        lines.append(f"| {' '.join(dict.fromkeys(which))} | {reason} | `{requires}` | {until} |")
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
