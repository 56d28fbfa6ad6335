"""The engine is built over the weights of the model in training."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, with_leading
from patchfastrl.seam import Seam

from .releases import OWNERS, between, outside


class SharedEngine(Rewrite):
    """``LLM(...)`` becomes ``build_engine(LLM, self, ...)``, every argument kept."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "LLM"):
            return updated_node
        self.found += 1
        return with_leading(updated_node, "@build_engine", "LLM", "self")


SEAMS = tuple(
    Seam(
        name=f"{owner.name}.build",
        target=f"{owner.target}.{owner.builds}",
        requires=between(owner.first, owner.end),
        absent=outside(owner.first, owner.end),
        count=1,
        reason="TRL's own engine reads a second copy of the weights from disk",
        link=owner.link,
        until="VLLMGeneration can be given a ready engine",
        rewrite=SharedEngine,
    )
    for owner in OWNERS
)
