"""One storage has one dtype: which one, for each way to name a model, and how closely the two sides then agree."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from patchfastrl import PatchFastRL, UnpatchFastRL
from patchfastrl.copies import Copies
from patchfastrl.errors import GuardError, SharingError, UnsupportedError
from patchfastrl.materialise import materialise, own_memory
from patchfastrl.sharing import Shared, base_parameters, make_plan
from patchfastrl.trace import storage_key

pytestmark = pytest.mark.timeout(180)

FLOAT, HALF = torch.float32, torch.bfloat16
PROMPT = tiny.ids(24)
CHECKPOINTS_DTYPE = "the frozen base is loaded in its checkpoint's dtype"


@pytest.fixture(scope="module", autouse=True)
def _patched() -> Iterator[None]:
    PatchFastRL()
    yield
    _close_all()
    UnpatchFastRL()


def _close_all() -> None:
    from patchfastrl import engine

    gc.collect()
    for llm in list(engine.live):
        llm.close("the test is over.")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, str]:
    return {d: tiny.checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2", d) for d in (FLOAT, HALF)}


def trained(folder: Path, model: Any, lora: bool, algorithm: str = "GRPO", **settings: Any) -> Any:
    """A trainer after three steps."""
    args = {"max_steps": 3, "learning_rate": 1e-2, "vllm_max_model_length": 128, **settings}
    made = tiny.trainer(folder, algorithm, model=model, args=args, peft_config=tiny.lora() if lora else None)
    made.train()
    return made


def differences(trainer: Any) -> list[float]:
    """TRL's own measure of how far the engine's log-probabilities are from the trainer's, one figure per step."""
    found = [h["sampling/sampling_logp_difference/max"] for h in trainer.state.log_history if "loss" in h]
    assert len(found) == 3
    return found


def assert_one_dtype(trainer: Any, dtype: torch.dtype) -> None:
    """Both sides hold the base in `dtype`, in one storage, and sample and compute alike."""
    llm, model = trainer.vllm_generation.llm, trainer.accelerator.unwrap_model(trainer.model)
    assert llm.copies is None
    homes = {storage_key(p) for p in llm.shared.engine_model.parameters()}
    for name, parameter in base_parameters(model).items():
        assert parameter.dtype == dtype, name
        assert storage_key(parameter) in homes, name
    assert llm.llm_engine.model_config.dtype == dtype
    assert max(differences(trainer)) < (1e-4 if dtype == FLOAT else 0.5)
    llm.publish()
    distance = (tiny.engine_logprobs(llm, PROMPT) - tiny.logprobs(model, PROMPT)).abs()
    assert distance.mean() < (1e-4 if dtype == FLOAT else 0.1)
    if dtype == FLOAT:
        assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)


# What a script says, and what both sides take -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "lora", "asked", "expected"),
    [
        (HALF, True, None, HALF),
        (FLOAT, True, None, FLOAT),
        (HALF, True, "float32", FLOAT),
        (FLOAT, True, "bfloat16", HALF),
        (HALF, False, None, FLOAT),  # TRL's default for full fine-tuning, whatever the checkpoint
        (FLOAT, False, None, FLOAT),
        (HALF, False, "bfloat16", HALF),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_model_named_by_a_string(
    tmp_path: Path,
    paths: dict[torch.dtype, str],
    caplog: pytest.LogCaptureFixture,
    checkpoint: torch.dtype,
    lora: bool,
    asked: str | None,
    expected: torch.dtype,
) -> None:
    settings = {} if asked is None else {"model_init_kwargs": {"dtype": asked}}
    with caplog.at_level(logging.WARNING, "patchfastrl"):
        trainer = trained(tmp_path, paths[checkpoint], lora, **settings)
    assert_one_dtype(trainer, expected)
    told = [r.message for r in caplog.records if CHECKPOINTS_DTYPE in r.message]
    assert len(told) == (1 if lora and asked is None else 0)
    assert all("set `dtype` for another one" in line for line in told)
    block = [r.message for r in caplog.records if "engine ready" in r.message]
    assert len(block) == 1
    assert f"{expected}: one copy, shared with the trainer" in block[0]


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_an_instance_keeps_its_dtype(tmp_path: Path, lora: bool, dtype: torch.dtype) -> None:
    assert_one_dtype(trained(tmp_path, tiny.model("qwen2-tied", dtype), lora), dtype)


def test_rloo_in_float32(tmp_path: Path, paths: dict) -> None:
    """RLOO logs no difference: completions have to do."""
    trainer = trained(tmp_path, paths[FLOAT], lora=False, algorithm="RLOO")
    llm, model = trainer.vllm_generation.llm, trainer.accelerator.unwrap_model(trainer.model)
    assert {p.dtype for p in model.parameters()} == {FLOAT}
    llm.publish()
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)


