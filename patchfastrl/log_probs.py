"""Log-probabilities of chosen tokens, and entropies: each is one pass over the logits, and one more for the gradient.

TRL's functions compute the same in many, each of them as large as the logits, which for small models are most of a
training step.
"""

from __future__ import annotations

from typing import Any

import torch

from . import install


def selected_log_probs(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor | None:
    """What `selective_log_softmax` returns, (B, T), float32; None where TRL's statements are to do it.

    Args:
        logits: (B, T, V). index: (B, T), whose log-probabilities.
    """
    if not _wanted(logits) or index.shape != logits.shape[:-1]:
        return None
    whole, first = _whole(logits)
    selected: torch.Tensor = _Selected.apply(whole, logits.detach(), index, first)
    return selected


def entropies(logits: torch.Tensor) -> torch.Tensor | None:
    """What `entropy_from_logits` returns, (B, T), float32; None where TRL's statements are to do it.

    Args:
        logits: (B, T, V).
    """
    if not _wanted(logits) or (logits.requires_grad and torch.is_grad_enabled()):
        return None
    return _forward(logits.detach(), _zeros(logits))[2]


def compile_ahead(device: torch.device, vocabulary: int) -> None:
    """Compile the kernels for logits of such a vocabulary; Triton does that for each alignment of its rows."""
    logits = torch.zeros(2, 2, 16 + vocabulary % 16, dtype=torch.float32, device=device)
    selected, lse, _ = _forward(logits, _zeros(logits))
    _backward(logits, _zeros(logits), lse, selected, torch.empty_like(logits))


def _zeros(logits: torch.Tensor) -> torch.Tensor:
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def _wanted(logits: torch.Tensor) -> bool:
    """Logits of a step in mixed precision are float32; TRL rounds those of other dtypes in ways of its own."""
    return (
        install.settings().fuses(logits.is_cuda)
        and logits.dtype == torch.float32
        and logits.dim() == 3
        and logits.numel() > 0
        and logits.stride(-1) == 1
    )


def _whole(logits: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the logits are a slice of, and at which token it begins.

    Their gradient is computed there. By way of the slices it would be copied once for each.
    """
    base = logits._base
    if (
        base is None
        or not base.requires_grad
        or logits.grad_fn is None  # a slice of which somebody made a leaf
        or logits.retains_grad
        or not base.is_contiguous()
        or base.dim() != 3
        or (base.shape[0], base.shape[2], *base.stride()) != (logits.shape[0], logits.shape[2], *logits.stride())
    ):
        return logits, 0
    first, rest = divmod(logits.storage_offset() - base.storage_offset(), base.stride(1))
    return (base, first) if rest == 0 and first + logits.shape[1] <= base.shape[1] else (logits, 0)


class _Selected(torch.autograd.Function):
    """`whole` has the gradient, `logits` are the part of it, from the token `first` on, that `index` belongs to."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, logits: torch.Tensor, index: torch.Tensor, first: int) -> torch.Tensor:
        selected, lse, _ = _forward(logits, index)
        ctx.save_for_backward(logits, index, lse)
        ctx.whole, ctx.first = whole.shape, first
        return selected

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, index, lse = ctx.saved_tensors
        result = logits.new_empty(ctx.whole)
        end = ctx.first + logits.shape[1]
        result[:, : ctx.first].zero_()
        result[:, end:].zero_()
        _backward(logits, index, lse, gradient, result[:, ctx.first : end])
        return result, None, None, None


def _forward(logits: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of `index`, log-sum-exps and entropies, each (B, T)."""
    if logits.is_cuda:
        from . import _log_probs_kernel

        return _log_probs_kernel.forward(logits, index)
    selected, lses, found = [], [], []
    for row, chosen in zip(logits, index, strict=True):
        lse = row.logsumexp(-1)
        logps = row - lse[:, None]
        selected.append(logps.gather(-1, chosen[:, None])[:, 0])
        lses.append(lse)
        found.append(-(logps.exp() * logps).sum(-1))
    return torch.stack(selected), torch.stack(lses), torch.stack(found)


def _backward(
    logits: torch.Tensor, index: torch.Tensor, lse: torch.Tensor, gradient: torch.Tensor, result: torch.Tensor
) -> None:
    """`result` = `gradient` * (1 where it is `index` - softmax of the logits)."""
    if logits.is_cuda:
        from . import _log_probs_kernel

        _log_probs_kernel.backward(logits, index, lse, gradient, result)
        return
    torch.sub(logits, lse[..., None], out=result).exp_().mul_(-gradient[..., None])
    result.scatter_add_(-1, index[..., None], gradient[..., None])
