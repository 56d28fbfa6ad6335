"""`vLLMSamplingParams`: explicit values reach vLLM; what TRL's loss depends on stays TRL's."""

from __future__ import annotations

import json
import pickle
import pickletools
from typing import Any

import pytest
import tiny

from patchfastrl import PatchFastRL, vLLMSamplingParams
from patchfastrl.errors import UnsupportedError
from patchfastrl.sampling import sampling_overrides


@pytest.fixture(scope="module", autouse=True)
def patched():
    PatchFastRL()


def config(folder: Any, **settings: Any) -> Any:
    from trl import GRPOConfig

    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "vllm_gpu_memory_utilization": 0.2,
    }
    return GRPOConfig(**{**arguments, **settings})


def completions(folder: Any, **settings: Any) -> list[list[int]]:
    """Token ids of one batch of two prompts, four completions each."""
    from trl import GRPOTrainer

    seen: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float(i) for i in range(len(completion_ids))]

    trainer = GRPOTrainer(
        model=tiny.model("llama"),
        processing_class=tiny.tokenizer(),
        reward_funcs=reward,
        args=config(folder, **settings),
        train_dataset=tiny.prompts(16),
    )
    trainer.train()
    return seen


def test_they_reach_vllm(tmp_path):
    free = completions(tmp_path)
    assert len({tuple(c) for c in free}) > 2
    greedy = completions(tmp_path, vllm_sampling_params=vLLMSamplingParams(top_k=1))
    assert len({tuple(c) for c in greedy}) <= 2  # one per prompt
    explicit_wins = completions(tmp_path, top_k=50, vllm_sampling_params=vLLMSamplingParams(top_k=1))
    assert explicit_wins == greedy
    stopper = greedy[0][2]
    stopped = completions(
        tmp_path, vllm_sampling_params=vLLMSamplingParams(top_k=1, stop_token_ids=[stopper]), min_p=None
    )
    assert stopped[0] == greedy[0][: greedy[0].index(stopper) + 1]
    assert completions(tmp_path, vllm_sampling_params={"min_p": 1.0}) == greedy  # a dictionary will do
    word = tiny.tokenizer().decode([greedy[0][1]])
    text = completions(
        tmp_path,
        vllm_sampling_params=vLLMSamplingParams(top_k=1, stop=[word], include_stop_str_in_output=True, logit_bias={}),
    )
    assert text[0] == greedy[0][: greedy[0].index(greedy[0][1]) + 1]


@pytest.mark.parametrize(
    ("given", "text"),
    [({}, False), ({"stop": ["x"]}, True), ({"stop": []}, False), ({"detokenize": True}, True)],
)
def test_the_engine_makes_text_only_where_it_is_needed(tmp_path, monkeypatch, given, text):
    from patchfastrl.llm import SharedLLM

    seen = []
    before = SharedLLM.generate

    def generate(self, prompts, sampling_params=None, **kwargs):
        if sampling_params.logprobs is not None:  # not the audit, before training
            seen.append(sampling_params.detokenize)
        return before(self, prompts, sampling_params=sampling_params, **kwargs)

    monkeypatch.setattr(SharedLLM, "generate", generate)
    as_settings = completions(tmp_path, generation_kwargs={"top_k": 1, **given})
    as_parameters = completions(tmp_path, generation_kwargs={"top_k": 1}, vllm_sampling_params=given)
    assert set(seen) == {text}
    assert as_settings == as_parameters
    with_text = completions(tmp_path, generation_kwargs={"top_k": 1, **given, "detokenize": True})
    assert with_text == as_settings  # the same tokens
    assert seen[-1]


def test_the_engine_takes_them_too():
    llm = tiny.engine(tiny.model("llama"))
    prompt = [{"prompt_token_ids": tiny.ids(9)}]
    free = llm.generate(prompt, vLLMSamplingParams(max_tokens=12, ignore_eos=True, seed=3), use_tqdm=False)
    greedy = llm.generate(
        prompt, sampling_params=vLLMSamplingParams(max_tokens=12, ignore_eos=True, top_k=1), use_tqdm=False
    )
    assert list(greedy[0].outputs[0].token_ids) == tiny.engine_greedy(llm, tiny.ids(9))
    assert list(free[0].outputs[0].token_ids) != list(greedy[0].outputs[0].token_ids)
    llm.close("the test is over.")


