"""Unchanged scripts, in every form, train through the shared engine; what TRL does with the samples stays TRL's."""

from __future__ import annotations

import gc
import json
import logging
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import stock
import tiny
import torch
import trl

from patchfastrl import PatchFastRL, adapters, engine_report
from patchfastrl.errors import AdapterError, PatchFastRLError

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("patched")]

MIB = 2**20
PROMPT = tiny.ids(24)


def losses(trainer: Any) -> list[dict[str, float]]:
    return [h for h in trainer.state.log_history if "loss" in h]


def assert_in_step(trainer: Any) -> None:
    """The engine sampled from the policy in training at every step, and does now."""
    for entry in losses(trainer):
        if "sampling/sampling_logp_difference/max" in entry:
            assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    llm = trainer.vllm_generation.llm
    llm.wake_up()
    llm.publish()
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)


def base_of(model: Any) -> dict[str, torch.Tensor]:
    from patchfastrl.sharing import base_parameters

    return {n: p.detach().clone() for n, p in base_parameters(model).items()}


# Every form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
@pytest.mark.parametrize("form", ["string", "string + config", "instance", "instance + config", "PeftModel"])
def test_every_form(algorithm: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM

    adapted = "config" in form or form == "PeftModel"
    model: Any = tiny.checkpoint(tmp_path / "model", "llama")
    if "string" not in form:
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if form == "PeftModel":
        model = tiny.adapted(model)
    with caplog.at_level(logging.WARNING, logger="patchfastrl"):
        trainer = tiny.trainer(
            tmp_path,
            algorithm,
            model=model,
            peft_config=tiny.lora() if "config" in form else None,
            args={"max_steps": 3},
        )
    told = [r.getMessage() for r in caplog.records if "use_vllm is on" in r.getMessage()]
    assert len(told) == 1
    assert "use_vllm='keep'" in told[0]
    assert trainer.args.use_vllm
    assert trainer.use_vllm
    assert trainer.vllm_mode == "colocate"
    llm = trainer.vllm_generation.llm
    llm.shared.check()
    homes = {h.untyped_storage().data_ptr() for h in llm.shared.homes.values()}
    parameters = trainer.model.named_parameters()
    apart = [n for n, p in parameters if "lora_" not in n and p.untyped_storage().data_ptr() not in homes]
    assert apart == []
    before, checksum = base_of(trainer.model), llm.shared.checksum()
    adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_B.default" in n}
    trainer.train()
    assert_in_step(trainer)
    assert len(losses(trainer)) == 3
    after = base_of(trainer.model)
    if adapted:
        assert llm.shared.checksum() == checksum
        assert all(torch.equal(after[n], before[n]) for n in before)
        changed = [n for n, p in trainer.model.named_parameters() if n in adapter and not torch.equal(p, adapter[n])]
        assert len(changed) == len(adapter) > 0
        assert engine_report(trainer)["publishes"] >= 3
        assert tiny.engine_greedy(llm, PROMPT, lora_request=None) != tiny.engine_greedy(llm, PROMPT)
    else:
        assert all(not torch.equal(after[n], before[n]) for n in before)
        assert engine_report(trainer)["publishes"] == 0
    assert engine_report(trainer)["bytes_shared"] == sum(
        h.untyped_storage().nbytes() for h in llm.shared.homes.values()
    )


def test_a_string_is_loaded_in_one_dtype_for_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny.checkpoint(tmp_path / "model", "llama", torch.bfloat16)

    def dtypes(adapted: bool, **settings: Any) -> tuple[Any, Any]:
        trainer = tiny.trainer(
            tmp_path, model=path, peft_config=tiny.lora() if adapted else None, args={"max_steps": 1, **settings}
        )
        trainer.train()
        llm = trainer.vllm_generation.llm
        assert {h.dtype for h in llm.shared.homes.values()} == {p.dtype for p in base_of(trainer.model).values()}
        return llm.llm_engine.model_config.dtype, next(iter(base_of(trainer.model).values())).dtype

    with caplog.at_level(logging.WARNING, logger="patchfastrl"):
        assert dtypes(True) == (torch.bfloat16, torch.bfloat16)
    assert any("checkpoint's dtype" in r.getMessage() for r in caplog.records)
    assert dtypes(True, model_init_kwargs={"dtype": "float32"}) == (torch.float32, torch.float32)
    assert dtypes(False) == (torch.float32, torch.float32)  # TRL's own default
    assert dtypes(False, model_init_kwargs={"dtype": "bfloat16"}) == (torch.bfloat16, torch.bfloat16)


def test_keep_respects_the_script(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    PatchFastRL(use_vllm="keep")
    try:
        with caplog.at_level(logging.INFO):
            trainer = tiny.trainer(tmp_path, peft_config=tiny.lora())
            trainer.train()
        assert not trainer.args.use_vllm
        assert not hasattr(trainer, "vllm_generation")
        assert not any("use_vllm is on" in r.getMessage() for r in caplog.records)
        chosen = tiny.trainer(tmp_path, peft_config=tiny.lora(), args={"use_vllm": True})
        chosen.train()
        assert_in_step(chosen)
    finally:
        PatchFastRL()


def test_a_server_becomes_colocated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:9"}
    with caplog.at_level(logging.WARNING, logger="patchfastrl"):
        trainer = tiny.trainer(tmp_path, args=settings)
    assert any("asks for vllm_mode='server'; the engine runs in this process" in r.getMessage() for r in caplog.records)
    trainer.train()
    assert_in_step(trainer)


# Settings that TRL has --------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "num_iterations": {"num_iterations": 2, "max_steps": 4, "loss_type": "grpo", "scale_rewards": "none"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 3},
    "steps_per_generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4},
    "checkpointing": {"gradient_checkpointing": True, "optim": "adafactor", "mask_truncated_completions": True},
    "no correction": {"vllm_importance_sampling_correction": False, "top_entropy_quantile": 0.5},
    "temperature": {"temperature": 0.7},
}


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_settings(adapted: bool, tmp_path: Path) -> None:
    """The same model through all of them: a notebook in which a cell is changed and run again."""
    for name, settings in SETTINGS.items():
        model = tiny.model("qwen2-tied")
        trainer = tiny.trainer(
            tmp_path / name, model=model, peft_config=tiny.lora() if adapted else None, args=settings
        )
        trainer.train()
        assert_in_step(trainer)
        ratios = [h[ratio] for h in losses(trainer) if (ratio := "sampling/importance_sampling_ratio/mean") in h]
        assert bool(ratios) == (name != "no correction"), name
        assert all(abs(ratio - 1) < 1e-3 for ratio in ratios), name


def test_publishes_follow_the_optimizer(tmp_path: Path) -> None:
    """Two optimizer steps for each batch of completions: one publish for each batch."""
    settings = {"num_iterations": 2, "max_steps": 6}
    trainer = tiny.trainer(tmp_path, peft_config=tiny.lora(), args=settings)
    before = engine_report(trainer)["publishes"]
    trainer.train()
    assert (
        engine_report(trainer)["publishes"] - before == 2
    )  # before the 2nd and 3rd batch; the 1st had the initial one


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_the_reference_of_a_full_model(algorithm: str, tmp_path: Path) -> None:
    """TRL loads the reference from the checkpoint: a model of its own, which the engine must not touch."""
    path = tiny.checkpoint(tmp_path / "model", "llama")
    trainer = tiny.trainer(tmp_path, algorithm, model=path, args={"beta": 0.1, "max_steps": 3})
    homes = {h.untyped_storage().data_ptr() for h in trainer.vllm_generation.llm.shared.homes.values()}
    assert all(p.untyped_storage().data_ptr() not in homes for p in trainer.ref_model.parameters())
    before = {n: p.clone() for n, p in trainer.ref_model.named_parameters()}
    trainer.train()
    assert_in_step(trainer)
    assert all(torch.equal(p, before[n]) for n, p in trainer.ref_model.named_parameters())
    kl = [entry["kl"] for entry in losses(trainer)]
    assert abs(kl[0]) < 1e-4 < kl[-1]


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
@pytest.mark.parametrize("form", ["config", "PeftModel"])
def test_the_reference_of_an_adapted_model(algorithm: str, form: str, tmp_path: Path) -> None:
    """The base alone for a fresh adapter; a copy of the adapter ("ref") for one that was there before."""
    model = tiny.model("llama")
    wrapped = form == "PeftModel"
    trainer = tiny.trainer(
        tmp_path,
        algorithm,
        model=tiny.adapted(model) if wrapped else model,
        peft_config=None if wrapped else tiny.lora(),
        args={"beta": 0.1, "max_steps": 3},
    )
    assert ("ref" in trainer.model.peft_config) == wrapped
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    trainer.train()
    assert_in_step(trainer)
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    kl = [entry["kl"] for entry in losses(trainer)]
    assert abs(kl[0]) < 1e-4 < kl[-1]
    if wrapped:  # both adapters can be served, the one that is active is
        current = tiny.engine_greedy(trainer.vllm_generation.llm, PROMPT)
        trainer.model.set_adapter("ref")
        trainer.vllm_generation.sync_weights()
        assert tiny.engine_greedy(trainer.vllm_generation.llm, PROMPT) == tiny.greedy(trainer.model, PROMPT) != current


def test_evaluation_and_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback
    from vllm import SamplingParams

    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")
    events: list[str] = []
    sampled: list[Any] = []

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("step")
            llm = trainer.vllm_generation.llm
            llm.wake_up()
            with pytest.raises(AdapterError, match=r"sync_weights\(\)"):  # trained since the last publish
                llm.generate([{"prompt_token_ids": PROMPT}], use_tqdm=False)
            trainer.vllm_generation.sync_weights()
            params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
            out = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
            sampled.append(list(out[0].outputs[0].token_ids) == tiny.greedy(trainer.model, PROMPT))

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            events.append("evaluate")

    trainer = tiny.trainer(
        tmp_path,
        peft_config=tiny.lora(),
        eval_dataset=tiny.prompts(8),
        callbacks=[Watching()],
        args={"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8, "max_steps": 4},
    )
    trainer.train()
    assert events == ["step", "step", "evaluate", "step", "step", "evaluate"]
    assert sampled == [True] * 4
    evaluated = [h for h in trainer.state.log_history if "eval_reward" in h]
    assert len(evaluated) == 2
    assert max(h["eval_sampling/sampling_logp_difference/max"] for h in evaluated) < 1e-4
    assert "eval_reward" in trainer.evaluate()
    assert_in_step(trainer)


def test_conversations(tmp_path: Path) -> None:
    from datasets import Dataset

    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(c[0]["content"]) % 5) for c in completions]

    turns = [
        {"role": "user", "content": "the cat sat"},
        {"role": "assistant", "content": "on"},
        {"role": "user", "content": "the mat ?"},
    ]
    data = Dataset.from_dict({"prompt": [turns[:1], turns] * 8})
    trainer = tiny.trainer(tmp_path, peft_config=tiny.lora(), reward_funcs=reward, train_dataset=data)
    trainer.train()
    assert_in_step(trainer)
    assert len(seen) == 16
    assert all(c[0]["role"] == "assistant" for c in seen)


