"""Attention that leaves padding out: torch's own flash attention over the tokens of a batch, row after row.

A padded batch has a mask, which flash attention in `scaled_dot_product_attention` knows nothing of: its slower kernel
computes with every token, and with keys and values copied for each query head.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from . import install
from .compat import varlen_attention

SDPA = "sdpa"  # transformers' name for it
_AMPERE = (8, 0)
_LARGEST_HEAD = 256
# Of B * T * T * hidden size: from here on a layer computes longer with a mask than it takes to launch the kernels that
# leave padding out (0.7 ms, on an H200's host).
_WORTH_IT = 2**33
_CAUSAL = (-1, 0)  # how far a token looks, back and ahead

_configs: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # of the models; they have no hash


def leave_padding_out(base: Any) -> None:
    """While TRL is patched, a model that computes with `scaled_dot_product_attention` leaves padding out."""
    config = base.config.get_text_config()
    if not varlen_attention.available() or config._attn_implementation != SDPA or _asks_for_sdpa(base):
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _configs[id(config)] = config
    install.while_patched(functools.partial(_replace, ALL_MASK_ATTENTION_FUNCTIONS, mask))
    install.while_patched(functools.partial(_replace, ALL_ATTENTION_FUNCTIONS, attend))


def _replace(interface: Any, replacement: Callable[..., Any], journal: Any) -> None:
    stock = interface[SDPA]
    if getattr(stock, "func", None) is not replacement:
        interface.register(SDPA, functools.partial(replacement, stock))
        journal.on_undo(functools.partial(interface.register, SDPA, stock))


def _asks_for_sdpa(base: nn.Module) -> bool:
    """Whether the model's source treats that implementation in a way of its own, or cannot be read."""
    from transformers import PreTrainedModel

    for name in {type(m).__module__ for m in base.modules() if isinstance(m, PreTrainedModel)}:
        try:
            lines = inspect.getsource(sys.modules[name]).splitlines()
        except (OSError, TypeError):  # a class that was defined in a notebook
            return True
        if any("_attn_implementation" in line and SDPA in line for line in lines):
            return True
    return False


class Rows(NamedTuple):
    """The tokens of a padded batch. `index`: (N,), their places in it, int64. `starts`: (B + 1,), int32."""

    index: torch.Tensor
    starts: torch.Tensor
    longest: int

    @classmethod
    def of(cls, padding: torch.Tensor) -> Rows:
        """From a mask, (B, T), bool."""
        lengths = padding.sum(-1, dtype=torch.int32)
        starts = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(padding.flatten().nonzero()[:, 0], starts, int(lengths.max()))


_latest: tuple[weakref.ref[torch.Tensor], int, Rows] | None = None  # each layer of a forward asks for the same


def _rows(padding: torch.Tensor) -> Rows:
    global _latest
    version: int = 0 if padding.is_inference() else padding._version
    if _latest is None or _latest[0]() is not padding or _latest[1] != version:
        _latest = weakref.ref(padding), version, Rows.of(padding)
    return _latest[2]


def mask(stock: Callable[..., Any], **given: Any) -> torch.Tensor | None:
    """In place of transformers' `sdpa_mask`: where padding and causality are all of it, the padding, (B, T)."""
    from transformers.masking_utils import causal_mask_function

    padding: Any = given.get("attention_mask")
    config: Any = given.get("config")
    if (
        id(config) not in _configs
        or not isinstance(padding, torch.Tensor)
        or padding.dim() != 2
        or not given["q_length"] == given["kv_length"] == padding.shape[1]
        or given["mask_function"] is not causal_mask_function
        or not given.get("allow_is_causal_skip", True)
        or padding.numel() * padding.shape[1] * config.hidden_size < _WORTH_IT
        or torch.compiler.is_compiling()
    ):
        made: torch.Tensor | None = stock(**given)
        return made
    return None if padding.all() else padding


def attend(
    stock: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """In place of transformers' `sdpa_attention_forward`; (B, heads, T, size) becomes (B, T, heads, size)."""
    if attention_mask is None or attention_mask.dim() != 2:
        return stock(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if torch.is_autocast_enabled(query.device.type):  # as torch does it: rotated in float32, they are of two dtypes
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if not _fits(query, key, value, kwargs):
        causal = torch.ones(2 * query.shape[2:3], dtype=torch.bool, device=query.device).tril()
        whole = causal & attention_mask[:, None, None, :]
        return stock(module, query, key, value, whole, scaling=scaling, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    rows = _rows(attention_mask)
    batch, heads, tokens, size = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1).index_select(0, rows.index) for t in (query, key, value))
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    found = varlen_attn(
        q, k, v, rows.starts, rows.starts, rows.longest, rows.longest, scale=scaling, window_size=_CAUSAL
    )
    padded = found.new_zeros(batch * tokens, heads, size).index_copy(0, rows.index, found)
    return padded.view(batch, tokens, heads, size), None


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether flash attention computes this."""
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) >= _AMPERE
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= _LARGEST_HEAD
        and query.shape[-1] % 8 == 0
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and not torch.are_deterministic_algorithms_enabled()
    )
