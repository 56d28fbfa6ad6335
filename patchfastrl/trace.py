"""Find out where an engine keeps every checkpoint tensor, by watching its own `load_weights` and writing nothing.

vLLM already knows which rows of which fused tensor `q_proj` becomes: its `load_weights` copies it there. `Recorder` is
a dispatch mode under which that code runs over shape-only (meta) stand-ins of the trainer's parameters: every `copy_`
and `fill_` into an engine parameter is recorded as a pair of strided views, none is executed. Operations that move data
without changing it (`clone`, `contiguous`, `cat`, `stack`, a cast to the same dtype) are followed; a tensor made by any
other operation has no provenance, and copying it into a parameter is an error that names both. So is changing a
checkpoint tensor or a parameter in place, and reading a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import SharingError

aten = torch.ops.aten


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage that `tensor` lies in (also for meta tensors, whose data pointers are all 0)."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class View:
    """A strided box of elements inside one tensor's storage. Offset and strides count elements, not bytes."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> View:
        return cls(tensor.storage_offset(), tuple(tensor.size()), tuple(tensor.stride()))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def on(self, storage_owner: torch.Tensor) -> torch.Tensor:
        """The view of this box on `storage_owner`'s storage."""
        return storage_owner.as_strided(self.size, self.stride, self.offset)

    def runs(self) -> torch.Tensor:
        """Start and length of each contiguous run of elements, shape (runs, 2), int64, sorted by start."""
        dims = sorted(((st, n) for st, n in zip(self.stride, self.size, strict=True) if n != 1), reverse=True)
        length = 1
        while dims and dims[-1][0] == length:
            length *= dims.pop()[1]
        starts = torch.tensor([self.offset])
        for stride, n in dims:
            starts = (starts[:, None] + torch.arange(n) * stride).flatten()
        starts = starts.sort().values
        return torch.stack([starts, torch.full_like(starts, length)], dim=1)


@dataclass(frozen=True)
class Copy:
    """`destination[into] = source[out_of]`, element by element, no cast."""

    source: str
    out_of: View
    destination: str
    into: View


