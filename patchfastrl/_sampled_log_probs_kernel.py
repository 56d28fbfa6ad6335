"""The kernel of `compat.sampled_log_probs`: log-probability and rank of one drawn token a row, for few rows.

`_log_probs_kernel` is training's, for thousands of tokens, with entropies and no ranks. A module of its own: Triton is
there with PyTorch's CUDA builds only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Logits that a program reads at once, and its warps. There is a program for each row, and with 8 rows most of a GPU has
# nothing to do, so one is as large as it can be: 15 microseconds for 8 rows of 128,256 on an H200. (Two kernels, with
# each row in parts, take 4, and the processor 20 more to launch the second one; small models wait for that.)
_BLOCK, _WARPS = 32768, 32


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    logits, of_row, token_ids, log_probs, ranks, vocabulary, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * of_row
    drawn = tl.load(logits + tl.load(token_ids + row)).to(tl.float32)
    largest = -1e38  # not -inf: a block may be cut off altogether, by top-k say
    total = 0.0  # of exp(x - largest)
    rank = 0
    for first in tl.range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
        rank += tl.sum((inside & (x >= drawn)).to(tl.int32), 0)
    tl.store(log_probs + row, drawn - largest - tl.log(total))
    tl.store(ranks + row, rank)


def log_probs_and_ranks(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one token a row, as vLLM defines them.

    Args:
        logits: (rows, vocabulary), on a GPU, in any floating dtype; a row's entries lie one after the other.
        token_ids: (rows,), int64.

    Returns:
        Log-probabilities, (rows,), float32, and how many logits are as large as the token's or larger, (rows,), int64.
    """
    rows, vocabulary = logits.shape
    log_probs, ranks = logits.new_empty(rows, dtype=torch.float32), token_ids.new_empty(rows)
    _kernel[(rows,)](
        logits, logits.stride(0), token_ids, log_probs, ranks, vocabulary, BLOCK=_BLOCK, num_warps=_WARPS
    )  # fmt: skip
    return log_probs, ranks
