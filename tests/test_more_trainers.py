"""Every trainer that samples, besides GRPO and RLOO: completions come from the current weights of the one copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from cases import Watch, engine_of, make, outside_one_copy, present

from patchfastrl import PatchFastRL, vLLMSamplingParams
from patchfastrl.errors import UnsupportedError
from patchfastrl.patches.trainers import TRAINERS

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("patched")]

PROMPT = tiny.ids(24)
# GRPO and RLOO have tests/test_trainers.py. Server distillation needs a server, PAPO images.
HERE = [title for title in present() if title not in ("GRPO", "RLOO", "Server distillation", "PAPO")]


def steps(trainer: Any) -> int:
    return sum("loss" in entry for entry in trainer.state.log_history)


# Trained ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", [title for title in HERE if title != "A*-PO"])  # which makes no adapters
def test_it_samples_from_the_adapter_in_training(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.tuners_utils import BaseTuner

    merges: list[object] = []
    for name in ("merge_adapter", "unmerge_adapter"):
        monkeypatch.setattr(BaseTuner, name, lambda *_, **__: merges.append(1))
    trainer = make(title, tmp_path)
    assert getattr(trainer.args, "use_vllm", True)
    assert outside_one_copy(trainer) == []
    checksum = engine_of(trainer).shared.checksum()
    watch = Watch(trainer)
    trainer.train()
    assert steps(trainer) == 3
    assert len(watch.off) >= 2
    assert max(watch.off) < 1e-3
    assert watch.apart[-1] > 1e-2  # by then the adapter says something else than the base
    assert engine_of(trainer).shared.checksum() == checksum
    assert merges == []
    assert outside_one_copy(trainer) == []


@pytest.mark.parametrize("title", ["Online DPO", "GOLD", "Distillation", "GKD", "A*-PO"])
def test_full_fine_tuning(title: str, tmp_path: Path) -> None:
    trainer = make(title, tmp_path, peft=False, learning_rate=1e-3)
    assert outside_one_copy(trainer) == []
    checksum = engine_of(trainer).shared.checksum()
    watch = Watch(trainer)
    trainer.train()
    assert len(watch.off) >= 2
    assert max(watch.off) < 1e-3
    assert engine_of(trainer).shared.checksum() != checksum
    assert outside_one_copy(trainer) == []


def sample(trainer: Any) -> None:
    """Once more, the way the trainer does it."""
    if hasattr(trainer, "vllm_generation"):
        trainer.vllm_generation.generate(prompts=[PROMPT], images=None, num_generations=1)
    elif hasattr(trainer, "_generate_vllm"):
        trainer._generate_vllm(["the cat sat on the mat"])
    else:
        inputs = {"prompts": torch.tensor([PROMPT]), "prompt_attention_mask": torch.ones(1, len(PROMPT))}
        trainer.generate_on_policy_outputs(trainer.model, inputs, trainer.generation_config)


@pytest.mark.parametrize("title", ["Online DPO", "GOLD", "Distillation", "SDPO", "GKD"])
@pytest.mark.parametrize("standby", ["0", "1"])
def test_the_second_sampling_within_a_step(
    title: str, standby: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", standby)
    trainer = make(title, tmp_path, max_steps=1)
    trainer.train()
    watch = Watch(trainer)
    for seed in (1, 2):  # TRL's step counter does not move
        tiny.scramble(trainer.model, seed=seed)
        sample(trainer)
    assert len(watch.off) == 2
    assert max(watch.off) < 1e-3
    assert min(watch.apart) > 1e-2
    assert engine_of(trainer).awake == (standby == "0")


@pytest.mark.parametrize("title", ["Online DPO", "GOLD", "Distillation", "IW-OPD", "SDFT", "SDPO", "GKD"])
def test_a_model_named_by_a_string(title: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    trainer = make(title, tmp_path, model=path, max_steps=1)
    assert outside_one_copy(trainer) == []
    base = {p.dtype for n, p in trainer.model.named_parameters() if "lora_" not in n}
    assert base == {torch.bfloat16}


# generate, answered by an engine ------------------------------------------------------------------------------------


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"prompts": torch.tensor(ids), "prompt_attention_mask": torch.tensor(mask)}


def test_gkd_gets_what_transformers_would_give_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    from patchfastrl import generation, runtime

    trainer = make("GKD", tmp_path)
    tiny.scramble(trainer.model)
    trainer.model.eval()
    prompts = [tiny.ids(12), tiny.ids(5, start=40), tiny.ids(9, start=17)]
    config = copy.deepcopy(trainer.generation_config)
    config.do_sample = False
    greedy = tiny.greedy(trainer.model, prompts[1], 8)
    for eos in (1, [greedy[3], 1]):  # with the second, one completion ends early and is padded
        config.eos_token_id = eos
        watch = Watch(trainer)
        ours = trainer.generate_on_policy_outputs(trainer.model, padded(prompts), config)
        assert len(watch.off) == 1
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "generate", lambda model, **kwargs: model.generate(**kwargs))
            theirs = trainer.generate_on_policy_outputs(trainer.model, padded(prompts), config)
        assert len(watch.off) == 1
        assert all(torch.equal(mine, stock) for mine, stock in zip(ours, theirs, strict=True))
    ids = ours[0][1, 12:].tolist()
    assert ids[: ids.index(greedy[3]) + 1] == greedy[: greedy.index(greedy[3]) + 1]
    assert set(ids[ids.index(greedy[3]) + 1 :]) <= {0}
    trainer.generate_on_policy_outputs(trainer.teacher_model, padded(prompts), config)
    assert len(watch.off) == 1  # the teacher samples by itself
    config.num_beams = 2
    with pytest.raises(UnsupportedError, match=r"generation_config.num_beams=2.*use_vllm='keep'"):
        trainer.generate_on_policy_outputs(trainer.model, padded(prompts), config)
    config.num_beams = 1
    with pytest.raises(UnsupportedError, match=r"need 128 tokens, the engine was built for 72.*max_model_length=128"):
        trainer.generate_on_policy_outputs(trainer.model, padded([tiny.ids(120)]), config)
    assert list(generation.engines) == [trainer.llm]


def test_scores_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO and the older RLOO take the log-probabilities of their policy from them (tests/cell_generate.py)."""
    import copy

    from patchfastrl import runtime

    trainer = make("GKD", tmp_path)
    tiny.scramble(trainer.model)
    config = copy.deepcopy(trainer.generation_config)
    config.update(temperature=0.7, repetition_penalty=1.3, eos_token_id=list(range(3, 33)))
    inputs = padded([tiny.ids(12), tiny.ids(5, start=40), tiny.ids(9, start=17)])
    given = {
        "input_ids": inputs["prompts"],
        "attention_mask": inputs["prompt_attention_mask"],
        "generation_config": config,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    watch = Watch(trainer)
    ours = runtime.generate(trainer.model, **given)
    assert len(watch.off) == 1
    draws = list(ours.sequences[:, 12:].T)
    assert 0 in draws[-1]  # a completion ended early, and was padded
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: draws.pop(0)[:, None])
    theirs = trainer.model.generate(**given)
    assert draws == []
    assert torch.equal(ours.sequences, theirs.sequences)
    mine, stock = (torch.stack(made.scores, 1) for made in (ours, theirs))
    assert (mine.dtype, mine.shape) == (stock.dtype, stock.shape)
    assert (mine - stock).abs().max() < 1e-4
    assert (mine * 0.7 - stock).abs().max() > 1e-1  # the temperature is in them


