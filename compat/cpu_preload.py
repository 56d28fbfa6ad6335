"""One vLLM release will not start on a CPU unless tcmalloc and Intel's OpenMP are preloaded: let it, as the others do.

Requirement: vLLM 0.18 on the CPU platform. 0.17 does not ask, 0.19 warns.
Reason: the libraries make it faster, nothing needs them, and LD_PRELOAD cannot be set from inside a process.
Link: vllm/v1/worker/cpu_worker.py, `check_preloaded_libs`
Until: vLLM 0.18 is no longer supported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

from .replaced import replaced


@contextlib.contextmanager
def not_needed() -> Iterator[None]:
    """While an engine is built: the worker looks for the libraries on no platform (it does on Linux only)."""
    from vllm.v1.worker import cpu_worker

    constants = cpu_worker.CPUWorker.init_device.__code__.co_consts
    check = next((c for c in constants if getattr(c, "co_name", None) == "check_preloaded_libs"), None)
    if check is None or "RuntimeError" not in check.co_names:
        yield
        return
    with replaced(cpu_worker, "sys", SimpleNamespace(platform="")):
        yield
