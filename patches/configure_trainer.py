"""A trainer's arguments pass through PatchFastRL before anything is made from them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import libcst as cst

from patchfastrl.rewrite import AtStart, Rewrite, reads, statement
from patchfastrl.seam import Seam

from .releases import END, FIRST, between, upstream
from .trainers import (
    A2PO,
    DISTILLATION,
    GKD,
    GOLD,
    GRPO,
    IW_OPD,
    NASH_MD,
    OLD_RLOO,
    OLD_SDFT,
    ONLINE_DPO,
    PPO,
    RLOO,
    SDFT,
    SDPO,
    SSD,
    XPO,
    Trainer,
)


def configure(more: str = "", args: str = "args", model: str = "model", peft_config: str = "peft_config") -> str:
    """The statement that a trainer gets.

    Args:
        more: further arguments, with a comma in front.
        args, model, peft_config: what the trainer calls them; it is given the last one to make an adapter with.
    """
    return f"{args} = @configure(self, {args}, {model}, {peft_config}{more})"


class ConfigureTrainer(Rewrite):
    """``if args is None: ...`` is followed by ``args = configure(self, args, model, peft_config)``."""

    words = ("args is None",)

    def __init__(self, *settings: str, **names: str) -> None:
        super().__init__()
        self.statement = configure(*settings, **names)

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.If | cst.FlattenSentinel[cst.BaseStatement]:
        # With an `else` it is RLOO's handling of a deprecated name, up to 0.24.
        if original_node.orelse is not None or not reads(original_node.test, "args is None"):
            return updated_node
        self.found += 1
        return cst.FlattenSentinel([updated_node, statement(self.statement)])


class ConfigureAtOnce(AtStart):
    """It becomes the first statement of ``__init__``, which makes no arguments of its own."""

    def __init__(self, *settings: str, **names: str) -> None:
        super().__init__("__init__", configure(*settings, **names))


# The release that calls `rollout_func` in server mode only: in colocate mode it would forget it in silence.
ROLLOUTS = functools.partial(ConfigureTrainer, ", server_only=rollout_func")
PAIRS = functools.partial(ConfigureTrainer, ", completions=2")
LOADS_LATER = functools.partial(ConfigureAtOnce, ", loads_later=True")
# No vLLM path of TRL's: nothing of it is turned on.
BESIDE = functools.partial(ConfigureAtOnce, ", beside=True")
BESIDE_NO_ADAPTER = functools.partial(ConfigureTrainer, ", beside=True", peft_config="None")
BESIDE_LOADS_LATER = functools.partial(ConfigureAtOnce, ", loads_later=True, beside=True")
BESIDE_POLICY = functools.partial(BESIDE, args="config", model="policy", peft_config="None")

ERAS: tuple[tuple[Trainer, Callable[[], Rewrite], str, str], ...] = (
    (GRPO, ConfigureTrainer, FIRST, "0.25"),
    (GRPO, ROLLOUTS, "0.25", "0.26"),
    (GRPO, ConfigureTrainer, "0.26", END),
    (RLOO, ConfigureTrainer, FIRST, END),
    (ONLINE_DPO, PAIRS, FIRST, END),
    (GOLD, LOADS_LATER, FIRST, END),
    (A2PO, BESIDE_NO_ADAPTER, FIRST, END),
    (PPO, BESIDE, FIRST, END),
    (OLD_RLOO, BESIDE_POLICY, FIRST, END),
    *((trainer, BESIDE_LOADS_LATER, FIRST, END) for trainer in (GKD, NASH_MD, XPO, OLD_SDFT)),
    *((trainer, ConfigureTrainer, FIRST, END) for trainer in (DISTILLATION, IW_OPD, SSD)),
    *((trainer, ConfigureAtOnce, FIRST, END) for trainer in (SDFT, SDPO)),
)

SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.configure",
        target=home.target(),
        requires=between(start, stop),
        absent=trainer.absent(),
        count=1,
        reason="turns use_vllm on, and refuses what a shared engine cannot do, before a model is loaded",
        link=upstream(home.module.removeprefix("trl.").replace(".", "/") + "_trainer.py"),
        until="TRL lets a plug-in see the arguments before the trainer reads them",
        rewrite=rewrite,
    )
    for trainer, rewrite, first, end in ERAS
    for home, start, stop in trainer.between(first, end)
)
