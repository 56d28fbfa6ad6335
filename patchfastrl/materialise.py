"""Memory for the engine's model, which is built without any: the trainer's, laid out as the engine wants it.

What lies in the trainer's memory as it would in the engine's stays there. For the rest, one engine tensor at a time,
real memory is allocated, the trainer's values are copied in, and the trainer's parameters become views of it.

On a GPU only large tensors stay. torch takes the device's memory in segments, into which it puts several tensors or,
where transformers reads a model by its name, all of them. A segment goes back to the device when nothing lies in it any
more, and in one that does not, the next layer fits exactly where a whole layer was. So layers move whole, memory is
given back between them, and what lies beside them, such as an adapter, moves out of the way.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn

from .errors import SharingError, UnsupportedError
from .memory import return_freed
from .sharing import Plan, Shared, base_parameters, engine_replaced
from .trace import View, storage_key
from .weightless import become

# From how much of the trainer's freed storage on it is given back at the end of a layer: bytes; on a GPU, which is
# waited for each time, at least this share of the weights. There a tensor of this size is large.
_TRIM, _TRIM_SHARE = 64 * 2**20, 1 / 128


def materialise(engine_model: nn.Module, model: nn.Module, plan: Plan, device: torch.device) -> None:
    """Give the engine's parameters memory holding the trainer's values, and make the trainer's views of it.

    Where the trainer's storage is as the engine's would be, it is the engine's; on a GPU, where it is large enough. The
    engine's own weights get zeros, all in one small piece of memory, until `own_memory` replaces it.

    Peak: one copy of the weights, the largest fused tensor, the largest of the engine's own, and a layer on its way
    back to the device.
    """
    parameters = base_parameters(model)
    trim, large = _TRIM, 0
    if _in_segments(device):
        trim = large = max(_TRIM, int(_TRIM_SHARE * sum(p.nbytes for p in parameters.values())))
    beside = [p for p in _others(model, parameters) if p.nbytes < large]
    freed = 0
    of_engine: dict[str, list[tuple[str, nn.Parameter, View]]] = defaultdict(list)
    for name, (destination, view) in plan.views.items():
        of_engine[destination].append((name, parameters[name], view))
    engines = dict(engine_model.named_parameters())
    zeros = _zeros([engines[destination] for destination in plan.own], device)
    layer: list[str] = []
    for destination, tensor in engines.items():
        if freed > trim and _layer_of(destination) != layer:
            _give_back(beside)
            freed = 0
        layer = _layer_of(destination)
        if destination in plan.own:
            become(tensor, zeros[tensor.dtype][: tensor.numel()].view(tensor.shape))
            continue
        if destination not in of_engine and destination not in plan.fills:
            continue
        sources = of_engine[destination]
        if tensor.is_meta and len(sources) == 1:
            _, parameter, view = sources[0]
            if parameter.nbytes >= large and _lies_alone(parameter, view, tensor.numel(), device):
                become(tensor, parameter.data.view(tensor.shape))
                continue
        with torch.no_grad():
            home = tensor.data
            if home.is_meta:
                home = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            _fill(plan, destination, home)
            for name, parameter, view in sources:
                view.on(home).copy_(parameter.data)
                _rebind(name, parameter, view.on(home))
                freed += home.element_size() * view.numel
        if tensor.is_meta:
            become(tensor, home)
    _give_back(beside)
    left = [n for n, t in engine_model.named_parameters() if t.is_meta]
    if left:
        raise SharingError(f"The engine's {', '.join(left)} would have no memory: nothing was traced into them.")


def _layer_of(name: str) -> list[str]:
    """Path of the layer that a parameter belongs to: up to the first number. Empty outside of layers."""
    parts = name.split(".")
    return next((parts[: n + 1] for n, part in enumerate(parts) if part.isdigit()), [])


def _lies_alone(parameter: nn.Parameter, view: View, numel: int, device: torch.device) -> bool:
    """Whether the parameter's storage is, byte for byte, what the engine's of `numel` elements would be."""
    return (
        parameter.device == device
        and View.of(parameter) == view
        and parameter.is_contiguous()
        and parameter.numel() == numel
        and parameter.nbytes == parameter.untyped_storage().nbytes()
    )


def _in_segments(device: torch.device) -> bool:
    """Whether torch takes this device's memory in segments, and waits for the device when it gives some back."""
    return device.type != "cpu"


def _others(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    """The model's other parameters, such as an adapter's, but those that share a storage."""
    base = {id(parameter) for parameter in parameters.values()}
    users = Counter(storage_key(parameter) for parameter in model.parameters())
    return [p for p in model.parameters() if id(p) not in base and users[storage_key(p)] == 1]


def _give_back(beside: list[nn.Parameter]) -> None:
    """Give back what was freed. What may lie beside it moves to the smallest gap that holds it."""
    for parameter in beside:
        parameter.data = parameter.data.clone()
    return_freed()


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


def own_memory(shared: Shared, slot: list[torch.Tensor], pool: contextlib.AbstractContextManager[Any]) -> int:
    """Give the engine's own weights memory, allocated inside `pool`. They are zeros still.

    Args:
        slot: what else moves there: tensors for adapters, which hold nothing yet.

    Returns:
        Bytes, less those of the memory that stood in for it and is free now.

    Raises:
        SharingError: the engine has replaced one of them since it was laid out.
    """
    held = {id(tensor) for tensor in shared.engine_model.parameters()}
    stood_in: dict[int, int] = {}
    with pool, torch.no_grad():  # all at once: vLLM's pools end with the last tensor that was made under their name
        for destination, home in shared.homes.items():
            if destination not in shared.plan.own:
                continue
            if id(home) not in held or storage_key(home) != shared.keys[destination]:
                raise engine_replaced(destination)
            stood_in[storage_key(home)] = home.untyped_storage().nbytes()
            fresh = torch.zeros(home.shape, dtype=home.dtype, device=home.device)
            _fill(shared.plan, destination, fresh)
            home.data = fresh
            shared.keys[destination] = storage_key(home)
            shared.own_bytes += fresh.nbytes
        for tensor in slot:
            tensor.data = torch.zeros_like(tensor)
    return shared.own_bytes - sum(stood_in.values())
