"""`vllm_sampling_params` of the configuration reach the engine with `generation_kwargs`."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads, with_leading
from patchfastrl.seam import Seam

from .releases import END, ENGINE_CLASS, SAMPLES, between, outside, trainer, upstream


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


class SamplingSettings(Rewrite):
    """``SamplingParams(...)`` becomes ``sampling_params(SamplingParams, self.args, ...)``, every argument kept."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "SamplingParams"):
            return updated_node
        self.found += 1
        return with_leading(updated_node, "@sampling_params", "SamplingParams", "self.args")


SEAMS = tuple(
    Seam(
        name=f"{name.lower()}.sampling_overrides",
        target=trainer(name, method),
        requires=between(since, end),
        absent=outside(first),
        count=1,
        reason="vllm_sampling_params are checked against what TRL must control, then sent along with generation_kwargs",
        link=upstream(f"trainer/{name.lower()}_trainer.py"),
        until="TRL's configurations take a SamplingParams",
        rewrite=rewrite,
    )
    for name, first in SAMPLES.items()
    for method, since, end, rewrite in (
        ("_generate_and_score_completions", first, "0.24", SamplingSettings),
        ("_generate_single_turn", "0.24", ENGINE_CLASS, SamplingSettings),
        ("__init__", ENGINE_CLASS, END, SamplingOverrides),
    )
)
