"""While weights are shared nothing tears them apart, ordinary scripts notice nothing, and no trace is left."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from patchfastrl import PatchFastRL, guards
from patchfastrl.errors import GuardError, PatchFastRLError, SharingError

pytestmark = pytest.mark.timeout(120)

PROMPT = tiny.ids(24)


def close_all() -> None:
    gc.collect()
    from patchfastrl import engine

    for llm in list(engine.live):
        llm.close("the test is over.")


@pytest.fixture(autouse=True)
def _no_engine_left() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def full() -> tuple[Any, Any]:
    """An engine and its model, all of which is trained."""
    model = tiny.model("llama")
    return tiny.engine(model), model


@pytest.fixture
def lora() -> tuple[Any, Any]:
    """An engine and its model with an adapter, in bfloat16."""
    model = tiny.adapted(tiny.model("llama", torch.bfloat16))
    return tiny.engine(model), model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_untouched(llm: Any, model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Same values in the same storage, and the engine goes on."""
    llm.shared.check()
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert now[name].dtype == value.dtype, name
        assert torch.equal(now[name], value), name
    tiny.engine_greedy(llm, PROMPT)
    assert (tiny.engine_logprobs(llm, PROMPT) - tiny.logprobs(model, PROMPT)).abs().mean() < 0.05


# Stopped ------------------------------------------------------------------------------------------------------------

STOPPED: dict[str, Callable[[Any, Any], Any]] = {
    "merge_adapter": lambda llm, m: m.merge_adapter(),
    "base_model.merge_adapter": lambda llm, m: m.base_model.merge_adapter(safe_merge=True),
    "one layer's merge": lambda llm, m: m.get_base_model().model.layers[0].self_attn.q_proj.merge(),
    "float": lambda llm, m: m.float(),
    "half": lambda llm, m: m.half(),
    "double": lambda llm, m: m.double(),
    "to(float16)": lambda llm, m: m.to(torch.float16),
    "to(dtype=float32)": lambda llm, m: m.to(dtype=torch.float32),
    "to(other)": lambda llm, m: m.to(torch.empty(1, dtype=torch.float64)),
    "to(meta)": lambda llm, m: m.to("meta"),
    "to_empty": lambda llm, m: m.to_empty(device="cpu"),
    "one module's to(meta)": lambda llm, m: m.get_base_model().model.norm.to("meta"),
    "lm_head.float": lambda llm, m: m.get_base_model().lm_head.float(),
    "resize": lambda llm, m: m.resize_token_embeddings(m.config.vocab_size + 8),
    "resize of the base": lambda llm, m: m.get_base_model().resize_token_embeddings(new_num_tokens=64),
    "load_weights": lambda llm, m: llm.model_runner.model.load_weights(
        [("lm_head.weight", torch.zeros(m.config.vocab_size, m.config.hidden_size))]
    ),
    "apply_model(load_weights)": lambda llm, m: llm.apply_model(lambda inner: inner.load_weights([])),
    "reload_weights": lambda llm, m: llm.worker.reload_weights(),
    "runner.reload_weights": lambda llm, m: llm.model_runner.reload_weights(),
    "rpc reload_weights": lambda llm, m: llm.collective_rpc("reload_weights"),
    "engine rpc reload_weights": lambda llm, m: llm.llm_engine.collective_rpc("reload_weights"),
    "rpc update_weights": lambda llm, m: llm.collective_rpc("update_weights", args=({},)),
}


def test_stopped_with_an_explanation_and_nothing_changed(lora: tuple[Any, Any]) -> None:
    llm, model = lora
    before = snapshot(model)
    for name, action in STOPPED.items():
        with pytest.raises(GuardError) as stopped:
            action(llm, model)
        message = str(stopped.value)
        assert "was stopped" in message, name
        assert "shared with the vLLM engine" in message, name
        assert "copy.deepcopy(model)" in message, name
        assert "unshare(model)" in message, name
        assert_untouched(llm, model, before)


def test_moves_and_casts_name_both_sides(full: tuple[Any, Any]) -> None:
    _, model = full
    with pytest.raises(
        GuardError, match=r"casting LlamaForCausalLM from torch\.float32 on cpu to torch\.bfloat16 on cpu"
    ):
        model.bfloat16()
    with pytest.raises(GuardError, match=r"casting RMSNorm|casting LlamaRMSNorm"):
        model.model.norm.half()


TORN: dict[str, Callable[[Any], Any]] = {
    "data replaced": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data.clone()),
    "parameter replaced": lambda m: setattr(m.model.norm, "weight", nn.Parameter(m.model.norm.weight.detach().clone())),
    "module replaced": lambda m: setattr(m, "lm_head", nn.Linear(64, 101, bias=False)),
    "assigned": lambda m: m.load_state_dict({n: t.clone() for n, t in m.state_dict().items()}, assign=True),
    "transposed": lambda m: setattr(m.model.layers[0].self_attn.q_proj.weight, "data", m.lm_head.weight.data[:64]),
}


