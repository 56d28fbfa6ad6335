"""The policy that a trainer loads by name is loaded in the precision that the engine can share."""

from __future__ import annotations

import functools

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam

from .releases import END, FIRST, between, upstream
from .trainers import DISTILLATION, GRPO, IW_OPD, ONLINE_DPO, RLOO, SDFT, SDPO, SSD


class LoadPolicy(Rewrite):
    """The call ``create(model, ...)`` becomes ``load_model(create, model, ...)``.

    Args:
        create: what TRL calls, e.g. ``"create_model_from_path"``.
        model: the variable that holds the model's name.
        dtype: how the precision is called among the keyword arguments.
    """

    def __init__(self, create: str, model: str, dtype: str) -> None:
        super().__init__()
        self.words = (create,)
        self.call = f"{create}({model}, **model_init_kwargs)"
        self.replacement = f'@load_model({create}, {model}, args, peft_config, model_init_kwargs, "{dtype}")'

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        # The reference model is `self.ref_model = create(...)` and stays TRL's.
        if not (reads(original_node.targets[0].target, "model") and reads(original_node.value, self.call)):
            return updated_node
        self.found += 1
        return updated_node.with_changes(value=expression(self.replacement))


AUTO, AUTO_ID = "AutoModelForCausalLM.from_pretrained", "model_id"
AUTO_CLASS = functools.partial(LoadPolicy, AUTO, "model", "torch_dtype")
AUTO_CLASS_ID_TORCH_DTYPE = functools.partial(LoadPolicy, AUTO, AUTO_ID, "torch_dtype")
AUTO_CLASS_ID = functools.partial(LoadPolicy, AUTO, AUTO_ID, "dtype")
ARCHITECTURE_TORCH_DTYPE = functools.partial(LoadPolicy, "architecture.from_pretrained", "model_id", "torch_dtype")
ARCHITECTURE = functools.partial(LoadPolicy, "architecture.from_pretrained", "model_id", "dtype")
PATH = functools.partial(LoadPolicy, "create_model_from_path", "model", "dtype")

# GOLD leaves loading to SFTTrainer: see `loads_later`.
ERAS = (
    (GRPO, AUTO_CLASS, FIRST, "0.20"),
    (GRPO, ARCHITECTURE_TORCH_DTYPE, "0.20", "0.23"),
    (GRPO, ARCHITECTURE, "0.23", "0.26"),
    (GRPO, PATH, "0.26", END),
    (RLOO, ARCHITECTURE_TORCH_DTYPE, FIRST, "0.23"),
    (RLOO, ARCHITECTURE, "0.23", "0.27"),
    (RLOO, PATH, "0.27", END),
    (ONLINE_DPO, AUTO_CLASS_ID_TORCH_DTYPE, "0.20", "0.23"),
    (ONLINE_DPO, AUTO_CLASS_ID, "0.23", END),
    *((trainer, PATH, FIRST, END) for trainer in (DISTILLATION, IW_OPD, SDFT, SDPO, SSD)),
)

SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.load_model",
        target=home.target(),
        requires=between(start, stop),
        absent=trainer.absent("0.20" if trainer is ONLINE_DPO else FIRST),
        count=1,
        reason="TRL loads a model named by a string in float32, vLLM in the checkpoint's dtype: one storage has one",
        link=upstream("trainer/utils.py"),
        until="TRL keeps the checkpoint's dtype by default",
        rewrite=rewrite,
    )
    for trainer, rewrite, first, end in ERAS
    for home, start, stop in trainer.between(first, end)
)
