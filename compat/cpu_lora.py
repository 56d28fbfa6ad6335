"""vLLM's CPU worker copies the adapter once for every token: two matrix products for the whole batch instead.

Requirement: vLLM on the CPU platform, all releases so far.
Reason: a GRPO step with LoRA took 1.3 times as long; and where a batch mixes requests with and without an adapter,
those without got it as well (their index, -1, is the last row).
Link: vllm/lora/ops/torch_ops/lora_ops.py
Until: vLLM's `PunicaWrapperCPU` groups tokens by adapter.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch


def install(layers: Iterable[Any]) -> None:
    """Give the LoRA layers of an engine with one slot the two products."""
    for wrapper in {id(layer.punica_wrapper): layer.punica_wrapper for layer in layers}.values():
        wrapper.add_lora_linear = types.MethodType(_add_lora_linear, wrapper)


def _add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    *further: Any,
) -> None:
    """`y += scale * x A B` for the tokens that are sampled with the adapter, one slice of `y` at a time.

    Args:
        y: (..., out), changed in place.
        x: (..., in).
        lora_a_stacked: (1, 1, rank, in) for each slice.
        lora_b_stacked: (1, 1, width of the slice, rank) for each slice.
        further: scale, and the slices' widths. Before vLLM 0.12 the adapter's biases, of which a slot has none, first.
    """
    *_, scale, output_slices = further
    if self.no_lora:
        return
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    without = None if self.batch_size == 1 else (self.token_lora_indices < 0).unsqueeze(1)
    slices = y.split(output_slices, dim=1)
    for target, a, b in zip(slices, lora_a_stacked, lora_b_stacked, strict=True):
        low_rank = x @ a[0, 0].T
        if without is not None:
            low_rank.masked_fill_(without, 0)
        target.addmm_(low_rank, b[0, 0].T, alpha=scale)
