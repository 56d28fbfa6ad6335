"""Waking the engine reloads no checkpoint: the weights never slept, and are the trainer's."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads
from patchfastrl.seam import Seam

from .owners import OWNERS
from .releases import between, outside


def _reloads(body: object, engine: str = "self.llm") -> bool:
    """Whether a block (or a line) holds this one expression and nothing else."""
    while isinstance(body, (cst.IndentedBlock, cst.SimpleStatementLine)) and len(body.body) == 1:
        body = body.body[0]
    return isinstance(body, cst.Expr) and reads(body.value, f'{engine}.collective_rpc("reload_weights")')


class ReloadWeights(Rewrite):
    """The statement ``self.llm.collective_rpc("reload_weights")`` goes.

    Args:
        engine: where the engine is, ``"self.llm"`` above.
    """

    words = ("reload_weights",)

    def __init__(self, engine: str = "self.llm") -> None:
        super().__init__()
        self.engine = engine

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        if not _reloads(original_node, self.engine):
            return updated_node
        self.found += 1
        return cst.RemoveFromParent()


class TryToReloadWeights(Rewrite):
    """``try: self.llm.collective_rpc("reload_weights")`` goes, its ``except NotImplementedError`` with it."""

    words = ("reload_weights",)

    def leave_Try(self, original_node: cst.Try, updated_node: cst.Try) -> cst.Try | cst.RemovalSentinel:
        handled = [handler.type for handler in original_node.handlers]
        if not _reloads(original_node.body) or len(handled) != 1 or not reads(handled[0], "NotImplementedError"):
            return updated_node
        self.found += 1
        return cst.RemoveFromParent()


TRAINER = (("_generate_single_turn", "0.26", "0.28", ReloadWeights),)
ERAS = {
    "grpo": TRAINER,
    "rloo": TRAINER,
    "engine": (("generate", "0.28", "0.29", ReloadWeights), ("generate", "0.29", "1.10", TryToReloadWeights)),
}

SEAMS = tuple(
    Seam(
        name=f"{owner.name}.reload",
        target=f"{owner.target}{method}",
        requires=between(first, end),
        absent=outside(ERAS[owner.name][0][1], ERAS[owner.name][-1][2]),
        count=1,
        reason="the checkpoint's weights would be written over the ones in training",
        link="https://github.com/vllm-project/vllm/issues/29341",
        until="releases before 1.10 are no longer supported",
        rewrite=rewrite,
    )
    for owner in OWNERS
    if owner.name in ERAS
    for method, first, end, rewrite in ERAS[owner.name]
)
