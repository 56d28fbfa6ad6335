"""One small trainer of every kind that samples, wherever the installed TRL has it, and a watch on what it samples.

For the tests, and for tests/cell_trainers.py, which goes with every release.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import trl
from packaging.version import Version

from patchfastrl import runtime
from patchfastrl.compat.versions import installed
from patchfastrl.patches.trainers import BESIDE, INHERITING, SHARED, Home, Trainer

RELEASE = installed("trl")

TINY = {name: value for name, value in tiny.quick("").items() if name not in ("output_dir", "num_generations")}


def quick(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings that train a tiny model in a second, sampling from its plain distribution."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return {**TINY, "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, **plain, **settings}


# What trainers are given ----------------------------------------------------------------------------------------------


def conversations(**columns: str) -> Any:
    from datasets import Dataset

    texts = ["the cat sat on the mat", "a b c d e f g", "1 + 2 = ?", "the mat sat on the cat . a cat"]
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": "a cat sat ."}] for t in texts]
    return Dataset.from_list([{"messages": turn, **columns} for turn in turns * 4])


def byte_level() -> Any:
    """A tokenizer of characters, in the form that GOLD asks for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<pad>", "<eos>", "\u0120", "\u010a", *map(chr, range(33, 127))]
    core = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(signs)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def teacher(folder: Path) -> Any:
    """A model that knows where its tokenizer is."""
    from transformers import AutoModelForCausalLM

    path = tiny.checkpoint(folder / "teacher")
    tiny.model(seed=7).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path).to(tiny.DEVICE, tiny.DTYPE)


def contexts() -> Any:
    """Prompts, and what only the teacher is told."""
    return tiny.prompts(16).add_column("privileged_context", ["the mat"] * 16)


def even(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(c) % 2) for c in completions]


def rewards(folder: Path) -> dict[str, Any]:
    return {"reward_funcs": tiny.length_reward, "train_dataset": tiny.prompts(16)}


def pairs(folder: Path) -> dict[str, Any]:
    """For Online DPO, which before 0.23 had a judge of pairs in place of rewards."""
    if not hasattr(trl, "BasePairwiseJudge") or Version("0.23") <= RELEASE:
        return rewards(folder)

    class Longer(trl.BasePairwiseJudge):
        def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
            return [int(len(second) > len(first)) for first, second in completions]

    return {"judge": Longer(), "train_dataset": tiny.prompts(16)}


def rollouts(folder: Path) -> dict[str, Any]:
    """GRPO with a `rollout_func` that samples through OpenEnv's helper."""
    from trl.experimental.openenv import generate_rollout_completions

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        found = generate_rollout_completions(trainer, prompts)
        return {key: [result[key] for result in found] for key in ("prompt_ids", "completion_ids", "logprobs")}

    return {**rewards(folder), "rollout_func": rollout}


OPENENV = Trainer("OpenEnv's rollouts", "", "", (Home("trl.trainer.grpo", "GRPO", "0.26", "1.9"),))

# Class, what the trainer is given besides model and configuration, settings.
Given = Callable[[Path], dict[str, Any]]
_GRPO: dict[str, Any] = {"num_generations": 4}
CASES: dict[str, tuple[str, Given, dict[str, Any]]] = {
    "GRPO": ("GRPO", rewards, _GRPO),
    "RLOO": ("RLOO", rewards, _GRPO),
    "Online DPO": (
        "OnlineDPO",
        pairs,
        {"max_new_tokens": 8, "max_length": 64, "max_completion_length": None, "vllm_mode": "server"},
    ),
    "GOLD": (
        "GOLD",
        lambda folder: {
            "teacher_model": tiny.model(seed=7),
            "train_dataset": conversations(),
            "processing_class": byte_level(),
        },
        {"lmbda": 1.0, "max_length": 64},
    ),
    "Distillation": (
        "Distillation",
        lambda folder: {
            "teacher_model": teacher(folder),
            "train_dataset": tiny.prompts(16) if Version("1.10") <= RELEASE else conversations(),
        },
        # Before 1.10 TRL's own does not train an adapter with gradient checkpointing.
        {"lmbda": 1.0, "max_length": 64, "gradient_checkpointing": Version("1.10") <= RELEASE},
    ),
    "IW-OPD": (
        "IWOPD",
        lambda folder: {"teacher_model": teacher(folder), "train_dataset": conversations()},
        {"lmbda": 1.0, "max_length": 64},
    ),
    "SDFT": ("SDFT", lambda folder: {"train_dataset": contexts()}, _GRPO),
    "SDPO": ("SDPO", lambda folder: {**rewards(folder), "train_dataset": contexts()}, _GRPO),
    "SSD": ("SSD", lambda folder: {"train_dataset": tiny.prompts(16)}, {}),
    "DPPO": ("DPPO", rewards, _GRPO),
    "GFPO": ("GFPO", rewards, _GRPO),
    "GMPO": ("GMPO", rewards, _GRPO),
    "GRPO with replay buffer": ("GRPOWithReplayBuffer", rewards, {**_GRPO, "replay_buffer_size": 8}),
    "GSPO-token": ("GRPO", rewards, {**_GRPO, "importance_sampling_level": "sequence_token"}),
    "PAPO": ("PAPO", rewards, _GRPO),
    "MiniLLM": ("MiniLLM", lambda folder: {**rewards(folder), "teacher_model": tiny.model(seed=7)}, _GRPO),
    OPENENV.title: ("GRPO", rollouts, _GRPO),
    "GKD": (
        "GKD",
        lambda folder: {"teacher_model": tiny.model(seed=7), "train_dataset": conversations()},
        {"lmbda": 1.0, "max_length": 64, "max_new_tokens": 8},
    ),
    "A*-PO": (
        "A2PO",
        lambda folder: {"reward_funcs": even, "train_dataset": tiny.prompts(16)},
        {"max_prompt_length": 32, "num_value_samples": 2, "filter_all_incorrect": False},
    ),
}


