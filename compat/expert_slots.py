"""vLLM prepares a mixture's experts for adapters, whether or not an adapter aims at them: leave them as they are.

Requirement: vLLM that serves adapters on experts: 0.11 does not. The first that do (0.12) ask `utils.FusedMoE` which
modules are experts, and stop at one that got no slot.
Reason: adapters on experts are refused, but the kernels and the wrapper for them need Triton (on the CPU the first
batch dies in it) and cost time.
Link: vllm/model_executor/layers/fused_moe/layer.py, `is_lora_enabled`; vllm/lora/utils.py, `_all_lora_classes`
Until: adapters on experts are served, or `lora_target_modules` can leave modules out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .replaced import replaced


class _NoModule:
    """What no module is an instance of."""


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """While an engine is built: experts get their ordinary kernels and no adapter slot."""
    from vllm.lora import layers, utils

    if not hasattr(layers, "FusedMoEWithLoRA"):
        yield
        return
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.model_executor.layers.fused_moe import layer

    def without_adapters(**settings: Any) -> Any:
        return config(**{**settings, "is_lora_enabled": False})

    classes = tuple(c for c in utils._all_lora_classes if c not in (FusedMoEWithLoRA, FusedMoE3DWithLoRA))
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(utils, "_all_lora_classes", classes))
        config = stack.enter_context(replaced(layer, "FusedMoEConfig", without_adapters))
        if hasattr(utils, "FusedMoE"):
            stack.enter_context(replaced(utils, "FusedMoE", _NoModule))
        yield
