"""Whether TRL has a kernel of its own for log-probabilities and entropies; before, it calls ours.

Requirement: trl<1.14 has none.
Reason: where TRL has one, there is no seam, and nothing of ours to compile.
Link: https://github.com/huggingface/trl/tree/main/trl/kernels
Until: releases of TRL before 1.14 are no longer supported.
"""

from __future__ import annotations

from packaging.version import Version

from .versions import installed

FIRST = Version("1.14")


def missing() -> bool:
    """Whether the installed TRL has none."""
    trl = installed("trl")
    return trl is not None and trl < FIRST
