"""Old log-probabilities from the training forward, in place of a pass of their own over the generation batch.

Until the optimizer steps, the model in training is the one that TRL's pass would score with: a micro-batch's own
log-probabilities, detached, are the old ones. Ratios and metrics are computed from them by TRL's statements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_ROWS = "patchfastrl_rows"  # in a batch: which rows of the generation batch these are
# What has to be TRL's own: with one of them replaced, somebody else may read the old values, or score differently.
_METHODS = (
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "training_step",
    "compute_loss",
    "_compute_loss",
)
_RANDOM = ("drop", "jitter", "noise")  # in the names of settings that make a model's training forward random


def old_logps_later(trainer: Any, owner: type) -> bool:
    """Whether the training forwards of this generation batch give the numbers of the pass that TRL is about to make.

    Args:
        owner: the class of TRL whose methods the seams are in.
    """
    args, model = trainer.args, trainer.model
    return (
        model.training
        and trainer.num_iterations == 1
        and args.gradient_accumulation_steps % args.steps_per_generation == 0
        and not args.use_liger_kernel  # another loss, which has no seam
        and not args.neftune_noise_alpha
        and all(getattr(getattr(trainer, name), "__func__", None) is getattr(owner, name) for name in _METHODS)
        and not _random(model)
    )


def _random(model: nn.Module) -> bool:
    """Whether two forwards of a model in training mode may differ."""
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    if any(isinstance(m, _BatchNorm) or (isinstance(m, _DropoutNd) and m.p > 0) for m in model.modules()):
        return True
    return _set(model.config.to_dict())  # attention's dropout, for one, is no module


def _set(config: dict[str, Any]) -> bool:
    for name, value in config.items():
        if isinstance(value, dict):
            if _set(value):
                return True
        elif isinstance(value, (int, float)) and value and any(word in name for word in _RANDOM):
            return True
    return False


def promise_old_logps(
    trainer: Any,
    output: dict[str, Any],
    ratio: Callable[..., tuple[Any, ...]],
    metrics: Callable[..., None],
    *scored: torch.Tensor | None,
) -> None:
    """Remember a generation batch whose old log-probabilities come later.

    Args:
        output: the batch, which TRL is going to shuffle and split.
        ratio: TRL's statements for the importance-sampling ratio, of the old log-probabilities and `scored`.
        metrics: TRL's statements that log them, of the same and of what `ratio` returns.
        scored: the engine's log-probabilities, (B, T), and the masks that go with them; None for a missing one.
    """
    import torch

    mask = output["completion_mask"]
    output[_ROWS] = torch.arange(len(mask), device=mask.device)
    trainer.patchfastrl_promised = _Promised(ratio, metrics, scored, len(mask))


def with_old_logps(trainer: Any, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> dict[str, Any]:
    """A micro-batch with what TRL's pass would have put there, or as it is if the pass was made.

    Args:
        per_token_logps: of the forward that is trained on, (B, T).
    """
    if _ROWS not in inputs:
        return inputs
    old = per_token_logps.detach()
    ratio = trainer.patchfastrl_promised.keep(inputs[_ROWS], old)
    return {**inputs, "old_per_token_logps": old, "importance_sampling_ratio": ratio}


class _Promised:
    """A generation batch whose rows are scored as they are trained on; its metrics are of all rows, in TRL's order."""

    def __init__(
        self,
        ratio: Callable[..., tuple[Any, ...]],
        metrics: Callable[..., None],
        scored: tuple[torch.Tensor | None, ...],
        missing: int,
    ) -> None:
        self._ratio, self._metrics, self._scored, self._missing = ratio, metrics, scored, missing
        self._old: torch.Tensor | None = None

    def keep(self, rows: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """The ratio for some rows."""
        if self._old is None:
            self._old = old.new_empty(self._missing, old.shape[1])
        self._old[rows] = old
        self._missing -= len(rows)
        if self._missing == 0:
            self._metrics(self._old, *self._scored, *self._ratio(self._old, *self._scored))
        return self._ratio(old, *(None if tensor is None else tensor[rows] for tensor in self._scored))[0]
