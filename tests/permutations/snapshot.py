"""What a module looks like, deep enough to tell whether undo put everything back."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from types import CodeType, FunctionType, ModuleType
from typing import Any

TARGETS = (
    "trl.generation.vllm_generation",
    "trl.trainer.grpo_config",
    "trl.trainer.grpo_trainer",
    "trl.trainer.rloo_config",
    "trl.trainer.rloo_trainer",
)


def by_identity(names: tuple[str, ...] = TARGETS) -> dict[str, Any]:
    """Every entry of the modules' and their classes' dictionaries, and of every function's attributes, by identity.

    Objects are kept in the answer, so that no id can be used twice.
    """
    entries: dict[str, Any] = {"sys.meta_path": list(sys.meta_path)}
    for name in names:
        module = sys.modules[name]
        entries[f"{name} order"] = list(vars(module))
        entries[f"{name} spec"] = (module.__spec__, module.__spec__.loader, module.__spec__.origin)
        for where, owner in _owners(module):
            for key, value in list(vars(owner).items()):
                entries[f"{where}.{key}"] = value
                function = inspect.unwrap(value) if isinstance(value, FunctionType) else value
                if isinstance(function, FunctionType):
                    entries[f"{where}.{key} parts"] = (
                        function.__code__,
                        function.__defaults__,
                        function.__kwdefaults__,
                        function.__annotations__,
                        function.__dict__,
                    )
            if isinstance(owner, type) and dataclasses.is_dataclass(owner):
                entries[f"{where} fields"] = dataclasses.fields(owner)
    return entries


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | after.keys() if not _identical(before.get(key), after.get(key)))


def _identical(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return one is other or all(a is b or (isinstance(a, str) and a == b) for a, b in zip(one, other, strict=True))
    return one is other


def by_value(names: tuple[str, ...] = TARGETS) -> dict[str, str]:
    """The same in words, so that two processes can be compared."""
    words: dict[str, str] = {}
    for name in names:
        module = sys.modules[name]
        words[f"{name} names"] = ", ".join(vars(module))
        words[f"{name} file"] = f"{module.__file__} {module.__spec__.origin} {type(module.__loader__).__name__}"
        words[f"{name} loader"] = str(module.__spec__.loader is module.__loader__)
        for where, owner in _owners(module):
            for key, value in list(vars(owner).items()):
                if isinstance(value, FunctionType):
                    code = inspect.unwrap(value).__code__
                    words[f"{where}.{key}"] = f"{inspect.signature(value)} {_code(code)}"
            if isinstance(owner, type):
                words[f"{where} attributes"] = ", ".join(sorted(vars(owner)))
                if dataclasses.is_dataclass(owner):
                    words[f"{where} fields"] = ", ".join(f"{f.name}: {f.type}" for f in dataclasses.fields(owner))
    return words


def _owners(module: ModuleType) -> list[tuple[str, Any]]:
    owners: list[tuple[str, Any]] = [(module.__name__, module)]
    for key, value in list(vars(module).items()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            owners.append((f"{module.__name__}.{key}", value))
    return owners


def _code(code: CodeType) -> str:
    inner = [_code(const) for const in code.co_consts if isinstance(const, CodeType)]
    return f"{code.co_filename}:{code.co_firstlineno} {hash(code.co_code)} {code.co_names} {inner}"
