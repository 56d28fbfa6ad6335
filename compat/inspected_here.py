"""vLLM looks at a model's class in this process, not in a child.

Requirement: vLLM that has `_run_in_subprocess` in its model registry, all supported releases.
Reason: the child imports torch, transformers and vLLM all over again, 12 to 17 s for each architecture that it has not
seen yet. It spares the parent CUDA's initialisation, which the trainer's model has brought about already.
Link: vllm/model_executor/models/registry.py
Until: vLLM inspects without a child.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .replaced import replaced


@contextlib.contextmanager
def without_a_child() -> Iterator[None]:
    """While an engine is built."""
    from vllm.model_executor.models import registry

    with replaced(registry, "_run_in_subprocess", lambda inspect: inspect()):
        yield
