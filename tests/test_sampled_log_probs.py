"""Log-probabilities of sampled tokens in one pass: the kernel's numbers, and what is left to vLLM."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from vllm.v1.outputs import LogprobsTensors

from patchfastrl.compat import sampled_log_probs

sampler = pytest.importorskip("vllm.v1.worker.gpu.sample.sampler", reason="a vLLM without the newer model runner")
ON_GPU = torch.cuda.is_available()


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 40_000, 128_256])
def test_the_kernel(dtype: torch.dtype, vocabulary: int) -> None:
    from patchfastrl._sampled_log_probs_kernel import log_probs_and_ranks

    made = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, vocabulary + 3, generator=made) * 4).to(dtype)[:, :vocabulary]  # rows lie apart
    token_ids = torch.randint(0, vocabulary, (6,), generator=made)
    token_ids[0] = logits[0].argmax()
    logits[1, 3:], token_ids[1] = float("-inf"), 2  # cut by top-k
    logits[2, :3], token_ids[2] = float("-inf"), vocabulary - 1
    logits[3, 1] = float("nan")
    logits[4] = float("-inf")
    logits, token_ids = logits.cuda(), token_ids.cuda()
    log_probs, ranks = log_probs_and_ranks(logits, token_ids)
    wanted = logits.double().log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), wanted, rtol=1e-6, atol=2e-6, equal_nan=True)
    assert log_probs[3:5].isnan().all()
    assert ranks.tolist() == (logits >= logits.gather(-1, token_ids[:, None])).sum(-1).tolist()


def test_what_else_is_asked_for_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usual(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs))
        return "vLLM's"

    monkeypatch.setattr(sampler, "compute_topk_scores", usual)
    logits, sampled = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((logits, 1, sampled, None), {}),
        ((logits, 0, sampled, [0, 1, 2]), {}),
        ((logits, 0, sampled, None), {"max_per_req_token_ids": 3, "logits_mode": False}),
        ((logits, 0, sampled, None), {"max_per_req_token_ids": 0, "logits_mode": True}),
        ((torch.zeros(8, 2).T, 0, sampled, None), {}),
    ]
    with sampled_log_probs._replaced():
        assert [sampler.compute_topk_scores(*args, **kwargs) for args, kwargs in others] == ["vLLM's"] * 5
    assert asked == others
    assert sampler.compute_topk_scores is usual


def test_vllm_calls_it_as_the_shim_expects() -> None:
    names = list(inspect.signature(sampler.compute_topk_scores).parameters)
    assert names[:4] == ["logits", "num_logprobs", "sampled_token_ids", "cu_num_logits"]
    assert {"max_per_req_token_ids", "logits_mode"} < set(names)
    assert LogprobsTensors._fields[:3] == ("logprob_token_ids", "logprobs", "selected_token_ranks")
    source = inspect.getsource(sampler.Sampler.__call__)
    assert (
        "compute_topk_scores(\n                logits,\n                num_logprobs,\n                sampled,"
        in source
    )


def test_a_cpu_build_is_left_alone() -> None:
    before = sampler.compute_topk_scores
    with sampled_log_probs.in_one_pass():
        assert (sampler.compute_topk_scores is before) == (not ON_GPU)
    assert sampler.compute_topk_scores is before
