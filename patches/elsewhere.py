"""A trainer that samples from a server in another process stays TRL's, and says so."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, at_start, reads
from patchfastrl.seam import Seam

from .releases import between, upstream
from .trainers import ELSEWHERE


class SamplesElsewhere(Rewrite):
    """``samples_elsewhere(self)`` becomes the first statement of ``__init__``."""

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        if not reads(original_node.name, "__init__"):
            return updated_node
        self.found += 1
        return at_start(updated_node, "@samples_elsewhere(self)")


SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.elsewhere",
        target=home.target(),
        requires=between(start, stop),
        absent=trainer.absent(),
        count=1,
        reason="tells a script that this trainer's completions come from a vLLM server in another process",
        link=upstream(home.module.removeprefix("trl.").replace(".", "/") + "_trainer.py"),
        until="TRL gives it an engine in the trainer's process",
        rewrite=SamplesElsewhere,
    )
    for trainer in ELSEWHERE
    for home, start, stop in trainer.between()
)
