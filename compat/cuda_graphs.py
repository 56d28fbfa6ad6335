"""An engine's CUDA graphs go when it ends.

Requirement: vLLM on CUDA that has `CUDAGraphWrapper`, all releases seen.
Reason: what compiling keeps for good keeps the graphs of a model's pieces (seen: 175 an engine, of 24 layers), and so
memory of the driver's and of torch's pool.
Link: vllm/compilation/cuda_graph.py
Until: vLLM's worker drops them when it shuts down.
"""

from __future__ import annotations

import gc
import sys
from typing import Any


def drop(config: Any) -> None:
    """Those of the engine that was built with this configuration of vLLM's."""
    module = sys.modules.get("vllm.compilation.cuda_graph")
    if module is not None:
        for wrapper in gc.get_objects():
            if type(wrapper) is module.CUDAGraphWrapper and wrapper.compilation_config is config.compilation_config:
                wrapper.concrete_cudagraph_entries.clear()