def test_several_rewards_with_weights(tmp_path: Path) -> None:
    def other(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [1.0 if len(c) % 2 else None for c in completions]

    trainer = tiny.trainer(
        tmp_path, peft_config=tiny.lora(), reward_funcs=[tiny.length_reward, other], args={"reward_weights": [1.0, 0.5]}
    )
    trainer.train()
    assert_in_step(trainer)
    assert {"rewards/length_reward/mean", "rewards/other/mean"} <= losses(trainer)[0].keys()


def test_a_rollout_function_that_reaches_for_the_engine(tmp_path: Path) -> None:
    """It gets the adapter in training without asking for it."""
    from vllm import SamplingParams

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        params = SamplingParams(temperature=1.0, max_tokens=8, logprobs=0, detokenize=False)
        outputs = trainer.vllm_generation.llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
        done = [o.outputs[0] for o in outputs]
        return {
            "prompt_ids": ids,
            "completion_ids": [list(d.token_ids) for d in done],
            "logprobs": [[step[t].logprob for t, step in zip(d.token_ids, d.logprobs, strict=True)] for d in done],
        }

    trainer = tiny.trainer(tmp_path, peft_config=tiny.lora(), rollout_func=rollout, args={"max_steps": 3})
    trainer.train()
    assert_in_step(trainer)
    assert len(losses(trainer)) == 3


def test_a_subclass_of_the_trainer_and_of_the_configuration(tmp_path: Path) -> None:
    from dataclasses import dataclass

    import trl

    class MyTrainer(trl.GRPOTrainer):
        doubled = 0

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.doubled += 1
            return super()._compute_loss(*args, **kwargs) * 2

    @dataclass
    class MyConfig(trl.GRPOConfig):
        mine: int = 3

    trainer = MyTrainer(
        model=tiny.model(),
        args=MyConfig(**tiny.quick(tmp_path), mine=4),
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.length_reward,
        train_dataset=tiny.prompts(16),
        peft_config=tiny.lora(),
    )
    trainer.train()
    assert trainer.doubled == 2
    assert_in_step(trainer)


# One after another --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["same model", "another model"])
def test_a_second_trainer(same: bool, tmp_path: Path) -> None:
    """A notebook cell run again: the first engine goes, its memory comes back, the old trainer says why."""
    model = tiny.model(positions=65536)
    args = {"vllm_enable_sleep_mode": True}
    first = tiny.trainer(tmp_path / "1", model=model, args=args)
    first.train()
    llm = first.vllm_generation.llm
    size = llm._standby.nbytes
    assert size > 200 * MIB
    llm.wake_up()  # all pages of the cache touched
    gc.collect()
    before = psutil.Process().memory_full_info().uss
    second = tiny.trainer(
        tmp_path / "2", model=model if same else tiny.model("llama"), args={"vllm_max_model_length": 256}
    )
    gc.collect()
    assert before - psutil.Process().memory_full_info().uss > size - 40 * MIB
    second.train()
    assert_in_step(second)
    with pytest.raises(PatchFastRLError, match="closed: another engine was built in this process"):
        first.train()
    with pytest.raises(PatchFastRLError, match="closed: another engine was built in this process"):
        _ = llm.llm_engine
    assert second.accelerator.distributed_type == "NO"
    assert type(second.model_wrapped) is type(second.model)


def test_trainers_that_are_thrown_away_leave_nothing(tmp_path: Path) -> None:
    """Memory, guards, environment and process group, after as many as a notebook sees in a day."""
    from patchfastrl import engine, guards

    environment = dict(os.environ)
    used = []
    for number in range(5):
        trainer = tiny.trainer(tmp_path, peft_config=tiny.lora(), args={"max_steps": 1, "vllm_max_model_length": 256})
        assert dict(os.environ) == environment
        trainer.train()
        del trainer
        gc.unfreeze()
        gc.collect()
        assert not engine.live
        assert not guards._replaced
        assert not torch.distributed.is_initialized()
        if number:
            used.append(psutil.Process().memory_full_info().uss)
    assert used[-1] - used[0] < 30 * MIB


# As stock TRL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock_trl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stock")
    done = subprocess.run(
        [sys.executable, str(Path(stock.__file__)), str(folder)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "stock.json").read_text())


def test_defaults_are_trl_s(stock_trl: tuple[Path, dict[str, Any]]) -> None:
    ours = stock.defaults()
    for name, theirs in stock_trl[1]["defaults"].items():
        assert {k: v for k, v in ours[name].items() if k != "vllm_sampling_params"} == theirs
        assert ours[name]["vllm_sampling_params"] == "None"
        assert list(ours[name])[: len(theirs)] == list(theirs) or set(ours[name]) - set(theirs) == {
            "vllm_sampling_params"
        }


def test_a_trainer_changes_only_what_it_must(tmp_path: Path) -> None:
    args = tiny.config(tmp_path)
    before = args.to_dict()
    import trl

    trl.GRPOTrainer(
        model=tiny.model(),
        args=args,
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.length_reward,
        train_dataset=tiny.prompts(16),
    )
    changed = {k: v for k, v in args.to_dict().items() if v != before[k]}
    assert changed == {"use_vllm": True}


@pytest.mark.parametrize(("algorithm", "lora", "seed"), stock.RUNS, ids=str)
def test_the_same_run_as_stock(
    stock_trl: tuple[Path, dict[str, Any]], algorithm: str, lora: bool, seed: int, tmp_path: Path
) -> None:
    """With the same seed: the same completions, token for token, the same losses, rewards and metrics."""
    folder, found = stock_trl
    theirs = found["runs"][f"{algorithm} {lora} {seed}"]
    ours = stock.short_run(tmp_path, str(folder / "model"), algorithm, lora, seed)
    assert ours["keys"] == theirs["keys"]
    assert ours["completions"] == theirs["completions"]
    assert ours["reward"] == theirs["reward"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2, abs=1e-3)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "model", "llama")
    runs = [stock.short_run(tmp_path / str(n), path, "GRPO", True, seed) for n, seed in enumerate((5, 5, 6))]
    assert runs[0] == runs[1]
    assert runs[0]["completions"] != runs[2]["completions"]


