"""A conversation becomes the prompt that the trainer's settings ask for, as it does in server mode."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, with_keyword
from patchfastrl.seam import Seam

from .releases import between, outside, upstream
from .trainers import GRPO, RLOO


class ChatTemplateKwargs(Rewrite):
    """``self.llm.chat(...)`` gets ``chat_template_kwargs=self.chat_template_kwargs``."""

    words = ("llm.chat",)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "self.llm.chat"):
            return updated_node
        if any(reads(arg.keyword, "chat_template_kwargs") for arg in original_node.args):
            return updated_node
        self.found += 1
        return with_keyword(updated_node, "chat_template_kwargs", "self.chat_template_kwargs")


SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.chat_template",
        target=trainer.homes[0].target("_generate_single_turn"),
        requires=between("0.25", end),
        absent=outside("0.25", end),
        count=1,
        reason="these releases apply chat_template_kwargs in server mode, and forget them in colocate mode",
        link=upstream(f"trainer/{trainer.key}_trainer.py"),
        until="releases before 0.27 are no longer supported",
        rewrite=ChatTemplateKwargs,
    )
    for trainer, end in ((GRPO, "0.26"), (RLOO, "0.27"))
)
