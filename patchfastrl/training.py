"""Training micro-steps with fewer passes over memory. The same function, up to the rounding of the last bit.

PEFT adds an adapter in separate passes over each layer's output: casts, a product, a scaling, a sum. Here the matrix
product adds on top of the layer's output by itself, and on top of the gradient of its input. Liger's kernels, where
they are installed, do the norms, the gated activations and the rotation of queries and keys in one pass each, and
attention leaves padding out (`attention`).
"""

from __future__ import annotations

import logging
import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from . import attention, rotary
from .compat.versions import installed
from .sharing import base_of

logger = logging.getLogger("patchfastrl")


def fuse(model: nn.Module) -> None:
    """Let the model in training compute with fused operations. Doing it twice changes nothing."""
    from peft.tuners import lora

    kinds = [kind for kind in (lora.Linear, getattr(lora, "Linear4bit", None)) if kind is not None]
    for module in model.modules():
        if type(module) in kinds and "forward" not in vars(module):
            module.forward = types.MethodType(_forward, module)
    if next(model.parameters()).device.type == "cuda":
        base = base_of(model)
        attention.leave_padding_out(base)
        if installed("liger-kernel") is not None:
            _use_liger(base)


def _use_liger(base: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Rotary embeddings it would replace on a CPU as well; the losses are TRL's.
    _apply_liger_kernel_to_instance(model=base, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    rotary.use_liger(base)


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In place of a LoRA layer's `forward`: `base(x) + scaling * B A dropout(x)`."""
    if args or kwargs or not _is_plain(self, x):
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = self.active_adapters
    base, dropout, scaling = self.base_layer, self.lora_dropout[name], self.scaling[name]
    a, b = self.lora_A[name], self.lora_B[name]
    dtype = torch.get_autocast_dtype(x.device.type)
    frozen = base.weight.dtype == dtype and not any(p.requires_grad for p in base.parameters())
    if frozen and type(dropout) is nn.Identity and _is_linear(base) and _is_linear(a):
        summed: torch.Tensor = _Adapted.apply(x.to(dtype), base.weight, base.bias, a.weight, b.weight, scaling)
        return summed
    result = base(x)
    low = a(dropout(x))  # autocast rounds x once, whatever the adapter's dtype
    return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.weight.t(), alpha=scaling).view_as(result)


class _Adapted(torch.autograd.Function):
    """`x W^T + bias + scaling * (x A^T) B^T`, of which `x`, A and B have gradients. x and W have autocast's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        result = functional.linear(x, weight, bias)
        a_rounded, b_rounded = a.to(x.dtype), b.to(x.dtype)
        low = functional.linear(x, a_rounded).flatten(0, -2)
        result.view(-1, result.shape[-1]).addmm_(low, b_rounded.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a_rounded, b_rounded, low)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        of_low, of_b = gradient @ b, gradient.t() @ low
        if ctx.scaling != 1:
            of_low, of_b = of_low * ctx.scaling, of_b * ctx.scaling
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(of_low, a).view_as(x)
        return of_x, None, None, (of_low.t() @ x.flatten(0, -2)).to(ctx.dtypes[0]), of_b.to(ctx.dtypes[1]), None


def _is_linear(layer: nn.Module) -> bool:
    """A linear layer and nothing else: nobody else hears of its calls."""
    others = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not others


def _is_plain(layer: Any, x: torch.Tensor) -> bool:
    """One active adapter of the plain kind, under autocast; PEFT's own `forward` is for everything else."""
    names = layer.active_adapters
    return (
        torch.is_autocast_enabled(x.device.type)
        and x.dim() > 1
        and not layer.disable_adapters
        and not layer.merged
        and len(names) == 1
        and names[0] in layer.lora_A
        and names[0] not in layer.lora_variant
        and layer.lora_A[names[0]].bias is None
        and layer.lora_B[names[0]].bias is None
        and _is_linear(layer.lora_B[names[0]])
    )
