"""A function that torch compiles once for any number of rows."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

# What decides which variant is run: not the process' settings, such as the number of threads, of which each would be a
# variant, and few are kept.
_GUARDS = ("TENSOR_MATCH", "SHAPE_ENV", "CONSTANT_MATCH")


def for_any_rows(function: Any, rows: int, options: dict[str, Any]) -> Callable[..., Any]:
    """`function` in compiled form. It is compiled when it is first called.

    Rows of another shape, and other numbers, are compiled apart, under a name of their own: torch keeps few variants of
    one function, and would make a dimension that differs a variable.

    Args:
        rows: as many of its first arguments, tensors or None, have a row for each row: their first dimension.
        options: Inductor's.
    """
    from torch.fx.experimental import _config

    made: dict[Any, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        key = tuple(a.shape[1:] if isinstance(a, torch.Tensor) else a for a in args)
        if (compiled := made.get(key)) is not None:
            return compiled(*args)
        code = function.__code__.replace(co_name=f"{function.__name__}_{hash(key) & 0xFFFFFFFFFFFF:x}")
        anew = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
        made[key] = torch.compile(anew, fullgraph=True, options={**options, "guard_filter_fn": _kept})
        for tensor in (a for a in args[:rows] if a is not None):
            torch._dynamo.mark_dynamic(tensor, 0)
        with _config.patch(backed_size_oblivious=True):  # a single row is no case of its own
            return made[key](*args)

    return call


def _kept(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type in _GUARDS for guard in guards]
