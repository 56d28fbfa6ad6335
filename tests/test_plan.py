"""The byte budget: exact where it can be, refused with the settings that would work."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from patchfastrl import cli, plan
from patchfastrl.errors import UnsupportedError
from patchfastrl.memory import gib

GIB = 2**30
EIGHT = plan.Shape(
    parameters=8_030_261_248, linear=6_979_321_856, adapter=83_886_080, layers=32, hidden=4096, intermediate=14336,
    vocabulary=128256, cache=2 * 32 * 8 * 128,
)  # fmt: skip
RUN = plan.Run(method="lora", tokens=576, micro_batch=8, share=0.3, standby=True)


def test_the_parts_of_an_8b_model() -> None:
    found = plan.budget(EIGHT, RUN, 140 * GIB)
    assert gib(found.sampling["weights, shared"]) == "14.96 GiB"
    assert gib(found.sampling["engine's own weights"]) == "13.00 GiB"
    assert found.training["optimizer"] == 8 * EIGHT.adapter
    assert "KV cache" not in found.training
    assert found.fits
    assert plan.problem(EIGHT, RUN, 140 * GIB) is None
    packed = plan.budget(EIGHT, replace(RUN, method="qlora"), 140 * GIB)
    assert 5 < packed.training["weights, shared"] / GIB < 5.6
    full = plan.budget(EIGHT, replace(RUN, method="full"), 140 * GIB)
    assert full.training["gradients"] == 2 * EIGHT.parameters
    assert full.training["optimizer"] == 4 * EIGHT.parameters
    assert full.sampling["engine's own weights"] == 0


def test_without_standby_the_cache_stays() -> None:
    found = plan.budget(EIGHT, replace(RUN, standby=False), 140 * GIB)
    assert found.training["KV cache"] == found.sampling["KV cache"] > 0
    assert found.sampling["engine's own weights"] > 0
    assert "engine's own weights" not in found.training  # they are there while a batch runs


def test_layers_keep_what_is_free() -> None:
    """By default all but a tenth of the device is used for it; not what a script without checkpointing keeps anyway."""
    long = replace(RUN, tokens=2112, completion=2048)
    found = plan.budget(EIGHT, long, 80 * GIB)
    assert 71.9 < sum(found.training.values()) / GIB < 72.1
    assert found.fits
    needed = plan.budget(EIGHT, replace(long, recompute="needed"), 80 * GIB)
    assert sum(needed.training.values()) <= max(
        sum(needed.sampling.values()), sum(needed.training.values()) - needed.training["kept activations"]
    )
    for none in replace(long, recompute="always"), replace(long, checkpointing=False):
        assert plan.budget(EIGHT, none, 80 * GIB).training["kept activations"] == 0
    roomy = plan.budget(EIGHT, replace(RUN, micro_batch=1), 1000 * GIB)
    assert roomy.training["kept activations"] < 10 * GIB  # all that there are
    scored = plan.budget(EIGHT, replace(long, completion=512), 80 * GIB).training["activations"]
    assert scored < found.training["activations"]


def test_what_cannot_work_is_refused_and_what_may_not_is_said(caplog: pytest.LogCaptureFixture) -> None:
    plan.check(EIGHT, RUN, 140 * GIB)
    assert not caplog.records
    long = replace(RUN, tokens=40960, completion=512, micro_batch=1, share=0.76, standby=False)
    plan.check(EIGHT, long, 80 * GIB)
    assert "will probably run out of memory" in caplog.text
    assert "This fits: UNSLOTH_VLLM_STANDBY=1" in caplog.text
    with pytest.raises(UnsupportedError, match=r"are needed and the device has 80.00 GiB. This fits: UNSL"):
        plan.check(EIGHT, replace(RUN, share=0.95, standby=False), 80 * GIB)


def test_the_plan_is_said_before_the_engine_is_built(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.adapted(tiny.model("qwen2"))
    with caplog.at_level("INFO", "patchfastrl"):
        tiny.engine(model).close("the test is over.")
    said = [record.getMessage() for record in caplog.records]
    planned = next(i for i, line in enumerate(said) if line.startswith("PatchFastRL: memory, planned"))
    ready = next(i for i, line in enumerate(said) if "engine ready" in line)
    assert planned < ready
    assert gib(sum(p.nbytes for n, p in model.named_parameters() if "lora" not in n)) in said[planned]


def test_the_engine_gets_what_the_trainer_leaves() -> None:
    all_of_it = replace(RUN, share=0.95)
    run = plan.beside_the_trainer(EIGHT, all_of_it, 140 * GIB)
    assert run == replace(all_of_it, share=run.share)
    assert 0.85 < run.share < 0.88  # 15.3 GiB are the trainer's, adapter and optimizer included, and 3 head-room
    assert plan.problem(EIGHT, run, 140 * GIB) is None
    assert "standby" in (plan.problem(EIGHT, replace(run, standby=False, tokens=2048), 140 * GIB) or "")
    assert plan.beside_the_trainer(EIGHT, RUN, 140 * GIB) == RUN  # what fits is not touched
    beside_others = plan.beside_the_trainer(EIGHT, replace(all_of_it, taken=60 * GIB), 140 * GIB)
    assert beside_others.share < run.share - 60 / 141
    assert plan.budget(EIGHT, beside_others, 140 * GIB).device == 80 * GIB
    too_small = plan.beside_the_trainer(EIGHT, all_of_it, 16 * GIB)
    assert too_small == all_of_it
    assert plan.problem(EIGHT, too_small, 16 * GIB) is not None


@given(
    device=st.integers(16, 200),
    tokens=st.sampled_from([512, 4096, 65536]),
    micro_batch=st.sampled_from([1, 8, 64]),
    share=st.sampled_from([0.1, 0.3, 0.6, 0.95]),
    standby=st.booleans(),
    checkpointing=st.booleans(),
    method=st.sampled_from(["lora", "qlora", "full"]),
)
def test_what_is_proposed_does_fit(device: int, **settings: Any) -> None:
    run = plan.beside_the_trainer(EIGHT, replace(RUN, **settings), device * GIB)
    wrong = plan.problem(EIGHT, run, device * GIB)
    found = plan.budget(EIGHT, run, device * GIB)
    enough = found.sampling["KV cache"] >= plan.one_sequence(EIGHT, run)
    assert (wrong is None) == (found.fits and enough)
    if wrong is None or "No setting" in wrong:
        return
    assert "This fits" in wrong
    if "standby" in wrong:
        run = replace(run, standby=True)
    if "gradient_checkpointing" in wrong:
        run = replace(run, checkpointing=True)
    if "rollouts='adapter'" in wrong:
        run = replace(run, merged=False)
    if "batch_size=1" in wrong:
        run = replace(run, micro_batch=1)
    if asked := re.search(r"utilization=([0-9.]+[0-9])", wrong):
        run = replace(run, share=float(asked[1]))
    if "load_in_4bit" in wrong:
        run = replace(run, method="qlora")
    if asked := re.search(r"sequences of (\d+)", wrong):
        run = replace(run, tokens=int(asked[1]))
    assert plan.problem(EIGHT, run, device * GIB) is None, wrong


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_shape_is_the_models(wrapped: bool) -> None:
    model = tiny.model("qwen2")
    numbers = sum(p.numel() for p in model.parameters())
    linear = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "head" not in n
    )
    if wrapped:
        model = tiny.adapted(model, r=4)
    shape = plan.shape_of_model(model, None if wrapped else 4)
    assert (shape.parameters, shape.linear) == (numbers, linear)
    assert shape.adapter == sum(
        p.numel() for n, p in tiny.adapted(tiny.model("qwen2"), r=4).named_parameters() if "lora" in n
    )
    assert shape.itemsize == 4


def test_a_bare_model_with_an_adapter_slot_is_to_get_an_adapter() -> None:
    """FastLanguageModel builds the engine before there is one."""
    bare, adapted = tiny.model("qwen2"), tiny.adapted(tiny.model("qwen2"), r=4)
    assert plan.of_trainer(bare, None, {}, 0)[1].method == "full"
    shape, run = plan.of_trainer(bare, None, {}, 0, rank=4)
    expected, later = plan.of_trainer(adapted, None, {}, 0, rank=16)  # a slot may be larger than its adapter
    assert (run.method, later.method) == ("lora", "lora")
    assert shape == expected
    assert plan.budget(shape, run, GIB).training["gradients"] == 4 * shape.adapter


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # only the configuration is read
    assert cli.main(["plan", path, "--tokens", "64", "--standby", "--memory", "80", "--share", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "weights, shared" in said
    assert "It fits." in said
    assert "kept activations" in said
    assert cli.main(["plan", path, "--tokens", "64", "--standby", "--memory", "80", "--share", "0.99"]) == 0
    assert "of the device: the trainer needs the rest" in capsys.readouterr().out
    assert cli.main(["plan", path, "--tokens", "64", "--memory", "1", "--share", "0.5"]) == 1
    assert "No setting makes it fit" in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert cli.main(["plan", path, "--tokens", "64", "--memory", "80"]) == 1
    assert "quantization_config (awq)" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
