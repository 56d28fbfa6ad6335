"""What is logged when an engine is ready: what is shared, what the engine has for itself, how adapters are served."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform

from .llm import SharedLLM
from .memory import gib
from .packed import quant_state
from .sharing import dtype_of


def of(llm: SharedLLM, sleep_mode: bool) -> str:
    """The lines about an engine that has nothing to do.

    Args:
        sleep_mode: whether standby is on.
    """
    shared = llm.shared
    n = sum(destination not in shared.plan.own for destination, _ in shared.plan.views.values())
    dtype = next(iter(shared.homes.values())).dtype
    lines = [
        f"PatchFastRL: engine ready in {llm.seconds['build']:.1f} s",
        f"  weights   {n} parameters, {gib(shared.bytes)}, {dtype}: one copy, shared with the trainer",
    ]
    if llm.copies is not None:
        stays = llm.copies.resident and not sleep_mode
        until = "there for good" if stays else f"released {'by standby' if sleep_mode else 'while nothing is sampled'}"
        lines.append(f"  own       {gib(shared.own_bytes)}, {_why_own(llm)}, {until}")
    if llm.merges:
        lines.append("  adapter   merged into the engine's own weights before it samples")
    elif llm.slot is not None:
        rank = llm.llm_engine.vllm_config.lora_config.max_lora_rank
        lines.append(f"  adapter   slot of rank {rank}{', released by standby' if sleep_mode else ''}")
    else:
        lines.append("  adapter   none: the weights themselves are trained, the optimizer's update is the engine's")
    divided = llm._asleep is not None and llm._asleep.parts.blocks is not None
    back = "as far as a batch can use it" if divided else "whole"
    standby = f"on: the KV cache is released while training, and comes back {back}" if sleep_mode else "off"
    lines.append(f"  standby   {standby}")
    return "\n".join(lines)


def _why_own(llm: SharedLLM) -> str:
    if any(quant_state(p) is not None for p in llm.shared.parameters.values()):
        return "unpacked from the trainer's 4-bit weights"
    if dtype_of(llm.shared.model) == torch.float32 and not current_platform.is_cpu():
        return (
            "because float32 master weights cannot be sampled from on CUDA; dtype=bfloat16 (model_init_kwargs) would "
            "share one copy"
        )
    return "for the adapter to be merged into"
