"""While weights are shared, stop what would tear them apart or write through them by accident.

The guards are attributes of torch's, transformers' and peft's classes, put in place with the first engine and taken
away with the last one. A call that touches no shared storage goes through untouched.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import GuardError
from .trace import storage_key

if TYPE_CHECKING:
    from .llm import SharedLLM

_protected: dict[int, weakref.ref[SharedLLM]] = {}  # storage key -> engine
_replaced: list[tuple[Any, str, Any]] = []
_inside = threading.local()


def stopped(what: str, why: str) -> GuardError:
    return GuardError(
        f"{what} was stopped: the model's weights are shared with the vLLM engine, and {why}. "
        "Work on a copy (copy.deepcopy(model)), or end sharing first: patchfastrl.guards.unshare(model) gives "
        "the model "
        "storage of its own and closes the engine."
    )


def engine_of(model: nn.Module) -> SharedLLM | None:
    """The live engine that shares any of `model`'s weights."""
    if not _protected:
        return None
    return next((_protected[k]() for p in model.parameters() if (k := storage_key(p)) in _protected), None)


def unshare(model: nn.Module) -> None:
    """Give every shared parameter of `model` storage of its own, and close the engine."""
    engine = engine_of(model)
    if engine is None:
        return
    for parameter in engine.shared.parameters.values():
        parameter.data = parameter.data.clone()
    engine.close("its model was given storage of its own (merged, or unshared by hand).")


# Life cycle ---------------------------------------------------------------------------------------------------------


def protect(engine: SharedLLM) -> None:
    """Guard the weights that `engine` shares, and the engine's own ways of overwriting them."""
    if not _replaced:
        _install()
    for key in engine.shared.keys.values():
        _protected[key] = weakref.ref(engine)
    why = "it would write other weights through the shared storage"
    engine.shared.engine_model.load_weights = _refuser("load_weights() of the engine's model", why)
    engine.model_runner.reload_weights = _refuser("reload_weights() of the engine", why)


def release(keys: list[int]) -> None:
    """The storages `keys` are shared no longer."""
    for key in keys:
        _protected.pop(key, None)
    if not _protected:
        while _replaced:
            owner, name, before = _replaced.pop()
            setattr(owner, name, before)


def _install() -> None:
    from accelerate import accelerator
    from accelerate.utils import other
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

    packed = [(lora.Linear4bit, "merge", _guard_merge)] if hasattr(lora, "Linear4bit") else []
    for owner, name, guard in (
        *packed,
        (nn.Module, "_apply", _guard_apply),
        (lora.Linear, "merge", _guard_merge),
        (BaseTuner, "merge_and_unload", _unshare_first),
        (PreTrainedModel, "resize_token_embeddings", _guard_resize),
        (accelerator, "clean_state_dict_for_safetensors", _keep_all),
        (other, "clean_state_dict_for_safetensors", _keep_all),
    ):
        before = vars(owner)[name]
        _replaced.append((owner, name, before))
        setattr(owner, name, guard(before))


# Guards -------------------------------------------------------------------------------------------------------------


def _refuser(what: str, why: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise stopped(what, why)

    return refuse


def _guard_apply(before: Any) -> Any:
    """`.to()`, `.cuda()`, `.half()`, `.float()`, `.to_empty()` and the like all end here."""

    @functools.wraps(before)
    def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        if getattr(_inside, "apply", False):
            return before(self, fn, recurse)
        kinds = {(p.dtype, p.device) for p in self.parameters(recurse) if storage_key(p) in _protected}
        for dtype, device in kinds:
            probe = torch.full((1,), 0.5, dtype=dtype, device=device)
            moved = fn(probe)
            if moved.dtype != dtype or moved.device != device or not torch.equal(moved, probe):
                raise stopped(
                    f"Moving or casting {type(self).__name__} from {dtype} on {device} to {moved.dtype} on "
                    f"{moved.device}",
                    "the moved copy would no longer be what the engine samples from",
                )

        def unless_shared(tensor: torch.Tensor) -> torch.Tensor:
            # `.to("cpu:0")` copies a tensor that is on "cpu" already, and TRL's second trainer asks for just that.
            return tensor if storage_key(tensor) in _protected else fn(tensor)

        _inside.apply = True
        try:
            return before(self, unless_shared if kinds else fn, recurse)
        finally:
            _inside.apply = False

    return _apply


def _guard_merge(before: Any) -> Any:
    @functools.wraps(before)
    def merge(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if engine_of(self) is not None:
            raise stopped(
                "Merging an adapter in place (merge_adapter)",
                "the engine would apply the adapter twice, and bfloat16 weights would not come back exactly",
            )
        return before(self, *args, **kwargs)

    return merge


def _guard_resize(before: Any) -> Any:
    @functools.wraps(before)
    def resize_token_embeddings(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        wanted = args[0] if args else kwargs.get("new_num_tokens")
        if wanted not in (None, self.get_input_embeddings().weight.shape[0]) and engine_of(self) is not None:
            raise stopped(
                "resize_token_embeddings()", "the engine's vocabulary has a fixed size. Resize before training"
            )
        return before(self, *args, **kwargs)

    return resize_token_embeddings


def _unshare_first(before: Any) -> Any:
    @functools.wraps(before)
    def merge_and_unload(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        unshare(self)
        return before(self, *args, **kwargs)

    return merge_and_unload


def _keep_all(before: Any) -> Any:
    """accelerate takes parts of one storage for tied weights and would save one of them only."""

    @functools.wraps(before)
    def clean_state_dict_for_safetensors(state_dict: dict[str, Any]) -> Any:
        def on_its_own(value: Any) -> Any:
            part = isinstance(value, torch.Tensor) and value.nbytes < value.untyped_storage().nbytes()
            return value.clone() if part and storage_key(value) in _protected else value

        return before({name: on_its_own(value) for name, value in state_dict.items()})

    return clean_state_dict_for_safetensors
