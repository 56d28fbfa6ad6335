"""Before 0.22 RLOOTrainer was another trainer, which has no vLLM path: it stays TRL's, and says so."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, at_start, reads
from patchfastrl.seam import Seam

from .releases import FIRST, SAMPLES, between, outside, trainer


class SamplesByItself(Rewrite):
    """``samples_by_itself(self)`` becomes the first statement of ``__init__``."""

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        if not reads(original_node.name, "__init__"):
            return updated_node
        self.found += 1
        return at_start(updated_node, "@samples_by_itself(self)")


SEAMS = (
    Seam(
        name="rloo.legacy",
        target=trainer("RLOO"),
        requires=between(FIRST, SAMPLES["RLOO"]),
        absent=outside(FIRST, SAMPLES["RLOO"]),
        count=1,
        reason="tells a script that this RLOOTrainer samples with transformers, as without PatchFastRL",
        link="https://github.com/huggingface/trl/blob/v0.21.0/trl/trainer/rloo_trainer.py",
        until="releases before 0.22 are no longer supported",
        rewrite=SamplesByItself,
    ),
)
