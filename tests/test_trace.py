"""The tracer against the real thing: a plan must put every byte where the loader itself would have put it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from patchfastrl.errors import SharingError
from patchfastrl.materialise import materialise
from patchfastrl.sharing import Shared, make_plan
from patchfastrl.trace import Copy, View, combined_view, coverage, storage_key

pytestmark = pytest.mark.timeout(120)
many = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=150)


# Trainer and engine -------------------------------------------------------------------------------------------------


class Trainer(nn.Module):
    # transformers asks every model how its checkpoints differ from it: this one's do not.
    config: Any = None
    _weight_conversions: list[Any] = []  # noqa: RUF012

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


class Engine(nn.Module):
    """Parameters and a loader in vLLM's manner: `loaders[name](engine, tensor)` for each tensor of the checkpoint."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], loaders: dict[str, Callable], **kwargs: Any) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, torch.nan, **kwargs)))
        self._loaders = loaders

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self._loaders[name](self, tensor)


def loaded(shapes: dict, loaders: dict, trainer: Trainer, **kwargs: Any) -> dict[str, torch.Tensor]:
    """What the loader itself makes of the trainer's values, on real memory."""
    engine = Engine(shapes, loaders, **kwargs)
    with torch.no_grad():
        engine.load_weights((n, p.detach().clone()) for n, p in trainer.named_parameters())
    return {n: p.detach() for n, p in engine.named_parameters()}


def assert_shares(shapes: dict, loaders: dict, trainer: Trainer) -> None:
    """Planned and materialised, the engine holds what its loader would have put there, before and after writing."""
    values = {n: p.detach().clone() for n, p in trainer.named_parameters()}
    expected = loaded(shapes, loaders, trainer)
    engine = Engine(shapes, loaders, device="meta")
    plan = make_plan(engine, trainer)
    assert all(p.is_meta for p in engine.parameters())
    materialise(engine, trainer, plan, torch.device("cpu"))
    for name, parameter in engine.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    homes = {storage_key(p) for p in engine.parameters()}
    for name, parameter in trainer.named_parameters():
        assert torch.equal(parameter, values[name]), name
        assert storage_key(parameter) in homes, name
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(-2).add_(1)
    expected = loaded(shapes, loaders, trainer)
    for name, parameter in engine.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    Shared.of(trainer, engine, plan).check()


