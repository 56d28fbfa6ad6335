"""Putting rewritten code into TRL's modules: at import, or in place when they were imported before.

Both are one mechanism. A module is executed as upstream wrote it; then the functions that seams rewrite get their new
code, and undo gives them the old one back. So what undo restores is upstream's own objects.
"""

from __future__ import annotations

import ast
import atexit
import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from . import garbage, live
from .errors import PatchFastRLError, SeamError
from .rewrite import RUNTIME, RUNTIME_MODULE, Rewritten, changed_attributes, class_lines, digest, extract, locate


class Home:
    """A private temporary folder for the rewritten text: real files, so that every tool finds the lines that run."""

    def __init__(self) -> None:
        # The folder that the environment names, or an error: Python would go on to others, the working directory last.
        parent = next((os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), "/tmp")
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="patchfastrl-", dir=parent)).resolve()
        except OSError as error:
            raise PatchFastRLError(
                f"PatchFastRL keeps the rewritten source in a temporary folder, but {parent!r} cannot be written "
                f"({error}). Nothing was changed. Set TMPDIR to a folder that can."
            ) from error
        self._owner = os.getpid()
        atexit.register(self.remove)

    def file(self, module: str) -> Path:
        return self.folder.joinpath(*module.split(".")).with_suffix(".py")

    def write(self, patches: Iterable[ModulePatch]) -> None:
        try:
            for patch in patches:
                patch.home.parent.mkdir(parents=True, exist_ok=True)
                patch.home.write_text(patch.text, encoding="utf-8")
        except OSError as error:
            raise PatchFastRLError(
                f"PatchFastRL could not write the rewritten source to {self.folder} ({error}). Nothing was changed. "
                "Set TMPDIR to a folder with some space."
            ) from error

    def remove(self) -> None:
        """Remove the folder; a forked child leaves it to the process that made it."""
        if os.getpid() == self._owner:
            shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.remove)

    def in_use(self) -> bool:
        """Whether a function or a frame still runs lines of these files."""

        def mine(code: CodeType) -> bool:
            return code.co_filename.startswith(f"{self.folder}{os.sep}")

        frames = list(sys._current_frames().values())
        for thing in gc.get_objects():
            kind = type(thing)  # not isinstance(): it asks the object, and some of them answer with a warning
            if kind is FunctionType and mine(thing.__code__):
                return True
            if kind is FrameType:
                frames.append(thing)
        for frame in frames:
            current: FrameType | None = frame
            while current is not None:
                if mine(current.f_code):
                    return True
                current = current.f_back
        return False


