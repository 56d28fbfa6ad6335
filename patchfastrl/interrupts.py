"""Ctrl-C, held back while vLLM is in the middle of something that it cannot be interrupted in.

A signal can hit between any two lines of vLLM's scheduler and model runner, and neither can go on from there: the next
batch would return rows of the old one, or fail. Held back until the end of a step, it always finds them at rest.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class _Held:
    """SIGINT in a block: remembered until its end, or until `let_through`. A second one goes through at once."""

    def __init__(self) -> None:
        self._pending = False
        self._before = signal.getsignal(signal.SIGINT)

    def hold(self, number: int, frame: Any) -> None:
        again, self._pending = self._pending, True
        if again:
            self.let_through()

    def let_through(self) -> None:
        if not self._pending:
            return
        self._pending = False
        if callable(self._before):
            self._before(signal.SIGINT, None)
        elif self._before is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def uninterrupted() -> Iterator[_Held | None]:
    """Hold Ctrl-C back until the end of the block (in the main thread, the only one that receives it). Nests."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield None
        return
    held = _Held()
    before = signal.signal(signal.SIGINT, held.hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
        held.let_through()


@contextlib.contextmanager
def between_steps(engine: Any) -> Iterator[list[BaseException]]:
    """While a batch runs: Ctrl-C takes effect between two steps of vLLM's `LLMEngine`.

    Yields a list that receives the error of a step that failed half-way, after which vLLM cannot go on.
    """
    step = engine.step
    failed: list[BaseException] = []
    with uninterrupted() as held:

        def step_when_not_interrupted() -> Any:
            if held is not None:
                held.let_through()
            try:
                return step()
            except BaseException as error:
                failed.append(error)
                raise

        engine.step = step_when_not_interrupted
        try:
            yield failed
        finally:
            del engine.step
