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

import torch
from torch import nn

T = TypeVar("T")


class _Found:
    """Answers about a model, and what they hold for."""

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        modules = list(model.modules())[1:]
        self._attributes = list(map(vars, modules))
        tables = self._tables_now(model)
        self._sizes, self._entries = list(map(len, tables)), list(_entries(tables))
        self._parameters = [e for e in self._entries if isinstance(e, torch.Tensor)]
        self._trained = self._trained_now()
        self._layers = [m for m in modules if isinstance(m, BaseTunerLayer)]
        self._states = self._states_now()
        self.answers: dict[Any, Any] = {}

    # A copy of the model, or what is unpickled, has other modules.
    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def _tables_now(self, model: nn.Module) -> list[dict[str, Any]]:
        """Where modules keep their submodules, and their parameters."""
        return list(chain.from_iterable(map(_tables_of, chain((vars(model),), self._attributes))))

    def _trained_now(self) -> list[bool]:
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' tensors have one, called each time
            return [p.requires_grad for p in self._parameters]

    def _states_now(self) -> list[tuple]:
        return [(m.disable_adapters, m.active_adapter, tuple(m.merged_adapters)) for m in self._layers]

    def holds(self, model: nn.Module) -> bool:
        """As long as every table has the same entries, there are no other modules and parameters than those known."""
        tables = self._tables_now(model)
        return (
            self._sizes == list(map(len, tables))
            and all(map(operator.is_, _entries(tables), self._entries))
            and self._trained == self._trained_now()
            and self._states == self._states_now()
        )


def _entries(tables: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, filter(None, tables)))


_tables_of = operator.itemgetter("_modules", "_parameters")
_KEY = "_patchfastrl_found"  # in the model's attributes: kept elsewhere, what is found would keep the model alive
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
        found = vars(model).get(_KEY)
        if found is None or not (model in (_looked_at or ()) or found.holds(model)):
            found = vars(model)[_KEY] = _Found(model)
        if _looked_at is not None:
            _looked_at.add(model)
        if ask not in found.answers:
            found.answers[ask] = ask(model)
        return found.answers[ask]

    answer.__doc__, answer.__name__ = ask.__doc__, ask.__name__
    return answer
