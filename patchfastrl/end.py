"""The end of an engine: whenever it comes, and whatever still refers to it, the next one finds the memory free."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from vllm.platforms import current_platform

from . import garbage, guards, memory
from .compat import cpu_heap, cpu_standby, cuda_graphs, cuda_slot_addresses, cuda_weight_pool, worker_asleep
from .config_folder import ConfigFolder
from .copies import Scratch
from .errors import StandbyError
from .llm import live

logger = logging.getLogger("patchfastrl")

_put_off: list[Callable[[], None]] = []


def reachable(asleep: worker_asleep.Asleep, standby: cpu_standby.Storages | None, scratch: Scratch | None) -> None:
    """On a GPU: freeing memory that is not mapped leaves vLLM's allocator in an error that the next engine inherits."""
    if standby is None:
        memory.return_cached()
        try:
            asleep.take_all()
        except StandbyError:
            asleep.give_back()  # what had stayed
            raise
        if scratch is not None:
            scratch.take()


def discard(
    engine: Any,
    worker: Any,
    engine_model: nn.Module,
    keys: list[int],
    reach: Callable[[], None],
    standby: cpu_standby.Storages | None,
    folder: ConfigFolder,
) -> None:
    """The end of an engine: by `close`, or by garbage collection. All of it, whatever fails.

    By garbage collection it may come while a GPU has no room for it: it is put off, then.
    """
    with contextlib.ExitStack() as last_first:
        _free(last_first, worker, engine_model, standby)
        last_first.callback(folder.cleanup)
        last_first.callback(engine.engine_core.shutdown)
        guards.release(keys)
        garbage.collect_rarely(any(True for _ in live))  # its length counts those that are being collected
        try:
            reach()
        except StandbyError:
            last_first.pop_all()
            _put_off.append(functools.partial(discard, engine, worker, engine_model, keys, reach, standby, folder))
            return
        if standby is not None:
            last_first.enter_context(cpu_heap.not_walked())


def catch_up() -> None:
    """What was put off, before another engine is built.

    Raises:
        StandbyError: there is still no room.
    """
    ends = _put_off[:]
    _put_off.clear()
    for end in ends:
        end()
    if _put_off:
        raise StandbyError(
            "An engine that nobody uses any more is asleep, or a part of it, and the GPU has not enough memory left to "
            "wake it for its end. Free what else the script keeps there, and try again."
        )


@contextlib.contextmanager
def if_it_fails(free: Callable[[], None]) -> Iterator[None]:
    """While an engine is built. If that fails, its memory goes at once, even if somebody keeps the error."""
    handled = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        try:
            if not current_platform.is_cpu():
                cuda_weight_pool.forget_error()
            _clear_frames(error, handled)
            free()
        except Exception:  # after some errors of CUDA's, every call fails
            logger.exception("PatchFastRL: the engine could not be built, and not all of its memory could be freed")
        raise


def _clear_frames(error: BaseException | None, handled: BaseException | None) -> None:
    """What the error's frames refer to, and those of errors that led to it, since `handled`."""
    while error is not None and error is not handled:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def give_up(made: dict[str, Any]) -> None:
    """The end of an engine that is none yet.

    Args:
        made: what there is of it: vLLM's "model", the "worker", its "standby" on a CPU. Nothing afterwards.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    with contextlib.ExitStack() as last_first:
        last_first.callback(cleanup_dist_env_and_memory)  # groups for this model, which the next engine would inherit
        last_first.callback(made.clear)
        worker: Any = made.get("worker")
        _free(last_first, worker, made.get("model", nn.Module()), made.get("standby"))
        if hasattr(worker, "shutdown"):  # not in every release
            last_first.callback(worker.shutdown)


def _free(
    last_first: contextlib.ExitStack, worker: Any, engine_model: nn.Module, standby: cpu_standby.Storages | None
) -> None:
    last_first.callback(memory.return_cached)
    caches = [] if worker is None else getattr(worker.model_runner, "kv_caches", [])
    last_first.callback(_let_go, engine_model, caches, standby)
    if not current_platform.is_cpu():
        if worker is not None:
            last_first.callback(cuda_graphs.drop, worker.vllm_config)
        last_first.callback(cuda_weight_pool.release_pools)
        last_first.callback(cuda_weight_pool.leave)


def _let_go(engine_model: nn.Module, kv_caches: list[Any], standby: cpu_standby.Storages | None) -> None:
    """The memory goes at once, not when the collector gets round to vLLM's cycles and to what compiling keeps alive."""
    if standby is not None:
        standby.release()
    kv_caches.clear()
    for module in engine_model.modules():
        for name in ("kv_cache", "lora_a_stacked", "lora_b_stacked"):
            if hasattr(module, name):
                setattr(module, name, ())
    for parameter in engine_model.parameters():
        parameter.data = parameter.data.new_empty(0)  # the trainer's views keep what they share
    cuda_slot_addresses.forget()
    for kernel in ("_checksum_kernel", "_merge_kernel"):
        if (module := sys.modules.get(f"{__package__}.{kernel}")) is not None:
            module.tables.cache_clear()  # addresses, in memory of the GPU
    memory.return_workspaces()
