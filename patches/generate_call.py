"""A trainer that TRL gave no vLLM path: an engine beside it, which answers its `generate` calls for the policy."""

from __future__ import annotations

import functools

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, statement, with_leading
from patchfastrl.seam import Seam

from .releases import between, upstream
from .trainers import A2PO, GKD


class EngineBeside(Rewrite):
    """The statement `after` is followed by ``build_beside(self, args)``.

    Args:
        after: the assignment that runs when the trainer has its model, and nothing has been sampled.
    """

    def __init__(self, after: str) -> None:
        super().__init__()
        self.target, self.value = after.split(" = ")
        self.words = (self.target,)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.BaseStatement]:
        node = original_node.body[0]
        if not isinstance(node, cst.Assign):
            return updated_node
        if not (reads(node.targets[0].target, self.target) and reads(node.value, self.value)):
            return updated_node
        self.found += 1
        return cst.FlattenSentinel([updated_node, statement("@build_beside(self, args)")])


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


PLACES = (
    (GKD, "self.lmbda = args.lmbda", "generate_on_policy_outputs", "model"),
    (
        A2PO,
        "self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)",
        "_prepare_inputs",
        "unwrapped_model",
    ),
)


SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.{part}",
        target=home.target(method),
        requires=between(start, stop),
        absent=trainer.absent(),
        count=1,
        reason=reason,
        link=upstream(home.module.removeprefix("trl.").replace(".", "/") + "_trainer.py"),
        until="TRL gives it a vLLM path",
        rewrite=rewrite,
    )
    for trainer, after, generates, model in PLACES
    for home, start, stop in trainer.between()
    for part, method, reason, rewrite in (
        (
            "build",
            "__init__",
            "this trainer has no engine, and its configuration has no settings for one",
            functools.partial(EngineBeside, after),
        ),
        (
            "generate",
            generates,
            "transformers' generate is several times slower than an engine; a teacher keeps using it",
            functools.partial(GenerateCall, model),
        ),
    )
)
