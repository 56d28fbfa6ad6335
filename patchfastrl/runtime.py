"""What rewritten TRL code calls: the only door from TRL into the core. Importing it imports no vLLM."""

from __future__ import annotations

import gc
import logging
import os
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedError
from .old_logprobs import old_logps_later, promise_old_logps, with_old_logps
from .sampling import sampling_overrides, sampling_params, token_log_probs, token_params

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .llm import SharedLLM

__all__ = [
    "build_beside",
    "build_early_engine",
    "build_engine",
    "configure",
    "entropies",
    "generate",
    "load_model",
    "lora_request",
    "old_logps_later",
    "promise_old_logps",
    "publish",
    "samples_elsewhere",
    "sampling_overrides",
    "sampling_params",
    "selected_log_probs",
    "token_log_probs",
    "token_params",
    "with_old_logps",
]

logger = logging.getLogger("patchfastrl")

STANDBY = "UNSLOTH_VLLM_STANDBY"

# By identity: some of TRL's trainers cannot be hashed, and are equal to each other.
_trainers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

# TRL announces a process group of one in these for vLLM, and leaves them. The next trainer of the process would take
# them for a launcher's, listen on the same port, and wrap its model for distributed training.
_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_environment: dict[str, str | None] = {name: os.environ.get(name) for name in _RENDEZVOUS}


# Called from a trainer's __init__ -----------------------------------------------------------------------------------


def configure(
    trainer: Any,
    args: Any,
    model: Any,
    peft_config: Any,
    *,
    server_only: Any = None,
    completions: int = 1,
    loads_later: bool = False,
    beside: bool = False,
) -> Any:
    """Turn vLLM on in `args` and refuse, before anything is allocated, what a shared engine cannot do.

    Args:
        server_only: the script's `rollout_func`, in a TRL release that would not call it in this process.
        completions: how many the trainer asks of the engine for each prompt.
        loads_later: a model named by a string is loaded by another class, from `args.model_init_kwargs`.
        beside: TRL gave the trainer no vLLM path, so its engine stands beside it (`build_beside`).
    """
    from .install import settings

    _environment.update({name: os.environ.get(name) for name in _RENDEZVOUS})
    if args is None:
        return None  # TRL says by itself that it needs them
    if id(trainer) in _trainers:
        return args  # Nash-MD and XPO are made by Online DPO's `__init__`, which asks again
    if beside and getattr(args, "use_vllm", False):
        raise UnsupportedError(
            f"{type(trainer).__name__}: use_vllm=True asks TRL for an engine that this trainer never samples from. Set "
            "use_vllm=False: PatchFastRL gives it one of its own."
        )
    if not getattr(args, "use_vllm", False):
        if settings().use_vllm == "keep":
            if getattr(args, "vllm_sampling_params", None):
                logger.warning("PatchFastRL: use_vllm=False, so vllm_sampling_params have no effect.")
            return args
        if getattr(args, "lmbda", None) == 0:
            return args  # distillation on the data set's own completions: nothing is sampled
        keep = "PatchFastRL(use_vllm='keep') leaves it alone."
        if beside:
            logger.warning("PatchFastRL: %s samples from an engine; %s", type(trainer).__name__, keep)
        else:
            logger.warning("PatchFastRL: use_vllm is on (the script leaves it off); %s", keep)
            args.use_vllm = True
    if server_only is not None:
        raise UnsupportedError(
            "rollout_func: this TRL release calls it with vllm_mode='server' only, and the shared engine is not a "
            "server. Install TRL 0.26.0 or newer, which calls it in colocate mode too, or train with stock TRL."
        )
    if getattr(args, "use_teacher_server", False) and not hasattr(args, "teacher_model_server_url"):
        raise UnsupportedError(
            "use_teacher_server=True: the teacher's log-probabilities would come from the server that samples, and the "
            "shared engine is not a server. Set it to False, or train with stock TRL."
        )
    if hasattr(args, "vllm_mode"):
        if args.vllm_mode == "server":
            logger.warning(
                "PatchFastRL: the script asks for vllm_mode='server'; the engine runs in this process instead."
            )
        args.vllm_mode = "colocate"
    if not beside and (standby := standby_requested()) is not None:
        _set_standby(args, standby)
    _refuse_unsupported(args, model, peft_config)
    if args.n_gpu > 1:
        logger.warning("PatchFastRL: one process trains and samples on one GPU, %s of %s.", args.device, args.n_gpu)
        args._n_gpu = 1  # transformers would have a copy of the model on each
    sampling_overrides(args, completions)
    if isinstance(model, str) and loads_later:
        args.model_init_kwargs = _shareable_kwargs(model, args, peft_config, args.model_init_kwargs or {}, "dtype")
    elif isinstance(model, str) and beside:
        from .quantisation import refuse_loading

        refuse_loading(model, getattr(args, "model_init_kwargs", None) or {})
    _trainers[id(trainer)] = trainer
    return args


