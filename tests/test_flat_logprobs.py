"""Log-probabilities of sampled tokens: what TRL makes of vLLM's, without an object for each token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from trl.generation.vllm_generation import extract_logprobs
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs, Logprob

from patchfastrl import runtime
from patchfastrl.compat import flat_logprobs

PROMPTS = [{"prompt_token_ids": tiny.ids(n)} for n in (3, 20)]


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    yield tiny.engine(tiny.model())
    tiny.close_all()


def sampled(llm: Any, make: Any = SamplingParams, **settings: Any) -> list[Any]:
    params = make(n=2, temperature=1.0, max_tokens=8, seed=1, **settings)
    return llm.generate(PROMPTS, params, use_tqdm=False)


def ours(llm: Any, **settings: Any) -> list[Any]:
    return sampled(llm, lambda **given: runtime.token_params(SamplingParams, **given), **settings)


def nobody(outputs: list[Any]) -> None:
    pytest.fail("TRL was asked")


def test_they_are_the_ones_that_trl_extracts(llm: Any) -> None:
    expected, flat = sampled(llm, logprobs=0), ours(llm, logprobs=0)
    assert all(isinstance(c.logprobs, FlatLogprobs) for output in flat for c in output.outputs)
    assert not any(isinstance(c.logprobs, FlatLogprobs) for output in expected for c in output.outputs)
    found = runtime.token_log_probs(nobody, flat)
    assert found == extract_logprobs(expected) == extract_logprobs(flat)
    assert [len(one) for one in found[0]] == [len(c.token_ids) for output in flat for c in output.outputs]
    assert runtime.token_log_probs(nobody, []) == extract_logprobs([])


@pytest.mark.parametrize("wanted", [None, 1, 3])
def test_others_are_extracted_by_trl(llm: Any, wanted: int | None) -> None:
    outputs = ours(llm, logprobs=wanted)
    assert flat_logprobs.extracted(outputs) is None
    assert runtime.token_log_probs(extract_logprobs, outputs) == extract_logprobs(sampled(llm, logprobs=wanted))


def test_what_a_script_asks_for_holds() -> None:
    assert not runtime.token_params(SamplingParams, logprobs=0, flat_logprobs=False).flat_logprobs
    assert runtime.token_params(SamplingParams, logprobs=0, detokenize=True).detokenize
    assert runtime.token_params(SamplingParams, stop=["the"]).detokenize
    assert not runtime.token_params(SamplingParams, logprobs=0).detokenize


def test_a_vllm_without_them_is_asked_for_none() -> None:
    asked = runtime.token_params(dict, logprobs=0)
    assert asked == {"detokenize": False, "logprobs": 0}


def test_what_is_not_a_number_is_none_and_each_token_has_one(llm: Any) -> None:
    outputs = ours(llm, logprobs=0)
    completion = outputs[0].outputs[0]
    completion.logprobs.logprobs[1] = math.nan
    found = runtime.token_log_probs(nobody, outputs)
    assert found == extract_logprobs(outputs)
    assert found[0][0][1] == [None]
    for position in ({}, {7: Logprob(-1.0, 1), 8: Logprob(-2.0, 2)}):
        other = FlatLogprobs()
        for one in ({5: Logprob(-0.5, 1)}, position, {6: Logprob(-0.5, 1)}):
            other.append(one)
        completion.logprobs = other
        assert flat_logprobs.extracted(outputs) is None
        assert runtime.token_log_probs(extract_logprobs, outputs) == extract_logprobs(outputs)
