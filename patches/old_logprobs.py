"""The old log-probabilities come from the training forward where TRL's own pass would only repeat it.

With the importance-sampling correction TRL scores every generation batch once more before training. Its statements
for the ratio and for the metrics stay: they become functions, which run where TRL ran them, or for each micro-batch.
"""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads, statement
from patchfastrl.seam import Seam

from .releases import between, outside, upstream
from .trainers import GRPO

FIRST = "0.28"  # before, GRPOTrainer had other statements for it, and a `tool_mask` that was not always bound

CORRECTED = "self.use_vllm and self.vllm_importance_sampling_correction"
PASS = f"self.args.gradient_accumulation_steps % generate_every != 0 or ({CORRECTED})"
SCORED = "sampling_per_token_logps, completion_mask, tool_mask"
RATIO = "vllm_importance_sampling_ratio, sequence_level_is"
OUTPUT = 'output["importance_sampling_ratio"]'


def _first_target(block: cst.BaseSuite) -> cst.BaseExpression | None:
    """What the first statement of a block assigns to."""
    line = block.body[0]
    node = line.body[0] if isinstance(line, cst.SimpleStatementLine) else None
    return node.targets[0].target if isinstance(node, cst.Assign) else None


def _and(left: cst.BaseExpression, right: str) -> cst.BooleanOperation:
    if isinstance(left, cst.BooleanOperation) and isinstance(left.operator, cst.Or):
        left = left.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return cst.BooleanOperation(left, cst.And(), expression(right))


class OldLogps(Rewrite):
    """TRL's pass, and what follows from it: four `if` statements of the method that makes a generation batch."""

    words = ("vllm_importance_sampling_correction",)

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.If | cst.FlattenSentinel[cst.BaseStatement]:
        target = _first_target(original_node.body)
        if reads(original_node.test, PASS):
            self.found += 1
            return updated_node.with_changes(test=_and(updated_node.test, "not @old_logps_later(self, GRPOTrainer)"))
        if not reads(original_node.test, CORRECTED):
            return updated_node
        if reads(target, "mask"):
            self.found += 1
            return self._function(updated_node, "patchfastrl_ratio", SCORED, RATIO)
        if reads(target, "delta"):
            self.found += 1
            return self._function(updated_node, "patchfastrl_metrics", f"{SCORED}, {RATIO}", None)
        if reads(target, OUTPUT):
            self.found += 1
            return self._promise(updated_node)
        return updated_node

    def _function(
        self, node: cst.If, name: str, given: str, result: str | None
    ) -> cst.FlattenSentinel[cst.BaseStatement]:
        """The statements as a function of what they read, and the `if`, which calls it when TRL's pass was made."""
        made = statement(f"def {name}(old_per_token_logps, {given}): ...")
        returned = [statement(f"return {result}")] if result else []
        body = node.body.with_changes(body=[*node.body.body, *returned])
        call = f"{name}(old_per_token_logps, {given})"
        test = _and(node.test, "old_per_token_logps is not None")
        return cst.FlattenSentinel(
            [
                made.with_changes(body=body, leading_lines=node.leading_lines),
                node.with_changes(
                    leading_lines=[cst.EmptyLine(indent=False)],
                    test=test,
                    body=node.body.with_changes(body=[statement(f"{result} = {call}" if result else call)]),
                ),
            ]
        )

    def _promise(self, node: cst.If) -> cst.If:
        promise = f"@promise_old_logps(self, output, patchfastrl_ratio, patchfastrl_metrics, {SCORED})"
        return node.with_changes(
            test=_and(node.test, "old_per_token_logps is None"),
            body=node.body.with_changes(body=[statement(promise)]),
            orelse=node.with_changes(leading_lines=[]),
        )


class LossOldLogps(Rewrite):
    """A micro-batch gets them from its own forward, just before the loss reads them."""

    words = ("old_per_token_logps",)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.BaseStatement]:
        node = original_node.body[0]
        if not isinstance(node, cst.Assign) or not reads(node.value, 'inputs.get("old_per_token_logps")'):
            return updated_node
        self.found += 1
        return cst.FlattenSentinel([statement("inputs = @with_old_logps(self, inputs, per_token_logps)"), updated_node])


SEAMS = tuple(
    Seam(
        name=f"{GRPO.key}.{part}",
        target=GRPO.homes[0].target(method),
        requires=between(FIRST),
        absent=outside(FIRST),
        count=count,
        reason="before the optimizer steps, the importance-sampling correction's pass over a generation batch only "
        "repeats the numbers of the training forward",
        link=upstream("trainer/grpo_trainer.py"),
        until="TRL takes them from the training forward",
        rewrite=rewrite,
    )
    for part, method, count, rewrite in (
        ("old_logps", "_generate_and_score_completions", 4, OldLogps),
        ("loss_old_logps", "_compute_loss", 1, LossOldLogps),
    )
)
