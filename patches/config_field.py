"""The configurations take `vllm_sampling_params`."""

from __future__ import annotations

import libcst as cst

from patchfastrl.rewrite import Rewrite, reads, statement
from patchfastrl.seam import Seam

from .releases import FIRST, ONLINE_DPO_MODES, between, upstream
from .trainers import DISTILLATION, GRPO, ONLINE_DPO, RLOO, SDFT, SDPO, SSD

SPACE = cst.SimpleWhitespace(" ")
FIELD = "vllm_sampling_params"
NEIGHBOUR = "vllm_gpu_memory_utilization"
# Keyword-only, so that it moves no positional argument of the configurations or of a script's own subclasses.
DECLARATION = f"""{FIELD}: dict | str | None = field(
    default=None,
    kw_only=True,
    metadata={{"help": "Sampling parameters for vLLM, on top of `generation_kwargs`; see `vLLMSamplingParams`."}},
)"""


class SamplingParamsField(Rewrite):
    """The field follows ``vllm_gpu_memory_utilization``, which every release has."""

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.BaseStatement]:
        neighbour = original_node.body[0]
        if not isinstance(neighbour, cst.AnnAssign) or not reads(neighbour.target, NEIGHBOUR):
            return updated_node
        self.found += 1
        return cst.FlattenSentinel([updated_node, statement(DECLARATION)])


class SamplingParamsFromText(Rewrite):
    """``_VALID_DICT_FIELDS`` lists the field: on a command line its value is JSON."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        # _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", ...]
        value = updated_node.value
        if not reads(original_node.targets[0].target, "_VALID_DICT_FIELDS"):
            return updated_node
        if not isinstance(value, cst.BinaryOperation) or not isinstance(value.operator, cst.Add):
            return updated_node
        names = value.right
        if not isinstance(names, cst.List) or not names.elements:
            return updated_node
        self.found += 1
        first = names.elements[0]
        layout = names.lbracket.whitespace_after
        comma = cst.Comma(whitespace_after=layout if isinstance(layout, cst.ParenthesizedWhitespace) else SPACE)
        own = first.with_changes(value=cst.SimpleString(f'"{FIELD}"'), comma=comma)
        return updated_node.with_deep_changes(names, elements=[own, *names.elements])


# Online DPO's configuration listed no such names before 0.29.1.
FIELDS = (*((t, FIRST) for t in (GRPO, RLOO, SDFT, SDPO, SSD)), (ONLINE_DPO, ONLINE_DPO_MODES), (DISTILLATION, "1.10"))
LISTS = (*FIELDS[:-2], (ONLINE_DPO, "0.29.1"), FIELDS[-1])

SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.{part}",
        target=home.config(attribute),
        requires=between(start, stop),
        absent=trainer.absent(first),
        count=1,
        reason="scripts set vllm_sampling_params=vLLMSamplingParams(...) on the configuration",
        link=upstream(home.config("").partition(":")[0].removeprefix("trl.").replace(".", "/") + ".py"),
        until="TRL's configurations take a SamplingParams",
        rewrite=rewrite,
    )
    for part, attribute, rewrite, trainers in (
        ("config_field", NEIGHBOUR, SamplingParamsField, FIELDS),
        ("config_json", "_VALID_DICT_FIELDS", SamplingParamsFromText, LISTS),
    )
    for trainer, first in trainers
    for home, start, stop in trainer.between(first)
)
