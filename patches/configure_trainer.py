"""A trainer's arguments pass through PatchFastRL before anything is made from them."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, statement
from patchfastrl.seam import Seam

from .releases import END, FIRST, SAMPLES, between, outside, trainer, upstream


class ConfigureTrainer(Rewrite):
    """``if args is None: ...`` is followed by ``args = configure(self, args, model, peft_config)``."""

    statement = "args = @configure(self, args, model, peft_config)"

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.If | cst.FlattenSentinel[cst.BaseStatement]:
        # With an `else` it is RLOO's handling of a deprecated name, up to 0.24.
        if original_node.orelse is not None or not reads(original_node.test, "args is None"):
            return updated_node
        self.found += 1
        return cst.FlattenSentinel([updated_node, statement(self.statement)])


class ConfigureTrainerWithRollouts(ConfigureTrainer):
    """The release that calls `rollout_func` in server mode only: in colocate mode it would forget it in silence."""

    statement = "args = @configure(self, args, model, peft_config, server_only=rollout_func)"


ERAS = {
    "GRPO": (
        (ConfigureTrainer, FIRST, "0.25"),
        (ConfigureTrainerWithRollouts, "0.25", "0.26"),
        (ConfigureTrainer, "0.26", END),
    ),
    "RLOO": ((ConfigureTrainer, SAMPLES["RLOO"], END),),
}

SEAMS = tuple(
    Seam(
        name=f"{name.lower()}.configure",
        target=trainer(name),
        requires=between(first, end),
        absent=outside(SAMPLES[name]),
        count=1,
        reason="turns use_vllm on, and refuses what a shared engine cannot do, before a model is loaded",
        link=upstream(f"trainer/{name.lower()}_trainer.py"),
        until="TRL lets a plug-in see the arguments before the trainer reads them",
        rewrite=rewrite,
    )
    for name, eras in ERAS.items()
    for rewrite, first, end in eras
)
