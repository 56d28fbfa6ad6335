"""vLLM's CPU kernel for RMS norms reads a strided tensor as if it were contiguous: hand it contiguous ones.

Requirement: vLLM on the CPU platform whose kernel does so (0.12 does, 0.30 does not); found out by trying it.
Reason: Qwen 3 normalises the heads of queries and keys as slices of one tensor, and its completions would be noise.
Link: vllm/csrc/cpu/layernorm.cpp, `rms_norm_impl`
Until: the oldest supported vLLM reads the strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def install(engine_model: nn.Module) -> None:
    """Change the norms of this engine's model, where the kernel needs it."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    if _reads_strides():
        return
    for module in engine_model.modules():
        if isinstance(module, RMSNorm):
            module._forward_method = _contiguous(module._forward_method)


def _contiguous(forward: Any) -> Any:
    def forward_contiguous(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x.contiguous(), *args, **kwargs)

    return forward_contiguous


def _reads_strides() -> bool:
    from vllm import _custom_ops

    wide = torch.arange(1.0, 4 * 128 + 1).view(4, 128)
    strided = wide[:, 32:96].view(4, 2, 32)
    results = []
    for x in (strided, strided.contiguous()):
        results.append(torch.empty(x.shape))
        _custom_ops.rms_norm(results[-1], x, torch.ones(32), 1e-6)
    return torch.allclose(*results)