def standby_requested() -> bool | None:
    """What the environment says about standby: True, False, or None when it says nothing."""
    value = os.environ.get(STANDBY)
    if value is None or value == "":
        return None
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off"):
        return False
    raise UnsupportedError(f"{STANDBY}={value!r}: set it to 1 or 0.")


def _set_standby(args: Any, standby: bool) -> None:
    if hasattr(args, "vllm_enable_sleep_mode"):
        args.vllm_enable_sleep_mode = standby
    elif standby:
        raise UnsupportedError(
            f"{STANDBY} asks for standby, but {type(args).__name__} of this TRL release has no vllm_enable_sleep_mode: "
            "its trainer never puts the engine to sleep. The first releases that do: 0.23.0 for GRPO, 0.24.0 for RLOO, "
            f"0.28.0 for Online DPO. Install one, or set {STANDBY}=0."
        )


def _refuse_unsupported(args: Any, model: Any, peft_config: Any) -> None:
    from accelerate.utils import DistributedType

    from . import adapters

    processes = args.distributed_state.num_processes if args.distributed_state is not None else args.world_size
    if processes > 1:
        raise UnsupportedError(
            f"{processes} processes: one shared engine per process is not supported yet. Start one process "
            "(accelerate launch --num_processes 1), or train with stock TRL."
        )
    if getattr(args, "vllm_tensor_parallel_size", 1) > 1:
        raise UnsupportedError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}: shared weights are not supported with tensor "
            "parallelism yet. Set it to 1."
        )
    plugin = getattr(args, "deepspeed_plugin", None)
    if args.deepspeed or plugin is not None:
        stage = plugin.zero_stage if plugin is not None else "?"
        raise UnsupportedError(
            f"DeepSpeed (ZeRO stage {stage}) keeps its own flattened copies of the weights, which cannot be "
            "shared with an "
            "engine. Train without DeepSpeed, or with stock TRL."
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UnsupportedError(
            "FSDP shards the weights, which cannot be shared with an engine yet. Train without FSDP, or with stock TRL."
        )
    if args.distributed_state is not None and args.distributed_state.distributed_type == DistributedType.MEGATRON_LM:
        raise UnsupportedError("Megatron-LM cannot share weights with an engine. Train with stock TRL.")
    if getattr(args, "vllm_model_impl", "vllm") not in ("vllm", "auto"):
        raise UnsupportedError(
            f"vllm_model_impl={args.vllm_model_impl!r}: weights are shared with vLLM's own models only."
        )
    if peft_config is not None:
        adapters.refuse_unservable(peft_config)
    if not isinstance(model, str):
        from .engine import check_model

        check_model(model)
        if getattr(args, "cast_lm_head_to_fp32", False) and str(model.dtype) != "torch.float32":
            raise _fp32_head(model.dtype)


def _fp32_head(dtype: Any) -> UnsupportedError:
    return UnsupportedError(
        f"cast_lm_head_to_fp32=True with a model in {dtype}: the head would leave the storage that the engine "
        "samples from. "
        "Set it to False, or load the whole model in float32 (model_init_kwargs={'dtype': 'float32'})."
    )


def load_model(create: Any, model: str, args: Any, peft_config: Any, kwargs: dict[str, Any], dtype: str) -> nn.Module:
    """TRL's way to load a model by name, in the dtype that both sides can share.

    With LoRA the base is frozen and both sides take the checkpoint's dtype (TRL alone would load the trainer's in
    float32 and the engine's in the checkpoint's). Full fine-tuning keeps TRL's default, and a script's own `dtype`
    always holds.

    Args:
        create: TRL's `create_model_from_path`, or a `from_pretrained` in its older releases.
        dtype: how `create` calls the precision: ``"dtype"`` or ``"torch_dtype"``.
    """
    import torch

    if args.use_vllm:
        kwargs = _shareable_kwargs(model, args, peft_config, kwargs, dtype)
        if torch.cuda.device_count() > 1:  # TRL's `device_map` would spread the model over all of them
            kwargs = {"device_map": {"": args.device}, **kwargs}
    loaded = create(model, **kwargs)
    if args.use_vllm and getattr(args, "cast_lm_head_to_fp32", False) and str(loaded.dtype) != "torch.float32":
        raise _fp32_head(loaded.dtype)
    return loaded


def _shareable_kwargs(model: str, args: Any, peft_config: Any, kwargs: dict[str, Any], dtype: str) -> dict[str, Any]:
    from .quantisation import refuse_loading

    refuse_loading(model, kwargs)
    if peft_config is None or "dtype" in kwargs or "torch_dtype" in kwargs:
        return kwargs
    logger.warning("PatchFastRL: the frozen base is loaded in its checkpoint's dtype; set `%s` for another one.", dtype)
    return {**kwargs, dtype: "auto"}


def samples_elsewhere(trainer: Any) -> None:
    """Said by a trainer whose completions come from a server, and that PatchFastRL leaves as it is."""
    logger.warning(
        "PatchFastRL: %s samples from a vLLM server in another process, as it does without PatchFastRL: that server "
        "has a copy of the weights of its own.",
        type(trainer).__name__,
    )


# Called from the engine's owner (VLLMGeneration, or an older trainer) -----------------------------------------------


def build_engine(llm_class: Any, owner: Any, **kwargs: Any) -> SharedLLM:
    """In place of `LLM(...)`: the engine round `owner.model`, or the one that the model brought along."""
    llm, trainer = _engine_for(llm_class, owner, kwargs)
    from . import room

    room.watch(llm, trainer)
    return llm


def build_beside(trainer: Any, args: Any, model: nn.Module) -> None:
    """An engine for a trainer that knows of none: `generate` below samples from it."""
    if id(trainer) not in _trainers:
        return  # the script keeps it from vLLM, or nothing is sampled
    from vllm import LLM

    from . import generation
    from .install import settings

    kwargs = generation.engine_settings(trainer, args, model, settings(), bool(standby_requested()))
    owner = types.SimpleNamespace(model=model, processing_class=trainer.processing_class, trainer=trainer)
    trainer.llm, _ = _engine_for(LLM, owner, kwargs)
    generation.engines.add(trainer.llm)
    if kwargs["enable_sleep_mode"]:
        trainer.llm.sleep()


def generate(model: Any, **kwargs: Any) -> Any:
    """In place of `model.generate(...)`."""
    from . import generation

    return generation.generate(model, **kwargs)


def build_early_engine(
    llm_class: Any, trainer: Any, args: Any, model: nn.Module, processing_class: Any, /, **kwargs: Any
) -> SharedLLM:
    """The same, in a trainer that is not one yet: Online DPO before TRL 0.23."""
    model.to(args.device)  # as the trainer would do later on
    owner = types.SimpleNamespace(model=model, processing_class=processing_class, trainer=trainer)
    return _engine_for(llm_class, owner, kwargs)[0]


def _engine_for(llm_class: Any, owner: Any, kwargs: dict[str, Any]) -> tuple[SharedLLM, Any]:
    """The engine, and the trainer that it is for."""
    try:
        return _found_or_built(llm_class, owner, kwargs)
    finally:
        _restore_environment()


def _found_or_built(llm_class: Any, owner: Any, kwargs: dict[str, Any]) -> tuple[SharedLLM, Any]:
    from vllm import LLM

    from . import engine

    if llm_class is not LLM:
        raise UnsupportedError(f"TRL's `LLM` is {llm_class!r}, not vLLM's class: another library has replaced it.")
    trainer = next((trainer for trainer in _trainers.values() if _builds_for(owner, trainer)), None)
    if trainer is None:
        raise UnsupportedError(
            f"Something other than a trainer that PatchFastRL knows asks for vLLM through {type(owner).__name__}. It "
            "is not supported: set use_vllm=False, or leave PatchFastRL() out."
        )
    # The checkpoint's name and precision: weights and configuration come from the live model.
    for name in ("model", "dtype"):
        kwargs.pop(name, None)
    # What vLLM's in-process executor reads. TRL sets it too, from 0.20 on.
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)
    if _environment.get("MASTER_PORT") is None:
        # Torch takes a free one while it listens. A number chosen here could be another process's by then.
        os.environ["MASTER_PORT"] = "0"
    ready = engine.brought_along(owner.model, kwargs)
    args = getattr(trainer, "args", None)
    return ready or engine.build(owner.model, owner.processing_class, args=args, **kwargs), trainer


