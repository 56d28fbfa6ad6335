"""The adapter in training: which modules it has, and what of it an engine can serve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import UnsupportedError
from .structure import remembered

# vLLM's ids are the caller's choice. One that nobody else would pick: a request with our id would be served our slot.
ADAPTER_ID = 0x5EED_F00D & 0x7FFF_FFFF
ADAPTER_PATH = "patchfastrl:in-memory"  # never read: vLLM fails loudly if it ever tries to load the adapter itself

_publishing = True


def publishing() -> bool:
    return _publishing


@contextlib.contextmanager
def publishing_disabled() -> Iterator[None]:
    """For controls in tests and demos only: nothing is published and nothing checks that the slot is current."""
    global _publishing
    _publishing, before = False, _publishing
    try:
        yield
    finally:
        _publishing = before


# What can be served -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """One trained LoRA module: `base(x) + scaling * B(A(x))`.

    Attributes:
        module: name of the adapted module in the base model.
        layer: PEFT's layer there. name: the adapter's name in it.
        a: lora_A, shape (rank, in_features). b: lora_B, shape (out_features, rank). Live parameters.
    """

    module: str
    layer: Any
    name: str
    a: nn.Parameter
    b: nn.Parameter

    @property
    def scaling(self) -> float:
        """Read live: PEFT rescales adapters in place (`set_scale`, `rescale_adapter_scale`)."""
        return self.layer.scaling[self.name]


@remembered
def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that the model is trained with; None for a model without adapters or with them disabled.

    Raises:
        UnsupportedError: several adapters are active, or they are not PEFT's `PeftModel`'s.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            raise UnsupportedError(
                f"This {type(model).__name__} has adapters inside (model.add_adapter, or a mixed model), which "
                "the engine "
                "would not see. Wrap the model with peft.get_peft_model(model, config), or give the trainer a "
                "peft_config."
            )
        return None
    if any(m.disable_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)):
        return None
    names = model.active_adapters
    if len(names) != 1:
        raise UnsupportedError(
            f"{len(names)} adapters are active ({', '.join(names)}); the engine serves one. "
            "Choose it with model.set_adapter(name)."
        )
    return names[0]


_VARIANTS = ("use_bdlora", "kasa_config", "velora_config", "monteclora_config")


def refuse_unservable(peft_config: Any) -> None:
    """Refuse, by name and from the configuration alone, what vLLM's LoRA layers cannot compute.

    Raises:
        UnsupportedError: names the setting and the alternative.
    """
    from peft import LoraConfig, PeftType

    stock = "or leave PatchFastRL() out and train with stock TRL"
    if not isinstance(peft_config, LoraConfig) or peft_config.peft_type != PeftType.LORA:  # AdaLoRA's is a subclass
        raise UnsupportedError(
            f"{type(peft_config).__name__} ({peft_config.peft_type}) is not LoRA, the only adapter that vLLM "
            "serves. Use a "
            f"LoraConfig, {stock}."
        )
    parameters = getattr(peft_config, "target_parameters", None) or ()
    refused = {
        "use_dora=True": getattr(peft_config, "use_dora", False),
        f"bias={peft_config.bias!r}": peft_config.bias != "none",
        "lora_bias=True": getattr(peft_config, "lora_bias", False),
        f"modules_to_save={peft_config.modules_to_save!r}": peft_config.modules_to_save,
        # With transformers 5 PEFT turns target_modules that name a mixture's experts or router into these.
        f"target_parameters={sorted(parameters)!r}": parameters,
        "trainable_token_indices": getattr(peft_config, "trainable_token_indices", None),
        "layer_replication": getattr(peft_config, "layer_replication", None),
        "alora_invocation_tokens": getattr(peft_config, "alora_invocation_tokens", None),
        "arrow_config": getattr(peft_config, "arrow_config", None),
        "use_qalora=True": getattr(peft_config, "use_qalora", False),
        **{name: getattr(peft_config, name, None) for name in _VARIANTS},
    }
    found = [name for name, value in refused.items() if value]
    if found:
        raise UnsupportedError(
            f"LoraConfig({', '.join(found)}): vLLM serves plain LoRA matrices only, so the engine would sample "
            "from another "
            f"policy than the one in training. Drop it, {stock}."
        )


def adapters_of(model: nn.Module, name: str) -> list[Adapter]:
    """The LoRA modules of adapter `name`.

    Raises:
        UnsupportedError: something is trained, or adapted, that the engine cannot serve.
    """
    from peft import PeftModel
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    # PEFT defines the second only where bitsandbytes is installed.
    servable = [kind for kind in (lora.Linear, getattr(lora, "Linear4bit", None)) if kind is not None]

    assert isinstance(model, PeftModel)
    refuse_unservable(model.peft_config[name])
    found, served = [], set()
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise UnsupportedError(f"The adapter is merged into {path}. Call model.unmerge_adapter() first.")
        if name not in getattr(module, "lora_A", {}):
            if name in getattr(module, "lora_embedding_A", {}):
                raise UnsupportedError(
                    f"The adapter targets the embedding {path}, which the engine's slot cannot hold. Take it out of "
                    "target_modules."
                )
            continue
        if type(module) not in servable or getattr(module, "lora_variant", {}).get(name):
            variant = getattr(module, "lora_variant", {}).get(name)
            kind = type(module).__name__ if variant is None else type(variant).__name__
            raise UnsupportedError(f"{path} is adapted by PEFT's {kind}, which the engine's slot cannot hold.")
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        found.append(Adapter(path, module, name, a, b))
        served |= {id(a), id(b)}
    trained = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in served]
    if trained:
        raise UnsupportedError(
            f"{', '.join(trained[:4])}{' and more' if len(trained) > 4 else ''} would be trained beside adapter "
            f"{name!r}. "
            "Train the adapter alone (requires_grad=False for the rest), or the whole model without an adapter."
        )
    if not found:
        raise UnsupportedError(f"Adapter {name!r} has no LoRA module: nothing would be trained.")
    return found


@remembered
def active_adapters(model: nn.Module) -> list[Adapter]:
    """The LoRA modules that the model is trained with; empty without an adapter, or with it disabled."""
    name = active_adapter(model)
    return [] if name is None else adapters_of(model, name)


def slot_rank(model: nn.Module) -> int:
    """The largest rank of any adapter of `model`."""
    from peft.tuners.lora import LoraLayer

    return max((r for m in model.modules() if isinstance(m, LoraLayer) for r in m.r.values()), default=1)
