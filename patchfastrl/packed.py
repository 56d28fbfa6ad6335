"""Base weights that are stored packed: bitsandbytes' 4-bit. What the rest of the package reads them by."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn


def quant_state(parameter: torch.Tensor) -> Any:
    """bitsandbytes' `QuantState` of a 4-bit parameter, None for any other."""
    if type(parameter) is nn.Parameter or "bitsandbytes" not in sys.modules:
        return None
    return parameter.quant_state if isinstance(parameter, _kind()) else None


@functools.cache
def _kind() -> Any:
    from bitsandbytes.nn import Params4bit

    return Params4bit


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the weight that `parameter` stands for."""
    state = quant_state(parameter)
    return parameter.shape if state is None else torch.Size(state.shape)


def dtype_of(parameter: torch.Tensor) -> torch.dtype:
    """The dtype that the model computes with `parameter` in."""
    state = quant_state(parameter)
    return parameter.dtype if state is None else state.dtype


def unpacked(parameter: torch.Tensor, home: torch.Tensor) -> torch.Tensor:
    """The weight itself: `parameter`; a packed one is unpacked, into `home` if that has its dtype."""
    state = quant_state(parameter)
    if state is None:
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    values = dequantize_4bit(parameter.data, state)
    return home.copy_(values) if values.dtype == home.dtype else values


def storages_of(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor that the weight's values depend on, but for tables that are the same for all of its kind."""
    state = quant_state(parameter)
    if state is None:
        return [parameter]
    return [parameter, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]


def scales_of(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a packed weight is proportional to: negating all of them negates the weight, exactly."""
    state = quant_state(parameter)
    if state is None:
        return []
    return [state.state2.absmax, state.offset] if state.nested else [state.absmax]
