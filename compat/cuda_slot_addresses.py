"""vLLM's LoRA kernels remember where a layer's slot lies, and keep some of it alive: they forget when it moves or ends.

Requirement: vLLM on CUDA, all releases so far.
Reason: the addresses are remembered for good, by themselves. Of a layer with one slice the tensor is, too, so that its
memory would never be free; of the others the strides are, which a later engine's slot at the same address may not have.
Link: vllm/lora/ops/triton_ops/utils.py
Until: they are remembered with the layer.
"""

from __future__ import annotations

import sys


def forget() -> None:
    """What a kernel needs it looks up again, before CUDA graphs are captured. Nothing where no kernel has run."""
    utils = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    if utils is not None:
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()
