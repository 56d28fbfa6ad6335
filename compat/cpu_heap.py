"""On a CPU, spare the walks through the whole heap that vLLM makes: one when it builds an engine, two when it ends.

Requirement: all supported vLLM on the CPU platform.
Reason: each takes half a second for all that TRL and vLLM import, longer than the rest of building a small engine. vLLM
collects before it freezes the heap, which is undone in any case, and before it returns what a GPU's allocator holds.
Link: vllm/utils/gc_utils.py, `freeze_gc_heap`; vllm/distributed/parallel_state.py, `cleanup_dist_env_and_memory`
Until: vLLM leaves the heap of a process that is not its own alone.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from typing import Any

from .replaced import replaced


def not_frozen() -> AbstractContextManager[Any]:
    """While an engine is built."""
    from vllm.v1.engine import core

    return replaced(core, "freeze_gc_heap", lambda: None)


def not_walked() -> AbstractContextManager[Any]:
    """While an engine is shut down: `SharedLLM.close` walks the heap afterwards, when nothing refers to it."""
    return replaced(gc, "collect", lambda generation=2: 0)
