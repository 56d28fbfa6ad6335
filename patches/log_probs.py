"""Log-probabilities and entropies of the logits in one pass, in releases in which TRL has no kernel for them."""

from __future__ import annotations

import functools

from patchfastrl.compat import trl_log_probs
from patchfastrl.rewrite import AtStart
from patchfastrl.seam import Seam

from .expressions import Instead
from .releases import FIRST, between, outside, upstream
from .trainers import GRPO, RLOO

END = str(trl_log_probs.FIRST)
UNTIL = f"releases before {END} are no longer supported"
NAMED = "0.20"  # before, GRPO's method had another name, and TRL logged no entropies
# At a temperature of 1 this is a copy of all logits, or a change of a part in place, and as much for the gradient.
DIVIDED, IN_PLACE = "logits / self.temperature", "logits.div_(self.temperature)"


def _divided(trainer: str, home: str, first: str, end: str, before: str, absent: tuple[str, ...]) -> Seam:
    return Seam(
        name=f"{trainer}.temperature",
        target=home,
        requires=between(first, end),
        absent=absent,
        count=1,
        reason="at a temperature of 1 the logits are copied, or changed in place, for nothing",
        link=upstream(f"trainer/{trainer}_trainer.py"),
        until=UNTIL,
        rewrite=functools.partial(
            Instead, before, f"logits if self.temperature == 1 else {before}", "self.temperature"
        ),
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
            until=UNTIL,
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
