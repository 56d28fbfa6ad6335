"""A trainer that the engine does not sample for stays TRL's, and says so."""

from __future__ import annotations

import functools

import libcst as cst

from patchfastrl.rewrite import Rewrite, at_start, reads
from patchfastrl.seam import Seam

from .releases import between, upstream
from .trainers import BY_THEMSELVES, ELSEWHERE


class SamplesByItself(Rewrite):
    """``samples_by_itself(self)`` becomes the first statement of ``__init__``."""

    def __init__(self, said: str = "") -> None:
        super().__init__()
        self.statement = f"@samples_by_itself(self{said})"

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        if not reads(original_node.name, "__init__"):
            return updated_node
        self.found += 1
        return at_start(updated_node, self.statement)


# The trainer of the same name that follows it samples from the shared engine.
SINCE = {"rloo": ', since="0.22.0"', "sdft": ', since="1.6.0"'}

SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.{'legacy' if trainer.key in SINCE else 'alone'}",
        target=home.target(),
        requires=between(start, stop),
        absent=trainer.absent(),
        count=1,
        reason=f"tells a script that this trainer's completions come from {trainer.samples.partition(',')[0]}",
        link=upstream(home.module.removeprefix("trl.").replace(".", "/") + "_trainer.py"),
        until="TRL gives it an engine in the trainer's process",
        rewrite=functools.partial(
            SamplesByItself, SINCE.get(trainer.key, ", server=True" if trainer in ELSEWHERE else "")
        ),
    )
    for trainer in (*BY_THEMSELVES, *ELSEWHERE)
    for home, start, stop in trainer.between()
)
