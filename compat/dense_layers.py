"""vLLM gives no adapter slot to layers of a mixture that `decoder_sparse_step` leaves dense: name these layers instead.

Requirement: all supported vLLM, for configurations with a `decoder_sparse_step` and no `mlp_only_layers`.
Reason: with that list vLLM's classes say that `gate_up_proj` is made of two layers. Without it the layer cannot be
wrapped: 0.17 to 0.19 stop there, later releases go on without it.
Link: vllm/model_executor/models/qwen3_moe.py, `packed_modules_mapping`
Until: vLLM says so whenever a layer is dense.
"""

from __future__ import annotations

from typing import Any


def name(config: Any) -> None:
    """Say in `config`, which the engine reads, which layers are dense. The architecture stays the same."""
    step = getattr(config, "decoder_sparse_step", None)
    if step and not config.mlp_only_layers:
        config.mlp_only_layers = [layer for layer in range(config.num_hidden_layers) if (layer + 1) % step]
