"""Queries and keys rotated in one pass, by Liger's kernel, where a model rotates them as Llama does."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import install
from .compat.versions import installed

NAME = "apply_rotary_pos_emb"  # in transformers' modules: a function, not a method, so it is every model's of a kind


def use_liger(base: Any) -> None:
    """Rotate with Liger's kernel in models of this kind: on a GPU, in what is not compiled."""
    modeling: Any = sys.modules[type(base).__module__]
    stock, kernel = getattr(modeling, NAME, None), _kernel_for(base)
    if kernel is not None and not getattr(stock, "patchfastrl", False):
        install.set_until_unpatched(modeling, NAME, _on_gpu(kernel, stock))


def compile_ahead(base: Any, rows: int, dtype: torch.dtype) -> None:
    """Compile the kernel for so many rows; Triton does that for each alignment of their length."""
    kernel, config = _kernel_for(base), base.config.get_text_config()
    if kernel is None:
        return
    heads, device = config.num_attention_heads, next(base.parameters()).device
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    for tokens in (16, 17):
        q, k = (
            torch.zeros(rows, tokens, n, size, dtype=dtype, device=device, requires_grad=True)
            for n in (heads, config.num_key_value_heads)
        )
        angles = torch.zeros(1, tokens, size, dtype=base.dtype, device=device)
        rotated = kernel(q.transpose(1, 2), k.transpose(1, 2), angles, angles)
        torch.autograd.grad(rotated[0].sum() + rotated[1].sum(), (q, k))


def _kernel_for(base: Any) -> Callable[..., Any] | None:
    """Liger's, if it is installed and the model rotates as Llama does."""
    from transformers.models.llama import modeling_llama

    modeling = sys.modules[type(base).__module__]
    if installed("liger-kernel") is None or not all(_same(modeling, modeling_llama, n) for n in (NAME, "rotate_half")):
        return None
    from liger_kernel.ops.rope import LigerRopeFunction

    kernel: Callable[..., Any] = LigerRopeFunction.apply
    return kernel


def _on_gpu(kernel: Callable[..., Any], stock: Any) -> Callable[..., Any]:
    @functools.wraps(stock)
    def rotate(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = len(args) == 2 and not kwargs  # cosines and sines
        if plain and q.is_cuda and q.dtype == k.dtype and not torch.compiler.is_compiling():
            return kernel(q, k, *args)
        return stock(q, k, *args, **kwargs)

    rotate.patchfastrl = True  # type: ignore[attr-defined]
    return rotate


def _same(module: Any, other: Any, name: str) -> bool:
    """Whether a function of two modules says the same; transformers has a copy in each."""
    functions = [inspect.unwrap(found) for found in (getattr(m, name, None) for m in (module, other)) if found]
    codes = [getattr(function, "__code__", None) for function in functions]
    if len(codes) != 2 or any(code is None or code.co_freevars for code in codes):
        return False
    said = [
        (code.co_code, code.co_names, code.co_varnames, [c for c in code.co_consts if not isinstance(c, str)])
        for code in codes
        if code is not None
    ]
    return said[0] == said[1] and functions[0].__defaults__ == functions[1].__defaults__
