"""Keep bitsandbytes' 4-bit weights in their plain layout on the CPU, which is the one that `dequantize_4bit` reads.

Requirement: bitsandbytes 0.49 and later on a CPU with AVX512-BF16.
Reason: the first forward pass in evaluation mode repacks the weights in place, and the engine's copy is made of them.
Link: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py
Until: `dequantize_4bit` reads both layouts.
"""

from __future__ import annotations

import sys

from torch import nn


def plain_layout(model: nn.Module) -> None:
    """Undo a repacking that has happened, and have no other."""
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.state_dict()  # bitsandbytes goes back to the plain layout to save it
            module.support_avx512bf16_for_cpu = False
