"""What a shared engine cannot do is refused by name, before anything is loaded or allocated."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from patchfastrl import PatchFastRL, UnpatchFastRL, vLLMSamplingParams
from patchfastrl.errors import PatchFastRLError, UnsupportedError

pytestmark = pytest.mark.timeout(120)

NOWHERE = "there/is-no-such-model"  # being looked at would be another error


@pytest.fixture(scope="module", autouse=True)
def _patched() -> Iterator[None]:
    PatchFastRL()
    yield
    close_all()
    UnpatchFastRL()


def close_all() -> None:
    from patchfastrl import engine

    gc.collect()
    for llm in list(engine.live):
        llm.close("the test is over.")


def assert_refused(says: str, folder: Path, args: dict[str, Any] | None = None, **given: Any) -> None:
    from patchfastrl import engine, runtime

    given.setdefault("model", NOWHERE)
    for algorithm in ("GRPO", "RLOO"):
        with pytest.raises(UnsupportedError, match=says):
            tiny.trainer(folder, algorithm, args=args, **given)
    assert not engine.live
    gc.collect()
    assert not list(runtime._trainers)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"vllm_tensor_parallel_size": 2}, r"vllm_tensor_parallel_size=2.*Set it to 1"),
        ({"vllm_model_impl": "transformers"}, r"vllm_model_impl='transformers'.*vLLM's own models"),
        ({"vllm_sampling_params": vLLMSamplingParams(n=2)}, r"vLLMSamplingParams\(n=2\).*num_generations"),
        ({"vllm_sampling_params": vLLMSamplingParams(temperature=0.2)}, r"temperature=0\.2.*importance ratios"),
        ({"vllm_sampling_params": {"no_such": 1}}, r"SamplingParams has no no_such"),
        ({"vllm_sampling_params": {"top_k": -7}}, r"top_k"),
        ({"model_init_kwargs": {"load_in_8bit": True}}, r"load_in_8bit: .* only 4-bit ones"),
        ({"model_init_kwargs": {"quantization_config": {"quant_method": "x"}}}, r"quantised models only .* 4-bit"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_settings(args: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert_refused(says, tmp_path, args)


def test_a_quantisation_given_to_the_trainer(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    assert_refused("BitsAndBytesConfig .* only bitsandbytes' 4-bit", tmp_path, quantization_config=config)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_adapters(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert_refused(says, tmp_path, peft_config=tiny.lora(**settings))


def test_other_adapters(tmp_path: Path) -> None:
    import peft

    assert_refused("IA3Config", tmp_path, peft_config=peft.IA3Config(task_type="CAUSAL_LM"))
    model = peft.get_peft_model(tiny.model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert_refused("PromptTuningConfig", tmp_path, model=model)


def test_models_that_are_not_whole_or_not_plain(tmp_path: Path) -> None:
    quantised = tiny.model()
    quantised.is_quantized = True
    assert_refused("only bitsandbytes' 4-bit", tmp_path, model=quantised)
    adapted = tiny.adapted(tiny.model())
    adapted.merge_adapter()
    assert_refused(r"merged.*unmerge_adapter", tmp_path, model=adapted)
    inside = tiny.model()
    inside.add_adapter(tiny.lora())
    assert_refused("adapters inside", tmp_path, model=inside)


def test_a_model_that_is_elsewhere(tmp_path: Path) -> None:
    from patchfastrl import engine

    model = tiny.model()
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedError, match=r"The model is on cpu, meta and vLLM runs on cpu.*no device_map"):
        engine.build(model, tiny.tokenizer())
    assert not engine.live


def test_a_sequence_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"One sequence of .* tokens needs .* of KV cache.*vllm_max_model_length"
    ):
        tiny.trainer(tmp_path, model=tiny.model(positions=10**7), args={"vllm_gpu_memory_utilization": 0.01})


# Several processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Accelerate's record of what it was launched with, which every configuration made afterwards would read anew."""
    from accelerate import PartialState

    args = tiny.config(tmp_path)
    before = dict(PartialState._shared_state)
    yield {"args": args, "shared": PartialState._shared_state}
    PartialState._shared_state.clear()
    PartialState._shared_state.update(before)


