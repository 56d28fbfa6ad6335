"""Every completion is sampled with the adapter in training."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam


class LoraRequest(Rewrite):
    """``self.llm.generate(...)`` gets ``lora_request=lora_request(self.llm)``, and so does ``self.llm.chat(...)``."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not (reads(original_node.func, "self.llm.generate") or reads(original_node.func, "self.llm.chat")):
            return updated_node
        if any(reads(arg.keyword, "lora_request") for arg in original_node.args):
            return updated_node  # TRL serves adapters by itself now: the count will say so
        self.found += 1
        request = cst.Arg(
            value=expression("@lora_request(self.llm)"),
            keyword=cst.Name("lora_request"),
            equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
        )
        return updated_node.with_changes(args=[*updated_node.args, request])


SEAMS = (
    Seam(
        name="engine.lora_request",
        target="trl.generation.vllm_generation:VLLMGeneration.generate",
        requires="trl>=1.10,<1.17",
        count=1,
        reason="without a request vLLM samples from the base model, and says nothing",
        link="https://docs.vllm.ai/en/latest/features/lora.html",
        until="TRL passes a lora_request in colocate mode",
        rewrite=LoraRequest,
    ),
)
