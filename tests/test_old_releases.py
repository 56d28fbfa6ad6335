"""What the runtime does with the arguments of TRL releases that know less than today's."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
from packaging.version import Version

from patchfastrl import PatchFastRL, UnpatchFastRL, install, runtime
from patchfastrl.compat import cpu_rms_norm, guided_decoding, request_ids
from patchfastrl.errors import UnsupportedError


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
    assert runtime.sampling_params(dict, args, **settings) == {**settings, "detokenize": False}
    assert runtime.sampling_params(dict, args, **settings, stop=["x"])["detokenize"]  # they are looked for in text


def test_sampling_params_take_the_overrides() -> None:
    args = SimpleNamespace(vllm_sampling_params={"min_p": 0.2, "stop": ["x"]}, temperature=0.9)
    made = runtime.sampling_params(dict, args, n=1, temperature=0.9, min_p=0.0)
    assert made == {"n": 1, "temperature": 0.9, "min_p": 0.2, "stop": ["x"], "detokenize": True}
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


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_precision_goes_by_the_name_of_its_time(name: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path)
    made: list[dict[str, Any]] = []

    def create(model: str, **kwargs: Any) -> Any:
        made.append(kwargs)
        return SimpleNamespace(dtype="torch.bfloat16")

    args = SimpleNamespace(use_vllm=True)
    given = {"use_cache": False}
    runtime.load_model(create, path, args, object(), given, name)
    runtime.load_model(create, path, args, None, given, name)
    runtime.load_model(create, path, args, object(), {"torch_dtype": "float32"}, name)
    assert made == [{"use_cache": False, name: "auto"}, {"use_cache": False}, {"torch_dtype": "float32"}]
    assert given == {"use_cache": False}


class Trainer:
    pass


def test_a_trainer_that_samples_elsewhere_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "patchfastrl"):
        runtime.samples_elsewhere(Trainer())
    assert "Trainer samples from a vLLM server in another process" in caplog.text


@pytest.mark.parametrize("keep", ["force", "keep"])
def test_a_trainer_that_inherits_vllm_and_never_samples_from_it(keep: Any) -> None:
    """Nash-MD and XPO are made by Online DPO's `__init__`, the older SDFT's configuration has the field."""
    PatchFastRL(use_vllm=keep)
    try:
        with pytest.raises(UnsupportedError, match=r"Trainer: use_vllm=True asks TRL for an engine that this trainer"):
            runtime.configure(Trainer(), SimpleNamespace(use_vllm=True), "a/model", None, beside=True)
    finally:
        UnpatchFastRL()


def test_a_trainer_is_configured_once(tmp_path: Path) -> None:
    """Online DPO's `__init__` asks for its own settings when Nash-MD and XPO have had theirs."""
    args = tiny.config(tmp_path, "GRPO", max_steps=1)
    trainer, path = Trainer(), tiny.checkpoint(tmp_path)
    for more in ({"beside": True}, {"completions": 2}):
        assert runtime.configure(trainer, args, path, None, **more) is args
        assert args.use_vllm is False


def test_the_report_of_a_trainer_that_owns_its_engine() -> None:
    trainer = SimpleNamespace(llm=SimpleNamespace(report=lambda: {"publishes": 1}))
    assert runtime.engine_report(trainer) == {"publishes": 1}


# Names that vLLM dropped ----------------------------------------------------------------------------------------------


@pytest.fixture
def old_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module like `vllm.sampling_params`, not imported yet."""
    name = f"sampling_params_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "import dataclasses\n\n@dataclasses.dataclass\nclass StructuredOutputsParams:\n    regex: str | None = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(guided_decoding, "MODULE", name)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("when", ["imported before", "imported after"])
def test_a_dropped_class_is_supplied_and_taken_away(old_vllm: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided_decoding, "needed", lambda: True)
    monkeypatch.setattr(install, "_chosen", list)
    if when == "imported before":
        importlib.import_module(old_vllm)
    installation = install.Installation(strict=True)
    installation.install()
    module = importlib.import_module(old_vllm)
    supplied = module.GuidedDecodingParams
    assert isinstance(supplied(backend="outlines", regex="a+"), module.StructuredOutputsParams)
    assert supplied("a+").regex == "a+"
    loader: Any = module.__spec__.loader if module.__spec__ is not None else None
    assert "StructuredOutputsParams" in loader.get_source(old_vllm)
    installation.uninstall()
    assert not hasattr(module, "GuidedDecodingParams")


@pytest.mark.parametrize("trl", ["0.26.2", "0.27.0"])
def test_only_releases_that_import_the_class_get_it(trl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided_decoding, "installed", lambda name: Version(trl))
    assert guided_decoding.needed() is (trl == "0.26.2")


def test_a_class_that_is_there_stays() -> None:
    module: Any = ModuleType("vllm.sampling_params")
    module.GuidedDecodingParams = dict
    guided_decoding.supply(module, setattr)
    assert module.GuidedDecodingParams is dict


def test_guided_decoding_goes_by_the_name_of_today() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    args = SimpleNamespace()
    regex = StructuredOutputsParams(regex="a+")
    assert runtime.sampling_params(SamplingParams, args, n=1, guided_decoding=None).structured_outputs is None
    assert runtime.sampling_params(SamplingParams, args, n=1, guided_decoding=regex).structured_outputs.regex == "a+"
    with pytest.raises(UnsupportedError, match="older name"):
        runtime.sampling_params(SamplingParams, args, n=1, guided_decoding=regex, structured_outputs=regex)

    class OldParams(SimpleNamespace):
        __struct_fields__ = ("guided_decoding",)

    assert runtime.sampling_params(OldParams, args, guided_decoding=regex).guided_decoding is regex


# Methods that vLLM has changed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["one id", "two ids"])
def test_what_is_left_of_a_batch_is_aborted(ids: str) -> None:
    aborted: list[Any] = []

    class Engine:
        output_processor = SimpleNamespace(request_states={"7": object()})

        if ids == "one id":

            def abort_request(self, request_ids: list[str]) -> None:
                aborted.append((request_ids, None))
        else:

            def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
                aborted.append((request_ids, internal))

    request_ids.abort_all(Engine())
    assert aborted == [(["7"], None if ids == "one id" else True)]


def test_norms_get_contiguous_tensors_where_the_kernel_ignores_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.model_executor.layers.layernorm import RMSNorm

    seen: list[bool] = []
    norm = RMSNorm.__new__(RMSNorm)
    torch.nn.Module.__init__(norm)
    norm._forward_method = lambda x, residual=None: seen.append(x.is_contiguous())
    strided = torch.rand(4, 8)[:, :4]
    monkeypatch.setattr(cpu_rms_norm, "_reads_strides", lambda: True)
    cpu_rms_norm.install(norm)
    norm._forward_method(strided)
    monkeypatch.setattr(cpu_rms_norm, "_reads_strides", lambda: False)
    cpu_rms_norm.install(norm)
    norm._forward_method(strided, residual=None)
    assert seen == [False, True]
