"""vLLM's CPU backend repacks the experts of a mixture: compute with the plain weights, as on a GPU.

Requirement: vLLM on the CPU platform. Up to 0.26 the experts run in `cpu_fused_moe.CPUFusedMOE`, which has a plain path
and only has to be told to take it (`check_grouped_gemm`; in 0.12 through `_custom_ops`; in 0.11, where it has no other
path, it stands in for the class that needs Intel's extension of PyTorch); after that they run in
`experts.cpu_moe.CPUUnquantizedExperts`, which has none.
Reason: a repacked copy cannot be the trainer's parameter.
Link: vllm/model_executor/layers/fused_moe
Until: vLLM can be asked for unpacked CPU weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import gelu, linear, silu

from .replaced import replaced


def plain_weights() -> contextlib.AbstractContextManager[None]:
    """While an engine is built: its unquantised experts read their own `[experts, out, in]` weights."""
    if importlib.util.find_spec("vllm.model_executor.layers.fused_moe.cpu_fused_moe") is not None:
        return _up_to_0_26()
    return _later()


@contextlib.contextmanager
def _up_to_0_26() -> Iterator[None]:
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    plain = cpu_fused_moe.CPUFusedMOE
    if hasattr(plain, "check_grouped_gemm"):
        no_repacking = replaced(plain, "check_grouped_gemm", lambda self, layer: (False, "none"))
    elif hasattr(cpu_fused_moe, "IPEXFusedMOE"):
        no_repacking = replaced(cpu_fused_moe, "IPEXFusedMOE", plain)
    else:
        no_repacking = replaced(_custom_ops, "is_onednn_acl_supported", lambda: False)
    with no_repacking, replaced(utils, "check_cpu_sgl_kernel", lambda *args: False):
        yield


@contextlib.contextmanager
def _later() -> Iterator[None]:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    def keep(self: Any, layer: torch.nn.Module) -> None:
        self.apply = _apply.__get__(self)

    with replaced(CPUUnquantizedExperts, "process_weights_after_loading", keep):
        yield


def _apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any,
    *args: Any,
    apply_router_weight_on_input: bool = False,
    **kwargs: Any,
) -> None:
    """`output[t] = sum over chosen experts e of weight * w2[e] @ act(w1[e] @ hidden_states[t])`.

    w1: (experts, 2 * intermediate, hidden), gate rows first; w2: (experts, hidden, intermediate); topk_*: (tokens, k).
    """
    act = {"silu": silu, "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}[activation.value]
    total = torch.zeros(output.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        bias = self.w1_bias[expert] if self.w1_bias is not None else None
        gate, up = linear(hidden_states[token], w1[expert], bias).chunk(2, dim=-1)
        bias = self.w2_bias[expert] if self.w2_bias is not None else None
        out = linear(act(gate) * up, w2[expert], bias).float()
        total.index_add_(0, token, out if apply_router_weight_on_input else out * topk_weights[token, choice, None])
    output.copy_(total)
