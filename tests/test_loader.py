"""`FastLanguageModel`: the model brings its engine along, and a trainer uses that one."""

from __future__ import annotations

import copy
import io

import pytest
import tiny
import torch

from patchfastrl import FastLanguageModel, PatchFastRL, engine_report, vLLMSamplingParams
from patchfastrl.errors import UnsupportedError

GREEDY = vLLMSamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def load(path, **kwargs):
    kwargs = {"load_in_4bit": False, "max_seq_length": 256, "max_lora_rank": 8, "gpu_memory_utilization": 0.2} | kwargs
    return FastLanguageModel.from_pretrained(path, **kwargs)


def sampled(model, prompt, **kwargs):
    out = model.fast_generate({"prompt_token_ids": prompt}, GREEDY, use_tqdm=False, **kwargs)
    return list(out[0].outputs[0].token_ids)


def perturb(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.normal_(0, 0.5)


def test_engine_and_model_sample_alike(path):
    model, tokenizer = load(path)
    prompt = tiny.ids(20)
    assert sampled(model, prompt) == tiny.greedy(model, prompt)
    text = model.fast_generate(["the cat sat", "a b c"], GREEDY, use_tqdm=False)
    assert len(text) == 2
    assert text[0].prompt_token_ids == tokenizer("the cat sat")["input_ids"]


def test_current_base_and_explicit_adapters(path, tmp_path):
    model, _ = load(path)
    prompt = tiny.ids(20)
    base = sampled(model, prompt)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, use_gradient_checkpointing="unsloth")
    perturb(model)
    first = sampled(model, prompt)
    assert first == tiny.greedy(model, prompt) != base
    model.save_lora(tmp_path / "first")
    perturb(model)
    second = sampled(model, prompt)
    assert second == tiny.greedy(model, prompt) != first
    assert sampled(model, prompt, lora_request=None) == base
    assert sampled(model, prompt, lora_request=model.load_lora(tmp_path / "first")) == first
    assert sampled(model, prompt) == second  # an explicit adapter does not stay in the slot
    with model.disable_adapter():
        assert sampled(model, prompt) == base


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "asleep"])
def test_a_trainer_uses_the_engine_that_the_model_brought(path, tmp_path, monkeypatch, asleep):
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", str(int(asleep)))
    PatchFastRL("GRPO", FastLanguageModel)
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(path)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    if asleep:
        model.vllm_engine.sleep()
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[lambda completions, **kwargs: [float(len(c) % 7) for c in completions]],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            max_steps=3,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=tiny.prompts(16),
    )
    assert trainer.vllm_generation.llm is model.vllm_engine
    assert model.vllm_engine.awake is not asleep
    trainer.train()
    differences = [h["sampling/sampling_logp_difference/max"] for h in trainer.state.log_history[:-1]]
    assert len(differences) == 3
    assert max(differences) < 1e-4
    assert engine_report(trainer)["publishes"] == engine_report(model)["publishes"] >= 3
    prompt = tiny.ids(20)
    assert sampled(model, prompt) == tiny.greedy(model, prompt)


def test_copies_and_pickles_have_no_engine(path):
    model, _ = load(path)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    perturb(model)
    prompt = tiny.ids(20)
    expected = tiny.greedy(model, prompt)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert twin.vllm_engine is None
        assert tiny.greedy(twin, prompt) == expected
        with pytest.raises(UnsupportedError, match="no engine"):
            twin.fast_generate("the cat")
    assert model.vllm_engine is not None
    assert sampled(model, prompt) == expected


def test_modes(path):
    model, _ = load(path, load_in_8bit=False, load_in_fp8=False)
    assert FastLanguageModel.for_inference(model) is model
    assert not model.training
    assert model.config.use_cache
    assert not model.is_gradient_checkpointing
    assert FastLanguageModel.for_training(model) is model
    assert model.training
    assert not model.config.use_cache
    assert model.is_gradient_checkpointing


def test_standby_outside_a_trainer(path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")
    model, _ = load(path)
    prompt = tiny.ids(20)
    awake = sampled(model, prompt)
    model.vllm_engine.sleep()
    assert sampled(model, prompt) == awake
    assert not model.vllm_engine.awake  # fast_generate woke it, and put it to sleep again


def test_without_an_engine(path):
    model, _ = load(path, fast_inference=False)
    assert model.vllm_engine is None
    ids = torch.tensor([tiny.ids(8)])
    out = model.fast_generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 12)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"load_in_8bit": True}, "load_in_8bit=True: .*load_in_4bit=True"),
        ({"load_in_fp8": True}, "load_in_fp8=True: .*load_in_4bit=True"),
        ({"load_in_4bit": True, "full_finetuning": True}, "full_finetuning"),
        ({"float8_kv_cache": True}, "float8_kv_cache"),
    ],
)
def test_refused_by_name_before_loading(kwargs, named):
    with pytest.raises(UnsupportedError, match=named):
        load("no-such-model" if "float8_kv_cache" not in kwargs else tiny_checkpoint_once(), **kwargs)


_once: list[str] = []


def tiny_checkpoint_once():
    import tempfile

    if not _once:
        _once.append(tiny.checkpoint(tempfile.mkdtemp()))
    return _once[0]


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [({"r": 64}, "max_lora_rank=64"), ({"bias": "all"}, "bias"), ({"use_dora": True}, "use_dora")],
)
def test_adapters_that_do_not_fit_are_refused(path, kwargs, named):
    model, _ = load(path)
    with pytest.raises(UnsupportedError, match=named):
        FastLanguageModel.get_peft_model(model, **kwargs)


def test_without_vllm_the_import_error_says_what_to_install(path, monkeypatch):
    from patchfastrl import loader

    monkeypatch.setattr(loader, "installed", lambda name: None)
    with pytest.raises(ImportError, match="pip install vllm"):
        load(path)