def test_one_seed_gives_each_completion_of_a_group_its_own(tmp_path):
    seeded = vLLMSamplingParams(seed=3407)
    first = completions(tmp_path, vllm_sampling_params=seeded)
    assert len({tuple(c) for c in first[:4]}) > 1
    assert completions(tmp_path, vllm_sampling_params=seeded) == first
    assert completions(tmp_path, vllm_sampling_params=vLLMSamplingParams(seed=1)) != first


@pytest.mark.parametrize(
    ("given", "settings", "named"),
    [
        ({"n": 4}, {}, "n=4.*num_generations"),
        ({"logprobs": 5}, {}, "logprobs=5"),
        ({"max_tokens": 99}, {}, "max_tokens=99.*max_completion_length=8"),
        ({"temperature": 0.3}, {}, "temperature=0.3.*temperature=1.0"),
        ({"top_p": 0.5}, {"generation_kwargs": {"top_p": 0.9}}, "top_p is 0.5 .* 0.9 in generation_kwargs"),
        ({"no_such_setting": 1}, {}, "no_such_setting"),
        ({"top_k": -7}, {}, "vLLM refuses .*top_k"),
        ({"min_p": "much"}, {}, "vLLM refuses .*much"),
    ],
)
def test_conflicts_are_errors_before_a_model_is_loaded(tmp_path, given, settings, named):
    from trl import GRPOTrainer

    with pytest.raises(UnsupportedError, match=named):
        GRPOTrainer(
            model="no/such-model",
            reward_funcs=lambda **kwargs: [],
            args=config(tmp_path, vllm_sampling_params=vLLMSamplingParams(**given), **settings),
            train_dataset=tiny.prompts(8),
        )


def test_values_that_agree_are_no_conflict(tmp_path):
    given = vLLMSamplingParams(n=1, logprobs=0, max_tokens=8, temperature=1.0, top_p=0.9, min_p=0.1)
    args = config(tmp_path, vllm_sampling_params=given, generation_kwargs={"top_p": 0.9, "seed": 7})
    assert sampling_overrides(args) == {**given, "seed": 7}
    assert args.generation_kwargs == {"top_p": 0.9, "seed": 7}  # the script's own dictionary is left alone
    assert sampling_overrides(config(tmp_path)) is None


def test_a_ready_made_sampling_params_is_refused(tmp_path):
    from vllm import SamplingParams

    with pytest.raises(UnsupportedError, match="SamplingParams"):
        sampling_overrides(config(tmp_path, vllm_sampling_params=SamplingParams(top_k=3)))


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_configurations_carry_them(tmp_path, algorithm):
    import trl
    from transformers import HfArgumentParser

    cls = getattr(trl, f"{algorithm}Config")
    given = vLLMSamplingParams(top_k=5, stop=["cat"])
    args = cls(output_dir=str(tmp_path), report_to=[], use_cpu=True, vllm_sampling_params=given)
    assert args.to_dict()["vllm_sampling_params"] == {"top_k": 5, "stop": ["cat"]}
    assert json.loads(args.to_json_string())["vllm_sampling_params"]["top_k"] == 5
    (parsed,) = HfArgumentParser(cls).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", "--vllm_sampling_params", '{"top_k": 5, "min_p": 0.1}']
    )
    assert parsed.vllm_sampling_params == {"top_k": 5, "min_p": 0.1}
    assert cls(output_dir=str(tmp_path), use_cpu=True).vllm_sampling_params is None


def test_it_pickles_as_a_plain_dictionary():
    data = pickle.dumps(vLLMSamplingParams(top_k=5, stop=["cat"]))
    assert not any("patchfastrl" in str(argument) for _, argument, _ in pickletools.genops(data))
    assert pickle.loads(data) == {"top_k": 5, "stop": ["cat"]}