class ModulePatch:
    """One module's share of the installation, compiled and ready: nothing is parsed or matched after this.

    Args:
        rewritten: the source and what the seams made of it.
        home: the file that will hold the rewritten text; its lines are what debuggers show.

    Raises:
        SyntaxError: the rewritten text is not Python.
        SeamError: what was rewritten cannot replace upstream's in place.
    """

    def __init__(self, rewritten: Rewritten, home: Path) -> None:
        self.source = rewritten.source
        self.name = rewritten.source.module
        self.text = rewritten.text
        self.home = home
        tree = ast.parse(rewritten.text, str(home))
        self._rewritten = _compile(extract(tree, rewritten.functions), str(home))
        upstream = _compile(extract(self.source.tree, rewritten.functions), str(self.source.path))
        self.functions = {name: (_code(upstream, name), _code(self._rewritten, name)) for name in rewritten.functions}
        for name, (before, after) in self.functions.items():
            if before.co_freevars != after.co_freevars:
                raise self._error(name, f"rewritten code that closes over {after.co_freevars}", str(before.co_freevars))
        self._new_signatures = {
            name for name in rewritten.functions if _signature(self.source.tree, name) != _signature(tree, name)
        }
        lines = class_lines(self.source.tree)
        self._moved = {name: line for name, line in class_lines(tree).items() if lines.get(name) != line}
        self.attributes: dict[str, tuple[CodeType, str | None]] = {}
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in rewritten.attributes):
            body, anchor = changed_attributes(self.source.tree, tree, owner)
            self.attributes[owner] = (_compile(body, str(home)), anchor)

    def check_file(self, module: ModuleType) -> None:
        """Raise SeamError when a module does not come from the file that was matched, as it was then."""
        path = self.source.path
        origin = module.__spec__.origin if module.__spec__ is not None else None
        found = str(origin)
        if origin is not None and Path(origin).resolve() == path.resolve():
            try:
                found = f"sha256 {digest(path.read_bytes())}"
            except OSError as error:
                found = str(error)
        expected = f"sha256 {self.source.digest}"
        if found != expected:
            raise SeamError(
                f"{self.name} is not what PatchFastRL() read from {path}: found {found}, expected {expected}. The file "
                "or sys.path has changed since. Restart the process, or call UnpatchFastRL() and then PatchFastRL().",
                seam=self.name,
                found=found,
                expected=expected,
            )

    def check(self, module: ModuleType) -> list[tuple[str, FunctionType]]:
        """The live functions that are to be rewritten, with their names.

        Raises:
            SeamError: one of them is missing, or is not what upstream's file compiles to.
        """
        found: list[tuple[str, FunctionType]] = []
        for name, (before, after) in self.functions.items():
            behind = list(live.functions_behind(_lookup(module, name)))
            ours = [f for f in behind if f.__code__ is after or live.same_code(f.__code__, before)]
            if not ours:
                code = behind[0].__code__ if behind else None
                where = f"code from {code.co_filename}, line {code.co_firstlineno}" if code else "nothing of that name"
                raise self._error(name, where, f"the code of {self.source.path}")
            found += [(name, function) for function in ours]
        for owner in self.attributes:
            cls = _lookup(module, owner)
            if not isinstance(cls, type) or "__dataclass_fields__" not in vars(cls):
                raise self._error(owner, f"{cls!r}, which is no dataclass", f"the dataclass of {self.source.path}")
        return found

    def _error(self, name: str, found: str, expected: str) -> SeamError:
        return SeamError(
            f"{self.name}:{name} was modified by another library: found {found}, expected {expected}. Nothing was "
            "changed. Call PatchFastRL() before the other library changes TRL, or do without one of the two.",
            seam=f"{self.name}:{name}",
            found=found,
            expected=expected,
        )

    def apply(self, module: ModuleType, journal: live.Journal) -> None:
        """Rewrite a module in place. A module that is rewritten already stays as it is."""
        functions = self.check(module)
        namespace = vars(module)
        if isinstance(namespace.get("__loader__"), RewritingLoader) and namespace.get("__file__") == str(self.home):
            return
        if self.functions:
            journal.set_item(namespace, RUNTIME, sys.modules[RUNTIME_MODULE])
        for name, function in functions:
            self._swap(namespace, name, function, journal)
        for owner, (body, anchor) in self.attributes.items():
            scope: dict[str, Any] = {}
            exec(body, namespace, scope)
            live.extend_class(_lookup(module, owner), scope[owner.partition(".")[0]], anchor, journal)
        self._show(module, journal)

    def loader(self, upstream: Any, finish: Finish) -> Loader:
        return RewritingLoader(upstream, self, finish)

    def _swap(self, namespace: dict[str, Any], name: str, function: FunctionType, journal: live.Journal) -> None:
        journal.set_attribute(function, "__code__", self.functions[name][1])
        if name in self._new_signatures:
            # The rewritten definition is executed for its defaults and annotations; the function itself stays.
            scope: dict[str, Any] = {}
            exec(self._rewritten, namespace, scope)
            made = scope[name.partition(".")[0]]
            for part in name.split(".")[1:]:
                made = vars(made)[part]
            twin = next(f for f in live.functions_behind(made) if f.__code__ is self.functions[name][1])
            for attribute in ("__defaults__", "__kwdefaults__", "__annotations__"):
                journal.set_attribute(function, attribute, getattr(twin, attribute))

    def _show(self, module: ModuleType, journal: live.Journal) -> None:
        """Let `inspect` and debuggers find the rewritten text of the module's classes."""
        spec = module.__spec__
        loader = RewritingLoader(module.__loader__, self)
        for name, line in self._moved.items():
            cls = _lookup(module, name)
            if isinstance(cls, type) and "__firstlineno__" in vars(cls):  # Python 3.13: where inspect looks
                journal.set_attribute(cls, "__firstlineno__", line)
        journal.set_item(vars(module), "__file__", str(self.home))
        journal.set_item(vars(module), "__loader__", loader)
        if spec is not None:
            journal.set_attribute(spec, "loader", loader)


