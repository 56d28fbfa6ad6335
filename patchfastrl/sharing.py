"""One storage for every base weight: where the engine wants it, and whether both sides still have it.

The engine's own `load_weights` is watched (see `trace`) to learn where each of the trainer's parameters belongs.
`materialise` carries the plan out. The trainer's values always win: nothing is read from disk.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .checksum import checksum
from .errors import SharingError
from .packed import dtype_of as packed_dtype
from .packed import shape_of
from .structure import remembered
from .trace import Copy, Recorder, Trace, View, combined_view, coverage, storage_key

# The trainer's side -------------------------------------------------------------------------------------------------


def base_of(model: nn.Module) -> Any:
    """The transformers model inside `model`."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


@remembered
def _tensors_of(engine_model: nn.Module) -> list[nn.Parameter]:
    return list(engine_model.parameters())


@remembered
def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model under training without its adapters, under the names the bare model would have.

    PEFT's prefixes and `base_layer` are stripped; adapter tensors are left out. A tied parameter appears once.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_of(model)
    wrapped = {path for path, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in base.named_parameters():
        owner = next((path for path in accumulate(name.split("."), "{}.{}".format) if path in wrapped), None)
        if owner is not None:
            rest = name[len(owner) + 1 :]
            if not rest.startswith("base_layer."):
                continue
            name = f"{owner}.{rest.removeprefix('base_layer.')}"
        parameters[name] = parameter
    return parameters


def checkpoint_form(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` under the names and in the layout of the model's checkpoints, which is what `load_weights` expects.

    transformers 5 holds some layers in another layout than their checkpoints (fused experts, for one) and knows the way
    back; `save_pretrained` uses the same function.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4: both layouts are the same
        return tensors
    return revert_weight_conversion(model, tensors)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most of the base weights: an engine has one."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in base_parameters(model).values():
        sizes[packed_dtype(parameter)] += shape_of(parameter).numel()
    return sizes.most_common(1)[0][0]


# Plan ---------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Where each base parameter of the trainer lies in the engine.

    Attributes:
        views: trainer's parameter name -> (engine parameter name, view of its storage).
        fills: engine parameter name -> [(view, value)]: padding.
        copies: the traced copies, by engine parameter name.
        own: engine parameters with memory of their own, filled from the trainer's (see `copies`).
    """

    views: dict[str, tuple[str, View]]
    fills: dict[str, list[tuple[View, float]]]
    copies: dict[str, list[Copy]]
    own: frozenset[str] = frozenset()


def make_plan(engine_model: nn.Module, model: nn.Module, cast: bool = False, copied: Collection[str] = ()) -> Plan:
    """Trace the engine's `load_weights` over the trainer's parameters.

    Args:
        cast: the trainer's dtypes need not be the engine's: what differs, or is packed, the engine has a copy of.
        copied: names of further weights that the engine is to have a copy of.

    Raises:
        SharingError: a tensor cannot be shared; the message names it and says why. Nothing has been changed.
    """
    parameters = base_parameters(model)
    destinations = dict(engine_model.named_parameters())
    trace = _trace(engine_model, model, parameters, destinations, cast)
    problems = []

    copies_from: dict[str, list[Copy]] = defaultdict(list)
    copies_into: dict[str, list[Copy]] = defaultdict(list)
    fills: dict[str, list[tuple[View, float]]] = defaultdict(list)
    for copy in trace.copies:
        copies_from[copy.source].append(copy)
        copies_into[copy.destination].append(copy)
    for name, view, value in trace.fills:
        fills[name].append((view, value))

    for name, tensor in destinations.items():
        if any(tensor is t for n, t in destinations.items() if n in copies_into) and name not in copies_into:
            continue  # tied to a parameter that is covered
        loaded = [c.into for c in copies_into[name]]
        missing, _ = coverage(loaded + [view for view, _ in fills[name]], tensor.numel())
        _, twice = coverage(loaded, tensor.numel())
        if twice:
            problems.append(f"{twice} elements of the engine's {name} are loaded twice")
        elif missing and tensor.dim() > 0:  # a scalar is a scale with a default, which no checkpoint need have
            problems.append(f"{missing} of {tensor.numel()} elements of the engine's {name} have no source")

    views: dict[str, tuple[str, View]] = {}
    for name, parameter in parameters.items():
        copies = copies_from[name]
        if not copies:
            problems.append(f"the engine does not load {name}")
            continue
        shape = shape_of(parameter)
        missing, twice = coverage([c.out_of for c in copies], shape.numel())
        places = {c.destination for c in copies}
        whole = combined_view(tuple(shape), copies) if len(places) == 1 and not (missing or twice) else None
        if missing:
            problems.append(f"the engine leaves out {missing} of {shape.numel()} elements of {name}")
        elif twice:
            problems.append(f"the engine keeps {name} in more than one place ({', '.join(sorted(places))})")
        elif whole is None:
            problems.append(f"the engine scatters {name} ({', '.join(sorted(places))}), so it is no view of one tensor")
        else:
            views[name] = (places.pop(), whole)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise _cannot_share(model, engine_model, "; ".join(problems[:8]) + more)
    differing = {n for n, p in parameters.items() if p.dtype != destinations[views[n][0]].dtype}  # or packed
    own = frozenset(views[name][0] for name in {*differing, *copied})
    return Plan(views, dict(fills), dict(copies_into), own)


def _trace(
    engine_model: nn.Module,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    destinations: dict[str, nn.Parameter],
    cast: bool,
) -> Trace:
    """What the engine's `load_weights` does with the trainer's parameters. What it raises becomes a SharingError."""
    own = next(t.dtype for t in destinations.values() if t.is_floating_point())
    sources = {
        n: torch.empty(shape_of(p), dtype=own if cast else p.dtype, device="meta") for n, p in parameters.items()
    }
    recorder = Recorder(sources, destinations)
    latest = "the first tensor"

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal latest
        for name, tensor in checkpoint_form(base_of(model), dict(sources)).items():
            latest = name
            yield name, tensor

    try:
        with torch.no_grad(), recorder:
            engine_model.load_weights(stream())  # type: ignore[operator]
    except SharingError as error:
        raise _cannot_share(model, engine_model, str(error).removesuffix(".")) from error
    except Exception as error:
        why = f"its load_weights fails at {latest} ({type(error).__name__}: {error})"
        raise _cannot_share(model, engine_model, why) from error
    return recorder.trace


def _cannot_share(model: nn.Module, engine_model: nn.Module, why: str) -> SharingError:
    return SharingError(
        f"{type(base_of(model)).__name__} cannot share its weights with vLLM's {type(engine_model).__name__}: {why}. "
        "Train it with stock TRL (leave PatchFastRL() out), or train a model of a supported family."
    )


# Audit --------------------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """What is shared, and the means to check that it still is.

    Attributes:
        model: the model under training (maybe wrapped by PEFT).
        engine_model: vLLM's model.
        plan: where everything lies.
        bytes, own_bytes: size of the shared storages, and of the engine's own.
    """

    model: nn.Module
    engine_model: nn.Module
    plan: Plan
    parameters: dict[str, nn.Parameter]
    homes: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    own_bytes: int = 0

    @classmethod
    def of(cls, model: nn.Module, engine_model: nn.Module, plan: Plan) -> Shared:
        tensors = dict(engine_model.named_parameters())
        shared = cls(model, engine_model, plan, base_parameters(model))
        for destination in dict.fromkeys(d for d, _ in plan.views.values()):
            shared.homes[destination] = tensors[destination]
            shared.keys[destination] = storage_key(tensors[destination])
            if destination not in plan.own:
                shared.bytes += tensors[destination].untyped_storage().nbytes()
        return shared

    def check(self) -> None:
        """Every trainer parameter is still the planned view of the engine's storage. Microseconds per parameter."""
        held = {storage_key(t) for t in _tensors_of(self.engine_model)}
        for destination, key in self.keys.items():
            if key not in held:
                raise engine_replaced(destination)
        current = base_parameters(self.model)
        for name, (destination, view) in self.plan.views.items():
            parameter = current.get(name)
            if destination in self.plan.own and parameter is not None:
                continue
            if parameter is None or storage_key(parameter) != self.keys[destination] or View.of(parameter) != view:
                raise SharingError(
                    f"{name} of the model in training no longer lies in the engine's storage ({destination}): it was "
                    "moved, cast or replaced, and the engine would sample from other weights than those being trained. "
                    "Build a new trainer from this model."
                )
        if added := [name for name in current if name not in self.parameters]:
            raise SharingError(
                f"The model in training has got new base weights ({', '.join(added[:4])}) since the engine was built "
                "round it. Change the model first, then build the trainer."
            )

    def checksum(self) -> int:
        """A number that changes when any shared weight does, or when weights change places. Reads the storage twice."""
        return checksum(home for name, home in self.homes.items() if name not in self.plan.own)


def engine_replaced(destination: str) -> SharingError:
    return SharingError(
        f"The engine has replaced {destination}: it repacks or reloads this weight on this platform, so it "
        "no longer reads the trainer's. Train this model with stock TRL (leave PatchFastRL() out)."
    )
