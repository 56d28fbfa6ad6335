"""The engine is built over the weights of the model in training."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, with_leading
from patchfastrl.seam import Seam

from .owners import OWNERS
from .releases import between, outside


class SharedEngine(Rewrite):
    """``LLM(...)`` becomes ``build_engine(LLM, self, ...)``, every argument kept."""

    words = ("LLM(",)

    function = "@build_engine"
    leading: tuple[str, ...] = ("LLM", "self")

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "LLM"):
            return updated_node
        self.found += 1
        return with_leading(updated_node, self.function, *self.leading)


class EarlySharedEngine(SharedEngine):
    """Ahead of ``super().__init__``: ``build_early_engine(LLM, self, args, model, processing_class, ...)``."""

    function = "@build_early_engine"
    leading = ("LLM", "self", "args", "model", "processing_class")


SEAMS = tuple(
    Seam(
        name=f"{owner.name}.build",
        target=f"{owner.target}{owner.builds}",
        requires=between(owner.first, owner.end),
        absent=outside(owner.first, owner.end),
        count=1,
        reason="TRL's own engine reads a second copy of the weights from disk",
        link=owner.link,
        until="VLLMGeneration can be given a ready engine",
        rewrite=EarlySharedEngine if owner.syncs is None else SharedEngine,
    )
    for owner in OWNERS
)
