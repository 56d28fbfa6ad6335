"""The classes that hold an engine, by release: who builds it, samples from it, and pushes weights to it."""

from __future__ import annotations

from dataclasses import dataclass

from .releases import END, ENGINE_CLASS, FIRST, ONLINE_DPO_MODES, upstream
from .trainers import GOLD, GRPO, ONLINE_DPO, RLOO


@dataclass(frozen=True)
class Sampling:
    """The method that samples, from `first` to before `end`: how often it calls the engine."""

    method: str
    first: str
    end: str
    calls: int


@dataclass(frozen=True)
class Owner:
    """A class with an engine in `self.llm`, from `first` to before `end`.

    `builds`, `syncs`: the methods that construct the engine, and that push weights to it (None: the sampling method
    does, in one line). `engine`: where the class keeps it.
    """

    name: str
    target: str
    first: str
    end: str
    builds: str
    syncs: str | None
    samples: tuple[Sampling, ...]
    link: str
    engine: str = "self.llm"


OWNERS = (
    *(
        Owner(
            name=owner.key,
            target=owner.homes[0].target(""),
            first=owner.first,
            end=ENGINE_CLASS,
            builds="__init__",
            syncs="_move_model_to_vllm",
            samples=(
                Sampling("_generate_and_score_completions", owner.first, "0.24", calls=1),
                Sampling("_generate_single_turn", "0.24", "0.25", calls=1),
                Sampling("_generate_single_turn", "0.25", ENGINE_CLASS, calls=2),
            ),
            link=f"https://github.com/huggingface/trl/blob/v0.27.2/trl/trainer/{owner.key}_trainer.py",
        )
        for owner in (GRPO, RLOO)
    ),
    *(
        Owner(
            name=ONLINE_DPO.key,
            target=home.target(""),
            first=first,
            end=end,
            builds="__init__",
            syncs=syncs,
            samples=(Sampling(method, first, end, calls=calls),),
            link=upstream("experimental/online_dpo/online_dpo_trainer.py"),
        )
        for since, until, syncs, method, calls in (
            (FIRST, ONLINE_DPO_MODES, None, "_generate_vllm", 2),
            (ONLINE_DPO_MODES, END, "_move_model_to_vllm", "_generate_vllm_colocate", 1),
        )
        for home, first, end in ONLINE_DPO.between(since, until)
    ),
    Owner(
        name=GOLD.key,
        target=GOLD.homes[0].target(""),
        first=GOLD.first,
        end="1.0",
        builds="__init__",
        syncs="_move_model_to_vllm",
        samples=(Sampling("_generate_on_policy_outputs_vllm", GOLD.first, "1.0", calls=1),),
        link="https://github.com/huggingface/trl/blob/v0.29.1/trl/experimental/gold/gold_trainer.py",
        engine="self.vllm_engine",
    ),
    Owner(
        name="engine",
        target="trl.generation.vllm_generation:VLLMGeneration.",
        first=ENGINE_CLASS,
        end=END,
        builds="_init_vllm",
        syncs="sync_weights",
        samples=(
            Sampling("generate", ENGINE_CLASS, "0.29.1", calls=2),
            Sampling("generate", "0.29.1", END, calls=1),
        ),
        link=upstream("generation/vllm_generation.py"),
    ),
)
