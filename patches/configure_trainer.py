"""A trainer's arguments pass through PatchFastRL before anything is made from them."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, statement
from patchfastrl.seam import Seam


class ConfigureTrainer(Rewrite):
    """``if args is None: ...`` is followed by ``args = configure(self, args, model, peft_config)``."""

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.If | cst.FlattenSentinel[cst.BaseStatement]:
        if original_node.orelse is not None or not reads(original_node.test, "args is None"):
            return updated_node
        self.found += 1
        return cst.FlattenSentinel([updated_node, statement("args = @configure(self, args, model, peft_config)")])


SEAMS = tuple(
    Seam(
        name=f"{trainer.lower()}.configure",
        target=f"trl.trainer.{trainer.lower()}_trainer:{trainer}Trainer.__init__",
        requires="trl>=1.10,<1.17",
        count=1,
        reason="turns use_vllm on, and refuses what a shared engine cannot do, before a model is loaded",
        link=f"https://github.com/huggingface/trl/blob/main/trl/trainer/{trainer.lower()}_trainer.py",
        until="TRL lets a plug-in see the arguments before the trainer reads them",
        rewrite=ConfigureTrainer,
    )
    for trainer in ("GRPO", "RLOO")
)