def test_the_difference_tells_stale_weights(tmp_path: Path, paths: dict) -> None:
    """So that the bound above says something: without publishing, the first step agrees and the later ones do not."""
    from patchfastrl import adapters

    with adapters.publishing_disabled():
        trainer = trained(tmp_path, paths[FLOAT], lora=True, learning_rate=0.1)
    first, *later = differences(trainer)
    assert first < 1e-4
    assert min(later) > 1e-2


# cast_lm_head_to_fp32 -------------------------------------------------------------------------------------------------


# Tied embeddings with LoRA are left out: TRL itself looks for the embeddings in the wrong place then.
@pytest.mark.parametrize(("family", "lora"), [("qwen2", True), ("qwen2", False), ("qwen2-tied", False)])
def test_a_float32_head_on_a_float32_model(tmp_path: Path, family: str, lora: bool) -> None:
    assert_one_dtype(trained(tmp_path, tiny.model(family), lora, cast_lm_head_to_fp32=True), FLOAT)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("form", ["string", "instance"])
def test_a_float32_head_on_a_bfloat16_model_is_refused(tmp_path: Path, paths: dict, form: str, lora: bool) -> None:
    from patchfastrl import engine

    model = paths[HALF] if form == "string" else tiny.model("qwen2", HALF)
    settings = {"model_init_kwargs": {"dtype": "bfloat16"}} if form == "string" else {}
    _close_all()
    with pytest.raises(UnsupportedError, match=r"cast_lm_head_to_fp32=True with a model in torch\.bfloat16.*dtype"):
        trained(tmp_path, model, lora, cast_lm_head_to_fp32=True, **settings)
    assert not list(engine.live)
    if form == "instance":
        assert {p.dtype for p in model.parameters()} == {HALF}


# The checkpoint's revision --------------------------------------------------------------------------------------------


