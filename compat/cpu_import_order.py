"""vLLM's CPU worker replaces functions of vLLM that other modules take by name: it has to be imported before them.

Requirement: vLLM on the CPU platform that has `vllm.v1.worker.cpu.shm`: seen from 0.23 on, 0.19 has none yet.
Reason: vLLM itself imports its LoRA layers after the worker. Imported earlier (vLLM's model loaders import them), they
keep the `async_tensor_h2d` that pins memory, and without a GPU the first adapter fails in it (vLLM 0.23).
Link: vllm/v1/worker/cpu/shm.py
Until: vLLM's CPU worker replaces nothing, or no supported release pins memory there.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor


def worker_first() -> None:
    """In a thread, which nobody called: vLLM logs errors of optional imports, and who keeps log records (pytest does)
    keeps with such an error all frames that were importing, among them those that build the engine."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(importlib.import_module, "vllm.v1.worker.cpu_worker").result()
