"""Old log-probabilities from the training forward are those of TRL's own pass, which stays where they would not be."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from patchfastrl import PatchFastRL, UnpatchFastRL, patches

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module", autouse=True)
def _patched() -> Iterator[None]:
    PatchFastRL()
    yield
    close_all()
    UnpatchFastRL()


def close_all() -> None:
    from patchfastrl import engine

    gc.collect()
    for llm in list(engine.live):
        llm.close("the test is over.")


@contextlib.contextmanager
def without_the_seams() -> Iterator[None]:
    """PatchFastRL as it is, but for what is tested here: TRL makes its pass."""
    UnpatchFastRL()
    with pytest.MonkeyPatch.context() as patched:
        kept = tuple(seam for seam in patches.SEAMS if not seam.name.endswith("old_logps"))
        assert len(patches.SEAMS) - len(kept) == 2
        patched.setattr(patches, "SEAMS", kept)
        PatchFastRL()
        yield
        UnpatchFastRL()
    PatchFastRL()


@dataclass
class Run:
    """`passes`: forwards over a generation batch without gradients; `trained`: those that are trained on."""

    logs: list[dict[str, float]]
    gradients: list[list[torch.Tensor]]
    parameters: list[torch.Tensor]
    passes: int
    trained: int


def noisy_rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """From the engine, with log-probabilities that are off, one that is missing, and tokens that do not count."""
    from vllm import SamplingParams

    ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
    params = SamplingParams(temperature=1.0, max_tokens=8, logprobs=0, detokenize=False, seed=trainer.state.global_step)
    outputs = trainer.vllm_generation.llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
    done = [o.outputs[0] for o in outputs]
    noise = torch.Generator().manual_seed(trainer.state.global_step)
    exact = [[step[t].logprob for t, step in zip(d.token_ids, d.logprobs, strict=True)] for d in done]
    logprobs = [[p + 0.2 * float(torch.randn((), generator=noise)) for p in row] for row in exact]
    logprobs[0][0] = float("nan")
    return {
        "prompt_ids": ids,
        "completion_ids": [list(d.token_ids) for d in done],
        "logprobs": logprobs,
        "env_mask": [[int(position != 2) for position in range(len(row))] for row in logprobs],
    }


def _class(trainer: str, kind: str = "Trainer") -> Any:
    module = importlib.import_module("trl" if trainer == "GRPO" else f"trl.experimental.{trainer.lower()}")
    return getattr(module, f"{trainer}{kind}")


def run(folder: Path, trainer_class: str = "GRPO", *, peft_config: Any = None, **settings: Any) -> Run:
    """A short training, and everything that it leaves."""
    import trl

    found = Run([], [], [], 0, 0)
    scored = trl.GRPOTrainer._get_per_token_logps_and_entropies

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            found.trained += 1
        else:
            found.passes += 1
        return scored(self, *args, **kwargs)

    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            found.gradients.append([p.grad.clone() for p in trained if p.grad is not None])

    given = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 1e-1,
        "max_grad_norm": 0.0,
        "beta": 0.0,
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", counting)
        trainer = _class(trainer_class)(
            model=tiny.model(),
            args=_class(trainer_class, "Config")(**{**tiny.quick(folder), **given, **settings}),
            processing_class=tiny.tokenizer(),
            reward_funcs=tiny.length_reward,
            train_dataset=tiny.prompts(16),
            eval_dataset=tiny.prompts(4),
            peft_config=peft_config,
            rollout_func=noisy_rollout,
            callbacks=[Watching()],
        )
        trainer.train()
    found.parameters = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    found.logs = [
        {k: v for k, v in h.items() if "time" not in k and "per_second" not in k} for h in trainer.state.log_history
    ]
    return found


# The same numbers ---------------------------------------------------------------------------------------------------

CLIPPED = {"vllm_importance_sampling_clip_min": 0.9, "vllm_importance_sampling_clip_max": 1.1}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CASES: dict[str, dict[str, Any]] = {
    "token_truncate": CLIPPED,
    "token_mask": {**CLIPPED, "loss_type": "grpo", "importance_sampling_level": "sequence"},
    "sequence_truncate": {**CLIPPED, "off_policy_mask_threshold": 0.01},
    "sequence_mask": {**CLIPPED, "steps_per_generation": 2, "logging_steps": 3},
    "vespo": {**CLIPPED, "loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask"},
    "lora": {"peft_config": tiny.lora(), "beta": 0.1, "gradient_checkpointing": True, "steps_per_generation": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_the_pass(case: str, tmp_path: Path) -> None:
    """Bit by bit: losses, gradients, parameters and every metric of three optimizer steps."""
    settings = {"vllm_importance_sampling_mode": case if case in MODES else "token_truncate", **CASES[case]}
    ours = run(tmp_path / "ours", **settings)
    with without_the_seams():
        theirs = run(tmp_path / "theirs", **settings)
    batches = 3 * 4 // settings.get("steps_per_generation", 4)
    references = batches if "beta" in settings else 0  # with the model that the KL term compares to
    assert (ours.passes, theirs.passes) == (references, batches + references)
    assert ours.trained == theirs.trained == 3 * 4
    assert ours.logs == theirs.logs
    assert len(ours.gradients) == 3
    for one, other in ((ours.parameters, theirs.parameters), *zip(ours.gradients, theirs.gradients, strict=True)):
        assert len(one) == len(other) > 0
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # The ratios were no ones, and what the mode does to those out of bounds was done.
    least, most = (ours.logs[0][f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "max"))
    if case == "lora":
        assert most - least > 0.5
    else:
        assert least == (0.0 if "mask" in settings["vllm_importance_sampling_mode"] else pytest.approx(0.9))
        assert least < most <= 1.1 + 1e-6


def test_other_old_values_make_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared above tells one row from another."""
    from patchfastrl import old_logprobs

    kept = old_logprobs._Promised.keep
    expected = run(tmp_path / "expected")
    monkeypatch.setattr(old_logprobs._Promised, "keep", lambda promised, rows, old: kept(promised, rows.roll(1), old))
    found = run(tmp_path / "found")
    assert found.logs[0]["sampling/sampling_logp_difference/mean"] != pytest.approx(
        expected.logs[0]["sampling/sampling_logp_difference/mean"], rel=1e-3
    )
    assert found.logs[0]["loss"] != pytest.approx(expected.logs[0]["loss"], rel=1e-3)


