"""Where TRL's trainers and engines live, by release: what the declarations of the seams share."""

from __future__ import annotations

from dataclasses import dataclass

FIRST, END = "0.18", "1.17"  # the releases whose source was read: FIRST and later, before END
ENGINE_CLASS = "0.28"  # VLLMGeneration owns the engine from here on; before, each trainer had its own
# The first release in which a trainer samples with vLLM. RLOOTrainer was another trainer before.
SAMPLES = {"GRPO": FIRST, "RLOO": "0.22"}


def between(first: str, end: str = END) -> str:
    return f"trl>={first},<{end}"


def outside(first: str, end: str = END) -> tuple[str, ...]:
    """The known releases before `first` and from `end` on."""
    before = (between(FIRST, first),) if first != FIRST else ()
    return (*before, between(end)) if end != END else before


def trainer(name: str, method: str = "__init__") -> str:
    return f"trl.trainer.{name.lower()}_trainer:{name}Trainer.{method}"


def config(name: str, attribute: str) -> str:
    return f"trl.trainer.{name.lower()}_config:{name}Config.{attribute}"


def upstream(path: str) -> str:
    return f"https://github.com/huggingface/trl/blob/main/trl/{path}"


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

    `builds`, `syncs`: the methods that construct the engine, and that push weights to it.
    """

    name: str
    target: str
    first: str
    end: str
    builds: str
    syncs: str
    samples: tuple[Sampling, ...]
    link: str


OWNERS = (
    *(
        Owner(
            name=name.lower(),
            target=f"trl.trainer.{name.lower()}_trainer:{name}Trainer",
            first=first,
            end=ENGINE_CLASS,
            builds="__init__",
            syncs="_move_model_to_vllm",
            samples=(
                Sampling("_generate_and_score_completions", first, "0.24", calls=1),
                Sampling("_generate_single_turn", "0.24", "0.25", calls=1),
                Sampling("_generate_single_turn", "0.25", ENGINE_CLASS, calls=2),
            ),
            link=f"https://github.com/huggingface/trl/blob/v0.27.2/trl/trainer/{name.lower()}_trainer.py",
        )
        for name, first in SAMPLES.items()
    ),
    Owner(
        name="engine",
        target="trl.generation.vllm_generation:VLLMGeneration",
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
