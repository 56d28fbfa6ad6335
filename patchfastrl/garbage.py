"""Python's garbage collector, where it would go through a great many objects that all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_threshold: int | None = None  # Python's own, while ours is in place


@contextlib.contextmanager
def left() -> Iterator[None]:
    """None is collected inside of the block.

    For syntax trees, with torch in memory, that saves a third of the time; for the import of TRL's modules, and vLLM
    with them, a second of fourteen.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def collect_rarely(wanted: bool) -> None:
    """Full garbage collections a hundred times as far apart as Python has them, or back to Python's.

    One takes 0.7 s for all that TRL and vLLM import, and the outputs of a batch bring one about. vLLM avoids it by
    freezing the heap for good, which would keep a trainer that nobody uses any more, and its engine, alive.
    """
    global _threshold
    first, second, third = gc.get_threshold()
    if wanted and _threshold is None:
        _threshold = third
        gc.set_threshold(first, second, 100 * third)
    elif not wanted and _threshold is not None:
        gc.set_threshold(first, second, _threshold)
        _threshold = None