class Supplement:
    """A module of somebody else's that gets back a name which TRL still imports from it.

    Args:
        name: the module's name.
        supply: called with the module and a function that sets an attribute, and remembers it for the undo.
    """

    def __init__(self, name: str, supply: Callable[[ModuleType, Callable[[Any, str, Any], None]], None]) -> None:
        self.name = name
        self._supply = supply

    def check(self, module: ModuleType) -> None:
        """Whatever the module contains is vLLM's own affair: nothing of it is replaced."""

    check_file = check

    def apply(self, module: ModuleType, journal: live.Journal) -> None:
        self._supply(module, journal.set_attribute)

    def loader(self, upstream: Any, finish: Finish) -> Loader:
        return Loader(upstream, self, finish)


def _compile(tree: ast.Module, filename: str) -> CodeType:
    # dont_inherit: this file's own `from __future__` is not the target's.
    return compile(tree, filename, "exec", dont_inherit=True)


def _code(module: CodeType, qualname: str) -> CodeType:
    code = module
    for name in qualname.split("."):
        code = next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name)
    return code


def _signature(tree: ast.Module, qualname: str) -> tuple[str, ...]:
    node: Any = locate(tree, qualname)[0].node
    return ast.dump(node.args), ast.dump(node.returns) if node.returns else ""


def _lookup(module: ModuleType, qualname: str) -> Any:
    """The object behind a qualified name, without running descriptors; None when there is none."""
    current: Any = module
    for name in qualname.split("."):
        if not hasattr(current, "__dict__"):
            return None
        current = vars(current).get(name)
    return current


Change = ModulePatch | Supplement
# Called with a module that was just executed and is to be changed.
Finish = Callable[[Any, ModuleType], None]


class Loader:
    """Executes a module through upstream's own loader, then changes it."""

    def __init__(self, upstream: Any, patch: Any, finish: Finish | None = None) -> None:
        self._upstream = upstream
        self._patch = patch
        self._finish = finish

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._upstream.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Until it is changed the module looks like upstream's; if undo comes first, it stays so.
        module.__loader__ = self._upstream
        if module.__spec__ is not None:
            module.__spec__.loader = self._upstream
        with garbage.left():
            self._upstream.exec_module(module)
        if self._finish is not None:
            self._finish(self._patch, module)

    def __getattr__(self, name: str) -> Any:  # get_code, get_filename, is_package, get_resource_reader, ...
        if name.startswith("__") or name == "_upstream":  # copy and pickle ask before there is an upstream
            raise AttributeError(name)
        return getattr(self._upstream, name)


class RewritingLoader(Loader):
    """The loader of a module that seams rewrite."""

    def get_source(self, fullname: str) -> str:
        return self._patch.text


class Finder:
    """Answers for the target modules only: upstream's own spec, with the loader above."""

    def __init__(self, patches: Sequence[Change], finish: Finish) -> None:
        self._patches = {patch.name: patch for patch in patches}
        self._finish = finish

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        patch = self._patches.get(fullname)
        if patch is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        spec.loader = patch.loader(spec.loader, self._finish)  # type: ignore[assignment]
        return spec


def wait_for_import(name: str) -> ModuleType | None:
    """The module of that name, once no other thread is importing it; None when it is not imported.

    Raises:
        SeamError: this very thread is importing it, or waiting for it would be a deadlock.
    """
    importlib._bootstrap._lock_unlock_module(name)  # type: ignore[attr-defined]
    module = sys.modules.get(name)
    if module is not None and getattr(module.__spec__, "_initializing", False):
        raise SeamError(
            f"{name} is being imported right now, by the code that called PatchFastRL() or by a thread that waits for "
            "it. Nothing was changed. Call PatchFastRL() before importing TRL, or after the import has finished.",
            seam=name,
            found="a module half imported",
            expected="a module imported completely, or not at all",
        )
    return module
