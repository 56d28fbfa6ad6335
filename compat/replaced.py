"""An attribute of somebody else's class or module, replaced for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[Any]:
    """Yields what was there before. AttributeError, and nothing changed, when `owner` itself has no such attribute."""
    if name not in vars(owner):
        raise AttributeError(
            f"{owner!r} has no {name!r}: this release differs from those that the shim was written for"
        )
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)