# Where TRL's pass stays ---------------------------------------------------------------------------------------------

KEPT: dict[str, tuple[int, dict[str, Any]]] = {
    "num_iterations": (1, {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 1}),
    "optimizer steps within a generation": (1, {"steps_per_generation": 8, "max_steps": 2}),
    "dropout of an adapter": (3, {"peft_config": tiny.lora(lora_dropout=0.1)}),
    "another trainer's loss": (3, {"trainer_class": "GMPO"}),
}


@pytest.mark.parametrize("case", KEPT)
def test_the_pass_stays(case: str, tmp_path: Path) -> None:
    passes, settings = KEPT[case]
    found = run(tmp_path, **settings)
    assert found.passes == passes
    assert "sampling/importance_sampling_ratio/mean" in found.logs[0]


def test_the_pass_stays_in_evaluation(tmp_path: Path) -> None:
    found = run(tmp_path, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=8)
    assert found.passes == 2 + 2  # two batches: scored once, and once for their loss; none for training
    evaluated = [entry for entry in found.logs if "eval_loss" in entry]
    assert "eval_sampling/importance_sampling_ratio/mean" in evaluated[0]


def test_what_keeps_the_pass(tmp_path: Path) -> None:
    """One thing at a time: the pass can go before and after it, and must stay with it."""
    import trl

    from patchfastrl.old_logprobs import _METHODS, old_logps_later

    trainer = tiny.trainer(tmp_path, peft_config=tiny.lora(lora_dropout=0.5), args={"disable_dropout": True})
    dropout = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))
    config = trainer.model.config

    class Mine(trl.GRPOTrainer):
        pass

    for owner, name, value in (
        (trainer, "num_iterations", 2),
        (trainer.args, "steps_per_generation", 2),
        (trainer.args, "use_liger_kernel", True),
        (trainer.args, "neftune_noise_alpha", 5.0),
        (trainer.model, "training", False),
        (dropout, "p", 0.1),
        (config, "attention_dropout", 0.1),
        (config, "router_jitter_noise", 0.1),
        (config, "text_config", {"resid_pdrop": 0.1}),
        (trainer.model, "norm", torch.nn.BatchNorm1d(2)),
        *((trainer, name, lambda *args, **kwargs: None) for name in _METHODS),
        *((Mine, name, lambda *args, **kwargs: None) for name in _METHODS),
    ):
        trainer.__class__ = Mine
        assert old_logps_later(trainer, trl.GRPOTrainer)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(owner, name, value, raising=False)
            assert not old_logps_later(trainer, trl.GRPOTrainer), name
        assert old_logps_later(trainer, trl.GRPOTrainer)
