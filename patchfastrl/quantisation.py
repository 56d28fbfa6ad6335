"""Which weights an engine can be filled from: plain ones, and bitsandbytes' 4-bit. All others are refused by name.

Whoever quantises, and wherever a script asks for it: the arguments that a model is loaded with, the checkpoint's own
configuration, a model that is quantised already, vLLM's arguments.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .compat.versions import installed
from .errors import UnsupportedError
from .packed import quant_state

_FP8 = (
    " FP8 weights: most of vLLM's kernels have them or their scales transposed, requantised or repacked when the "
    "engine is built, so they are not shared."
)
_ONLY = (
    "of quantised models only bitsandbytes' 4-bit (BitsAndBytesConfig(load_in_4bit=True), QLoRA) can be sampled from "
    "here."
)
_INSTEAD = (
    "Load the model's 16-bit checkpoint without quantization_config (with LoRA the frozen base exists once) or in 4 "
    "bits, or train it with stock TRL and use_vllm=False."
)


# The arguments of from_pretrained -----------------------------------------------------------------------------------


def refuse_loading(name: str, kwargs: dict[str, Any]) -> None:
    """Refuse to load `name` with `from_pretrained(name, **kwargs)` quantised otherwise than in 4 bits by bitsandbytes.

    Raises:
        UnsupportedError: names what asked for it.
        ImportError: 4 bits without bitsandbytes.
    """
    from transformers import PretrainedConfig

    for word in ("load_in_8bit", "load_in_fp8", "gguf_file"):
        if kwargs.get(word):
            raise UnsupportedError(f"{word}={kwargs[word]!r}: {_ONLY}{_why(word)} {_INSTEAD}")
    given = kwargs.get("quantization_config")
    if given is not None and not _unpacks(given):
        _refuse(given)
    place = {k: kwargs[k] for k in ("cache_dir", "local_files_only", "revision", "subfolder", "token") if k in kwargs}
    declared = declared_by(PretrainedConfig.get_config_dict(name, **place)[0])
    if declared is None:
        if given is not None and _unpacks(given):
            raise UnsupportedError(f"{_named(given)} with dequantize=True: {name} is not quantised. Leave it out.")
        return
    if given is None or not _unpacks(given):  # transformers goes by the checkpoint's, whatever the script passes
        _refuse(declared, f"{name} declares ", _unpacked(declared))


def declared_by(config: dict[str, Any]) -> Any:
    """The quantisation that a checkpoint's config.json declares, None if there is none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # text_config of a composite model
    found = (part.get(word) for part in parts for word in ("quantization_config", "compression_config"))
    return next((quantisation for quantisation in found if quantisation), None)


def need_bitsandbytes(what: str) -> None:
    """Raises ImportError where it is not installed."""
    if installed("bitsandbytes") is None:
        raise ImportError(f"{what} needs bitsandbytes: `pip install bitsandbytes`, or load the model in 16 bits.")


# A model that is loaded ---------------------------------------------------------------------------------------------


def refuse_model(base: nn.Module) -> None:
    """Refuse a model of which some weight is neither plain nor bitsandbytes' 4-bit.

    Args:
        base: the model without its adapters.
    """
    config: Any = base.config
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        quantisation = getattr(config.get_text_config(), "quantization_config", None)
    if quantisation is None and (quantizer := getattr(base, "hf_quantizer", None)) is not None:
        quantisation = quantizer.quantization_config
    if quantisation is not None or getattr(base, "is_quantized", False):
        _refuse(quantisation, "the model is quantised: ")
    for name, parameter in base.named_parameters():
        # Quantised by hand: torchao, quanto and bitsandbytes' 8-bit are classes of their own, HQQ's are integers.
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1
        if not plain and quant_state(parameter) is None:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"{name} is a {type(parameter).__name__} of {dtype}: {_ONLY}{_why(dtype)} {_INSTEAD}"
            )


# vLLM's arguments ---------------------------------------------------------------------------------------------------


def refuse_engine(kwargs: dict[str, Any], packed: bool) -> None:
    """Take vLLM's `quantization` out of `kwargs`; refuse another one than TRL sets for a 4-bit model.

    Args:
        packed: whether the trainer's weights are bitsandbytes' 4-bit, which the engine's are unpacked from.
    """
    wanted = kwargs.pop("quantization", None)
    if wanted is not None and not (wanted == "bitsandbytes" and packed):
        raise UnsupportedError(
            f"quantization={wanted!r}: the engine's weights are the trainer's, so vLLM cannot quantise them on the "
            f"fly.{_why(wanted)} Leave it out, or load the trainer's model in 4 bits "
            "(BitsAndBytesConfig(load_in_4bit=True), QLoRA). float8_kv_cache=True makes only the KV cache smaller."
        )


# ---------------------------------------------------------------------------------------------------------------------


def _refuse(config: Any, where: str = "", instead: str = _INSTEAD) -> None:
    """Raise UnsupportedError unless `config` is bitsandbytes' 4-bit."""
    if _field(config, "load_in_4bit"):
        need_bitsandbytes(f"{where}{_named(config)}")
        return
    why = _why(f"{_method(config)} {_field(config, 'format')}")
    raise UnsupportedError(f"{where}{_named(config)}: {_ONLY}{why} {instead}")


def _why(words: str) -> str:
    """What there is to say of FP8 weights, if these words are about them (compressed-tensors: "float-quantized")."""
    return _FP8 if any(word in words for word in ("fp8", "float8", "float-quantized")) else ""


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _method(config: Any) -> str:
    method = _field(config, "quant_method")
    return str(getattr(method, "value", method) or "unknown")


def _named(config: Any) -> str:
    kind = "quantization_config" if isinstance(config, dict) or config is None else type(config).__name__
    bits = " in 8 bits" if _field(config, "load_in_8bit") else ""
    return f"{kind} ({_method(config)}{bits})"


def _unpacks(config: Any) -> bool:
    """Whether it makes transformers unpack a quantised checkpoint while it is loaded, into plain weights."""
    return bool(_field(config, "dequantize"))


def _unpacked(config: Any) -> str:
    """What to do with a checkpoint that declares `config`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(_method(config))
    if kind is None or "dequantize" not in inspect.signature(kind.__init__).parameters:
        return _INSTEAD
    return (
        f"Have transformers unpack it while it is loaded: pass quantization_config={kind.__name__}(dequantize=True) "
        "with a 16-bit dtype (in model_init_kwargs, or to FastLanguageModel with load_in_4bit=False). Or load "
        "the model's 16-bit checkpoint."
    )
