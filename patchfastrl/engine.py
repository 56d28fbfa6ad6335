"""The one engine of the process: how it is configured, and how it is built round a model."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform

from . import (
    adapters,
    ahead,
    end,
    garbage,
    guards,
    install,
    materialise,
    memory,
    plan,
    quantisation,
    rollouts,
    sharing,
    slot,
    start_block,
    training,
    weightless,
)
from .audit import audit
from .compat import (
    cpu_experts,
    cpu_heap,
    cpu_import_order,
    cpu_kv_cache,
    cpu_linear,
    cpu_lora,
    cpu_packed,
    cpu_preload,
    cpu_rms_norm,
    cpu_standby,
    cuda_free_blocks,
    cuda_pieces,
    cuda_slot_addresses,
    cuda_weight_pool,
    expert_slots,
    import_errors,
    inspected_here,
    kv_blocks,
    own_memory,
    pool_pieces,
    process_groups,
    sampled_log_probs,
    sampler_warmup,
    worker_asleep,
)
from .config_folder import ConfigFolder
from .copies import Copies, Scratch
from .errors import UnsupportedError
from .llm import SharedLLM, live
from .packed import quant_state
from .recompute import Recompute
from .sharing import base_of, base_parameters, dtype_of

logger = logging.getLogger("patchfastrl")

LOAD_FORMAT = "patchfastrl"

_SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's LoRA kernels are built for


# Configuration ------------------------------------------------------------------------------------------------------


def slot_rank_for(rank: int) -> int:
    """The smallest slot rank of vLLM's that holds `rank`."""
    fitting = [r for r in _SLOT_RANKS if r >= rank]
    if not fitting:
        raise UnsupportedError(f"LoRA rank {rank}: vLLM's slots end at {_SLOT_RANKS[-1]}. Use a smaller r.")
    return fitting[0]


def device() -> torch.device:
    """Where vLLM runs, and the model must be."""
    return torch.device("cpu" if current_platform.is_cpu() else current_platform.device_type)


def check_model(model: nn.Module, placed: bool = False) -> None:
    """Refuse models that cannot be shared whatever their architecture. Nothing is allocated.

    Args:
        placed: whether the model is where it will train, so that its device can be checked too.
    """
    base = base_of(model)
    quantisation.refuse_model(base)
    known = ModelRegistry.get_supported_archs()
    if not {type(base).__name__, *(base.config.architectures or ())} & set(known):
        raise UnsupportedError(
            f"vLLM does not know {type(base).__name__}, so there is no engine to sample this model from. Train it with "
            "stock TRL and use_vllm=False (leave PatchFastRL() out), or train a model of a supported family."
        )
    if placed:
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type != device().type:
            raise UnsupportedError(
                f"The model is on {', '.join(sorted(map(str, devices)))} and vLLM runs on {device().type}. Put the "
                "whole model on that device (no device_map that splits or off-loads it)."
            )
        if next(iter(devices)).index:
            raise UnsupportedError(
                f"The model is on {next(iter(devices))}, and an engine in this process runs on the first GPU that it "
                "sees. Choose the GPU with CUDA_VISIBLE_DEVICES, and leave the model on the first."
            )
    if (name := adapters.active_adapter(model)) is not None:
        adapters.adapters_of(model, name)


# Building -----------------------------------------------------------------------------------------------------------


def brought_along(model: nn.Module, wanted: dict[str, Any]) -> SharedLLM | None:
    """The live engine that `FastLanguageModel` built with this model, fit for a trainer; None if there is none.

    Args:
        wanted: the arguments that the trainer would build an engine with.

    Raises:
        UnsupportedError: the engine is too small for what the trainer asks.
    """
    llm = getattr(base_of(model), "vllm_engine", None)
    if not isinstance(llm, SharedLLM) or llm._closed:
        return None
    length = llm.llm_engine.model_config.max_model_len
    if (wanted.get("max_model_len") or 0) > length:
        raise UnsupportedError(
            f"The trainer asks for sequences of {wanted['max_model_len']} tokens, the model's engine was built "
            f"for {length}. "
            f"Pass max_seq_length={wanted['max_model_len']} to FastLanguageModel.from_pretrained."
        )
    if isinstance(model, PeftModel):
        llm.require_slot(adapters.slot_rank(model))
    if wanted.get("enable_sleep_mode") and not llm.can_sleep:
        raise UnsupportedError(
            "Standby was turned on after the model's engine was built. Set UNSLOTH_VLLM_STANDBY=1 before "
            "FastLanguageModel.from_pretrained."
        )
    llm.adopt(model)
    _prepare_training(llm, model)
    llm.wake_up()  # a trainer finds its engine awake
    audit(llm)
    return llm


