"""Attention that leaves padding out: torch's own flash attention over the tokens of a batch, row after row.

A padded batch has a mask, which flash attention in `scaled_dot_product_attention` knows nothing of: its slower kernel
computes with every token, and with keys and values copied for each query head.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional

from .compat.versions import installed

NAME = "patchfastrl"  # of the implementation, as transformers knows it
TORCH, TRANSFORMERS = Version("2.11"), Version("5.5")  # varlen_attn with a causal window; masks by their lengths
_LARGEST_HEAD = 256
# Of B * T * T * hidden size: from here on a layer computes longer with a mask than it takes to launch the kernels that
# leave padding out (0.7 ms, on an H200's host).
_WORTH_IT = 2**33
_CAUSAL = (-1, 0)  # how far a token looks, back and ahead


def leave_padding_out(base: Any) -> None:
    """Let a model that computes attention with `scaled_dot_product_attention` leave padding out."""
    releases = ((installed("torch"), TORCH), (installed("transformers"), TRANSFORMERS))
    config = base.config.get_text_config()
    known = all(release is not None and release >= first for release, first in releases)
    if not known or config._attn_implementation != "sdpa" or _asks_for_sdpa(base):
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    config._attn_implementation = NAME


def _asks_for_sdpa(base: nn.Module) -> bool:
    """Whether the model's source treats that implementation in a way of its own, or cannot be read."""
    from transformers import PreTrainedModel

    for name in {type(m).__module__ for m in base.modules() if isinstance(m, PreTrainedModel)}:
        try:
            source = inspect.getsource(sys.modules[name])
        except OSError:
            return True
        if '"sdpa"' in source or "'sdpa'" in source:
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


_latest: tuple[weakref.ref[torch.Tensor], Rows] | None = None  # each layer of a forward asks for the same


def _rows(padding: torch.Tensor) -> Rows:
    global _latest
    if _latest is None or _latest[0]() is not padding:
        _latest = weakref.ref(padding), Rows.of(padding)
    return _latest[1]


def mask(**given: Any) -> torch.Tensor | None:
    """In place of transformers' `sdpa_mask`: where padding and causality are all of it, the padding, (B, T)."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    padding = given.get("attention_mask")
    if (
        not isinstance(padding, torch.Tensor)
        or padding.dim() != 2
        or not given["q_length"] == given["kv_length"] == padding.shape[1]
        or given["mask_function"] is not causal_mask_function
        or not given.get("allow_is_causal_skip", True)
        or padding.numel() * padding.shape[1] * given["config"].hidden_size < _WORTH_IT
        or torch.compiler.is_compiling()
    ):
        made: torch.Tensor | None = sdpa_mask(**given)
        return made
    return None if padding.all() else padding


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """In place of transformers' `sdpa_attention_forward`; (B, heads, T, size) becomes (B, T, heads, size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dim() != 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if not _fits(query, key, value, kwargs):
        causal = torch.ones(2 * query.shape[2:3], dtype=torch.bool, device=query.device).tril()
        whole = causal & attention_mask[:, None, None, :]
        return sdpa_attention_forward(module, query, key, value, whole, scaling=scaling, **kwargs)
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
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= _LARGEST_HEAD
        and query.shape[-1] % 8 == 0
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and not torch.are_deterministic_algorithms_enabled()
    )
