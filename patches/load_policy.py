"""The policy that a trainer loads by name is loaded in the precision that the engine can share."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam


class LoadPolicy(Rewrite):
    """The call ``create_model_from_path(model, ...)`` becomes ``load_model(create_model_from_path, model, ...)``."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        # The reference model is `self.ref_model = create_model_from_path(...)` and stays TRL's.
        if not (
            reads(original_node.targets[0].target, "model")
            and reads(original_node.value, "create_model_from_path(model, **model_init_kwargs)")
        ):
            return updated_node
        self.found += 1
        call = "@load_model(create_model_from_path, model, args, peft_config, model_init_kwargs)"
        return updated_node.with_changes(value=expression(call))


SEAMS = tuple(
    Seam(
        name=f"{trainer.lower()}.load_model",
        target=f"trl.trainer.{trainer.lower()}_trainer:{trainer}Trainer.__init__",
        requires="trl>=1.10,<1.17",
        count=1,
        reason="TRL loads a model named by a string in float32, vLLM in the checkpoint's dtype: one storage has one",
        link="https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py",
        until="create_model_from_path keeps the checkpoint's dtype by default",
        rewrite=LoadPolicy,
    )
    for trainer in ("GRPO", "RLOO")
)