def build(
    model: nn.Module, tokenizer: Any, *, max_lora_rank: int | None = None, args: Any = None, **kwargs: Any
) -> SharedLLM:
    """Build the engine round `model` and make the two share one copy of the base weights.

    Args:
        model: model in training, on the device that vLLM runs on; with adapters (PEFT) the engine gets a LoRA slot.
        tokenizer: tokenizer or processor, or None (then only token ids go in and come out).
        args: the trainer's configuration, for the byte budget; None: not known.
        max_lora_rank: rank of the LoRA slot; None: the largest rank in `model`, no slot for a model without adapters.
        **kwargs: arguments of `vllm.LLM`. What sharing decides is decided here: model, dtype, load format, LoRA
        settings.

    Raises:
        UnsupportedError, SharingError: before training starts, naming what cannot be shared.
    """
    check_model(model, placed=True)
    packed = any(quant_state(p) is not None for p in base_parameters(model).values())
    quantisation.refuse_engine(kwargs, packed)
    for old in list(live):
        old.close("another engine was built in this process, which has room for one. Use the newer trainer or model.")
    end.catch_up()
    process_groups.make_anew()
    on_cpu = current_platform.is_cpu()
    sleep_mode = bool(kwargs.pop("enable_sleep_mode", False))
    for name in ("trust_remote_code", "revision", "tokenizer"):
        kwargs.pop(name, None)
    dtype = dtype_of(model)
    cast = packed or (dtype == torch.float32 and not on_cpu)
    dtype = torch.bfloat16 if dtype == torch.float32 and not on_cpu else dtype
    taken = 0 if on_cpu else memory.taken_beside(model)
    shape, run = plan.of_trainer(model, args, {**kwargs, "enable_sleep_mode": sleep_mode}, taken, max_lora_rank)
    if not on_cpu:
        run = _share_of_the_rest(shape, run, kwargs)
    copied: set[str] = set()
    merging = False
    if max_lora_rank is not None or isinstance(model, PeftModel):
        most = plan.beside_the_trainer(shape, replace(run, share=0.95), memory.device_bytes()).share
        copied, merging = rollouts.merged(model, dtype, sleep_mode, kwargs, args, most)
    run = replace(run, merged=merging, recompute="always" if on_cpu else install.settings().recompute)
    if not on_cpu:
        plan.check(shape, run, memory.device_bytes())
    parts = plan.budget(shape, run, memory.device_bytes()).lines()
    logger.log(logging.INFO if on_cpu else logging.WARNING, "\n".join(["PatchFastRL: memory, planned", *parts]))
    if max_lora_rank is None and isinstance(model, PeftModel) and not merging:
        max_lora_rank = adapters.slot_rank(model)
    if max_lora_rank is not None:
        kwargs |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": slot_rank_for(max_lora_rank)}
    if on_cpu:
        cpu_packed.plain_layout(model)
        kwargs.setdefault("enforce_eager", True)
        kwargs.setdefault("kv_cache_memory_bytes", memory.kv_cache_bytes(base_of(model).config, dtype, kwargs))
    else:
        kwargs["enable_sleep_mode"] = sleep_mode
    compiled = not kwargs.get("enforce_eager")
    folder = ConfigFolder(model, tokenizer, compiled, (dtype, cast, merging, sorted(copied)))
    made: dict[str, Any] = {}
    kernels: list[Callable[[], None]] = []
    if not on_cpu and args is not None and install.settings().fuses(on_gpu=True):
        kernels.append(functools.partial(ahead.for_training, model, args))
    if not on_cpu:
        kernels.append(functools.partial(ahead.for_sampling, model, dtype, merging))
    compiling = ahead.compile_ahead(kernels)
    pool = cuda_weight_pool.pool if not on_cpu and (sleep_mode or cuda_weight_pool.usable()) else contextlib.nullcontext

    def on_load(engine_model: nn.Module) -> None:
        made["model"] = engine_model
        layout = sharing.make_plan(engine_model, model, cast, copied)
        home = next(model.parameters()).device
        materialise.materialise(engine_model, model, layout, home)
        memory.make_workspace(home)
        made["shared"] = sharing.Shared.of(model, engine_model, layout)
        if on_cpu:
            cpu_rms_norm.install(engine_model)

    def on_loaded(engine_model: nn.Module, config: Any) -> None:
        if compiled and "compilation_config" not in kwargs:  # what a caller chose stays
            cuda_pieces.use(engine_model, config)
        compiling.result()  # from here on vLLM measures memory, and what runs on the GPU

    def on_profiled(worker: Any) -> int:
        memory.return_cached()
        made["slot"] = slot.memory_of(worker) if sleep_mode and max_lora_rank is not None else []
        more = materialise.own_memory(made["shared"], made["slot"], pool())
        cuda_slot_addresses.forget()
        memory.return_cached()
        return more

    # Functions of their own: `if_it_fails` can clear their frames, and with them what these refer to.

    def begin() -> tuple[SharedLLM, Scratch | None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_nothing_left_behind())
            stack.enter_context(_in_process())
            stack.enter_context(inspected_here.without_a_child())
            stack.enter_context(sampler_warmup.of_a_trainer())
            if on_cpu:
                cpu_import_order.worker_first()
            stack.enter_context(_loader(on_load, on_loaded))
            stack.enter_context(own_memory.after_profiling(on_profiled, made))
            if on_cpu:
                stack.enter_context(cpu_preload.not_needed())
                stack.enter_context(cpu_linear.plain_weights())
                stack.enter_context(cpu_experts.plain_weights())
                stack.enter_context(cpu_kv_cache.in_bytes())
                stack.enter_context(cpu_heap.not_frozen())
            else:
                stack.enter_context(cuda_weight_pool.weights_outside())
                stack.enter_context(cuda_free_blocks.split())
                stack.enter_context(sampled_log_probs.in_one_pass())
            stack.enter_context(expert_slots.left_out())
            llm = SharedLLM(
                model=str(folder.path),
                load_format=LOAD_FORMAT,
                dtype=str(dtype).removeprefix("torch."),
                skip_tokenizer_init=tokenizer is None,
                **kwargs,
            )
        llm.shared, llm.merging = made["shared"], merging
        if llm.shared.plan.own:
            llm.copies = Copies(llm.shared, merges=False)
            llm.copies.merges = merging and llm.copies.hold_all_of(model)
        if on_cpu:
            asleep = llm.copies.storages() if llm.copies is not None and sleep_mode else []
            llm._standby = made["standby"] = cpu_standby.install(llm.worker, asleep + made["slot"])
        pieces = llm._standby or pool_pieces.PoolPieces()
        llm._asleep = worker_asleep.Asleep(llm.worker, on_cpu or sleep_mode, pieces)
        scratch: Scratch | None = None
        if llm.copies is not None and not sleep_mode:
            if on_cpu:
                scratch = cpu_standby.Storages({cuda_weight_pool.OWN_WEIGHTS: llm.copies.storages()})
            elif cuda_weight_pool.usable():
                scratch = cuda_weight_pool.Scratch()
        llm._reachable = functools.partial(end.reachable, llm._asleep, llm._standby, scratch)
        llm._end = weakref.finalize(
            llm,
            end.discard,
            llm.llm_engine,
            llm.worker,
            llm.shared.engine_model,
            list(llm.shared.keys.values()),
            llm._reachable,
            llm._standby,
            folder,
        )
        llm._end.atexit = False  # the process' end frees everything anyway
        return llm, scratch

    def finish(llm: SharedLLM, scratch: Scratch | None) -> None:
        if max_lora_rank is not None:
            llm.slot = slot.Slot(llm.worker, model, llm.shared.plan)
            _before_sleep(llm.worker, llm.slot.lose)
            if on_cpu:
                cpu_lora.install(llm.model_runner.lora_manager._adapter_manager.modules.values())
        if llm.copies is not None:
            _before_sleep(llm.worker, llm.copies.release)
            llm.copies.live_in(scratch)
        kv_blocks.limit(llm)
        _prepare_training(llm, model)
        live.add(llm)
        garbage.collect_rarely(True)
        guards.protect(llm)
        audit(llm)

    start = time.perf_counter()
    with end.if_it_fails(lambda: end.give_up(made)):
        llm, scratch = begin()
    with end.if_it_fails(lambda: llm.close("it could not be built.")):
        finish(llm, scratch)
    llm.seconds["build"] = time.perf_counter() - start
    logger.warning(start_block.of(llm, sleep_mode))
    return llm


