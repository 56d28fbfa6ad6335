"""`vllm_sampling_params` of the configuration reach the engine with `generation_kwargs`."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, expression, reads, with_leading
from patchfastrl.seam import Seam

from .releases import END, ENGINE_CLASS, FIRST, ONLINE_DPO_MODES, between, upstream
from .trainers import DISTILLATION, GOLD, GRPO, ONLINE_DPO, RLOO, SDFT, SDPO, SSD


class SamplingOverrides(Rewrite):
    """``VLLMGeneration(..., generation_kwargs=args.generation_kwargs)`` takes ``sampling_overrides(args)`` instead."""

    words = ("VLLMGeneration",)

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

    words = ("SamplingParams",)

    args = "self.args"

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if not reads(original_node.func, "SamplingParams"):
            return updated_node
        self.found += 1
        return with_leading(updated_node, "@sampling_params", "SamplingParams", self.args)


class SamplingSettingsOnce(SamplingSettings):
    """The same in `__init__`, whose settings last for the whole training."""

    args = "args"


ERAS = (
    *(
        (trainer, *era)
        for trainer in (GRPO, RLOO)
        for era in (
            ("_generate_and_score_completions", FIRST, "0.24", SamplingSettings),
            ("_generate_single_turn", "0.24", ENGINE_CLASS, SamplingSettings),
            ("__init__", ENGINE_CLASS, END, SamplingOverrides),
        )
    ),
    (ONLINE_DPO, "__init__", ONLINE_DPO_MODES, END, SamplingSettingsOnce),
    # It takes no vllm_sampling_params. What it calls guided decoding has another name in newer vLLM.
    (GOLD, "_generate_on_policy_outputs_vllm", FIRST, "0.27", SamplingSettings),
    (DISTILLATION, "__init__", "1.10", END, SamplingOverrides),
    *((trainer, "__init__", FIRST, END, SamplingOverrides) for trainer in (SDFT, SDPO, SSD)),
)

SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.sampling_overrides",
        target=home.target(method),
        requires=between(start, stop),
        absent=trainer.absent(first, end),
        count=1,
        reason="vllm_sampling_params are checked against what TRL must control, then sent along with generation_kwargs",
        link=upstream(home.module.removeprefix("trl.").replace(".", "/") + "_trainer.py"),
        until="TRL's configurations take a SamplingParams",
        rewrite=rewrite,
    )
    for trainer, method, first, end, rewrite in ERAS
    for home, start, stop in trainer.between(first, end)
)
