"""vLLM's CPU workers answer `sleep` and `wake_up` with a warning: give them the KV-cache half of it.

Requirement: vLLM on the CPU platform, all releases so far.
Reason: standby must run, and be tested, where there is no GPU.
Link: https://docs.vllm.ai/en/latest/features/sleep_mode.html ("CUDA platform")
Until: vLLM's CPU worker can sleep by itself.

vLLM's own path stays in charge: engine core pauses its scheduler and drops the prefix cache, the executor keeps the
state, and calls these two. The cache's storages are released and allocated again in place, so that every view of them
stays valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class KVCacheStorages:
    """The storages behind a worker's KV cache, releasable. Every method can be interrupted and called again."""

    def __init__(self, kv_caches: Any) -> None:
        by_identity = {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(kv_caches)}
        self._storages = [(storage, storage.nbytes()) for storage in by_identity.values()]
        self._released: set[int] = set()
        self.releases = 0  # how often the contents were lost

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self._storages)

    @property
    def resident(self) -> bool:
        return not self._released

    def release(self) -> None:
        self.releases += 1
        for number, (storage, _) in enumerate(self._storages):
            self._released.add(number)
            storage.resize_(0)

    def restore(self) -> None:
        for number, (storage, size) in enumerate(self._storages):
            if number in self._released:
                storage.resize_(size)
                storage.fill_(0)  # attention multiplies masked positions by zero, and 0 * NaN is NaN
                self._released.remove(number)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def install(worker: Any, own_weights: list[torch.Tensor]) -> KVCacheStorages:
    """Replace `sleep` and `wake_up` of this CPU worker. Its KV cache must be allocated already.

    Args:
        own_weights: what else is released; their contents are lost, as the cache's are.
    """
    storages = KVCacheStorages([worker.model_runner.kv_caches, own_weights])

    def sleep(level: int = 1) -> None:
        storages.release()

    def wake_up(tags: list[str] | None = None) -> None:
        if tags is None or "kv_cache" in tags:
            storages.restore()

    worker.sleep, worker.wake_up = sleep, wake_up
    return storages