def test_the_reward_curve_is_stock_trl_s(stock_trl: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Against stock TRL sampling with transformers: within the noise between seeds, and not without publishing."""
    theirs = stock_trl[1]["curves"]
    ours = [stock.curve(tmp_path / str(seed), seed) for seed in stock.CURVE_SEEDS]
    for curve in theirs + ours:
        assert statistics.mean(curve[:3]) < 0.5
        assert statistics.mean(curve[-5:]) > 0.9
    means = [[statistics.mean(c) for c in curves] for curves in (theirs, ours)]
    noise = (statistics.variance(means[0]) + statistics.variance(means[1])) ** 0.5
    assert abs(statistics.mean(means[0]) - statistics.mean(means[1])) < 3 * max(noise, 0.03)
    with adapters.publishing_disabled():
        control = stock.curve(tmp_path / "control", 0)
    assert statistics.mean(control[-5:]) < 0.6


@pytest.mark.parametrize("by_name", [True, False])
def test_of_several_gpus_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by_name: bool
) -> None:
    """TRL would spread a model over all of them, and transformers copy it to each."""
    args = tiny.config(tmp_path)
    assert args.n_gpu < 2
    args._n_gpu = 2
    model = tiny.checkpoint(tmp_path / "model") if by_name else tiny.model()
    given = {} if by_name else {"processing_class": tiny.tokenizer()}
    with monkeypatch.context() as several:
        several.setattr(torch.cuda, "device_count", lambda: 2)
        trainer = trl.GRPOTrainer(
            model, reward_funcs=tiny.length_reward, args=args, train_dataset=tiny.prompts(16), **given
        )
    assert args.n_gpu == 1
    assert "one process trains and samples on one GPU, cpu of 2" in caplog.text
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    assert_in_step(trainer)


def test_a_model_is_loaded_onto_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer.utils import create_model_from_path

    from patchfastrl import runtime

    path, args, asked = tiny.checkpoint(tmp_path), tiny.config(tmp_path, use_vllm=True), []

    def create(model: str, **kwargs: Any) -> Any:
        asked.append(kwargs.get("device_map"))
        return create_model_from_path(model, **kwargs)

    for number in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda number=number: number)
        runtime.load_model(create, path, args, None, {}, "dtype")
    runtime.load_model(create, path, args, None, {"device_map": "cpu"}, "dtype")
    assert asked == [None, {"": args.device}, "cpu"]
