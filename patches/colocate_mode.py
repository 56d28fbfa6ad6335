"""The engine lives in the trainer's process, whatever `vllm_mode` a script asks for."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam

from .releases import ENGINE_CLASS, SAMPLES, between, outside, trainer


class TrainerMode(Rewrite):
    """``self.vllm_mode = args.vllm_mode`` becomes ``self.vllm_mode = "colocate"``."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        target = original_node.targets[0].target
        if not (reads(target, "self.vllm_mode") and reads(original_node.value, "args.vllm_mode")):
            return updated_node
        self.found += 1
        return updated_node.with_changes(value=expression('"colocate"'))


class GenerationMode(Rewrite):
    """``VLLMGeneration(..., mode=args.vllm_mode, ...)`` becomes ``VLLMGeneration(..., mode="colocate", ...)``."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "VLLMGeneration"):
            return updated_node
        args = []
        for arg in updated_node.args:
            if reads(arg.keyword, "mode") and reads(arg.value, "args.vllm_mode"):
                self.found += 1
                arg = arg.with_changes(value=expression('"colocate"'))
            args.append(arg)
        return updated_node.with_changes(args=args)


SEAMS = tuple(
    Seam(
        name=f"{name.lower()}.{mode}",
        target=trainer(name),
        requires=between(since),
        absent=outside(since),
        count=1,
        reason="a server is another process, with another copy of the weights",
        link="https://huggingface.co/docs/trl/vllm_integration",
        until="never: this is what sharing means",
        rewrite=rewrite,
    )
    for name, first in SAMPLES.items()
    for mode, since, rewrite in (
        ("trainer_mode", first, TrainerMode),
        ("generation_mode", ENGINE_CLASS, GenerationMode),
    )
)
