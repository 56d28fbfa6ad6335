"""A weight sync publishes the adapter instead of merging it and pushing every weight."""

from __future__ import annotations

import functools

import libcst as cst

from patchfastrl.rewrite import AtStart, Rewrite, expression, reads
from patchfastrl.seam import Seam

from .owners import OWNERS
from .releases import between, outside


class PublishInline(Rewrite):
    """``llm_model.load_weights(model.state_dict().items())`` becomes ``publish(self)``."""

    words = ("load_weights",)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if not reads(original_node, "llm_model.load_weights(model.state_dict().items())"):
            return updated_node
        self.found += 1
        return expression("@publish(self)")


SEAMS = tuple(
    Seam(
        name=f"{owner.name}.publish",
        target=f"{owner.target}{owner.syncs or owner.samples[0].method}",
        requires=between(owner.first, owner.end),
        absent=outside(owner.first, owner.end),
        count=1,
        reason="merging changes the base weights that the engine shares (and drifts in bf16); load_weights writes them",
        link="https://github.com/huggingface/trl/issues/6688",
        until="TRL can sync an adapter to a colocated engine without merging",
        rewrite=functools.partial(AtStart, owner.syncs, "return @publish(self)") if owner.syncs else PublishInline,
    )
    for owner in OWNERS
)
