"""Checkpoints are TRL's own: no engine inside, and a resumed run is the run that was not interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from patchfastrl import PatchFastRL, vLLMSamplingParams


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(c.split())) % 5) for c in completions]


def train(folder: Path, *, lora: bool, resume: bool = False, eval_dataset: Any = None, **settings: Any) -> Any:
    PatchFastRL()
    from trl import GRPOConfig, GRPOTrainer

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "temperature": 1.0,
        "vllm_gpu_memory_utilization": 0.2,
        **settings,
    }
    trainer = GRPOTrainer(
        model=tiny.model("llama"),
        processing_class=tiny.tokenizer(),
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **arguments),
        train_dataset=tiny.prompts(16),
        eval_dataset=eval_dataset,
        peft_config=tiny.lora() if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, lora):
    # vLLM draws from torch's generator, whose state is part of the checkpoint.
    whole = train(tmp_path / "through", lora=lora)
    through, losses = weights(whole), [h["loss"] for h in whole.state.log_history if "loss" in h]
    train(tmp_path / "stopped", lora=lora, max_steps=2)
    rest = train(tmp_path / "stopped", lora=lora, resume=True)
    resumed = weights(rest)
    assert [h["loss"] for h in rest.state.log_history if "loss" in h] == losses
    untrained = weights(train(tmp_path / "untrained", lora=lora, max_steps=1, learning_rate=0.0))
    assert through.keys() == resumed.keys()
    for name, value in through.items():
        assert torch.equal(value, resumed[name]), name
    assert any(not torch.equal(value, untrained[name]) for name, value in through.items())


@pytest.mark.timeout(240)
def test_what_is_saved(tmp_path):
    trainer = train(
        tmp_path / "out", lora=False, max_steps=2, vllm_sampling_params=vLLMSamplingParams(top_k=20, stop=["cat"])
    )
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    own = dict(trainer.model.named_parameters())
    for name, value in saved.items():
        assert torch.equal(value, own[name]), name
    assert saved.keys() == own.keys()
    one_copy = sum(p.numel() * p.element_size() for p in own.values())
    assert (checkpoint / "model.safetensors").stat().st_size < 1.1 * one_copy + 20_000
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2

    # A process that has never heard of this package reads the arguments, and the model.
    code = f"""
import sys, torch
sys.modules["patchfastrl"] = None
args = torch.load({str(checkpoint / "training_args.bin")!r}, weights_only=False)
assert type(args).__name__ == "GRPOConfig", type(args)
assert type(args.vllm_sampling_params) is dict and args.vllm_sampling_params["top_k"] == 20
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})
print("VALUE", float(model.model.norm.weight.double().sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = float(trainer.model.model.norm.weight.double().sum())
    assert float(done.stdout.split("VALUE")[1]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.timeout(240)
def test_an_adapter_s_checkpoint(tmp_path: Path) -> None:
    """The adapter alone; every way of saving it gives the adapter in training, and the base is not in it."""
    from peft import PeftModel

    trainer = train(tmp_path / "out", lora=True, max_steps=2)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.model.save_pretrained(str(tmp_path / "by hand"))
    own = {n: p for n, p in trainer.model.named_parameters() if "lora_" in n}
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "saved", tmp_path / "by hand"):
        saved = load_file(folder / "adapter_model.safetensors")
        assert len(saved) == len(own) > 0
        assert not list(folder.glob("model*"))
        again = PeftModel.from_pretrained(tiny.model("llama"), folder)
        for name, value in again.named_parameters():
            if name in own:
                assert torch.equal(value, own[name]), name
        assert torch.equal(tiny.logprobs(again, tiny.ids(9)), tiny.logprobs(trainer.model, tiny.ids(9)))
    names = {p.name for p in (tmp_path / "out" / "checkpoint-2").iterdir()}
    assert names <= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "optimizer.pt", "rng_state.pth", "scheduler.pt",
        "trainer_state.json", "training_args.bin",
    }  # fmt: skip


@pytest.mark.timeout(240)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_best_model_loaded_at_the_end_is_sampled_from(
    tmp_path: Path, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With standby: loading a checkpoint writes through the shared storage while the engine sleeps."""
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_completions/mean_length",
        "greater_is_better": False,
        "per_device_eval_batch_size": 8,
    }
    trainer = train(tmp_path, lora=lora, eval_dataset=tiny.prompts(8), **settings)
    assert trainer.state.best_model_checkpoint is not None
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    best = load_file(Path(trainer.state.best_model_checkpoint) / name)
    own = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters()}
    for key, value in best.items():
        assert torch.equal(own[key], value), key
    evaluated = trainer.evaluate()
    assert evaluated["eval_sampling/sampling_logp_difference/max"] < 1e-4
    llm = trainer.vllm_generation.llm
    with llm.awakened():
        llm.publish()
        assert tiny.engine_greedy(llm, tiny.ids(9)) == tiny.greedy(trainer.model, tiny.ids(9))
