"""Runs trainings on stock TRL, for comparison: `python stock.py FOLDER` writes FOLDER/stock.json.

vLLM's CPU build needs plain linear layers for TRL's weight sync; that shim, and a small engine, is all that differs
from TRL as installed. PatchFastRL() is not called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tiny

RUNS = (("GRPO", False, 0), ("GRPO", True, 0), ("GRPO", True, 1), ("RLOO", True, 0))  # algorithm, LoRA, seed
CURVE_SEEDS = (0, 1, 2)


def record(trainer: Any, seen: list[list[int]]) -> dict[str, Any]:
    trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    return {
        "completions": seen,
        "loss": [h["loss"] for h in logs],
        "grad_norm": [h["grad_norm"] for h in logs],
        "reward": [h["reward"] for h in logs],
        "keys": sorted(set().union(*(h.keys() for h in trainer.state.log_history))),
    }


def short_run(folder: Path, path: str, algorithm: str, lora: bool, seed: int) -> dict[str, Any]:
    """Four steps with vLLM."""
    seen: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float(sum(ids) % 11) for ids in completion_ids]

    settings = {"seed": seed, "max_steps": 4, "use_vllm": True, "vllm_max_model_length": 128, "learning_rate": 5e-3}
    trainer = tiny.trainer(
        folder,
        algorithm,
        model=path,
        reward_funcs=reward,
        args=settings,
        peft_config=tiny.lora(init_lora_weights="gaussian") if lora else None,
    )
    return record(trainer, seen)


def curve(folder: Path, seed: int, **settings: Any) -> list[float]:
    """Rewards of a run that learns to say tokens of the vocabulary's first third."""

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(i < 34 for i in ids) / len(ids) for ids in completion_ids]

    trainer = tiny.trainer(
        folder,
        model=tiny.model("qwen2", seed=3),
        reward_funcs=reward,
        args={
            "seed": seed,
            "max_steps": 30,
            "per_device_train_batch_size": 16,
            "num_generations": 8,
            "learning_rate": 1e-2,
            **settings,
        },
        peft_config=tiny.lora(r=8, lora_alpha=32),
        train_dataset=tiny.prompts(64),
    )
    trainer.train()
    return [h["reward"] for h in trainer.state.log_history if "loss" in h]


def defaults() -> dict[str, dict[str, str]]:
    import trl

    found = {}
    for name in ("GRPOConfig", "RLOOConfig"):
        fields = dataclasses.fields(getattr(trl, name))
        found[name] = {
            f.name: repr(f.default if f.default_factory is dataclasses.MISSING else f.default_factory()) for f in fields
        }
    return found


@contextlib.contextmanager
def small_engine() -> Iterator[None]:
    from trl.generation import vllm_generation

    from patchfastrl.compat import cpu_linear

    small = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    with cpu_linear.plain_weights():
        vllm_generation.LLM = functools.partial(vllm_generation.LLM, **small)
        yield


def main(folder: Path) -> None:
    found: dict[str, Any] = {"defaults": defaults(), "runs": {}, "curves": []}
    path = tiny.checkpoint(folder / "model", "llama")
    with small_engine():
        for algorithm, lora, seed in RUNS:
            name = f"{algorithm} {lora} {seed}"
            found["runs"][name] = short_run(folder / name, path, algorithm, lora, seed)
    for seed in CURVE_SEEDS:
        found["curves"].append(curve(folder / f"curve {seed}", seed, use_vllm=False))
    (folder / "stock.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
