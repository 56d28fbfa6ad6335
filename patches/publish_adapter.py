"""A weight sync publishes the adapter instead of merging it and pushing every weight."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, statement
from patchfastrl.seam import Seam


class PublishAdapter(Rewrite):
    """``return publish(self)`` becomes the first statement of ``sync_weights``."""

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        if not reads(original_node.name, "sync_weights"):
            return updated_node
        self.found += 1
        body = list(updated_node.body.body)
        first = 0 if original_node.get_docstring() is None else 1
        body.insert(first, statement("return @publish(self)"))
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


SEAMS = (
    Seam(
        name="engine.publish",
        target="trl.generation.vllm_generation:VLLMGeneration.sync_weights",
        requires="trl>=1.10,<1.17",
        count=1,
        reason="merging changes the base weights that the engine shares (and drifts in bf16); load_weights writes them",
        link="https://github.com/huggingface/trl/issues/6688",
        until="TRL can sync an adapter to a colocated engine without merging",
        rewrite=PublishAdapter,
    ),
)
