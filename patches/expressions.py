"""For seams that replace one expression by another."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads


class Instead(Rewrite):
    """The expression `before` becomes `after`.

    Args:
        word: of `before`; statements without it are not parsed.
    """

    def __init__(self, before: str, after: str, word: str) -> None:
        super().__init__()
        self.before, self.after, self.words = before, after, (word,)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        return self._instead(original_node, updated_node)

    def leave_BinaryOperation(
        self, original_node: cst.BinaryOperation, updated_node: cst.BinaryOperation
    ) -> cst.BaseExpression:
        return self._instead(original_node, updated_node)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        return self._instead(original_node, updated_node)

    def leave_ListComp(self, original_node: cst.ListComp, updated_node: cst.ListComp) -> cst.BaseExpression:
        return self._instead(original_node, updated_node)

    def _instead(self, original: cst.BaseExpression, updated: cst.BaseExpression) -> cst.BaseExpression:
        if not reads(original, self.before):
            return updated
        self.found += 1
        return expression(self.after)
