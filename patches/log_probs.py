"""Log-probabilities and entropies of the logits in one pass, in releases in which TRL has no kernel for them."""

from __future__ import annotations

import functools

import libcst as cst

from patchfastrl.rewrite import AtStart, Rewrite, expression, reads
from patchfastrl.seam import Seam

from .releases import FIRST, between, outside, upstream
from .trainers import GRPO, RLOO

END = "1.14"  # from here on TRL has a kernel
NAMED = "0.20"  # before, GRPO's method had another name, and TRL logged no entropies
# At a temperature of 1 this is a copy of all logits, or a change of a part in place, and as much for the gradient.
DIVIDED, IN_PLACE = "logits / self.temperature", "logits.div_(self.temperature)"


class Divided(Rewrite):
    """Not at a temperature of 1, where the logits would stay as they are."""

    words = ("self.temperature",)

    def __init__(self, before: str) -> None:
        super().__init__()
        self.before = before

    def leave_BinaryOperation(
        self, original_node: cst.BinaryOperation, updated_node: cst.BinaryOperation
    ) -> cst.BaseExpression:
        return self._unless_1(original_node, updated_node)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        return self._unless_1(original_node, updated_node)

    def _unless_1(self, original: cst.BaseExpression, updated: cst.BaseExpression) -> cst.BaseExpression:
        if not reads(original, self.before):
            return updated
        self.found += 1
        return expression(f"logits if self.temperature == 1 else {self.before}")


def _divided(trainer: str, home: str, first: str, end: str, before: str, absent: tuple[str, ...]) -> Seam:
    return Seam(
        name=f"{trainer}.temperature",
        target=home,
        requires=between(first, end),
        absent=absent,
        count=1,
        reason="at a temperature of 1 the logits are copied, or changed in place, for nothing",
        link=upstream(f"trainer/{trainer}_trainer.py"),
        until="releases before 1.14 are no longer supported",
        rewrite=functools.partial(Divided, before),
    )


SEAMS = (
    *(
        Seam(
            name=f"log_probs.{name}",
            target=f"trl.trainer.utils:{function}",
            requires=between(first, END),
            absent=outside(first, END),
            count=1,
            reason="TRL goes over all logits many times, in copies as large as they are",
            link=upstream("trainer/utils.py"),
            until="releases before 1.14 are no longer supported",
            rewrite=functools.partial(AtStart, function, source),
        )
        for name, function, first, source in (
            ("selected", "selective_log_softmax", FIRST,
             "if (selected := @selected_log_probs(logits, index)) is not None:\n    return selected"),
            ("entropies", "entropy_from_logits", NAMED,
             "if (entropies := @entropies(logits)) is not None:\n    return entropies"),
        )
    ),
    *(
        _divided(trainer.key, trainer.homes[0].target(method), first, end, before, outside(trainer.first, END))
        for trainer, method, first, end, before in (
            (GRPO, "_get_per_token_logps", FIRST, NAMED, DIVIDED),
            (GRPO, "_get_per_token_logps_and_entropies", NAMED, "1.0", DIVIDED),
            (GRPO, "_get_per_token_logps_and_entropies", "1.0", "1.10", IN_PLACE),
            (GRPO, "_get_per_token_logps_and_entropies", "1.10", END, DIVIDED),
            (RLOO, "_get_per_token_logps_and_entropies", RLOO.first, "1.0", DIVIDED),
            (RLOO, "_get_per_token_logps_and_entropies", "1.0", "1.10", IN_PLACE),
            (RLOO, "_get_per_token_logps_and_entropies", "1.10", END, DIVIDED),
        )
    ),
)  # fmt: skip