@pytest.mark.parametrize("how", TORN)
def test_what_no_guard_can_stop_fails_the_next_batch(full: tuple[Any, Any], how: str) -> None:
    llm, model = full
    TORN[how](model)
    for _ in range(2):
        with pytest.raises(SharingError, match=r"no longer lies in the engine's storage|new base weights"):
            tiny.engine_greedy(llm, PROMPT)


# What scripts do ----------------------------------------------------------------------------------------------------


def _prepared(model: Any) -> Any:
    from accelerate import Accelerator

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, _ = Accelerator(cpu=True).prepare(model, optimizer)
    return prepared


def _trained(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    _trained(model)
    model.gradient_checkpointing_disable()


def _loaded(model: Any) -> None:
    """In place, through the shared storage: both sides see it."""
    other = tiny.model("llama", seed=5)
    model.load_state_dict(other.state_dict())


ORDINARY: dict[str, Callable[[Any], Any]] = {
    "to(cpu)": lambda m: m.to("cpu"),
    "to(cpu:0)": lambda m: m.to("cpu:0"),
    "to(device, dtype)": lambda m: m.to(torch.device("cpu"), torch.float32, non_blocking=True),
    "cpu()": lambda m: m.cpu(),
    "float()": lambda m: m.float(),
    "train, eval": lambda m: m.train().eval().train(),
    "requires_grad_": lambda m: m.requires_grad_(False).requires_grad_(True),
    "zero_grad": lambda m: m.zero_grad(),
    "prepare": _prepared,
    "gradient checkpointing": _checkpointed,
    "training": _trained,
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": _loaded,
    "resize to the same": lambda m: m.resize_token_embeddings(m.config.vocab_size),
    "generate": lambda m: m.generate(torch.tensor([PROMPT]), max_new_tokens=4, do_sample=False),
    "tie_weights": lambda m: m.tie_weights(),
    "share_memory": lambda m: m.share_memory(),
    "compile": lambda m: torch.compile(m),
    "amp": lambda m: torch.autocast("cpu", torch.bfloat16).__enter__().__exit__(None, None, None),
}


def test_ordinary_scripts_notice_nothing(full: tuple[Any, Any]) -> None:
    llm, model = full
    names = list(snapshot(model))
    for name, action in ORDINARY.items():
        action(model)
        llm.shared.check()
        assert [n for n, _ in model.named_parameters()] == names, name
        assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT), name


def test_unmerging_what_is_not_merged(lora: tuple[Any, Any]) -> None:
    llm, model = lora
    before = snapshot(model)
    model.unmerge_adapter()
    with model.disable_adapter():
        tiny.logprobs(model, PROMPT)
    model.set_adapter("default")
    assert_untouched(llm, model, before)


# Copies -------------------------------------------------------------------------------------------------------------


def _through_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    one_copy = sum(p.numel() * p.element_size() for p in model.parameters())
    assert buffer.tell() < 1.5 * one_copy + 200_000
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_copies_are_private_and_have_no_engine(how: str, adapted: bool) -> None:
    model = tiny.adapted(tiny.model("llama")) if adapted else tiny.model("llama")
    llm = tiny.engine(model)
    base = model.get_base_model() if adapted else model
    base.vllm_engine = llm  # as FastLanguageModel leaves it
    before = snapshot(model)
    twin = COPIES[how](model)
    twin_base = twin.get_base_model() if adapted else twin
    assert twin_base.vllm_engine is None
    assert tiny.greedy(twin, PROMPT) == tiny.greedy(model, PROMPT)
    assert guards.engine_of(twin) is None
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert_untouched(llm, model, before)
    # No guard holds for the copy.
    if adapted:
        twin.merge_adapter()
        twin.unmerge_adapter()
    twin.to(torch.bfloat16)
    twin_base.resize_token_embeddings(120)
    assert_untouched(llm, model, before)


def test_another_model_is_never_affected(lora: tuple[Any, Any]) -> None:
    llm, model = lora
    before = snapshot(model)
    other = tiny.adapted(tiny.model("qwen2-tied"))
    expected = tiny.logprobs(other, PROMPT)
    other.merge_adapter()
    other.unmerge_adapter()
    other.to(torch.float64).float().to("cpu")
    assert (tiny.logprobs(other, PROMPT) - expected).abs().max() < 1e-4
    merged = other.merge_and_unload()
    assert (tiny.logprobs(merged, PROMPT) - expected).abs().max() < 1e-3
    merged.resize_token_embeddings(120)
    nn.Linear(2, 2).half().to("meta")
    assert_untouched(llm, model, before)


# Endings ------------------------------------------------------------------------------------------------------------


def replaced_attributes() -> list[Any]:
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

    return [
        nn.Module.__dict__["_apply"],
        Linear.__dict__["merge"],
        BaseTuner.__dict__["merge_and_unload"],
        PreTrainedModel.__dict__["resize_token_embeddings"],
        nn.Module.__dict__["register_parameter"],
    ]