def present() -> dict[str, Trainer]:
    """The trainers that sample from the shared engine in the installed TRL, by title."""
    return {t.title: t for t in (*SHARED, *INHERITING, *BESIDE, OPENENV) if any(map(_has, t.homes))}


def _has(home: Home) -> bool:
    return Version(home.first) <= RELEASE < Version(home.end)


def classes(title: str) -> tuple[Any, Any]:
    """The trainer and its configuration, as a script imports them."""
    package = next(home.module.rpartition(".")[0] for home in present()[title].homes if _has(home))
    if title == "SDPO":
        package = "trl.experimental.sdpo"  # before 1.6 its seams are in a base class, which is elsewhere
    name = CASES[title][0]
    module = importlib.import_module("trl" if package == "trl.trainer" else package)
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config", None) or trl.GRPOConfig


def make(title: str, folder: Path, *, model: Any = None, peft: bool = True, **settings: Any) -> Any:
    given, own = CASES[title][1:]
    trainer, config = classes(title)
    known = inspect.signature(config).parameters
    wanted = {**quick(folder), **own, **settings}
    args = config(**{k: v for k, v in wanted.items() if v is not None and k in known})
    return trainer(
        model=tiny.model(positions=1024) if model is None else model,
        args=args,
        **({"peft_config": tiny.lora()} if peft else {}),
        **{"processing_class": tiny.tokenizer(), **given(folder)},
    )


def engine_of(trainer: Any) -> Any:
    return runtime.engine_of(getattr(trainer, "vllm_generation", trainer))


def policy_of(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


# Watching -------------------------------------------------------------------------------------------------------------


def apart_from_engine(policy: Any, weights: dict[str, torch.Tensor], outputs: Any) -> float:
    """The largest difference between what the engine said of a sampled token, and `policy` with `weights` says.

    Log-probabilities, in float32, at temperature 1: a batch that was sampled from these very weights is within 1e-3.
    """
    largest = 0.0
    training = policy.training
    policy.eval()
    for output in outputs:
        for sample in output.outputs:
            start = len(output.prompt_token_ids) - 1
            ids = torch.tensor([[*output.prompt_token_ids, *sample.token_ids]], device=policy.device)
            said = torch.tensor([p[t].logprob for t, p in zip(sample.token_ids, sample.logprobs, strict=True)])
            with torch.no_grad():
                logits = torch.func.functional_call(
                    policy, weights, kwargs={"input_ids": ids, "use_cache": False}
                ).logits
            logps = logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[start:, 0].cpu()
            largest = max(largest, float((said - logps).abs().max()))
    policy.train(training)
    return largest


class Watch:
    """Every batch that the engine samples, against the model as it is at that moment.

    For each batch: `steps`, TRL's step counter; `off`, the difference from the current weights; `stale`, that from the
    weights that the batch before was sampled from (infinite for the first); `apart`, that from the base, under LoRA.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.llm, self.policy = trainer, engine_of(trainer), policy_of(trainer)
        self.steps: list[int] = []
        self.off: list[float] = []
        self.stale: list[float] = []
        self.apart: list[float] = []
        self.before: dict[str, torch.Tensor] = {}
        for method in ("generate", "chat"):
            setattr(self.llm, method, functools.partial(self.watched, getattr(self.llm, method)))

    def watched(self, call: Any, prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        if sampling_params.logprobs is None:
            sampling_params = sampling_params.clone()
            sampling_params.logprobs = 0
        outputs = call(prompts, sampling_params, **kwargs)
        now = {n: p.detach().clone() for n, p in self.policy.named_parameters() if p.requires_grad}
        self.steps.append(self.trainer.state.global_step)
        self.off.append(apart_from_engine(self.policy, {}, outputs))
        self.stale.append(apart_from_engine(self.policy, self.before, outputs) if self.before else math.inf)
        if hasattr(self.policy, "disable_adapter"):
            with self.policy.disable_adapter():
                self.apart.append(apart_from_engine(self.policy, {}, outputs))
        self.before = now
        return outputs


def outside_one_copy(trainer: Any, policy: Any = None) -> list[str]:
    """The base parameters that do not lie in the engine's own storage, but for those that it has merged copies of."""
    shared, policy = engine_of(trainer).shared, policy_of(trainer) if policy is None else policy
    theirs = {p.untyped_storage().data_ptr() for p in shared.engine_model.parameters()}
    copied = {shared.parameters[n].data_ptr() for n, (home, _) in shared.plan.views.items() if home in shared.plan.own}
    base = [(n, p) for n, p in policy.named_parameters() if "lora_" not in n and p.data_ptr() not in copied]
    return [n for n, p in base if p.untyped_storage().data_ptr() not in theirs]
