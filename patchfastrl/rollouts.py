"""How an adapter is sampled with: beside the shared weights, or merged into a copy of those that it changes.

vLLM's LoRA kernels cost 1.3 to 1.4 times the time per token of a merged model on a GPU. A merged copy costs memory
while sampling, and one pass over the weights for each batch. The trainer's weights stay.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn
from vllm.platforms import current_platform

from . import adapters, memory
from .compat import cuda_weight_pool
from .errors import UnsupportedError
from .install import settings
from .packed import quant_state, shape_of
from .sharing import base_of, base_parameters

logger = logging.getLogger("patchfastrl")

_HEADROOM = 2 * 2**30  # bytes of the engine's share for its activations and graphs
_USUAL_BATCH = 16  # sequences at a time, where nobody has said how many


def merged(
    model: nn.Module, dtype: torch.dtype, sleep_mode: bool, engine: dict[str, Any], args: Any = None, most: float = 0.95
) -> tuple[set[str], bool]:
    """Which weights the engine is to have a copy of, and whether an adapter is merged into it.

    Args:
        dtype: of the engine.
        sleep_mode: whether standby is on.
        engine: `vllm.LLM` arguments.
        args: the trainer's configuration; None: not known.
        most: the largest share of the memory that the engine can get beside the trainer.

    Raises:
        UnsupportedError: packed weights whose copy does not fit the engine's share of the memory.
    """
    wanted = settings().rollouts
    parameters = base_parameters(model)
    packed = {name for name, p in parameters.items() if quant_state(p) is not None}
    passing = not current_platform.is_cpu() and (sleep_mode or cuda_weight_pool.usable())  # there while sampling only
    if not packed and (wanted == "adapter" or (wanted is None and not passing)):
        return set(), False
    names = _changed_by_adapters(model) & parameters.keys() if wanted != "adapter" else set()
    needed = sum(shape_of(parameters[name]).numel() for name in names | packed) * dtype.itemsize
    config, device = base_of(model).config, memory.device_bytes()
    share = engine.get("gpu_memory_utilization") or 0.9
    limit = int(device * share)
    room = room_to_merge(needed, config, dtype, engine, getattr(args, "max_completion_length", None))
    if wanted is None and not packed and room > limit:
        enough = math.ceil(room / device * 100) / 100
        logger.warning(
            "PatchFastRL: rollouts use vLLM's LoRA slot, at 1.2 to 1.4 times the time per token of an adapter merged "
            "into a copy of the weights. "
            + (
                f"From vllm_gpu_memory_utilization={enough:.2f} on (now {share:.2f}) there is room for one."
                if enough <= most
                else "There is no room for one on this device."
            )
        )
        return set(), False
    one = memory.kv_cache_of(config, dtype, engine)[0]
    if needed + one > limit:
        raise UnsupportedError(
            f"{'4-bit weights are unpacked' if packed else 'Merged weights are copied'} for the engine while it "
            f"samples: {memory.gib(needed)}, and {memory.gib(one)} of KV cache for one sequence. The engine's "
            f"share ({share:.0%} of the memory) is {memory.gib(limit)}. Raise vllm_gpu_memory_utilization"
            + ("." if packed else ", or PatchFastRL(rollouts='adapter').")
        )
    return names, wanted != "adapter"


def room_to_merge(copies: int, config: Any, dtype: torch.dtype, engine: dict[str, Any], new: int | None) -> int:
    """Bytes of the engine's share from which on an adapter is merged.

    Three quarters of the batch's KV cache are enough: if every sequence grows to its full length, the others come after
    them, which takes a quarter of the time again, as the slot does. vLLM itself wants room for the longest sequence.

    Args:
        copies: bytes of the weights that the adapter changes.
        config: the model's transformers configuration.
        dtype: of the engine.
        engine: `vllm.LLM` arguments.
        new: tokens that a completion has at most. A prompt is taken to be no longer. None: not known.
    """
    engine = {"max_num_seqs": _USUAL_BATCH} | engine
    longest, sequences, length = memory.kv_cache_of(config, dtype, engine)
    usual = memory.kv_cache_of(config, dtype, engine | {"max_model_len": min(length, 2 * (new or length))})[0]
    return copies + max(longest, 3 * sequences * usual // 4) + _HEADROOM


def _changed_by_adapters(model: nn.Module) -> set[str]:
    """Names of the weights that the adapter in training changes; without one, of those that one may change."""
    if changed := {f"{adapter.module}.weight" for adapter in adapters.active_adapters(model)}:
        return changed
    base = base_of(model)
    head = base.get_output_embeddings()
    linear = (name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return {f"{name}.weight" for name in linear}