def test_guards_come_with_the_first_engine_and_go_with_the_last() -> None:
    before = replaced_attributes()
    model = tiny.model("llama")
    llm = tiny.engine(model)
    assert [a is b for a, b in zip(replaced_attributes(), before, strict=True)] == [False] * 4 + [True]
    second = tiny.engine(tiny.model("qwen2-tied"))  # closes the first
    with pytest.raises(PatchFastRLError, match="closed: another engine was built"):
        tiny.engine_greedy(llm, PROMPT)
    model.half().float()
    second.close("the test is over.")
    assert all(a is b for a, b in zip(replaced_attributes(), before, strict=True))
    third = tiny.engine(tiny.model("llama"))
    del third
    gc.collect()
    assert all(a is b for a, b in zip(replaced_attributes(), before, strict=True))


def test_merge_and_unload_after_training() -> None:
    """The usual last lines of a script: private storage first, then the merge; nothing of it reaches the engine."""
    model = tiny.adapted(tiny.model("llama"))
    expected = tiny.logprobs(model, PROMPT)
    stock = copy.deepcopy(model).merge_and_unload()
    llm = tiny.engine(model)
    homes = {d: h.data.clone() for d, h in llm.shared.homes.items()}
    held = {d: h.data for d, h in llm.shared.homes.items()}
    merged = model.merge_and_unload()
    for destination, home in held.items():
        assert torch.equal(home, homes[destination]), destination
    assert guards.engine_of(merged) is None
    ours, theirs = dict(merged.named_parameters()), dict(stock.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), name
    assert (tiny.logprobs(merged, PROMPT) - expected).abs().max() < 1e-3
    with pytest.raises(PatchFastRLError, match="closed: its model was given storage of its own"):
        tiny.engine_greedy(llm, PROMPT)


def test_unsharing_by_hand(full: tuple[Any, Any]) -> None:
    llm, model = full
    before = snapshot(model)
    guards.unshare(model)
    guards.unshare(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    model.double()
    with pytest.raises(PatchFastRLError, match="closed"):
        llm.generate("the cat")
    again = tiny.engine(model.float())
    assert tiny.engine_greedy(again, PROMPT) == tiny.greedy(model, PROMPT)


@pytest.mark.parametrize("family", ["llama", "qwen2-tied", "phi3", "qwen3-moe"])
def test_save_pretrained_while_shared(family: str, tmp_path: Path) -> None:
    """One copy on disk, and what is read back is the model."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = tiny.model(family)
    model.save_pretrained(tmp_path / "stock")
    llm = tiny.engine(model)
    model.save_pretrained(tmp_path / "shared")
    stock, shared = (load_file(tmp_path / n / "model.safetensors") for n in ("stock", "shared"))
    assert stock.keys() == shared.keys()
    for name, value in stock.items():
        assert torch.equal(value, shared[name]), name
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("stock", "shared")]
    assert sizes[0] == sizes[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shared", dtype=torch.float32)
    assert tiny.greedy(again, PROMPT) == tiny.engine_greedy(llm, PROMPT)


def test_save_pretrained_of_an_adapter(lora: tuple[Any, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    llm, model = lora
    before = snapshot(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    again = PeftModel.from_pretrained(tiny.model("llama", torch.bfloat16), tmp_path)
    assert torch.equal(tiny.logprobs(again, PROMPT), tiny.logprobs(model, PROMPT))
    assert_untouched(llm, model, before)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_end_of_a_training_script(adapted: bool, tmp_path: Path) -> None:
    """Train, save, merge, push to 16 bits, reload: as people write it."""
    from transformers import AutoModelForCausalLM

    PatchFastRL()
    trainer = tiny.trainer(tmp_path / "out", peft_config=tiny.lora() if adapted else None)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = trainer.model
    expected = tiny.logprobs(model, PROMPT)
    if adapted:
        model = model.merge_and_unload()
    else:
        guards.unshare(model)
    model.save_pretrained(tmp_path / "merged")
    trainer.processing_class.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (tiny.logprobs(again, PROMPT) - expected).abs().max() < 1e-3
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    with pytest.raises(PatchFastRLError, match="closed"):
        trainer.train()


def test_casting_the_head_is_refused_by_name(tmp_path: Path) -> None:
    PatchFastRL()
    with pytest.raises(PatchFastRLError, match=r"cast_lm_head_to_fp32=True.*bfloat16.*Set it to False"):
        tiny.trainer(tmp_path, model=tiny.model("llama", torch.bfloat16), args={"cast_lm_head_to_fp32": True})
    path = tiny.checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    with pytest.raises(PatchFastRLError, match=r"cast_lm_head_to_fp32=True"):
        tiny.trainer(tmp_path, model=path, peft_config=tiny.lora(), args={"cast_lm_head_to_fp32": True})
    tiny.trainer(tmp_path, model=tiny.model("llama"), args={"cast_lm_head_to_fp32": True, "max_steps": 1}).train()
