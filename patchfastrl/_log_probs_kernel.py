"""The kernels of `log_probs` on a GPU. A module of its own: Triton is there with PyTorch's CUDA builds only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048  # logits of one token that a program reads at once


@triton.jit(do_not_specialize=["tokens"])
def _forward(  # type: ignore[no-untyped-def]
    logits, index, selected, lses, entropies, tokens, of_row, of_token, vocabulary, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    logits += (token // tokens) * of_row + (token % tokens) * of_token
    largest = -1e38
    total = 0.0  # of exp(x - largest)
    weighted = 0.0  # of exp(x - largest) * (x - largest)
    for first in tl.range(0, vocabulary, BLOCK, num_stages=3):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(x, 0))
        scale = tl.exp(before - largest)
        weighted = scale * (weighted + (before - largest) * total)
        total = total * scale
        e = tl.exp(x - largest)
        total += tl.sum(e, 0)
        weighted += tl.sum(tl.where(e > 0, e * (x - largest), 0.0), 0)
    lse = largest + tl.log(total)
    tl.store(lses + token, lse)
    tl.store(entropies + token, tl.log(total) - weighted / total)
    chosen = tl.load(index + token)
    inside = (chosen >= 0) & (chosen < vocabulary)
    tl.store(selected + token, tl.load(logits + chosen, mask=inside, other=float("nan")) - lse)


@triton.jit(do_not_specialize=["tokens"])
def _backward(  # type: ignore[no-untyped-def]
    logits, index, lses, gradient, result, tokens, of_row, of_token, to_row, to_token, vocabulary,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, place = token // tokens, token % tokens
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    x = tl.load(logits + row * of_row + place * of_token + column, mask=inside, other=0.0)
    chosen = (column == tl.load(index + token)).to(tl.float32)
    values = tl.load(gradient + token) * (chosen - tl.exp(x - tl.load(lses + token)))
    tl.store(result + row * to_row + place * to_token + column, values, mask=inside)


def forward(logits: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `log_probs._forward`."""
    rows, tokens, vocabulary = logits.shape
    selected, lses, entropies = (logits.new_empty(rows, tokens) for _ in range(3))
    with torch.cuda.device(logits.device):
        _forward[(rows * tokens,)](
            logits, index.contiguous(), selected, lses, entropies,
            tokens, logits.stride(0), logits.stride(1), vocabulary, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return selected, lses, entropies


def backward(
    logits: torch.Tensor, index: torch.Tensor, lse: torch.Tensor, gradient: torch.Tensor, result: torch.Tensor
) -> None:
    """As `log_probs._backward`."""
    rows, tokens, vocabulary = logits.shape
    with torch.cuda.device(logits.device):
        _backward[(rows * tokens, triton.cdiv(vocabulary, _BLOCK))](
            logits, index.contiguous(), lse, gradient.contiguous(), result, tokens,
            logits.stride(0), logits.stride(1), result.stride(0), result.stride(1), vocabulary,
            BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
