"""What a model consists of, found once: to walk thousands of modules before each batch costs more than a token does.

The answers are kept for a model until a parameter, a module, or the state of an adapter in it is another one.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


class _Found:
    """Answers about a model, and what they hold for."""

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._modules = list(model.modules())[1:]  # without the model itself, which must not be kept alive
        self._tables = self._tables_now(model)
        self._entries = list(map(_entries, self._tables))
        self._trained = self._trained_now()
        self._layers = [m for m in self._modules if isinstance(m, BaseTunerLayer)]
        self._states = self._states_now()
        self.answers: dict[Any, Any] = {}

    def _tables_now(self, model: nn.Module) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Where modules keep their submodules, and their parameters."""
        modules = [model, *self._modules]
        return list(map(_submodules, modules)), list(map(_parameters, modules))

    def _trained_now(self) -> list[bool]:
        return [p.requires_grad for p in self._entries[1] if p is not None]

    def _states_now(self) -> list[tuple]:
        return [(m.disable_adapters, m.active_adapter, tuple(m.merged_adapters)) for m in self._layers]

    def holds(self, model: nn.Module) -> bool:
        """As long as every table has the same entries, there are no other modules and parameters than those known."""
        now = self._tables_now(model)
        return (
            all(map(_same, now, self._tables))
            and all(map(_same, map(_entries, now), self._entries))
            and self._trained == self._trained_now()
            and self._states == self._states_now()
        )


def _entries(tables: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


_submodules, _parameters = operator.attrgetter("_modules"), operator.attrgetter("_parameters")
_found: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()
_looked_at: weakref.WeakSet[nn.Module] | None = None


@contextlib.contextmanager
def looked_at_once() -> Iterator[None]:
    """Inside the block nobody changes any model: each is looked at once, however many questions are asked."""
    global _looked_at
    before, _looked_at = _looked_at, weakref.WeakSet() if _looked_at is None else _looked_at
    try:
        yield
    finally:
        _looked_at = before


def remembered(ask: Callable[[nn.Module], T]) -> Callable[[nn.Module], T]:
    """`ask(model)`, computed again only when the model has changed. Callers must not change the answer."""

    def answer(model: nn.Module) -> T:
        found = _found.get(model)
        if found is None or not (model in (_looked_at or ()) or found.holds(model)):
            found = _found[model] = _Found(model)
        if _looked_at is not None:
            _looked_at.add(model)
        if ask not in found.answers:
            found.answers[ask] = ask(model)
        return found.answers[ask]

    answer.__doc__, answer.__name__ = ask.__doc__, ask.__name__
    return answer
