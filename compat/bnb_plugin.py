"""Whether an engine of vLLM's own could read a 4-bit model: from 0.28 on bitsandbytes is in a package beside vLLM.

Requirement: vLLM 0.28 and later, without `vllm-bnb-plugin`.
Reason: stock TRL builds its engine with `quantization="bitsandbytes"` for a QLoRA model, and a server reads a 4-bit
checkpoint by itself. A shared engine is filled with unpacked weights, and needs no plug-in.
Link: https://github.com/vllm-project/vllm/pull/43529
Until: vLLM before 0.28 is no longer supported.
"""

from __future__ import annotations

from packaging.version import Version

from . import versions


def missing() -> bool:
    vllm = versions.installed("vllm")
    return vllm is not None and vllm >= Version("0.28") and versions.distribution("vllm-bnb-plugin") is None
