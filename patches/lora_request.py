"""Every completion is sampled with the adapter in training."""

from __future__ import annotations

import functools

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, with_keyword
from patchfastrl.seam import Seam

from .owners import OWNERS
from .releases import between, outside


class LoraRequest(Rewrite):
    """``self.llm.generate(...)`` gets ``lora_request=lora_request(self.llm)``, and so does ``self.llm.chat(...)``.

    Args:
        engine: where the engine is, ``"self.llm"`` above.
    """

    words = (".generate", ".chat")

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.engine = engine

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not any(reads(original_node.func, f"{self.engine}.{method}") for method in ("generate", "chat")):
            return updated_node
        if any(reads(arg.keyword, "lora_request") for arg in original_node.args):
            return updated_node  # TRL serves adapters by itself now: the count will say so
        self.found += 1
        return with_keyword(updated_node, "lora_request", f"@lora_request({self.engine})")


SEAMS = tuple(
    Seam(
        name=f"{owner.name}.lora_request",
        target=f"{owner.target}{era.method}",
        requires=between(era.first, era.end),
        absent=outside(owner.first, owner.end),
        count=era.calls,
        reason="without a request vLLM samples from the base model, and says nothing",
        link="https://docs.vllm.ai/en/latest/features/lora.html",
        until="TRL passes a lora_request in colocate mode",
        rewrite=functools.partial(LoraRequest, owner.engine),
    )
    for owner in OWNERS
    for era in owner.samples
)
