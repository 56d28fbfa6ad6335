"""The engine lives in the trainer's process, whatever `vllm_mode` a script asks for."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam

from .releases import END, ENGINE_CLASS, FIRST, ONLINE_DPO_MODES, between
from .trainers import DISTILLATION, GOLD, GRPO, IW_OPD, ONLINE_DPO, RLOO, SDFT, SDPO, SSD


class TrainerMode(Rewrite):
    """``self.vllm_mode = args.vllm_mode [if args.use_vllm else None]`` becomes ``... = "colocate" [...]``."""

    words = ("vllm_mode",)

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        target = original_node.targets[0].target
        if not reads(target, "self.vllm_mode"):
            return updated_node
        for value in ("args.vllm_mode", "args.vllm_mode if args.use_vllm else None"):
            if reads(original_node.value, value):
                self.found += 1
                return updated_node.with_changes(value=expression(value.replace("args.vllm_mode", '"colocate"')))
        return updated_node


class GenerationMode(Rewrite):
    """``VLLMGeneration(..., mode=args.vllm_mode, ...)`` becomes ``VLLMGeneration(..., mode="colocate", ...)``."""

    words = ("VLLMGeneration",)

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


ERAS = (
    ("trainer_mode", TrainerMode, GRPO, FIRST, END),
    ("trainer_mode", TrainerMode, RLOO, FIRST, END),
    ("trainer_mode", TrainerMode, ONLINE_DPO, ONLINE_DPO_MODES, END),
    ("trainer_mode", TrainerMode, GOLD, FIRST, "1.0"),
    ("trainer_mode", TrainerMode, DISTILLATION, "1.11", END),
    ("generation_mode", GenerationMode, GRPO, ENGINE_CLASS, END),
    ("generation_mode", GenerationMode, RLOO, ENGINE_CLASS, END),
    ("generation_mode", GenerationMode, GOLD, "1.0", END),
    *(("generation_mode", GenerationMode, t, FIRST, END) for t in (DISTILLATION, IW_OPD, SDFT, SDPO, SSD)),
)

SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.{mode}",
        target=home.target(),
        requires=between(start, stop),
        absent=trainer.absent(first, end),
        count=1,
        reason="a server is another process, with another copy of the weights",
        link="https://huggingface.co/docs/trl/vllm_integration",
        until="never: this is what sharing means",
        rewrite=rewrite,
    )
    for mode, rewrite, trainer, first, end in ERAS
    for home, start, stop in trainer.between(first, end)
)
