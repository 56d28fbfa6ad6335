"""`vllm_sampling_params` of the configuration reach the engine with `generation_kwargs`."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads
from patchfastrl.seam import Seam


class SamplingOverrides(Rewrite):
    """``VLLMGeneration(..., generation_kwargs=args.generation_kwargs)`` takes ``sampling_overrides(args)`` instead."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "VLLMGeneration"):
            return updated_node
        args = []
        for arg in updated_node.args:
            if reads(arg.keyword, "generation_kwargs") and reads(arg.value, "args.generation_kwargs"):
                self.found += 1
                arg = arg.with_changes(value=expression("@sampling_overrides(args)"))
            args.append(arg)
        return updated_node.with_changes(args=args)


SEAMS = tuple(
    Seam(
        name=f"{trainer.lower()}.sampling_overrides",
        target=f"trl.trainer.{trainer.lower()}_trainer:{trainer}Trainer.__init__",
        requires="trl>=1.10,<1.17",
        count=1,
        reason="vllm_sampling_params are checked against what TRL must control, then sent along with generation_kwargs",
        link=f"https://github.com/huggingface/trl/blob/main/trl/trainer/{trainer.lower()}_trainer.py",
        until="TRL's configurations take a SamplingParams",
        rewrite=SamplingOverrides,
    )
    for trainer in ("GRPO", "RLOO")
)
