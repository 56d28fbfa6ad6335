"""Changing what is imported already, in place, and putting it back exactly.

Functions keep their identity and get new code; classes keep theirs and get new attributes; a dataclass gets the
methods that `dataclasses` would have generated had the new fields been there from the start.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

_MISSING = object()


class Journal:
    """Every change that was made, so that each can be taken back, last one first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute; of a class, the undo puts the entry of its own `__dict__` back, or takes it out."""
        before = vars(owner).get(name, _MISSING) if isinstance(owner, type) else getattr(owner, name, _MISSING)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if before is _MISSING else setattr(owner, name, before))

    def set_item(self, mapping: dict[str, Any], key: str, value: Any) -> None:
        before = mapping.get(key, _MISSING)
        mapping[key] = value
        self._undo.append(lambda: mapping.pop(key) if before is _MISSING else mapping.__setitem__(key, before))

    def on_undo(self, action: Callable[[], None]) -> None:
        self._undo.append(action)

    def rollback(self, to: int = 0) -> None:
        """Undo down to the first `to` changes."""
        while len(self._undo) > to:
            self._undo.pop()()


def functions_behind(value: Any) -> Iterator[FunctionType]:
    """A function, and every function that its decorators, descriptors, partials and closures lead to."""
    queue, seen = [value], set()
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, FunctionType):
            yield current
            for cell in current.__closure__ or ():
                content = _content(cell)
                if isinstance(content, (FunctionType, MethodType, functools.partial, staticmethod, classmethod)):
                    queue.append(content)
        elif isinstance(current, property):
            queue += [current.fget, current.fset, current.fdel]
        for name in ("__wrapped__", "__func__", "func"):
            inner = inspect.getattr_static(current, name, None)
            if inner is not None:
                # Through getattr: on a staticmethod or a method these are descriptors.
                queue.append(getattr(current, name))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell: the name has not been bound yet
        return None


def same_code(one: CodeType, other: CodeType) -> bool:
    """Whether two code objects were compiled from the same lines: all but the file's name.

    `==` will not do: on some releases it sees the interpreter's own specialisation of code that has run.
    """
    return (
        one.co_name == other.co_name
        and one.co_code == other.co_code
        and one.co_names == other.co_names
        and one.co_varnames == other.co_varnames
        and one.co_freevars == other.co_freevars
        and one.co_cellvars == other.co_cellvars
        and one.co_flags == other.co_flags
        and one.co_argcount == other.co_argcount
        and one.co_posonlyargcount == other.co_posonlyargcount
        and one.co_kwonlyargcount == other.co_kwonlyargcount
        and one.co_firstlineno == other.co_firstlineno
        and list(one.co_lines()) == list(other.co_lines())
        and len(one.co_consts) == len(other.co_consts)
        and all(_same_constant(a, b) for a, b in zip(one.co_consts, other.co_consts, strict=True))
    )


def _same_constant(one: Any, other: Any) -> bool:
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return same_code(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(_same_constant(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and (one == other or repr(one) == repr(other))  # repr: nan, and -0.0


def subclasses(cls: type) -> Iterator[type]:
    """All living subclasses, each once, a base before what derives from it."""
    found: dict[type, None] = {}
    queue: list[type] = type.__subclasses__(cls)
    while queue:
        current = queue.pop(0)
        found.pop(current, None)
        found[current] = None
        queue += type.__subclasses__(current)
    yield from found


def extend_class(cls: type, body: type, anchor: str | None, journal: Journal) -> None:
    """Give a live class, and all that derives from it, the attributes of `body`.

    Annotated attributes become dataclass fields behind the field `anchor`. A list that replaces a list is also put
    into subclasses that had extended the old one.
    """
    annotations = dict(vars(body).get("__annotations__", {}))
    fields = dict(dataclasses.dataclass(body).__dataclass_fields__) if annotations else {}  # type: ignore[attr-defined]
    values = {name: value for name, value in vars(body).items() if not name.startswith("__") and name not in fields}
    added = {name: [item for item in value if item not in getattr(cls, name)] for name, value in values.items()}
    # First in, last out: classes that were derived in the meantime are put right after all others.
    journal.on_undo(lambda: _forget(cls, fields, added))
    for heir in (cls, *subclasses(cls)):
        known = vars(heir).get("__dataclass_fields__")
        if known is not None and not fields.keys() & known.keys():
            set_fields(heir, insert_after(known, anchor, fields), journal.set_attribute)
        for name, items in added.items():
            if name in vars(heir) and not set(items) & set(vars(heir)[name]):
                journal.set_attribute(heir, name, [*vars(heir)[name], *items])
    if annotations:
        own = vars(cls).get("__annotations__", {})
        journal.set_attribute(cls, "__annotations__", insert_after(own, anchor, annotations))
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING:
            journal.set_attribute(cls, name, field.default)


def _forget(cls: type, fields: dict[str, dataclasses.Field], added: dict[str, list[Any]]) -> None:
    for heir in subclasses(cls):
        known = vars(heir).get("__dataclass_fields__", {})
        if any(known.get(name) is field for name, field in fields.items()):
            set_fields(heir, {name: f for name, f in known.items() if fields.get(name) is not f}, setattr)
        for name, items in added.items():
            own = vars(heir).get(name, ())
            if any(item in own for item in items) and not fields.keys() & vars(heir).get("__annotations__", {}).keys():
                setattr(heir, name, [item for item in own if item not in items])


def set_fields(cls: type, fields: dict[str, dataclasses.Field], change: Callable[[type, str, Any], None]) -> None:
    """Make `fields` the fields of a dataclass: generated methods are generated again, hand-written ones stay.

    Args:
        cls: a class that `dataclasses.dataclass` made.
        fields: all its fields, inherited ones included, in order.
        change: called with the class, the attribute's name and its new value.
    """
    params = cls.__dataclass_params__  # type: ignore[attr-defined]
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__annotations__": {name: field.type for name, field in fields.items()},
        **{name: copy.copy(field) for name, field in fields.items()},
    }
    if hasattr(cls, "__post_init__"):
        namespace["__post_init__"] = cls.__post_init__
    scratch: type = dataclasses.dataclass(
        init=params.init,
        repr=params.repr,
        eq=params.eq,
        order=params.order,
        unsafe_hash=params.unsafe_hash,
        frozen=params.frozen,
    )(type(cls.__name__, (), namespace))
    for name in ("__init__", "__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__"):
        generated = vars(cls).get(name)
        if isinstance(generated, FunctionType) and inspect.unwrap(generated).__code__.co_filename == "<string>":
            change(cls, name, vars(scratch)[name])
    change(cls, "__dataclass_fields__", fields)


def insert_after(mapping: dict[str, Any], anchor: str | None, extra: dict[str, Any]) -> dict[str, Any]:
    """A copy of a mapping with `extra` behind the key `anchor` (at the end without it)."""
    result: dict[str, Any] = {}
    for key, value in mapping.items():
        result[key] = value
        if key == anchor:
            result.update(extra)
    return {**result, **{key: value for key, value in extra.items() if key not in result}}