@pytest.mark.parametrize("cut", [{"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_a_cut_off_leaves_no_log_probability(cut: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    from patchfastrl.generation import sampling_params

    config = GenerationConfig(do_sample=True, max_new_tokens=8, **{"top_k": 0, "top_p": 1.0, "temperature": 1.0, **cut})
    (name,) = cut
    assert getattr(sampling_params(config), name) == cut[name]
    with pytest.raises(UnsupportedError, match=rf"generation_config\.{name}={cut[name]}.*log-probabilities from it"):
        sampling_params(config, scored=True)


def test_an_engine_for_prompts_of_any_length() -> None:
    """PPO and the older RLOO say how long a response may be, and nothing about prompts."""
    from types import SimpleNamespace

    from datasets import Dataset

    from patchfastrl import install
    from patchfastrl.generation import engine_settings

    data = Dataset.from_dict({"input_ids": [[1] * 9, [2] * 5]})
    args = SimpleNamespace(
        response_length=53, local_rollout_forward_batch_size=64, per_device_train_batch_size=2, seed=7
    )
    made = []
    for longer in (None, Dataset.from_dict({"input_ids": [[3] * 20]}), Dataset.from_dict({"text": ["a"]})):
        trainer = SimpleNamespace(train_dataset=data, eval_dataset=longer)
        made.append(engine_settings(trainer, args, tiny.model(), install.Settings(), standby=False))
    assert [settings["max_model_len"] for settings in made] == [62, 73, 62]
    assert {settings["max_num_seqs"] for settings in made} == {64}
    texts = SimpleNamespace(train_dataset=Dataset.from_dict({"text": ["a"]}), eval_dataset=None)
    for wanted, length in ((None, 256), (99, 99)):  # what the model can, or what the script says
        settings = install.Settings(max_model_length=wanted)
        assert engine_settings(texts, args, tiny.model(), settings, standby=False)["max_model_len"] == length


@pytest.mark.parametrize("settings", [{"use_vllm": "keep"}, {"lmbda": 0.0}], ids=str)
def test_gkd_that_keeps_to_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    keep = settings.pop("use_vllm", "force")
    PatchFastRL(use_vllm=keep)
    try:
        trainer = make("GKD", tmp_path, max_steps=1, **settings)
        trainer.train()
    finally:
        PatchFastRL()
    assert not hasattr(trainer, "llm")


# Refused, and left alone ---------------------------------------------------------------------------------------------


def test_a_teacher_on_the_server_that_samples(tmp_path: Path) -> None:
    for title in ("SDFT", "SDPO"):
        with pytest.raises(UnsupportedError, match="use_teacher_server=True: the teacher's log-probabilities"):
            make(title, tmp_path, use_teacher_server=True, use_vllm=True, vllm_mode="server")


def test_sampling_params_of_online_dpo(tmp_path: Path) -> None:
    given = vLLMSamplingParams(min_p=0.2, n=2, max_tokens=8)
    trainer = make("Online DPO", tmp_path, vllm_sampling_params=given)
    params = trainer.generation_config
    assert (params.min_p, params.n, params.max_tokens, params.temperature) == (0.2, 2, 8, 1.0)
    for wrong, says in (({"n": 1}, "TRL needs n=2"), ({"max_tokens": 9}, "max_new_tokens=8")):
        with pytest.raises(UnsupportedError, match=says):
            make("Online DPO", tmp_path, vllm_sampling_params=vLLMSamplingParams(**wrong))


@pytest.mark.parametrize("settings", [{"gpu_memory_utilization": 2}, {"max_model_length": 0}], ids=str)
def test_engine_settings_that_are_none(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(settings))):
        PatchFastRL(**settings)


# The list of trainers -----------------------------------------------------------------------------------------------


def test_every_trainer_that_samples_is_in_the_list() -> None:
    """A class of the installed TRL that calls an engine or `generate`, and that the list lacks, is found here."""
    from packaging.version import Version

    installed = Version(trl.__version__)
    root = Path(trl.__file__).parent
    listed = {
        f"{home.module.replace('.', '/')}_trainer.py"
        for trainer in TRAINERS
        for home, first, end in trainer.between()
        if Version(first) <= installed < Version(end)
    }
    assert all((root.parent / file).is_file() for file in listed)
    calls = ("VLLMGeneration(", "LLM(**", ".generate(")
    sampling = {
        str(file.relative_to(root.parent))
        for file in root.rglob("*_trainer.py")
        if any(call in file.read_text(encoding="utf-8") for call in calls)
    }
    # These only show a few completions while they evaluate.
    evaluating = {f"trl/experimental/{n}/{n}_trainer.py" for n in ("bco", "cpo", "orpo", "kto")}
    assert sampling - listed - evaluating == set()
