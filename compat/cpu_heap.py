"""On a CPU, spare the walks through the whole heap that vLLM makes: one when it builds an engine, two when it ends.

Requirement: vLLM on the CPU platform; the first walk is made by vLLM 0.12 and later.
Reason: each takes half a second for all that TRL and vLLM import, longer than the rest of building a small engine. vLLM
collects before it freezes the heap, which is undone in any case, and before it returns what a GPU's allocator holds.
Link: vllm/utils/gc_utils.py, `freeze_gc_heap`; vllm/distributed/parallel_state.py, `cleanup_dist_env_and_memory`
Until: vLLM leaves the heap of a process that is not its own alone.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from packaging.version import Version

from .replaced import replaced
from .versions import installed


def not_frozen() -> AbstractContextManager[Any]:
    """While an engine is built."""
    vllm = installed("vllm")
    if vllm is not None and vllm < Version("0.12"):
        return nullcontext()

    from vllm.v1.engine import core

    return replaced(core, "freeze_gc_heap", lambda: None)


def not_walked() -> AbstractContextManager[Any]:
    """While an engine is shut down: `SharedLLM.close` walks the heap afterwards, when nothing refers to it."""
    return replaced(gc, "collect", lambda generation=2: 0)
