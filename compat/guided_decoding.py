"""TRL imports a class and passes a parameter that vLLM has dropped: put the one back and translate the other.

Requirement: TRL before 0.27 with a vLLM in which `GuidedDecodingParams` has become `StructuredOutputsParams`.
Reason: TRL's trainer modules import the old name even when no output is constrained, and pass `guided_decoding=None`.
Link: https://github.com/huggingface/trl/blob/v0.26.2/trl/trainer/grpo_trainer.py#L101
Until: TRL before 0.27 is no longer supported.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from packaging.version import Version

from patchfastrl.errors import UnsupportedError

from .versions import installed

MODULE = "vllm.sampling_params"


def needed() -> bool:
    """Whether the installed TRL imports the old name whatever vLLM is installed."""
    trl = installed("trl")
    return trl is not None and trl < Version("0.27")


def supply(module: ModuleType, set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Give `vllm.sampling_params` the class that it has lost."""
    if not hasattr(module, "GuidedDecodingParams"):
        set_attribute(module, "GuidedDecodingParams", _successor(module.StructuredOutputsParams))


def _successor(current: type) -> type:
    class GuidedDecodingParams(current):  # type: ignore[misc, valid-type]
        """`StructuredOutputsParams` under its old name. The engine chooses the backend now, a request does not."""

        __module__ = MODULE  # as if it had never left: it pickles by this name
        __qualname__ = "GuidedDecodingParams"

        def __init__(self, *args: Any, backend: str | None = None, **constraint: Any) -> None:
            super().__init__(*args, **constraint)

    return GuidedDecodingParams


def translated(params_class: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `params_class` (vLLM's `SamplingParams`), with `guided_decoding` under the name that it has now."""
    known = getattr(params_class, "__struct_fields__", None)
    if "guided_decoding" not in settings or known is None or "guided_decoding" in known:
        return settings
    rest = {name: value for name, value in settings.items() if name != "guided_decoding"}
    constraint = settings["guided_decoding"]
    if constraint is None:
        return rest
    if rest.get("structured_outputs") is not None:
        raise UnsupportedError(
            "structured_outputs is set together with vllm_guided_decoding_regex (guided_decoding), which is its older "
            "name. Set one of them."
        )
    return {**rest, "structured_outputs": constraint}
