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

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from .cuda_weight_pool import OWN_WEIGHTS


class Storages:
    """What standby releases of a worker's memory, by tag. `release` and `take` can be interrupted and called again."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._storages = [
            (tag, storage, storage.nbytes())
            for tag, some in tensors.items()
            for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(some)}.values()
        ]
        self._released: set[int] = set()
        self._only: Collection[int] = range(len(self._storages))

    @property
    def nbytes(self) -> int:
        return sum(size for _, _, size in self._storages)

    @property
    def resident(self) -> bool:
        return not self._released

    def release(self) -> None:
        for number, (_, storage, _) in enumerate(self._storages):
            if number in self._only:
                self._released.add(number)
                storage.resize_(0)

    def take(self, tags: list[str] | None = None) -> None:
        for number, (tag, storage, size) in enumerate(self._storages):
            if number in self._released and number in self._only and (tags is None or tag in tags):
                storage.resize_(size)
                storage.fill_(0)  # attention multiplies masked positions by zero, and 0 * NaN is NaN
                self._released.remove(number)

    # As `pool_pieces.Pieces` ------------------------------------------------------------------------------------------

    def sizes(self) -> dict[int, tuple[str, int]]:
        return {number: (tag, size) for number, (tag, _, size) in enumerate(self._storages)}

    @contextlib.contextmanager
    def only(self, chosen: Collection[int]) -> Iterator[None]:
        before, self._only = self._only, chosen
        try:
            yield
        finally:
            self._only = before

    def free(self) -> int | None:
        return None

    def divide(self, caches: list[torch.Tensor], blocks: int) -> bool:
        return False  # a storage is one piece

    def first_block(self, piece: int) -> int:
        return 0

    def join(self) -> None:
        pass


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def install(worker: Any, own_weights: list[torch.Tensor]) -> Storages:
    """Replace `sleep` and `wake_up` of this CPU worker. Its KV cache must be allocated already.

    Args:
        own_weights: what else is released, the LoRA slot among it; the contents are lost, as the cache's are.
    """
    storages = Storages({"kv_cache": worker.model_runner.kv_caches, OWN_WEIGHTS: own_weights})

    def sleep(level: int = 1) -> None:
        storages.release()

    def wake_up(tags: list[str] | None = None) -> None:
        storages.take(tags)

    worker.sleep, worker.wake_up = sleep, wake_up
    return storages