def _builds_for(owner: Any, trainer: Any) -> bool:
    if trainer is owner or trainer is getattr(owner, "trainer", None):
        return True
    return hasattr(owner, "accelerator") and getattr(trainer, "accelerator", None) is owner.accelerator


def _restore_environment() -> None:
    for name, value in _environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def publish(owner: Any) -> None:
    """In place of TRL's weight sync."""
    engine_of(owner).publish_first()


def engine_of(owner: Any) -> SharedLLM:
    return owner.llm if hasattr(owner, "llm") else owner.vllm_engine  # GOLD's name for it, before TRL 1.0


def lora_request(llm: SharedLLM) -> Any:
    """A `LoRARequest` for the adapter in training, if one is active; None for a model that has no adapters.

    Published when the batch begins, if it changed: TRL's sync goes by its step counter, which does not notice a second
    `train()`, a best model that was loaded at the end, or another trainer of the same model.
    """
    return llm.request_to_publish()


# Called from TRL's `selective_log_softmax` and `entropy_from_logits` ------------------------------------------------


def selected_log_probs(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor | None:
    from . import log_probs

    return log_probs.selected_log_probs(logits, index)


def entropies(logits: torch.Tensor) -> torch.Tensor | None:
    from . import log_probs

    return log_probs.entropies(logits)


# For people ---------------------------------------------------------------------------------------------------------


def live_trainers() -> list[str]:
    """Patched trainers and shared engines that are alive, described for a message."""
    gc.unfreeze()  # vLLM freezes the heap when it builds an engine; what is frozen cannot be found dead
    gc.collect()
    alive = [f"{type(t).__name__} (model {type(getattr(t, 'model', None)).__name__})" for t in _trainers.values()]
    if not alive and "patchfastrl.llm" in sys.modules:
        alive = [f"the engine of a {type(llm.shared.model).__name__}" for llm in sys.modules["patchfastrl.llm"].live]
    return alive


def engine_report(trainer_or_model: Any) -> dict[str, Any]:
    """What the shared engine of a trainer (or model) has done so far.

    Returns:
        bytes_shared (int, bytes), publishes (int: adapter versions copied to the slot), layers_kept (int: layers that
        keep their activations instead of being recomputed; None: as transformers does it), seconds (dict: publish,
        generate, sleep, wake, build).
    """
    owner = getattr(trainer_or_model, "vllm_generation", trainer_or_model)
    llm = getattr(owner, "llm", None) or getattr(owner, "vllm_engine", None)
    if llm is None:
        raise UnsupportedError(f"{type(trainer_or_model).__name__} has no shared engine.")
    return llm.report()