@dataclass
class Trace:
    """What a `load_weights` would have done: `copies` from checkpoint tensors, `fills` of padding."""

    copies: list[Copy] = field(default_factory=list)
    fills: list[tuple[str, View, float]] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Records the copies from `sources` into `destinations` made while it is active, and executes none of them.

    Args:
        sources: name -> meta tensor, contiguous. Distinct names have distinct storages.
        destinations: name -> tensor of the engine (on meta or any device). Tied names share one tensor: the first wins.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor], destinations: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.trace = Trace()
        self._sources = {storage_key(t): (name, t) for name, t in sources.items()}
        self._destinations: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in destinations.items():
            self._destinations.setdefault(storage_key(tensor), (name, tensor))
        # Made by a followed operation: the tensor (kept alive: its storage's identity must stay unique) and its pieces.
        self._made: dict[int, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        # Made by any other operation: the tensor, and the checkpoint tensor that it was made from. For messages.
        self._computed: dict[int, tuple[torch.Tensor, str]] = {}
        self._keep = list(destinations.values())

    # Dispatch -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.copy_.default and storage_key(args[0]) in self._destinations:
            self._record(args[0], args[1])
            return args[0]
        if func in (aten.fill_.Scalar, aten.zero_.default) and storage_key(args[0]) in self._destinations:
            self._record_fill(args[0], 0.0 if func is aten.zero_.default else float(args[1]))
            return args[0]
        if func in (aten.clone.default, aten._to_copy.default) and self._is_known(args[0]):
            dtype = kwargs.get("dtype") or args[0].dtype
            if dtype == args[0].dtype:
                return self._make(tuple(args[0].size()), dtype, [(slice(None), args[0])])
            kwargs = {**kwargs, "device": "meta"}  # a cast: no provenance
        if func is aten.cat.default and any(map(self._is_known, args[0])):
            return self._follow_cat(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if func is aten.stack.default and any(map(self._is_known, args[0])):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return self._follow_cat([t.unsqueeze(dim) for t in args[0]], dim)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any other operation. Views of what is known share its storage; all other results have no provenance."""
        of = next((name for t in _tensors((args, kwargs)) if (name := self._name(t))), None)
        if func in (aten._local_scalar_dense.default, aten.equal.default) and of:
            raise SharingError(
                f"While loading, the engine reads the value of {of} instead of copying it, so it cannot be traced."
            )
        for tensor in _tensors(_written(func, args, kwargs)):
            if self._is_known(tensor) or storage_key(tensor) in self._destinations:
                raise SharingError(
                    f"While loading, the engine changes {self._name(tensor)} in place ({func}), so it cannot be traced."
                )
        result = func(*args, **kwargs)
        if of:
            for tensor in _tensors(result):
                if not self._name(tensor):
                    self._computed[storage_key(tensor)] = (tensor, of)
        return result

    def _is_known(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and storage_key(tensor) in self._sources.keys() | self._made.keys()

    def _name(self, tensor: torch.Tensor) -> str | None:
        """The checkpoint tensor that `tensor` was made from (the first of several), or the parameter that it is."""
        key = storage_key(tensor)
        if key in self._made:
            return next((name for _, source in self._made[key][1] if (name := self._name(source))), None)
        return next((table[key][0] for table in (self._sources, self._destinations) if key in table), None) or (
            self._computed[key][1] if key in self._computed else None
        )

    def _follow_cat(self, tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
        dim %= tensors[0].dim()
        size = list(tensors[0].size())
        size[dim] = sum(t.size(dim) for t in tensors)
        start, pieces = 0, []
        for tensor in tensors:
            pieces.append(((slice(None),) * dim + (slice(start, start + tensor.size(dim)),), tensor))
            start += tensor.size(dim)
        return self._make(tuple(size), tensors[0].dtype, pieces)

    def _make(self, size: tuple[int, ...], dtype: torch.dtype, pieces: list[tuple[Any, torch.Tensor]]) -> torch.Tensor:
        made = torch.empty(size, dtype=dtype, device="meta")
        self._made[storage_key(made)] = (made, [(made[index], source) for index, source in pieces])
        return made

    # Recording ------------------------------------------------------------------------------------------------------

    def _record(self, into: torch.Tensor, source: torch.Tensor) -> None:
        destination, whole = self._destinations[storage_key(into)]
        if source.shape != into.shape:
            source = source.expand(into.shape)
        if (key := storage_key(source)) in self._sources:
            name, whole_source = self._sources[key]
            if source.dtype != into.dtype:
                raise SharingError(
                    f"{name} is {source.dtype} in the trainer and {into.dtype} in the engine ({destination}): one "
                    "storage has one dtype."
                )
            if (source.dtype, into.dtype) != (whole_source.dtype, whole.dtype):
                raise SharingError(f"The engine reinterprets the bytes of {name} on the way to {destination}.")
            self.trace.copies.append(Copy(name, View.of(source), destination, View.of(into)))
        elif key in self._made:
            self._record_made(into, source, destination)
        else:
            raise SharingError(
                f"The engine computes {destination} from {self._name(source) or 'other tensors'} instead of copying "
                "it, so the two cannot share storage."
            )

    def _record_fill(self, into: torch.Tensor, value: float) -> None:
        destination, whole = self._destinations[storage_key(into)]
        view, copied = View.of(into), [c.into for c in self.trace.copies if c.destination == destination]
        if coverage([view, *copied], whole.numel())[1] > coverage(copied, whole.numel())[1]:
            raise SharingError(f"The engine overwrites part of {destination} after loading it.")
        self.trace.fills.append((destination, view, value))

    def _record_made(self, into: torch.Tensor, source: torch.Tensor, destination: str) -> None:
        """`source` is a view of a followed tensor: break it up along that tensor's pieces."""
        made, pieces = self._made[storage_key(source)]
        wanted = _Box.of(source, made)
        if wanted is None:
            raise SharingError(
                f"The engine reshapes {self._name(made)} on the way to {destination} in a way that cannot be traced."
            )
        recorded = 0
        for piece, piece_source in pieces:
            held = _Box.of(piece, made)
            overlap = wanted.overlap(held) if held is not None else None
            if held is None or overlap is None:
                continue
            part = held.narrow(piece_source, overlap)
            # Same axes in the same order on both sides; axes that only one side spells out have length 1.
            order = [axis for axis in wanted.axes if axis is not None]
            part = part.permute(
                [held.axes.index(a) for a in order if a in held.axes]
                + [i for i, a in enumerate(held.axes) if a is None or a not in order]
            )
            target = wanted.narrow(into, overlap)
            self._record(target, part.reshape(target.shape))
            recorded += target.numel()
        if recorded != into.numel():
            raise SharingError(f"Part of what the engine copies into {destination} has no known source.")


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in an operation's arguments or results."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that `func` writes into, from its schema."""
    written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    names = [a.name for a, is_written in zip(func._schema.arguments, written, strict=True) if is_written]
    return [a for a, is_written in zip(args, written, strict=False) if is_written] + [
        kwargs[name] for name in names if name in kwargs
    ]


@dataclass(frozen=True)
class _Box:
    """A view as a rectangle in its base tensor's coordinates; `axes[i]` is the base axis of the view's dimension i."""

    start: tuple[int, ...]
    length: tuple[int, ...]
    axes: tuple[int | None, ...]

    @classmethod
    def of(cls, view: torch.Tensor, base: torch.Tensor) -> _Box | None:
        start, rest = [], view.storage_offset() - base.storage_offset()
        for stride in base.stride():
            start.append(rest // stride if stride else 0)
            rest -= start[-1] * stride
        length, axes = [1] * base.dim(), []
        for size, stride in zip(view.size(), view.stride(), strict=True):
            axis = None
            if size != 1:
                fits = [k for k in range(base.dim()) if base.stride(k) == stride and start[k] + size <= base.size(k)]
                axis = next((k for k in fits if k not in axes), None)
                if axis is None:
                    return None
                length[axis] = size
            axes.append(axis)
        return cls(tuple(start), tuple(length), tuple(axes))

    def overlap(self, other: _Box) -> list[tuple[int, int]] | None:
        spans = [
            (max(a, b), min(a + n, b + m))
            for a, n, b, m in zip(self.start, self.length, other.start, other.length, strict=True)
        ]
        return None if any(low >= high for low, high in spans) else spans

    def narrow(self, tensor: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
        """The part of `tensor` (shaped like this box's view) that lies in `spans` of the base."""
        for dim, axis in enumerate(self.axes):
            if axis is not None:
                low, high = spans[axis]
                tensor = tensor.narrow(dim, low - self.start[axis], high - low)
        return tensor


# What a trace must satisfy ------------------------------------------------------------------------------------------


def coverage(views: Iterable[View], numel: int) -> tuple[int, int]:
    """Elements of `range(numel)` that no view covers, and how often an element is covered again."""
    runs = [v.runs() for v in views if v.numel]
    if not runs:
        return numel, 0
    table = torch.cat(runs)
    table = table[table[:, 0].argsort()]
    starts, ends = table[:, 0], table[:, 0] + table[:, 1]
    if int(starts[0]) < 0 or int(ends.max()) > numel:
        raise SharingError("A traced copy reaches outside the tensor that it writes to.")
    seen = torch.cummax(ends, 0).values
    before = torch.cat([torch.zeros(1, dtype=seen.dtype), seen[:-1]])
    twice = int((torch.minimum(ends, before) - starts).clamp(min=0).sum())
    covered = int((ends - torch.maximum(starts, before)).clamp(min=0).sum())
    return numel - covered, twice


def combined_view(shape: tuple[int, ...], copies: list[Copy]) -> View | None:
    """The single strided view of the destination that holds the whole source (contiguous, of `shape`), if there is one.

    A fused checkpoint tensor may land in several copies (two per expert, say): together they are one view when the
    destination offset is the same affine function of the source index in all of them. The copies must cover the source.
    """
    strides = _contiguous_strides(shape)
    moved = {c.out_of.offset: c.into.offset for c in copies}
    if 0 not in moved:
        return None
    step: dict[int, int] = {}  # axis of the source -> destination stride
    for copy in copies:
        along = _along_axes(copy, shape, strides)
        if along is None:
            return None
        for axis, every, d in along:
            if d % every or step.setdefault(axis, d // every) != d // every:
                return None
    for axis, (n, s) in enumerate(zip(shape, strides, strict=True)):
        if n == 1:
            step[axis] = s
        elif axis not in step and s in moved:  # each copy has one index of this axis
            step[axis] = moved[s] - moved[0]
        if step.get(axis, 0) <= 0:
            return None
    view = View(moved[0], tuple(shape), tuple(step[axis] for axis in range(len(shape))))
    if any(_map_index(start, shape, strides, view) != into for start, into in moved.items()):
        return None
    return view


def _along_axes(copy: Copy, shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int, int]] | None:
    """The copy's dimensions as (axis of the source, indices per step, destination stride); None if one follows no axis.

    A dimension that runs through whole axes (a flattened source) is broken up into these.
    """
    index = [copy.out_of.offset // s % n for n, s in zip(shape, strides, strict=True)]
    todo = [d for d in zip(copy.out_of.size, copy.out_of.stride, copy.into.stride, strict=True) if d[0] > 1]
    found = []
    while todo:
        n, s, d = todo.pop()
        axis = next((k for k in range(len(shape)) if shape[k] > 1 and 0 < strides[k] <= s), None)
        if axis is None or s % strides[axis]:
            return None
        every = s // strides[axis]
        room = max(shape[axis] // every, 1)
        if n > room and n % room == 0 and shape[axis] % every == 0 and index[axis] < every:
            todo.append((n // room, s * room, d * room))
            n = room
        found.append((axis, every, d))
        index[axis] += (n - 1) * every
    return found if all(i < n for i, n in zip(index, shape, strict=True)) else None


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)


def _map_index(flat: int, shape: tuple[int, ...], strides: tuple[int, ...], view: View) -> int:
    offset = view.offset
    for n, s, d in zip(shape, strides, view.stride, strict=True):
        offset += (flat // s) % n * d
    return offset