def assert_refused_with(args: Any, says: str) -> None:
    import trl

    with pytest.raises(UnsupportedError, match=says):
        trl.GRPOTrainer(model=NOWHERE, args=args, reward_funcs=tiny.length_reward, train_dataset=tiny.prompts(8))


def test_two_processes(state: dict[str, Any]) -> None:
    state["shared"]["num_processes"] = 2
    assert_refused_with(state["args"], r"2 processes.*--num_processes 1")


def test_megatron(state: dict[str, Any]) -> None:
    from accelerate.utils import DistributedType

    state["shared"]["distributed_type"] = DistributedType.MEGATRON_LM
    assert_refused_with(state["args"], "Megatron-LM cannot share")


def test_fsdp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused_with(tiny.config(tmp_path, fsdp="full_shard"), "FSDP shards the weights")
    args = tiny.config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert_refused_with(args, "FSDP shards the weights")


def test_deepspeed(tmp_path: Path) -> None:
    args = tiny.config(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 3}}  # given to the constructor it wants deepspeed installed
    assert_refused_with(args, r"DeepSpeed.*cannot be shared")


LAUNCHED = """
    import sys
    sys.path.insert(0, {tests!r})
    import tiny
    from patchfastrl import PatchFastRL
    from patchfastrl.errors import UnsupportedError
    PatchFastRL()
    try:
        trainer = tiny.trainer({folder!r}, model={model!r}, peft_config=tiny.lora())
    except UnsupportedError as error:
        sys.stdout.write(f"REFUSED {{error}}\\n")  # one write: two processes share the pipe
    else:
        trainer.train()
        sys.stdout.write(f"TRAINED {{trainer.state.global_step}}\\n")
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("processes", [1, 2])
def test_launchers(processes: int, tmp_path: Path) -> None:
    """For real: `accelerate launch` with one process trains, torchrun's two are refused."""
    model = NOWHERE if processes > 1 else tiny.checkpoint(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(LAUNCHED).format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out"), model=model)
    )
    if processes == 1:
        launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        launch = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path)},
        check=False,
    )
    expected = ["TRAINED 2"] if processes == 1 else ["REFUSED 2 processes"] * 2
    said = [line for line in done.stdout.splitlines() if line.startswith(("TRAINED", "REFUSED"))]
    assert len(said) == len(expected), done.stdout + done.stderr[-3000:]
    assert all(line.startswith(start) for line, start in zip(said, expected, strict=True)), said


# Somebody else's engine ---------------------------------------------------------------------------------------------


def test_an_engine_for_nobody(tmp_path: Path) -> None:
    """TRL's generation class used by something that is no patched trainer."""
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    before = dict(os.environ)
    with pytest.raises(UnsupportedError, match=r"Something other than a trainer that PatchFastRL knows"):
        VLLMGeneration(model=tiny.model(), accelerator=Accelerator(cpu=True), processing_class=tiny.tokenizer())
    assert dict(os.environ) == before  # TRL announces a process group of one, for which accelerate would look


def test_another_library_s_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "LLM", dict)
    before = dict(os.environ)
    with pytest.raises(UnsupportedError, match="another library has replaced it"):
        tiny.trainer(tmp_path)
    assert dict(os.environ) == before


def test_a_trainer_can_be_made_after_a_refusal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_refused("vllm_tensor_parallel_size", tmp_path, {"vllm_tensor_parallel_size": 2})
    with pytest.raises(PatchFastRLError):
        tiny.trainer(tmp_path, model=tiny.adapted(tiny.model("llama"), target_modules=["embed_tokens"]))
    trainer = tiny.trainer(tmp_path, model=tiny.model("llama"))
    trainer.train()
    assert max(h["sampling/sampling_logp_difference/max"] for h in trainer.state.log_history if "loss" in h) < 1e-4
    assert torch.isfinite(tiny.logprobs(trainer.model, tiny.ids(9))).all()
    caplog.clear()  # vLLM logs an exception with its first engine, whose traceback leads to the trainer
