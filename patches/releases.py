"""Releases of TRL, as the declarations of the seams name them."""

from __future__ import annotations

FIRST, END = "0.18", "1.17"  # the releases whose source was read: FIRST and later, before END
ENGINE_CLASS = "0.28"  # VLLMGeneration owns the engine from here on; before, each trainer had its own
ONLINE_DPO_MODES = "0.23"  # Online DPO was rewritten: before, its engine was built ahead of the trainer


def between(first: str, end: str = END) -> str:
    return f"trl>={first},<{end}"


def outside(first: str, end: str = END) -> tuple[str, ...]:
    """The known releases before `first` and from `end` on."""
    before = (between(FIRST, first),) if first != FIRST else ()
    return (*before, between(end)) if end != END else before


def upstream(path: str) -> str:
    return f"https://github.com/huggingface/trl/blob/main/trl/{path}"
