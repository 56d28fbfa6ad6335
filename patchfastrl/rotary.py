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
        rotate = _on_gpu(kernel, stock)
        install.while_patched(lambda journal: journal.set_attribute(modeling, NAME, rotate))


def compile_ahead(base: Any, rows: int, dtype: torch.dtype) -> None:
    """Compile the kernel for so many rows; Triton does that for each alignment of their length."""
    kernel, config = _kernel_for(base), base.config.get_text_config()
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    if kernel is None or None in heads:
        return
    device, size = next(base.parameters()).device, getattr(config, "head_dim", None) or config.hidden_size // heads[0]
    for tokens in (16, 17):
        shapes = [(rows, tokens, number, size) for number in heads]
        q, k = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
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
    said = []
    for owner in (module, other):
        function = inspect.unwrap(getattr(owner, name, None))  # type: ignore[arg-type]
        if not inspect.isfunction(function) or function.__module__ != owner.__name__:
            return False  # none, or somebody's replacement
        code = function.__code__
        numbers = [constant for constant in code.co_consts if not isinstance(constant, str)]  # without the docstring
        said.append((code.co_code, code.co_names, code.co_varnames, code.co_freevars, function.__defaults__, numbers))
    return said[0] == said[1] and not said[0][3]
