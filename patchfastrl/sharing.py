"""One storage for every base weight: trace where the engine wants it, plan, materialise, audit.

The engine's model is built without weights. Its own `load_weights` is watched (see `trace`) to learn where each of
the trainer's parameters belongs; then, one engine tensor at a time, real memory is allocated, the trainer's values are
copied in, and the trainer's parameters become views of it. The trainer's values always win: nothing is read from disk.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .checksum import checksum
from .errors import SharingError, UnsupportedError
from .memory import return_freed
from .packed import dtype_of as packed_dtype
from .packed import shape_of
from .structure import remembered
from .trace import Copy, Recorder, Trace, View, combined_view, coverage, storage_key

# Engine parameters up to this many elements keep the memory that they were built with: some of them (a KV scale) hold a
# default that no checkpoint overwrites.
_SMALL = 4096

# How much of the trainer's freed storage may pile up before it is given back: bytes; on a GPU, which is waited for each
# time, at least this share of the weights.
_TRIM, _TRIM_SHARE = 64 * 2**20, 1 / 32


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


# Materialise --------------------------------------------------------------------------------------------------------


def materialise(engine_model: nn.Module, model: nn.Module, plan: Plan, device: torch.device) -> None:
    """Give the engine's parameters memory holding the trainer's values, and make the trainer's views of it.

    The engine's own weights get zeros, all in one small piece of memory, until `own_memory` replaces it.

    Peak: one copy of the weights, the largest fused tensor, the largest of the engine's own, and what is on its way
    back to the device.
    """
    parameters = base_parameters(model)
    trim = max(_TRIM, 0 if device.type == "cpu" else int(_TRIM_SHARE * sum(p.nbytes for p in parameters.values())))
    freed = 0
    of_engine: dict[str, list[tuple[str, View]]] = defaultdict(list)
    for name, (destination, view) in plan.views.items():
        of_engine[destination].append((name, view))
    engines = dict(engine_model.named_parameters())
    zeros = _zeros([engines[destination] for destination in plan.own], device)
    for destination, tensor in engines.items():
        if destination in plan.own:
            _become(tensor, zeros[tensor.dtype][: tensor.numel()].view(tensor.shape))
            continue
        if destination not in of_engine and destination not in plan.fills:
            continue
        with torch.no_grad():
            home = tensor.data
            if home.is_meta:
                home = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            _fill(plan, destination, home)
            for name, view in of_engine[destination]:
                view.on(home).copy_(parameters[name].data)
                _rebind(name, parameters[name], view.on(home))
                freed += home.element_size() * view.numel
        if freed > trim:
            return_freed()
            freed = 0
        if tensor.is_meta:
            _become(tensor, home)
    return_freed()
    left = [n for n, t in engine_model.named_parameters() if t.is_meta]
    if left:
        raise SharingError(f"The engine's {', '.join(left)} would have no memory: nothing was traced into them.")


def _zeros(tensors: list[nn.Parameter], device: torch.device) -> dict[torch.dtype, torch.Tensor]:
    """For each dtype, zeros enough for the largest of the tensors."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = max(tensor.numel(), sizes.get(tensor.dtype, 0))
    return {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}


def _fill(plan: Plan, destination: str, home: torch.Tensor) -> None:
    for view, value in plan.fills.get(destination, []):
        view.on(home).fill_(value)


def _rebind(name: str, parameter: nn.Parameter, view: torch.Tensor) -> None:
    if parameter.device != view.device:
        raise UnsupportedError(
            f"{name} is on {parameter.device} and the engine on {view.device}. Load the whole model onto one device "
            "(no device_map that splits or off-loads it)."
        )
    if not torch.equal(parameter.data, view):
        raise SharingError(f"{name} does not read back from the engine's storage as it was written.")
    parameter.data = view


@contextlib.contextmanager
def without_memory() -> Iterator[dict[str, bool]]:
    """Build modules whose parameters have shape, dtype and class, but no memory, from the moment they are registered.

    Yields a switch: set `["on"] = False` to end it early, while the block still runs.
    """
    register = nn.Module.register_parameter
    switch = {"on": True}

    def register_without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if switch["on"] and param is not None and not param.is_meta and param.numel() > _SMALL:
            _become(param, torch.empty_like(param.data, device="meta"))

    nn.Module.register_parameter = register_without_memory  # type: ignore[method-assign]
    try:
        yield switch
    finally:
        switch["on"] = False
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _become(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Put `data` (maybe on another device, which `.data =` refuses) under the same Parameter object."""
    twin = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, twin)


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

    def own_memory(self, pool: contextlib.AbstractContextManager[Any]) -> int:
        """Give the engine's own weights memory, allocated inside `pool`. Returns its bytes. They are zeros still.

        Raises:
            SharingError: the engine has replaced one of them since it was laid out.
        """
        held = {id(tensor) for tensor in self.engine_model.parameters()}
        with pool, torch.no_grad():
            for destination, home in self.homes.items():
                if destination not in self.plan.own:
                    continue
                if id(home) not in held or storage_key(home) != self.keys[destination]:
                    raise self._replaced(destination)
                fresh = torch.zeros(home.shape, dtype=home.dtype, device=home.device)
                _fill(self.plan, destination, fresh)
                home.data = fresh
                self.keys[destination] = storage_key(home)
                self.own_bytes += fresh.nbytes
        return self.own_bytes

    def check(self) -> None:
        """Every trainer parameter is still the planned view of the engine's storage. Microseconds per parameter."""
        held = {storage_key(t) for t in _tensors_of(self.engine_model)}
        for destination, key in self.keys.items():
            if key not in held:
                raise self._replaced(destination)
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

    @staticmethod
    def _replaced(destination: str) -> SharingError:
        return SharingError(
            f"The engine has replaced {destination}: it repacks or reloads this weight on this platform, so it "
            "no longer reads the trainer's. Train this model with stock TRL (leave PatchFastRL() out)."
        )

    def checksum(self) -> int:
        """A number that changes when any shared weight does, or when weights change places. Reads the storage twice."""
        return checksum(home for name, home in self.homes.items() if name not in self.plan.own)


def as_loader(on_load: Any) -> type:
    """A vLLM model loader class whose `load_weights` is `on_load(engine_model)`; `load_model` builds without memory."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class SharedWeightLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """Nothing to download: the weights are the trainer's."""

        def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
            if model_config.using_transformers_backend():
                # Refused before it is built: building it changes transformers' own class, the trainer's.
                raise SharingError(
                    f"vLLM has no {model_config.hf_config.architectures[0]} of its own, and its Transformers backend "
                    "cannot share weights. Train this model with stock TRL (leave PatchFastRL() out), or train a model "
                    "of a supported family."
                )
            with without_memory() as self._switch:
                return super().load_model(vllm_config, model_config, *args, **kwargs)

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            self._switch["on"] = False
            on_load(model)

    return SharedWeightLoader
