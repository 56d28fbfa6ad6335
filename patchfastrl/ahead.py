"""Triton's kernels, compiled in a thread while vLLM starts, so that neither the audit nor the first step waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from . import adapters, checksum, log_probs, merge, rotary
from .compat import trl_log_probs
from .sharing import base_of


def compile_ahead(tasks: Iterable[Callable[[], None]]) -> Future[None]:
    """Carry the tasks out one after the other. An error comes out where the result is waited for."""

    def all_of_them() -> None:
        for task in tasks:
            task()

    executor = ThreadPoolExecutor(1, "patchfastrl-compile")
    try:
        return executor.submit(all_of_them)
    finally:
        executor.shutdown(wait=False)


def for_sampling(model: nn.Module, dtype: torch.dtype, merging: bool) -> None:
    """What is done with weights before each batch.

    Args:
        dtype: of the engine.
        merging: whether the adapter in training is merged into a copy of them.
    """
    device = next(model.parameters()).device
    checksum.digests([torch.zeros(1, dtype=torch.int64, device=device)])
    merged = adapters.active_adapters(model)[:1] if merging else []
    for a, b in ((adapter.a, adapter.b) for adapter in merged):
        low, up = (torch.zeros(shape, dtype=a.dtype, device=device) for shape in ((len(a), 16), (16, len(a))))
        home = torch.zeros(16, 16, dtype=dtype, device=device)
        merge.merge_all([merge.Merge(home, home.clone(), low, up.to(b.dtype), 1.0)])


def for_training(model: nn.Module, args: Any) -> None:
    """What a training step is fused with.

    Args:
        args: the trainer's, whose micro-batches the kernels are for.
    """
    base: Any = base_of(model)
    rotary.compile_ahead(base, args.per_device_train_batch_size, torch.float16 if args.fp16 else torch.bfloat16)
    if trl_log_probs.missing():
        log_probs.compile_ahead(base.device, base.config.get_text_config().vocab_size)
