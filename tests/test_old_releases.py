"""What the runtime does with the arguments of TRL releases that know less than today's."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from patchfastrl import runtime
from patchfastrl.errors import UnsupportedError
from patchfastrl.interrupts import between_steps


def test_standby_needs_a_release_with_sleep_mode() -> None:
    args = SimpleNamespace(vllm_mode="colocate")
    with pytest.raises(UnsupportedError, match=r"no vllm_enable_sleep_mode.*0\.23\.0 for GRPO, 0\.24\.0 for RLOO"):
        runtime._set_standby(args, True)
    runtime._set_standby(args, False)
    assert vars(args) == {"vllm_mode": "colocate"}
    newer = SimpleNamespace(vllm_enable_sleep_mode=False)
    runtime._set_standby(newer, True)
    assert newer.vllm_enable_sleep_mode is True


@pytest.mark.parametrize("generation_kwargs", [{}, {"generation_kwargs": None}, {"generation_kwargs": {"min_p": 0.1}}])
def test_sampling_params_without_overrides_are_trls(generation_kwargs: dict[str, Any]) -> None:
    args = SimpleNamespace(**generation_kwargs)
    settings = {"n": 1, "temperature": 0.9, "min_p": 0.1}
    assert runtime.sampling_params(dict, args, **settings) == settings


def test_sampling_params_take_the_overrides() -> None:
    args = SimpleNamespace(vllm_sampling_params={"min_p": 0.2, "stop": ["x"]}, temperature=0.9)
    made = runtime.sampling_params(dict, args, n=1, temperature=0.9, min_p=0.0)
    assert made == {"n": 1, "temperature": 0.9, "min_p": 0.2, "stop": ["x"]}
    with pytest.raises(UnsupportedError, match="TRL needs n=1"):
        runtime.sampling_params(dict, SimpleNamespace(vllm_sampling_params={"n": 2}), n=1)


def test_structured_outputs_are_vllms_class() -> None:
    from vllm.sampling_params import StructuredOutputsParams

    args = SimpleNamespace(vllm_sampling_params={"structured_outputs": {"regex": "a+"}})
    made = runtime.sampling_params(dict, args, n=1)
    assert isinstance(made["structured_outputs"], StructuredOutputsParams)
    assert made["structured_outputs"].regex == "a+"


def test_a_rollout_func_that_would_be_forgotten_is_refused() -> None:
    args = SimpleNamespace(use_vllm=True, vllm_mode="server")
    with pytest.raises(UnsupportedError, match=r"rollout_func.*0\.26\.0"):
        runtime.configure(object(), args, "a/model", None, server_only=print)
    assert args.vllm_mode == "server"


def test_a_batch_may_run_inside_a_batch() -> None:
    class Engine:
        def step(self) -> str:
            return "stepped"

    engine = Engine()
    with between_steps(engine), between_steps(engine):
        assert engine.step() == "stepped"
    assert vars(engine) == {}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_precision_goes_by_the_name_of_its_time(name: str) -> None:
    made: list[dict[str, Any]] = []

    def create(model: str, **kwargs: Any) -> Any:
        made.append(kwargs)
        return SimpleNamespace(dtype="torch.bfloat16")

    args = SimpleNamespace(use_vllm=True)
    given = {"use_cache": False}
    runtime.load_model(create, "a/model", args, object(), given, name)
    runtime.load_model(create, "a/model", args, None, given, name)
    runtime.load_model(create, "a/model", args, object(), {"torch_dtype": "float32"}, name)
    assert made == [{"use_cache": False, name: "auto"}, {"use_cache": False}, {"torch_dtype": "float32"}]
    assert given == {"use_cache": False}


class Alone:
    pass


def test_a_trainer_without_a_vllm_path_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "patchfastrl"):
        runtime.samples_by_itself(Alone())
        assert caplog.text.count("has no vLLM path") == 1
        assert "from TRL" not in caplog.text
        runtime.samples_by_itself(Alone(), since="0.22.0")
        assert "from TRL 0.22.0 on" in caplog.text
        runtime.samples_by_itself(Alone(), server=True)
        assert "a vLLM server in another process" in caplog.text


def test_a_trainer_that_inherits_vllm_and_never_samples_from_it() -> None:
    """Nash-MD and XPO are made by Online DPO's `__init__`."""
    trainer = Alone()
    runtime.samples_by_itself(trainer)
    args = SimpleNamespace(use_vllm=False)
    assert runtime.configure(trainer, args, "a/model", None) is args
    assert not args.use_vllm
    with pytest.raises(UnsupportedError, match=r"Alone: use_vllm=True builds an engine that this trainer never"):
        runtime.configure(trainer, SimpleNamespace(use_vllm=True), "a/model", None)


def test_the_report_of_a_trainer_that_owns_its_engine() -> None:
    trainer = SimpleNamespace(llm=SimpleNamespace(report=lambda: {"publishes": 1}))
    assert runtime.engine_report(trainer) == {"publishes": 1}
