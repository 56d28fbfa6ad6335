"""vLLM's CPU backend repacks linear weights and drops (or stops reading) the originals: keep them plain, as on a GPU.

Requirement: vLLM on the CPU platform, 0.11 and later.
Reason: a repacked copy cannot be the trainer's parameter; writes into `lm_head.weight` would be ignored in silence.
Link: vllm/model_executor/layers/utils.py, `dispatch_cpu_unquantized_gemm`
Until: vLLM can be asked for unpacked CPU weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .replaced import replaced


def _plain_linear(layer: nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


@contextlib.contextmanager
def plain_weights() -> Iterator[None]:
    """While an engine is built: every unquantised linear layer reads its own `[out, in]` weight."""
    from vllm.model_executor.layers import utils

    with replaced(utils, "dispatch_cpu_unquantized_gemm", _plain_linear):
        yield