def _before_sleep(worker: Any, call: Callable[[], None]) -> None:
    """`call`, a method, whenever vLLM's worker is put to sleep, past the engine too. The worker keeps nobody alive."""
    sleep, method = worker.sleep, weakref.WeakMethod(call)

    def call_first(*args: Any, **kwargs: Any) -> Any:
        if (alive := method()) is not None:
            alive()
        return sleep(*args, **kwargs)

    worker.sleep = call_first


def _share_of_the_rest(shape: plan.Shape, run: plan.Run, kwargs: dict[str, Any]) -> plan.Run:
    """The run with a share of the device that the engine can get. `kwargs` ask vLLM for that."""
    lowered = plan.beside_the_trainer(shape, run, memory.device_bytes())
    if lowered.share < run.share:
        logger.warning(
            f"PatchFastRL: vllm_gpu_memory_utilization={run.share:g}: the weights, the adapter and the optimizer stay "
            f"while the engine samples. It gets what they leave, {lowered.share:g} of the device."
        )
        kwargs["gpu_memory_utilization"] = lowered.share
    return lowered


def _prepare_training(llm: SharedLLM, model: nn.Module) -> None:
    """What makes a training step faster, as far as it is wanted."""
    wanted, on_gpu = install.settings(), not current_platform.is_cpu()
    if wanted.fuses(on_gpu):
        training.fuse(model)
    for earlier in (llm.room, llm.recompute):
        if earlier is not None:
            earlier.remove()
    llm.room = llm.recompute = None
    if on_gpu and wanted.recompute != "always":
        device = memory.Device(next(model.parameters()).device, memory.idle())
        give_back = functools.partial(_give_back, weakref.ref(llm))
        llm.recompute = Recompute(model, device, wanted.recompute == "least", give_back)


def _give_back(engine: weakref.ref[SharedLLM], nbytes: int | None = None) -> bool:
    """`SharedLLM.give_back`, for a model, which keeps no engine alive."""
    return (llm := engine()) is not None and not llm._closed and llm.give_back(nbytes)


@contextlib.contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """What building an engine does to the process that an engine in a process of its own may do."""
    gc.freeze()  # vLLM collects garbage again and again, each time through all that TRL and vLLM import
    try:
        yield
    finally:
        gc.unfreeze()  # vLLM freezes it too: nothing that is alive now could ever be collected
        import_errors.drop_tracebacks()


@contextlib.contextmanager
def _in_process() -> Iterator[None]:
    """vLLM puts its engine core into a child process unless told otherwise."""
    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        else:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


@contextlib.contextmanager
def _loader(on_load: Any, on_loaded: Any) -> Iterator[None]:
    """Our load format is known to vLLM while an engine is built, and no longer: it refers to the model."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    register_model_loader(LOAD_FORMAT)(weightless.as_loader(on_load, on_loaded))
    try:
        yield
    finally:
        del _LOAD_FORMAT_TO_MODEL_LOADER[LOAD_FORMAT]
