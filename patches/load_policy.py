"""The policy that a trainer loads by name is loaded in the precision that the engine can share."""

from __future__ import annotations

import functools

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam

from .releases import END, SAMPLES, between, outside, trainer, upstream


class LoadPolicy(Rewrite):
    """The call ``create(model, ...)`` becomes ``load_model(create, model, ...)``.

    Args:
        create: what TRL calls, e.g. ``"create_model_from_path"``.
        model: the variable that holds the model's name.
        dtype: how the precision is called among the keyword arguments.
    """

    def __init__(self, create: str, model: str, dtype: str) -> None:
        super().__init__()
        self.call = f"{create}({model}, **model_init_kwargs)"
        self.replacement = f'@load_model({create}, {model}, args, peft_config, model_init_kwargs, "{dtype}")'

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        # The reference model is `self.ref_model = create(...)` and stays TRL's.
        if not (reads(original_node.targets[0].target, "model") and reads(original_node.value, self.call)):
            return updated_node
        self.found += 1
        return updated_node.with_changes(value=expression(self.replacement))


AUTO_CLASS = functools.partial(LoadPolicy, "AutoModelForCausalLM.from_pretrained", "model", "torch_dtype")
ARCHITECTURE_TORCH_DTYPE = functools.partial(LoadPolicy, "architecture.from_pretrained", "model_id", "torch_dtype")
ARCHITECTURE = functools.partial(LoadPolicy, "architecture.from_pretrained", "model_id", "dtype")
PATH = functools.partial(LoadPolicy, "create_model_from_path", "model", "dtype")

ERAS = {
    "GRPO": (
        (AUTO_CLASS, "0.18", "0.20"),
        (ARCHITECTURE_TORCH_DTYPE, "0.20", "0.23"),
        (ARCHITECTURE, "0.23", "0.26"),
        (PATH, "0.26", END),
    ),
    "RLOO": (
        (ARCHITECTURE_TORCH_DTYPE, "0.22", "0.23"),
        (ARCHITECTURE, "0.23", "0.27"),
        (PATH, "0.27", END),
    ),
}

SEAMS = tuple(
    Seam(
        name=f"{name.lower()}.load_model",
        target=trainer(name),
        requires=between(first, end),
        absent=outside(SAMPLES[name]),
        count=1,
        reason="TRL loads a model named by a string in float32, vLLM in the checkpoint's dtype: one storage has one",
        link=upstream("trainer/utils.py"),
        until="TRL keeps the checkpoint's dtype by default",
        rewrite=rewrite,
    )
    for name, eras in ERAS.items()
    for rewrite, first, end in eras
)