def test_the_engine_takes_the_trainers_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hub cache with two revisions of one model: the engine samples from the one that the script trains."""
    import huggingface_hub.constants

    repository = tmp_path / "hub" / "models--tiny--policy"
    for revision, seed, commit in (("main", 0, "a" * 40), ("v2", 7, "b" * 40)):
        snapshot = repository / "snapshots" / commit
        tiny.model("qwen2", seed=seed).save_pretrained(snapshot)
        tiny.tokenizer().save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    trainer = trained(
        tmp_path,
        "tiny/policy",
        lora=True,
        model_init_kwargs={"revision": "v2", "cache_dir": str(tmp_path / "hub")},
        learning_rate=0.0,
    )
    assert_one_dtype(trainer, FLOAT)
    llm = trainer.vllm_generation.llm
    base = tiny.engine_greedy(llm, PROMPT, lora_request=None)
    assert base == tiny.greedy(tiny.model("qwen2", seed=7), PROMPT)
    assert base != tiny.greedy(tiny.model("qwen2", seed=0), PROMPT)


# An engine with a copy of its own (float32 master weights on CUDA) ----------------------------------------------------


@pytest.fixture
def private(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """An engine in bfloat16 that samples from a copy of a float32 model. On the CPU it has to be made by hand."""
    family = request.param
    llm = tiny.engine(tiny.model(family, HALF, seed=3))
    model, engine_model = tiny.model(family, FLOAT), llm.shared.engine_model
    del engine_model.load_weights  # the guard of a shared engine
    plan = make_plan(engine_model, model, cast=True)
    materialise(engine_model, model, plan, torch.device("cpu"))
    llm.shared = Shared.of(model, engine_model, plan)
    own_memory(llm.shared, [], contextlib.nullcontext())
    llm.copies = Copies(llm.shared, merges=False)
    return llm, model


@pytest.mark.parametrize("private", ["qwen2", "phi3", "qwen3-moe"], indirect=True)
def test_a_private_copy_follows_by_one_casting_copy(private: tuple[Any, Any]) -> None:
    llm, model = private
    shared = llm.shared
    homes = {storage_key(p) for p in shared.engine_model.parameters()}
    for name, parameter in base_parameters(model).items():
        assert parameter.dtype == FLOAT
        assert storage_key(parameter) not in homes, name

    def assert_current(same: bool = True) -> None:
        for name, (destination, view) in shared.plan.views.items():
            held = view.on(shared.homes[destination].data)
            assert held.dtype == HALF
            assert torch.equal(held, base_parameters(model)[name].to(HALF)) == same, name

    with pytest.raises(SharingError, match=r"trained .* since the engine's copy .* Publish first"):
        tiny.engine_greedy(llm, PROMPT)  # nothing was published yet
    assert llm.publish()
    assert_current()
    assert not llm.publish()
    assert (tiny.engine_logprobs(llm, PROMPT) - tiny.logprobs(model, PROMPT)).abs().mean() < 0.1

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([PROMPT])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    assert_current(same=False)
    with pytest.raises(SharingError, match="Publish first"):
        tiny.engine_greedy(llm, PROMPT)
    storages = [t.data_ptr() for t in shared.homes.values()]
    assert llm.publish()
    assert_current()
    assert storages == [t.data_ptr() for t in shared.homes.values()]
    assert (tiny.engine_logprobs(llm, PROMPT) - tiny.logprobs(model, PROMPT)).abs().mean() < 0.1
    assert not llm.publish()


@pytest.mark.parametrize("private", ["qwen2"], indirect=True)
def test_a_private_copy_notices_every_way_of_writing(private: tuple[Any, Any]) -> None:
    """Some optimizers write through `.data` or from kernels of their own, which torch's version counters do not see."""
    llm, model = private
    llm.publish()
    layer = model.model.layers[1].mlp.up_proj

    def through_numpy() -> None:
        layer.weight.detach().numpy()[0, 0] += 1

    def another_parameter() -> None:
        layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))

    def other_data() -> None:
        layer.weight.data = torch.randn_like(layer.weight)

    for write in (lambda: layer.weight.data.add_(1), through_numpy, other_data, another_parameter):
        write()
        with pytest.raises(SharingError, match="Publish first"):
            tiny.engine_greedy(llm, PROMPT)
        assert llm.publish()
        assert (tiny.engine_logprobs(llm, PROMPT) - tiny.logprobs(model, PROMPT)).abs().mean() < 0.1


@pytest.mark.parametrize("private", ["qwen2"], indirect=True)
def test_only_a_casting_plan_takes_another_dtype(private: tuple[Any, Any]) -> None:
    llm, model = private
    with pytest.raises(SharingError, match=r"is torch\.float32 in the trainer and torch\.bfloat16 in the engine"):
        make_plan(llm.shared.engine_model, model)


def test_the_engines_own_load_weights_is_stopped() -> None:
    llm = tiny.engine(tiny.model("qwen2"))
    with pytest.raises(GuardError, match="load_weights"):
        llm.shared.engine_model.load_weights(iter([]))
