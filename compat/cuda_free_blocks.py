"""While the shared weights are laid out, torch uses free memory as it does by default.

Requirement: vLLM on CUDA that has `Worker._scoped_allocator_max_split`: seen in 0.23 to 0.30.
Reason: while vLLM loads a model, torch may neither split a free block of 20 MiB or more nor put a small tensor into it.
That suits weights which vLLM repacks. Ours move to where other layers were, and of a model that transformers has read
into one block next to nothing would be used again (8B, full fine-tuning: 27 GiB for 15 of weights).
Link: vllm/v1/worker/gpu_worker.py, https://github.com/vllm-project/vllm/pull/41268
Until: vLLM leaves the setting alone where it loads no weights itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .replaced import replaced

_NAME = "_scoped_allocator_max_split"


@contextlib.contextmanager
def split() -> Iterator[None]:
    """While an engine is built."""
    from vllm.v1.worker.gpu_worker import Worker

    def unlimited(self: Any, max_split_size_mb: int) -> Any:
        return contextlib.nullcontext()

    with replaced(Worker, _NAME, unlimited) if _NAME in vars(Worker) else contextlib.nullcontext():
        yield
