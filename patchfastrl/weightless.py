"""vLLM's model built without its weights: they have shape, dtype and class, and no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .errors import SharingError

# Parameters up to this many elements keep the memory that they were built with: some of them (a KV scale) hold a
# default that no checkpoint overwrites.
_SMALL = 4096

_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_meta", "requires_grad")
_LOOKS = {  # at a tensor, not into it
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel),
}


def as_loader(on_load: Callable[[nn.Module], None], on_loaded: Callable[[nn.Module, Any], None]) -> type:
    """A vLLM model loader class: models are built without memory.

    Args:
        on_load: called with the engine's model in place of loading it.
        on_loaded: called with it and vLLM's configuration when vLLM has done what it does to a loaded model.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class SharedWeightLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """Nothing to download: the weights are the trainer's."""

        def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
            if model_config.using_transformers_backend():
                # Refused before it is built: building it changes transformers' own class, the trainer's.
                raise SharingError(
                    f"vLLM has no {model_config.hf_config.architectures[0]} of its own, and its Transformers backend "
                    "cannot share weights. Train this model with stock TRL (leave PatchFastRL() out), or train a model "
                    "of a supported family."
                )
            if model_config.use_mla:
                raise SharingError(
                    f"vLLM's {model_config.hf_config.architectures[0]} attends with products of weights that it makes "
                    "while loading (multi-head latent attention), so it would not follow the trainer's. Train this "
                    "model with stock TRL (leave PatchFastRL() out)."
                )
            with without_memory() as self._end:
                model = super().load_model(vllm_config, model_config, *args, **kwargs)
            on_loaded(model, vllm_config)  # outside: torch compiles nothing that the block would look at
            return model

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            self._end()
            on_load(model)

    return SharedWeightLoader


@contextlib.contextmanager
def without_memory() -> Iterator[Callable[[], None]]:
    """Build modules whose parameters have no memory: not from the moment they are registered, and mostly never.

    Yields a function that ends it early, while the block still runs.
    """
    register = nn.Module.register_parameter
    mode = _EmptyIsMeta()

    def register_without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if mode.on and param is not None and not param.is_meta and param.numel() > _SMALL:
            become(param, torch.empty_like(param.data, device="meta"))

    nn.Module.register_parameter = register_without_memory  # type: ignore[method-assign]
    try:
        with mode:
            yield mode.end
    finally:
        mode.end()
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _EmptyIsMeta(TorchFunctionMode):
    """What `torch.empty` returns gets memory when somebody does something with it, but for making it a parameter.

    Memory for each weight until it is registered would be one more embedding at a time: a quarter of a small model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self._devices: Any = WeakIdKeyDictionary()  # of what has no memory yet: where it is to have it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            if not self.on or kwargs.get("pin_memory") or kwargs.get("out") is not None:
                return func(*args, **kwargs)
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.numel() <= _SMALL:
                return func(*args, **kwargs)
            self._devices[made] = torch.device(kwargs.get("device") or torch.get_default_device())
            return made
        if len(self._devices) and func not in _LOOKS:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor in self._devices:
                    self._give_memory(tensor)
        return func(*args, **kwargs)

    def end(self) -> None:
        self.on = False
        for tensor in list(self._devices):
            self._give_memory(tensor)

    def _give_memory(self, tensor: torch.Tensor) -> None:
        device = self._devices.pop(tensor)
        torch.utils.swap_tensors(tensor, torch.empty_like(tensor, device=device))


def become(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Put `data` (maybe on another device, which `.data =` refuses) under the same Parameter object."""
    twin = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, twin)
