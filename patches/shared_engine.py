"""The engine is built over the weights of the model in training."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam


class SharedEngine(Rewrite):
    """``LLM(...)`` becomes ``build_engine(LLM, self, ...)``, every argument kept."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "LLM"):
            return updated_node
        self.found += 1
        # The first argument's own white space is upstream's layout: one argument a line.
        between = updated_node.whitespace_before_args
        comma = cst.Comma(whitespace_after=between if between is not None else cst.SimpleWhitespace(" "))
        leading = [cst.Arg(cst.Name("LLM"), comma=comma), cst.Arg(cst.Name("self"), comma=comma)]
        return updated_node.with_changes(func=expression("@build_engine"), args=[*leading, *updated_node.args])


SEAMS = (
    Seam(
        name="engine.build",
        target="trl.generation.vllm_generation:VLLMGeneration._init_vllm",
        requires="trl>=1.10,<1.17",
        count=1,
        reason="TRL's own engine reads a second copy of the weights from disk",
        link="https://github.com/huggingface/trl/blob/main/trl/generation/vllm_generation.py",
        until="VLLMGeneration can be given a ready engine",
        rewrite=SharedEngine,
    ),
)
