"""A trainer that TRL gave no vLLM path: an engine beside it, which answers its `generate` calls for the policy."""

from __future__ import annotations

import functools
from collections.abc import Callable

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, statement, with_leading
from patchfastrl.seam import Seam

from .releases import FIRST, between, upstream
from .trainers import A2PO, GKD, NASH_MD, OLD_RLOO, OLD_SDFT, PPO, XPO, Trainer


class EngineBeside(Rewrite):
    """The statement `after` is followed by ``build_beside(self, args, self.model)``.

    Args:
        after: the assignment that runs when the trainer has its model, and nothing has been sampled.
        model: where the trainer keeps the model that samples.
    """

    def __init__(self, after: str, model: str) -> None:
        super().__init__()
        self.target, self.value = after.split(" = ")
        self.words = (self.target,)
        self.statement = f"@build_beside(self, args, {model})"

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.BaseStatement]:
        node = original_node.body[0]
        if not isinstance(node, cst.Assign):
            return updated_node
        if not (reads(node.targets[0].target, self.target) and reads(node.value, self.value)):
            return updated_node
        self.found += 1
        return cst.FlattenSentinel([updated_node, statement(self.statement)])


class GenerateCall(Rewrite):
    """``model.generate(...)`` becomes ``generate(model, ...)``, every argument kept."""

    words = (".generate",)

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, f"{self.model}.generate"):
            return updated_node
        self.found += 1
        return with_leading(updated_node, "@generate", self.model)


BUILDS = (
    (GKD, "self.lmbda = args.lmbda", "self.model"),
    (A2PO, "self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)", "self.model"),
    (NASH_MD, "self._mixture_coef = self.args.mixture_coef", "self.model"),
    (XPO, "self._alpha = self.args.alpha", "self.model"),
    (PPO, "self.reward_model = self.reward_model.to(self.accelerator.device)", "self.policy_model"),
    (OLD_RLOO, "self.ref_policy = self.ref_policy.to(self.accelerator.device)", "self.model"),
    (OLD_SDFT, "self.model_accepts_loss_kwargs = False", "self.model"),
)


def _methods(trainer: Trainer, method: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((home.target(method), start, stop) for home, start, stop in trainer.between())


# PPO and the older RLOO sample through one function, which moved.
_BATCHES = (
    ("trl.trainer.utils:generate", FIRST, "0.27"),
    ("trl.experimental.ppo.ppo_trainer:generate", "0.27", PPO.end),
)
CALLS = (
    (GKD, _methods(GKD, "generate_on_policy_outputs"), "model"),
    (A2PO, _methods(A2PO, "_prepare_inputs"), "unwrapped_model"),
    (NASH_MD, _methods(NASH_MD, "_generate_completions"), "unwrapped_policy_for_gen_ctx"),
    (XPO, _methods(XPO, "_generate_completions"), "unwrapped_policy_model_for_gen"),
    (PPO, _BATCHES, "lm_backbone"),
    (OLD_SDFT, _methods(OLD_SDFT, "_generate_completion_ids"), "unwrapped_model"),
)


def _seam(
    trainer: Trainer, part: str, place: tuple[str, str, str], reason: str, rewrite: Callable[[], Rewrite]
) -> Seam:
    target, start, stop = place
    return Seam(
        name=f"{trainer.key}.{part}",
        target=target,
        requires=between(start, stop),
        absent=trainer.absent(),
        count=1,
        reason=reason,
        link=upstream(target.partition(":")[0].removeprefix("trl.").replace(".", "/") + ".py"),
        until="TRL gives it a vLLM path",
        rewrite=rewrite,
    )


_NO_ENGINE = "this trainer has no engine, and its configuration has no settings for one"
_SLOW = "transformers' generate is several times slower than an engine; a teacher or a reference keeps using it"
SEAMS = (
    *(
        _seam(trainer, "build", place, _NO_ENGINE, functools.partial(EngineBeside, after, model))
        for trainer, after, model in BUILDS
        for place in _methods(trainer, "__init__")
    ),
    *(
        _seam(trainer, "generate", place, _SLOW, functools.partial(GenerateCall, model))
        for trainer, places, model in CALLS
        for place in places
    ),
)
