"""A trainer that samples from a server in another process stays TRL's, and says so."""

from __future__ import annotations

import functools

from patchfastrl.rewrite import AtStart
from patchfastrl.seam import Seam

from .releases import between, upstream
from .trainers import ELSEWHERE

SAMPLES_ELSEWHERE = functools.partial(AtStart, "__init__", "@samples_elsewhere(self)")

SEAMS = tuple(
    Seam(
        name=f"{trainer.key}.elsewhere",
        target=home.target(),
        requires=between(start, stop),
        absent=trainer.absent(),
        count=1,
        reason="tells a script that this trainer's completions come from a vLLM server in another process",
        link=upstream(home.module.removeprefix("trl.").replace(".", "/") + "_trainer.py"),
        until="TRL gives it an engine in the trainer's process",
        rewrite=SAMPLES_ELSEWHERE,
    )
    for trainer in ELSEWHERE
    for home, start, stop in trainer.between()
)
