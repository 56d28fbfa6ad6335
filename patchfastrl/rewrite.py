"""Source in, source out: find a seam's target, match, count, replace, and leave every other byte as it was.

`ast` finds the target's lines, libcst parses those alone (a trainer has 3,000 lines, and its `__init__` 900 of them);
the rest of the file is never touched, so what a debugger shows is upstream's text but for the replaced expressions.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import libcst as cst

from .errors import SeamError
from .seam import Seam

RUNTIME = "patchfastrl_runtime"
RUNTIME_MODULE = "patchfastrl.runtime"
RUNTIME_IMPORT = f"import {RUNTIME_MODULE} as {RUNTIME}"

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class Rewrite(cst.CSTTransformer):
    """The transformer of a seam: `leave_*` methods replace what they match and count it in `found`.

    They match on the original node and change the updated one, so that seams of one function do not see each other.

    Attributes:
        words: a statement with none of these in its text cannot match, and is not even parsed: most of a trainer's
            `__init__` is none of ours, and parsing it is where the time would go. Empty: the whole target is parsed.
    """

    words: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.found = 0


class _Together(cst.CSTTransformer):
    """Several seams in one traversal, which is where the time goes."""

    # Layout holds no expressions.
    _LAYOUT = (cst.SimpleWhitespace, cst.ParenthesizedWhitespace, cst.TrailingWhitespace, cst.EmptyLine, cst.Comma)

    def __init__(self, rewrites: Iterable[Rewrite]) -> None:
        super().__init__()
        self._leave: dict[str, list[Callable[[Any, Any], Any]]] = {}
        for transformer in rewrites:
            kinds = type(transformer).__mro__
            own = {name for kind in kinds[: kinds.index(Rewrite)] for name in vars(kind) if name.startswith("leave_")}
            for name in own:
                self._leave.setdefault(name.removeprefix("leave_"), []).append(getattr(transformer, name))

    def on_visit(self, node: cst.CSTNode) -> bool:
        return not isinstance(node, self._LAYOUT)

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        for leave in self._leave.get(type(original_node).__name__, ()):
            # One seam has put several nodes here, or none: another's match in it is not counted, and so noticed.
            if type(updated_node) is type(original_node):
                updated_node = leave(original_node, updated_node)
        return updated_node

    def on_visit_attribute(self, node: cst.CSTNode, attribute: str) -> None: ...

    def on_leave_attribute(self, original_node: cst.CSTNode, attribute: str) -> None: ...


def expression(source: str) -> cst.BaseExpression:
    """Parse an expression; ``@`` in front of a name stands for the runtime module, as in ``@publish(self)``."""
    return cst.parse_expression(source.replace("@", f"{RUNTIME}."))


def statement(source: str) -> cst.SimpleStatementLine | cst.BaseCompoundStatement:
    """Parse one statement, as `expression` does."""
    return cst.parse_statement(source.replace("@", f"{RUNTIME}."))


def with_leading(call: cst.Call, function: str, *leading: str) -> cst.Call:
    """The call as one of `function`, with some arguments in front of its own."""
    # The first argument's own white space is upstream's layout: one argument a line.
    between = call.whitespace_before_args
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" ") if between.empty else between)
    args = [cst.Arg(expression(source), comma=comma) for source in leading]
    return call.with_changes(func=expression(function), args=[*args, *call.args])


def with_keyword(call: cst.Call, keyword: str, source: str) -> cst.Call:
    """The call with one keyword argument more, the last."""
    equal = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    return call.with_changes(args=[*call.args, cst.Arg(expression(source), keyword=cst.Name(keyword), equal=equal)])


class AtStart(Rewrite):
    """`source` becomes the first statement of the function `name`, after its docstring."""

    def __init__(self, name: str, source: str) -> None:
        super().__init__()
        self.words = (f"def {name}",)
        self.name, self.source = name, source

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        if not reads(original_node.name, self.name):
            return updated_node
        self.found += 1
        body = list(updated_node.body.body)
        body.insert(0 if updated_node.get_docstring() is None else 1, statement(self.source))
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


def reads(node: cst.CSTNode | None, source: str) -> bool:
    """Whether an expression says `source`, whatever its layout, parentheses and commas.

    (libcst's own matchers say the same at greater length, and importing them takes a third of a second.)
    """
    return _alike(node, _pattern(source))


@functools.cache
def _pattern(source: str) -> cst.BaseExpression:
    return cst.parse_expression(source)


def _alike(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, cst.CSTNode):
        names = [field.name for field in dataclasses.fields(one) if not field.name.startswith("whitespace")]
        return all(_alike(getattr(one, n), getattr(other, n)) for n in names if n not in _PUNCTUATION)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


_PUNCTUATION = {"lpar", "rpar", "comma", "equal", "semicolon", "lbracket", "rbracket", "dot"}


@dataclass(frozen=True)
class Source:
    """A file of the package to be rewritten, read but not imported."""

    module: str
    path: Path
    digest: str
    text: str
    tree: ast.Module

    @classmethod
    def read(cls, module: str, path: Path, seam: Seam) -> Source:
        try:
            data = path.read_bytes()
            text = importlib.util.decode_source(data)
            tree = ast.parse(text, str(path))
        except (OSError, SyntaxError, UnicodeError, ValueError) as error:
            raise SeamError(
                f"Seam {seam.name!r} rewrites {seam.target}, but {path} cannot be read as Python: {error}. Nothing was "
                f"changed. Reinstall {seam.requirement.name} (expected: {seam.requires}).",
                seam=seam.name,
                found=str(error),
                expected=seam.count,
            ) from error
        return cls(module, path, digest(data), text, tree)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Target:
    """Lines `first` to `last` (counted from 1) of a definition that seams replace something in."""

    qualname: str
    node: ast.stmt
    first: int
    last: int


def locate(tree: ast.Module, qualname: str) -> list[Target]:
    """Every definition of `qualname` in a module: functions, and class attributes that are assigned."""
    *owners, name = qualname.split(".")
    bodies: list[list[ast.stmt]] = [tree.body]
    for owner in owners:
        classes = [node for body in bodies for node in _unconditional(body) if isinstance(node, ast.ClassDef)]
        bodies = [node.body for node in classes if node.name == owner]
    found = [node for body in bodies for node in _unconditional(body) if name in _names(node)]
    return [Target(qualname, node, _first_line(node), node.end_lineno or node.lineno) for node in found]


def _unconditional(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a scope, those under `if`, `try` and `with` included."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            for name in ("body", "orelse", "finalbody"):
                yield from _unconditional(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _unconditional(handler.body)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, FUNCTION):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


@dataclass(frozen=True)
class Rewritten:
    """A source and what the seams made of it.

    `functions` and `attributes` are the qualified names of what was rewritten; `found` counts each seam's matches.
    """

    source: Source
    text: str
    functions: tuple[str, ...]
    attributes: tuple[str, ...]
    found: dict[str, int]


def rewrite(source: Source, seams: Sequence[Seam]) -> Rewritten:
    """Apply all seams of one file.

    Counts are not judged here. Where a target is missing, or defined more than once, nothing is replaced, and the
    count says so: each definition would have to hold what one was expected to.
    """
    lines = source.text.split("\n")  # not splitlines(): for Python's parser a form feed does not end a line
    found: dict[str, int] = {}
    by_target: dict[str, list[Seam]] = {}
    for seam in seams:
        by_target.setdefault(seam.qualname, []).append(seam)
    located = {qualname: locate(source.tree, qualname) for qualname in by_target}
    replaced: list[tuple[Target, list[str]]] = []
    for qualname, targets in located.items():
        if len(targets) != 1:
            found.update({seam.name: seam.count * len(targets) for seam in by_target[qualname]})
            continue
        target = targets[0]
        segment, counts = _rewrite_target(lines, target, by_target[qualname])
        found.update(counts)
        replaced.append((target, segment))
    # From the bottom up, so that the line numbers above stay true.
    for target, segment in sorted(replaced, key=lambda item: item[0].first, reverse=True):
        lines[target.first - 1 : target.last] = segment
    if any(isinstance(target.node, FUNCTION) for target, _ in replaced):
        lines.insert(_import_line(source.tree), RUNTIME_IMPORT)
    functions = tuple(target.qualname for target, _ in replaced if isinstance(target.node, FUNCTION))
    attributes = tuple(target.qualname for target, _ in replaced if not isinstance(target.node, FUNCTION))
    return Rewritten(source, "\n".join(lines), functions, attributes, found)


def _rewrite_target(lines: list[str], target: Target, seams: Sequence[Seam]) -> tuple[list[str], dict[str, int]]:
    """The lines of a target with its seams in them, and how often each one matched."""
    transformers = {seam.name: seam.rewrite() for seam in seams}
    together = _Together(transformers.values())
    segment = lines[target.first - 1 : target.last]
    for first, last in reversed(_relevant(target, lines, list(transformers.values()))):
        part = slice(first - target.first, last - target.first + 1)
        segment[part] = _rewrite_lines(segment[part], together, seams[0], definition=first == target.first)
    return segment, {name: transformer.found for name, transformer in transformers.items()}


def _relevant(target: Target, lines: list[str], rewrites: Sequence[Rewrite]) -> list[tuple[int, int]]:
    """The first and last lines of the statements in a target that have to be parsed; the whole target if in doubt.

    What stands above a function's first statement goes with it, as a definition that ends there.
    """
    whole = [(target.first, target.last)]
    if not isinstance(target.node, FUNCTION) or not all(rewrite.words for rewrite in rewrites):
        return whole
    words = {word for rewrite in rewrites for word in rewrite.words}
    spans = [(_first_line(node), node.end_lineno or node.lineno) for node in target.node.body]
    if any(later[0] <= earlier[1] for earlier, later in pairwise(spans)) or spans[0][0] <= target.node.lineno:
        return whole  # several statements on one line
    spans[0] = target.first, spans[0][1]
    return [span for span in spans if any(word in line for line in lines[span[0] - 1 : span[1]] for word in words)]


def _rewrite_lines(segment: list[str], together: _Together, seam: Seam, definition: bool) -> list[str]:
    """Rewrite the lines of a definition, or of one statement of a function, however deep they are indented."""
    indent = len(segment[0]) - len(segment[0].lstrip())
    wrapper = ("class _:\n" if definition else "def _():\n") if indent else ""
    try:
        tree = cst.parse_module(wrapper + "\n".join(segment) + "\n")
    except cst.ParserSyntaxError as error:
        raise SeamError(
            f"libcst cannot parse {seam.target}, which Python can: {error}. Nothing was changed. "
            "Update it (pip install -U libcst).",
            seam=seam.name,
            found=str(error),
            expected=seam.count,
        ) from error
    return tree.visit(together).code.removeprefix(wrapper).removesuffix("\n").split("\n")


def _import_line(tree: ast.Module) -> int:
    """The index of the line before which a module's first ordinary statement may be put."""
    after = 0
    for position, node in enumerate(tree.body):
        docstring = position == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not docstring and not future:
            return after or _first_line(node) - 1
        after = node.end_lineno or node.lineno
    return after


def extract(tree: ast.Module, qualnames: Sequence[str]) -> ast.Module:
    """The named functions alone, in bare classes of their names.

    They compile to the code objects that the whole file would give (lines, names and cells are the same), in a tenth
    of the time; executing them runs no decorator of a class and no base class.
    """
    return _module(tree, _functions(tree.body, "", set(qualnames)))


def _functions(body: list[ast.stmt], prefix: str, qualnames: set[str]) -> list[ast.stmt]:
    kept: list[ast.stmt] = []
    for node in _unconditional(body):
        if isinstance(node, FUNCTION) and prefix + node.name in qualnames:
            kept.append(node)
        elif isinstance(node, ast.ClassDef):
            inner = _functions(node.body, f"{prefix}{node.name}.", qualnames)
            kept += [_bare(node, inner)] if inner else []
    return kept


def changed_attributes(before: ast.Module, after: ast.Module, owner: str) -> tuple[ast.Module, str | None]:
    """The statements in the body of class `owner` that a rewriting added or replaced, in a bare class.

    Second, the name of the annotated attribute that the first added annotated one follows.
    """
    known = {ast.dump(node) for node in _class(before, owner).body}
    rewritten = _class(after, owner)
    changed = [node for node in rewritten.body if ast.dump(node) not in known]
    anchor = None
    for node in rewritten.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node in changed:
                break
            anchor = node.target.id
    return _module(after, [_bare(rewritten, changed)]), anchor


def class_lines(tree: ast.Module) -> dict[str, int]:
    """The first line of every class that is not local to a function, by qualified name."""
    found: dict[str, int] = {}
    scopes: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    while scopes:
        prefix, body = scopes.pop()
        for node in _unconditional(body):
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = _first_line(node)
                scopes.append((f"{prefix}{node.name}.", node.body))
    return found


def _class(tree: ast.Module, qualname: str) -> ast.ClassDef:
    body = tree.body
    for name in qualname.split("."):
        node = next(node for node in _unconditional(body) if isinstance(node, ast.ClassDef) and node.name == name)
        body = node.body
    return node


def _bare(node: ast.ClassDef, body: list[ast.stmt]) -> ast.ClassDef:
    fields: dict[str, Any] = dict(ast.iter_fields(node))
    fields.update(bases=[], keywords=[], decorator_list=[], body=body)
    return ast.copy_location(ast.ClassDef(**fields), node)


def _module(tree: ast.Module, body: list[ast.stmt]) -> ast.Module:
    """A module of some statements of another, in which they compile as they do there."""
    # The compiler emits other instructions for a call on an imported name, so the imports have to be seen. They are
    # not to be run: `if False` shows them to its symbol table and to nothing else.
    imports = [node for node in _unconditional(tree.body) if isinstance(node, (ast.Import, ast.ImportFrom))]
    futures = [node for node in imports if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    others = [node for node in imports if node not in futures]
    unrun = ast.parse("if False: pass").body[0]
    assert isinstance(unrun, ast.If)
    unrun.body += others
    return ast.Module(body=[*futures, unrun, *body], type_ignores=[])