def assert_refused(shapes: dict, loaders: dict, trainer: Trainer, match: str) -> None:
    """Refused by name, with nothing changed on either side."""
    before = {n: (storage_key(p), p.detach().clone()) for n, p in trainer.named_parameters()}
    engine = Engine(shapes, loaders, device="meta")
    with pytest.raises(SharingError, match=match) as caught:
        make_plan(engine, trainer)
    assert "Trainer cannot share its weights with vLLM's Engine" in str(caught.value)
    assert "stock TRL" in str(caught.value)
    assert all(p.is_meta for p in engine.parameters())
    for name, parameter in trainer.named_parameters():
        assert storage_key(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


# Detours that leave the values and the shape as they were -----------------------------------------------------------


def _by_parts(tensor: torch.Tensor, dim: int, at: int) -> torch.Tensor:
    return torch.cat([tensor.narrow(dim, 0, at), tensor.narrow(dim, at, tensor.size(dim) - at)], dim=dim)


@st.composite
def detours(draw: st.DrawFn, shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A random chain of operations that move data (or only the view of it) and change nothing."""
    steps: list[Callable] = []
    for kind in draw(st.lists(st.sampled_from(sorted(_DETOURS)), max_size=3)):
        dim = draw(st.integers(0, len(shape) - 1))
        steps.append(_DETOURS[kind](dim, draw(st.integers(1, max(shape[dim] - 1, 1)))))

    def run(tensor: torch.Tensor) -> torch.Tensor:
        for step in steps:
            tensor = step(tensor)
        return tensor

    return run


_DETOURS: dict[str, Callable[[int, int], Callable[[torch.Tensor], torch.Tensor]]] = {
    "clone": lambda d, k: lambda t: t.clone(),
    "to": lambda d, k: lambda t: t.to(t.dtype, copy=True),
    "data": lambda d, k: lambda t: t.data.detach(),
    "contiguous": lambda d, k: lambda t: t.transpose(0, d).contiguous().transpose(0, d),
    "flip of axes": lambda d, k: lambda t: t.mT.mT if t.dim() > 1 else t,
    "cat": lambda d, k: lambda t: _by_parts(t, d, min(k, t.size(d) - 1)) if t.size(d) > 1 else t,
    "chunk": lambda d, k: lambda t: torch.cat(t.chunk(k, dim=d), dim=d),
    "split": lambda d, k: lambda t: torch.cat(t.split(k, dim=d), d - t.dim()),
    "stack": lambda d, k: lambda t: torch.stack(t.unbind(d), d),
    "stack and squeeze": lambda d, k: lambda t: torch.stack([t], d).squeeze(d),
    "expand": lambda d, k: lambda t: t.unsqueeze(0).expand(1, *t.shape)[0],
    "view": lambda d, k: lambda t: t.view(t.shape),
}


def copy_whole(into: torch.Tensor, tensor: torch.Tensor, parts: int, dim: int) -> None:
    """`copy_` in up to `parts` strips along `dim`."""
    for one, other in zip(into.chunk(parts, dim), tensor.chunk(parts, dim), strict=True):
        one.copy_(other)


# Properties ---------------------------------------------------------------------------------------------------------


@st.composite
def fusings(draw: st.DrawFn) -> tuple[dict, dict, dict]:
    """Engine shapes, loaders, trainer's tensors: slices of fused, padded, transposed tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    loaders: dict[str, Callable] = {}
    tensors: dict[str, torch.Tensor] = {}
    number = 0
    for d in range(draw(st.integers(1, 3))):
        destination, dim = f"fused{d}", draw(st.integers(0, 1))
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        across, padding = draw(st.integers(1, 6)), draw(st.integers(0, 3))
        fill = draw(st.sampled_from(["zero_ first", "fill_ first", "zero_ the rest"]))
        size = [across, across]
        size[dim] = sum(lengths) + padding
        shapes[destination] = tuple(size)
        start = 0
        for i, n in enumerate(lengths):
            box = [across, across]
            box[dim] = n
            transposed = draw(st.booleans())
            stored = tuple(reversed(box)) if transposed else tuple(box)
            parts, parts_dim = draw(st.integers(1, 3)), draw(st.integers(0, 1))
            detour = draw(detours(stored))

            def load(
                engine: Engine,
                tensor: torch.Tensor,
                span: tuple[int, int, int] = (dim, start, n),
                destination: str = destination,
                transposed: bool = transposed,
                parts: tuple[int, int] = (parts, parts_dim),
                detour: Callable = detour,
                padding: int = padding,
                first: bool = i == 0,
                fill: str = fill,
            ) -> None:
                home = engine.get_parameter(destination).data
                if padding and first and fill == "zero_ first":
                    home.zero_()
                elif padding and first and fill == "fill_ first":
                    home.fill_(7)
                elif padding and first:
                    home.narrow(span[0], home.size(span[0]) - padding, padding).zero_()
                tensor = detour(tensor)
                copy_whole(home.narrow(*span), tensor.t() if transposed else tensor, *parts)

            name = f"part{number}"
            loaders[name], tensors[name] = load, torch.randn(stored)
            number, start = number + 1, start + n
    return shapes, loaders, tensors


@given(fusings())
@many
def test_fused_padded_and_transposed(case: tuple[dict, dict, dict]) -> None:
    shapes, loaders, tensors = case
    assert_shares(shapes, loaders, Trainer(tensors))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[dict, dict, dict]:
    """Experts: one fused source per layer, copied expert by expert, gate and up apart, padded, transposed."""
    experts, inner, hidden = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    pad, transposed, by_cat = draw(st.integers(0, 2)), draw(st.booleans()), draw(st.booleans())
    detour = draw(detours((experts, hidden, 2 * inner) if transposed else (experts, 2 * inner, hidden)))

    def load_w13(engine: Engine, tensor: torch.Tensor) -> None:
        home = engine.get_parameter("w13").data
        if pad:
            home.zero_()
        tensor = detour(tensor)
        if transposed:
            tensor = tensor.transpose(1, 2)
        if by_cat:  # what reversing transformers' own fusing looks like: split apart, put together again
            parts = [torch.cat(e.chunk(2, 0)) if e.size(0) > 1 else e for e in tensor.unbind(0)]
        else:
            parts = list(tensor.unbind(0))
        for expert, part in enumerate(parts):
            home[expert, :inner].copy_(part[:inner])
            home[expert, inner : 2 * inner].copy_(part[inner:])

    def load_w2(engine: Engine, tensor: torch.Tensor) -> None:
        home = engine.get_parameter("w2").data
        if pad:
            home[:, :, inner:].fill_(0)
        for expert in range(experts):
            home[expert][:, :inner].copy_(tensor[expert])

    shapes = {"w13": (experts, 2 * inner + pad, hidden), "w2": (experts, hidden, inner + pad)}
    stored = (experts, hidden, 2 * inner) if transposed else (experts, 2 * inner, hidden)
    tensors = {"gate_up": torch.randn(stored), "down": torch.randn(experts, hidden, inner)}
    return shapes, {"gate_up": load_w13, "down": load_w2}, tensors


@given(mixtures())
@many
def test_mixtures_of_experts(case: tuple[dict, dict, dict]) -> None:
    shapes, loaders, tensors = case
    assert_shares(shapes, loaders, Trainer(tensors))


def test_what_lies_as_the_engine_wants_it_is_not_copied() -> None:
    """Parts of a fused tensor move, and so does what shares its storage with others or lies in another order."""

    def rows_of_fused(first: int) -> Callable:
        return lambda engine, tensor: engine.fused.data[first : first + 2].copy_(tensor)

    def into(name: str) -> Callable:
        return lambda engine, tensor: getattr(engine, name).data.copy_(tensor.view_as(getattr(engine, name)))

    file = torch.randn(30)  # several tensors of a checkpoint, mapped
    trainer = Trainer(
        {
            "alone": torch.randn(4, 3),
            "reshaped": torch.randn(6, 1, 2),
            "q": torch.randn(2, 3),
            "k": torch.randn(2, 3),
            "first_of_file": file[:12].view(4, 3),
            "later_in_file": file[12:24].view(4, 3),
            "columns_first": torch.randn(3, 4).T,
        }
    )
    single = {name: into(name) for name in ("alone", "reshaped", "first_of_file", "later_in_file", "columns_first")}
    shapes = {"fused": (4, 3), "reshaped": (6, 2), **{n: (4, 3) for n in single if n != "reshaped"}}
    loaders = {"q": rows_of_fused(0), "k": rows_of_fused(2), **single}
    before = {name: parameter.data_ptr() for name, parameter in trainer.named_parameters()}
    assert_shares(shapes, loaders, trainer)
    kept = {name for name, parameter in trainer.named_parameters() if parameter.data_ptr() == before[name]}
    assert kept == {"alone", "reshaped"}


class TiedEngine(Engine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = self.embed


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))
@many
def test_tied_and_padded(rows: int, columns: int, padding: int) -> None:
    """Tied on both sides: one storage, whichever name the engine loads it by; untied on one side only: refused."""

    def load(engine: Engine, tensor: torch.Tensor) -> None:
        engine.head.data[:rows].copy_(tensor)
        engine.head.data[rows:].fill_(0)

    shapes, loaders = {"embed": (rows + padding, columns)}, {"embed": load, "head": load}
    tied = Trainer({"embed": torch.randn(rows, columns)})
    tied.head = tied.embed
    engine = TiedEngine(shapes, loaders, device="meta")
    plan = make_plan(engine, tied)
    materialise(engine, tied, plan, torch.device("cpu"))
    assert engine.head is engine.embed
    assert tied.head is tied.embed
    assert storage_key(tied.head) == storage_key(engine.head)
    assert torch.equal(engine.embed[:rows], tied.head)
    assert not engine.embed[rows:].any()

    untied = Trainer({"embed": torch.randn(rows, columns), "head": torch.randn(rows, columns)})
    with pytest.raises(SharingError, match="embed are loaded twice"):
        make_plan(TiedEngine(shapes, loaders, device="meta"), untied)


def test_a_model_whose_layers_are_the_same_object() -> None:
    """One trainer parameter that the engine keeps twice has no single place."""

    def both(engine: Engine, tensor: torch.Tensor) -> None:
        engine.a.data.copy_(tensor)
        engine.b.data.copy_(tensor)

    trainer = Trainer({"w": torch.randn(2, 3)})
    assert_refused({"a": (2, 3), "b": (2, 3)}, {"w": both}, trainer, r"keeps w in more than one place \(a, b\)")


# Refusals -----------------------------------------------------------------------------------------------------------

SHAPE = (4, 6)
Load = Callable[[Engine, torch.Tensor], Any]


def _swap_rows(engine: Engine, tensor: torch.Tensor) -> None:
    engine.fused.data[:2].copy_(tensor[2:])
    engine.fused.data[2:].copy_(tensor[:2])


def _overwrite(engine: Engine, tensor: torch.Tensor) -> None:
    engine.fused.data.copy_(tensor)
    engine.fused.data[1].zero_()


def _copy_twice(engine: Engine, tensor: torch.Tensor) -> None:
    engine.fused.data.copy_(tensor)
    engine.fused.data[3:].copy_(tensor[3:])


def _through_a_buffer(engine: Engine, tensor: torch.Tensor) -> None:
    buffer = torch.empty_like(tensor)
    buffer.copy_(tensor)
    engine.fused.data.copy_(buffer)


def _scaled_in_place(engine: Engine, tensor: torch.Tensor) -> None:
    scaled = tensor.clone()
    scaled.mul_(2)
    engine.fused.data.copy_(scaled)


def _if_zero(engine: Engine, tensor: torch.Tensor) -> None:
    if not (tensor == 0).all():
        engine.fused.data.copy_(tensor)


def _new_storage(engine: Engine, tensor: torch.Tensor) -> None:
    engine.fused.data = tensor.clone()


def _part_with_zeros(engine: Engine, tensor: torch.Tensor) -> None:
    engine.fused.data.copy_(torch.cat([tensor[:3], torch.zeros(1, 6)]))


REFUSED: dict[str, tuple[Load, str]] = {
    "arithmetic": (lambda e, t: e.fused.data.copy_(t + 1), "computes fused from w "),
    "arithmetic on a piece": (lambda e, t: e.fused.data.copy_(torch.cat([t[:2], t[2:] * 2])), "computes fused from w "),
    "arithmetic in place on the checkpoint": (lambda e, t: e.fused.data.copy_(t.mul_(2)), "changes w in place"),
    "arithmetic in place on a copy": (_scaled_in_place, "changes w in place"),
    "arithmetic in place afterwards": (lambda e, t: e.fused.data.copy_(t).add_(1), "changes fused in place"),
    "fused arithmetic": (lambda e, t: torch.add(t, 1, out=e.fused.data), "changes fused in place"),
    "foreach": (lambda e, t: torch._foreach_copy_([e.fused.data], [t]), "changes fused in place"),
    "scatter": (lambda e, t: e.fused.data.index_copy_(0, torch.arange(4), t), "changes fused in place"),
    "random": (lambda e, t: e.fused.data.normal_(), "changes fused in place"),
    "gather": (lambda e, t: e.fused.data.copy_(t[torch.tensor([0, 2, 1, 3])]), "computes fused from w "),
    "flip": (lambda e, t: e.fused.data.copy_(t.flip(0)), "computes fused from w "),
    "buffer": (_through_a_buffer, "computes fused from w "),
    "cast of the source": (lambda e, t: e.fused.data.copy_(t.half().float()), "computes fused from w "),
    "other bytes": (
        lambda e, t: e.fused.data.view(torch.int32).copy_(t.view(torch.int32)),
        "reinterprets the bytes of w",
    ),
    "read of a value": (lambda e, t: e.fused.data.copy_(t) if t[0, 0].item() else None, "reads the value of w"),
    "read of a result": (_if_zero, "reads the value of w"),
    "comparison": (lambda e, t: torch.equal(t, t.clone()), "reads the value of w"),
    "list": (lambda e, t: e.fused.data.copy_(torch.tensor(t.tolist())), "fails at w "),
    "numpy": (lambda e, t: e.fused.data.copy_(torch.from_numpy(t.numpy())), "fails at w "),
    "wrong shape": (lambda e, t: e.fused.data.copy_(t[:, :5]), "fails at w "),
    "unknown name": (lambda e, t: e.get_parameter("w").data.copy_(t), "fails at w "),
    "loaded twice": (_copy_twice, "6 elements of the engine's fused are loaded twice"),
    "nothing loaded": (lambda e, t: None, "the engine does not load w"),
    "row left out": (
        lambda e, t: e.fused.data[:3].copy_(t[:3]),
        "6 of 24 elements of the engine's fused have no source",
    ),
    "part left out": (lambda e, t: e.fused.data.zero_()[:3].copy_(t[:3]), "leaves out 6 of 24 elements of w"),
    "one row for all": (lambda e, t: e.fused.data.copy_(t[:1]), "leaves out 18 of 24 elements of w"),
    "padding by hand": (_part_with_zeros, "computes fused from other tensors"),
    "pad": (lambda e, t: e.fused.data.copy_(nn.functional.pad(t[:3], (0, 0, 0, 1))), "computes fused from w "),
    "overwritten": (_overwrite, "overwrites part of fused after loading it"),
    "in another order": (_swap_rows, r"scatters w \(fused\)"),
    "reshaped": (lambda e, t: e.fused.data.view(-1).copy_(t.clone().view(-1)), "reshapes w on the way to fused"),
    "replaced": (_new_storage, "the engine does not load w"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    load, match = REFUSED[case]
    assert_refused({"fused": SHAPE}, {"w": load}, Trainer({"w": torch.randn(SHAPE)}), match)


def test_the_refused_loaders_are_refused_for_their_own_sake() -> None:
    """The plain copy in the same setting is fine."""
    assert_shares({"fused": SHAPE}, {"w": lambda e, t: e.fused.data.copy_(t)}, Trainer({"w": torch.randn(SHAPE)}))


def test_flattened_copies_are_followed() -> None:
    flat: Load = lambda e, t: e.fused.data.view(-1).copy_(t.view(-1))  # noqa: E731
    assert_shares({"fused": SHAPE}, {"w": flat}, Trainer({"w": torch.randn(SHAPE)}))


def test_dtypes_must_be_equal() -> None:
    """`copy_` casts without a word. With `cast` the engine has a copy of its own, in its own dtype."""
    loaders: dict[str, Load] = {
        "w": lambda e, t: e.fused.data[:2].copy_(t),
        "v": lambda e, t: e.fused.data[2:].copy_(t),
    }
    trainer = Trainer({"w": torch.randn(2, 6), "v": torch.randn(2, 6).bfloat16()})
    assert_refused(
        {"fused": SHAPE}, loaders, trainer, "v is torch.bfloat16 in the trainer and torch.float32 in the engine"
    )
    plan = make_plan(Engine({"fused": SHAPE}, loaders, device="meta", dtype=torch.bfloat16), trainer, cast=True)
    assert plan.views == {"w": ("fused", View(0, (2, 6), (6, 1))), "v": ("fused", View(12, (2, 6), (6, 1)))}


def test_every_problem_is_named() -> None:
    trainer = Trainer({f"w{i}": torch.randn(2, 2) for i in range(12)})
    engine = Engine({"fused": (2, 2)}, {f"w{i}": lambda e, t: None for i in range(12)}, device="meta")
    with pytest.raises(SharingError, match=r"4 of 4 elements of the engine's fused .* w0; .* w6; and 5 more") as caught:
        make_plan(engine, trainer)
    assert "w7" not in str(caught.value)


def test_a_scalar_of_the_engine_needs_no_source() -> None:
    """A scale has a default that no checkpoint overwrites; a vector would be left as it was allocated."""
    trainer = Trainer({"w": torch.randn(SHAPE)})
    loaders: dict[str, Load] = {"w": lambda e, t: e.fused.data.copy_(t)}
    make_plan(Engine({"fused": SHAPE, "scale": ()}, loaders, device="meta"), trainer)
    assert_refused(
        {"fused": SHAPE, "bias": (1,)}, loaders, trainer, "1 of 1 elements of the engine's bias have no source"
    )


# Views against brute force ------------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn, numel: int) -> View:
    """Any strided box inside `range(numel)`: also overlapping itself, also empty."""
    size, stride, room = [], [], numel - 1
    offset = draw(st.integers(0, room))
    room -= offset
    for _ in range(draw(st.integers(0, 3))):
        stride.append(draw(st.integers(0, max(room, 1))))
        size.append(draw(st.integers(0, 1 + (room // stride[-1] if stride[-1] else 3))))
        room -= max(size[-1] - 1, 0) * stride[-1]
    return View(offset, tuple(size), tuple(stride))


def elements(view: View, numel: int) -> list[int]:
    return view.on(torch.arange(numel)).flatten().tolist()


@given(views(40))
@many
def test_runs(view: View) -> None:
    runs = [i for start, n in view.runs().tolist() for i in range(start, start + n)]
    assert sorted(runs) == sorted(elements(view, 40))
    assert view.numel == len(runs)
    starts = view.runs()[:, 0].tolist()
    assert starts == sorted(starts)


@given(st.lists(views(40), max_size=5))
@many
def test_coverage(boxes: list[View]) -> None:
    covered = [i for box in boxes for i in elements(box, 40)]
    assert coverage(boxes, 40) == (40 - len(set(covered)), len(covered) - len(set(covered)))


def test_coverage_outside() -> None:
    with pytest.raises(SharingError, match="outside"):
        coverage([View(30, (11,), (1,))], 40)


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """Boxes, as (start, end) per axis, that cover `shape` exactly once: cut in two again and again."""
    boxes = [tuple((0, n) for n in shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        low, high = box[axis]
        if high - low < 2:
            boxes.append(box)
            continue
        at = draw(st.integers(low + 1, high - 1))
        boxes += [(*box[:axis], (low, at), *box[axis + 1 :]), (*box[:axis], (at, high), *box[axis + 1 :])]
    return boxes


@given(st.data())
@many
def test_combined_view(data: st.DataObject) -> None:
    """A view exactly when there is one, and then the right one: wherever the pieces of a source are put."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    numel, room = math.prod(shape), 4 * math.prod(shape)
    source, home = torch.arange(numel).view(shape), torch.arange(room)
    axes = data.draw(st.permutations(range(len(shape))))
    spread = data.draw(st.integers(1, 2))
    # An affine home (axes in any order, maybe with gaps), in which some of the pieces may then be moved elsewhere.
    affine = (
        home[:: 1 if spread == 1 else 2][:numel]
        .view([shape[a] for a in axes])
        .permute([axes.index(i) for i in range(len(shape))])
    )
    place, copies = torch.empty(shape, dtype=torch.long), []
    for box in data.draw(partitions(shape)):
        index = tuple(slice(*span) for span in box)
        piece, target = source[index], affine[index]
        if data.draw(st.integers(0, 4)) == 0:
            size = tuple(piece.shape)
            start = data.draw(st.integers(0, room - piece.numel()))
            target = home[start : start + piece.numel()].view(size)
        copies.append(Copy("s", View.of(piece), "d", View.of(target)))
        place[index] = target
    assert coverage([c.out_of for c in copies], numel) == (0, 0)

    first = place.flatten()[0]
    strides = [int(place.select(k, 1).flatten()[0] - first) if n > 1 else 1 for k, n in enumerate(shape)]
    grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1)
    is_affine = bool((place == first + (grid * torch.tensor(strides)).sum(-1)).all()) and min(strides) > 0
    view = combined_view(shape, data.draw(st.permutations(copies)))
    assert (view is not None) == is_affine
    if view is not None:
        assert torch.equal(view.on(home), place)


@given(st.data())
@many
def test_combined_view_of_reshaped_copies(data: st.DataObject) -> None:
    """Copies along other axes than the source's own (flattened, regrouped, every second one): never a wrong view."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    numel, rest, regrouped = math.prod(shape), math.prod(shape), []
    while rest > 1:
        regrouped.append(data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0])))
        rest //= regrouped[-1]
    source = torch.arange(numel).view(regrouped or [1])
    stretch, offset = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    place, copies = torch.empty(numel, dtype=torch.long), []
    for box in data.draw(partitions(tuple(source.shape))):
        box_slices = tuple(slice(*span) for span in box)
        odd = data.draw(st.booleans()) and box[-1][1] - box[-1][0] > 1
        for piece in (source[box_slices][..., ::2], source[box_slices][..., 1::2]) if odd else (source[box_slices],):
            out_of = View.of(piece)
            moved = data.draw(st.sampled_from([0, 0, 0, 0, 0, 1]))
            into = View(
                offset + stretch * out_of.offset + moved, out_of.size, tuple(stretch * s for s in out_of.stride)
            )
            place[piece] = into.on(torch.arange(4 * numel + 4))
            copies.append(Copy("s", out_of, "d", into))
    assert coverage([c.out_of for c in copies], numel) == (0, 0)
    view = combined_view(shape, copies)
    assert view is not None or len(copies) > 1 or len(regrouped) > 1, "a flattened source is a view"
    if view is not None:
        assert elements(view, 4 * numel + 4) == place.tolist()


def test_combined_view_needs_every_element() -> None:
    """Copies that agree with a view at their starts and not inside."""
    # Every second element, but three apart: 0, 3 and 1, 4.
    strided = [
        Copy("s", View(0, (2,), (2,)), "d", View(0, (2,), (3,))),
        Copy("s", View(1, (2,), (2,)), "d", View(1, (2,), (3,))),
    ]
    assert combined_view((4,), strided) is None
    # Rows ten apart, except for a copy that runs on from one row into the next.
    rows = [
        Copy("s", View(0, (2,), (1,)), "d", View(0, (2,), (1,))),
        Copy("s", View(2, (1,), (1,)), "d", View(10, (1,), (1,))),
        Copy("s", View(3, (2,), (1,)), "d", View(11, (2,), (1,))),
        Copy("s", View(5, (1,), (1,)), "d", View(21, (1,), (1,))),
    ]
    assert combined_view((3, 2), rows) is None
