"""Training micro-steps with fewer passes over memory. The same function, up to the rounding of the last bit.

PEFT adds an adapter in separate passes over each layer's output: casts, a product, a scaling, a sum. Here the matrix
product adds on top of the layer's output by itself. Liger's kernels, where they are installed, do the norms and the
gated activations in one pass each.
"""

from __future__ import annotations

import logging
import types
from typing import Any

import torch
from torch import nn

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
    device = next(model.parameters()).device
    if device.type == "cuda" and installed("liger-kernel") is not None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # Rotary embeddings it would replace in transformers' module, for every model; the losses are TRL's.
        _apply_liger_kernel_to_instance(
            model=base_of(model), rope=False, cross_entropy=False, fused_linear_cross_entropy=False
        )


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In place of a LoRA layer's `forward`: `base(x) + scaling * B A dropout(x)`."""
    if args or kwargs or not _is_plain(self, x):
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = self.active_adapters
    result = self.base_layer(x)
    low = self.lora_A[name](self.lora_dropout[name](x))  # autocast rounds x once, whatever the adapter's dtype
    summed = torch.addmm(
        result.flatten(0, -2), low.flatten(0, -2), self.lora_B[name].weight.t(), alpha=self.scaling[name]
    )
    return summed.view_as(result)


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
        and layer.lora_B[names[0]].bias is None
    )
