"""Whether attention can leave padding out: torch has the kernel, and transformers lets a mask say what is padding.

Requirement: torch>=2.11, transformers>=5.5.
Reason: torch's `varlen_attn` takes a causal window from 2.11 on, and transformers asks for masks by their lengths from
5.5 on.
Link: https://github.com/pytorch/pytorch/blob/main/torch/nn/attention/varlen.py
Until: older releases of both are no longer supported.
"""

from __future__ import annotations

from packaging.version import Version

from .versions import installed

NEEDED = {"torch": Version("2.11"), "transformers": Version("5.5")}


def available() -> bool:
    """Whether both are new enough."""
    return all((found := installed(name)) is not None and found >= first for name, first in NEEDED.items())
