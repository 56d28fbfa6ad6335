"""Every completion is sampled with the adapter in training."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, with_keyword
from patchfastrl.seam import Seam

from .releases import OWNERS, between, outside


class LoraRequest(Rewrite):
    """``self.llm.generate(...)`` gets ``lora_request=lora_request(self.llm)``, and so does ``self.llm.chat(...)``."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not (reads(original_node.func, "self.llm.generate") or reads(original_node.func, "self.llm.chat")):
            return updated_node
        if any(reads(arg.keyword, "lora_request") for arg in original_node.args):
            return updated_node  # TRL serves adapters by itself now: the count will say so
        self.found += 1
        return with_keyword(updated_node, "lora_request", "@lora_request(self.llm)")


SEAMS = tuple(
    Seam(
        name=f"{owner.name}.lora_request",
        target=f"{owner.target}.{era.method}",
        requires=between(era.first, era.end),
        absent=outside(owner.first, owner.end),
        count=era.calls,
        reason="without a request vLLM samples from the base model, and says nothing",
        link="https://docs.vllm.ai/en/latest/features/lora.html",
        until="TRL passes a lora_request in colocate mode",
        rewrite=LoraRequest,
    )
    for owner in OWNERS
    for era in owner.samples
)
