"""Where vLLM keeps the class of a loaded adapter.

Requirement: all supported vLLM. Up to 0.12 it is `vllm.lora.models.LoRAModel`, later `vllm.lora.lora_model.LoRAModel`.
Reason: the adapter slot is made resident with an adapter that has no tensors.
Link: vllm/lora/lora_model.py
Until: vLLM up to 0.12 is no longer supported.
"""

from __future__ import annotations

import importlib.util
from typing import Any


def without_tensors(adapter_id: int, rank: int) -> Any:
    """A `LoRAModel` that changes no layer."""
    if importlib.util.find_spec("vllm.lora.lora_model") is not None:
        from vllm.lora.lora_model import LoRAModel
    else:
        from vllm.lora.models import LoRAModel
    return LoRAModel(adapter_id, rank, {})
