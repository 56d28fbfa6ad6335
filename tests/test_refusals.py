"""What a shared engine cannot do is refused by name, before anything is loaded or allocated."""

from __future__ import annotations

import gc
import json
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

from patchfastrl import FastLanguageModel, PatchFastRL, UnpatchFastRL, vLLMSamplingParams
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
    if runtime._trainers:
        gc.collect()  # a trainer and its callbacks refer to each other
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
        ({"model_init_kwargs": {"load_in_8bit": True}}, r"load_in_8bit=True: .* only bitsandbytes' 4-bit"),
        ({"model_init_kwargs": {"load_in_fp8": True}}, r"load_in_fp8=True: .* only bitsandbytes' 4-bit.*FP8 weights: "),
        ({"model_init_kwargs": {"gguf_file": "model.gguf"}}, r"gguf_file='model.gguf': .* only bitsandbytes' 4-bit"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_settings(args: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert_refused(says, tmp_path, args)


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


# Quantised weights --------------------------------------------------------------------------------------------------


def configs() -> dict[str, Any]:
    """What quantises a model while it is loaded, by method; a dictionary where its class needs a package."""
    import transformers as t

    return {
        "fp8": t.FineGrainedFP8Config(),
        "fbgemm_fp8": t.FbgemmFp8Config(),
        "compressed-tensors": t.CompressedTensorsConfig(),
        "mxfp4": t.Mxfp4Config(),
        "gptq": t.GPTQConfig(bits=4),
        "awq": t.AwqConfig(),
        "bitsandbytes in 8 bits": t.BitsAndBytesConfig(load_in_8bit=True),
        "quanto": t.QuantoConfig(weights="int8"),
        "eetq": t.EetqConfig(),
        "torchao": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        "hqq": {"quant_method": "hqq"},
        "quark": {"quant_method": "quark"},
        "modelopt": {"quant_method": "modelopt"},
        "unknown": {"bits": 8},
    }


METHODS = sorted(configs())


def assert_method_refused(method: str, folder: Path, says: str = "", **given: Any) -> None:
    says += rf"\({method}\): of quantised models only bitsandbytes' 4-bit"
    assert_refused(rf"{says}.*FP8 weights: .*vLLM" if "fp8" in method else says, folder, **given)


def declaring(quantisation: dict[str, Any], folder: Path, word: str = "quantization_config", part: str = "") -> str:
    """A checkpoint whose config.json declares it. It has no weights: to look for them would be another error."""
    path = Path(tiny.checkpoint(folder / "model"))
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    (config.setdefault(part, {}) if part else config)[word] = quantisation
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantisation_that_is_asked_for(method: str, tmp_path: Path) -> None:
    config = configs()[method]
    assert_method_refused(method, tmp_path, quantization_config=config)
    assert_method_refused(method, tmp_path, args={"model_init_kwargs": {"quantization_config": config}})
    for four_bits in (True, False):
        with pytest.raises(UnsupportedError, match=rf"\({method}\): .* 4-bit"):
            FastLanguageModel.from_pretrained(NOWHERE, load_in_4bit=four_bits, quantization_config=config)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantisation_that_the_checkpoint_declares(method: str, tmp_path: Path) -> None:
    config = configs()[method]
    path = declaring(config if isinstance(config, dict) else config.to_dict(), tmp_path)
    assert_method_refused(method, tmp_path, f"{path} declares quantization_config ", model=path)
    assert_method_refused(method, tmp_path, model=path, args={"model_init_kwargs": {"dtype": "bfloat16"}})
    for four_bits in (True, False):
        with pytest.raises(UnsupportedError, match=rf"declares .*\({method}\): .* 4-bit"):
            FastLanguageModel.from_pretrained(path, load_in_4bit=four_bits)


@pytest.mark.parametrize(
    "place", [{"word": "compression_config"}, {"part": "text_config"}], ids=["compressed-tensors", "composite"]
)
def test_a_quantisation_that_is_declared_elsewhere(place: dict[str, str], tmp_path: Path) -> None:
    path = declaring({"quant_method": "compressed-tensors"}, tmp_path, **place)
    assert_method_refused("compressed-tensors", tmp_path, "declares quantization_config ", model=path)


@pytest.mark.parametrize("kind", ["float-quantized", "pack-quantized"])
def test_compressed_tensors_say_whether_they_are_fp8(kind: str, tmp_path: Path) -> None:
    path = declaring({"quant_method": "compressed-tensors", "format": kind}, tmp_path)
    with pytest.raises(UnsupportedError, match=r"\(compressed-tensors\): .* only bitsandbytes' 4-bit") as refused:
        tiny.trainer(tmp_path, model=path)
    assert ("FP8 weights: " in str(refused.value)) == (kind == "float-quantized")


def test_a_trainer_with_an_engine_beside_it(tmp_path: Path) -> None:
    """It loads its model by itself, out of PatchFastRL's sight."""
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    path = declaring({"quant_method": "fp8"}, tmp_path)
    with pytest.raises(UnsupportedError, match=r"declares quantization_config \(fp8\)"):
        A2POTrainer(
            model=path,
            reward_funcs=tiny.length_reward,
            args=A2POConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False),
            train_dataset=tiny.prompts(8),
        )


def test_what_to_do_with_a_checkpoint_that_transformers_can_unpack(tmp_path: Path) -> None:
    for method, kind in {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "gptq": None}.items():
        path = declaring({"quant_method": method}, tmp_path / method)
        instead = rf"quantization_config={kind}\(dequantize=True\) with a 16-bit dtype" if kind else "16-bit checkpoint"
        assert_refused(instead, tmp_path, model=path)


def test_an_fp8_checkpoint_that_is_unpacked_as_the_refusal_says(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import FineGrainedFP8Config

    path = Path(tiny.checkpoint(tmp_path / "model", "qwen2", torch.bfloat16))
    weights = load_file(path / "model.safetensors")
    for name in [n for n, w in weights.items() if "layers" in n and w.ndim == 2]:
        weights[name] = (weights[name] * 256).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.full([-(-n // 128) for n in weights[name].shape], 1 / 256)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))

    how = FineGrainedFP8Config(dequantize=True)
    args = {"model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = tiny.trainer(tmp_path, model=str(path), args=args, quantization_config=how, peft_config=tiny.lora())
    trainer.train()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(
        trainer.model.get_base_model().get_parameter(name.replace("up_proj.", "up_proj.base_layer.")),
        weights[name].to(torch.bfloat16) / 256,
    )
    differences = [h["sampling/sampling_logp_difference/mean"] for h in trainer.state.log_history if "loss" in h]
    assert len(differences) == 2
    assert max(differences) < 0.03
    close_all()


def test_unpacking_what_is_not_packed(tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    how = FineGrainedFP8Config(dequantize=True)
    path = tiny.checkpoint(tmp_path / "model")
    assert_refused("dequantize=True: .* is not quantised", tmp_path, model=path, quantization_config=how)


def test_models_that_are_quantised_already(tmp_path: Path) -> None:
    from bitsandbytes.nn import Int8Params
    from transformers import FineGrainedFP8Config

    declared, nameless, inside = tiny.model(), tiny.model(), tiny.model("llama")
    declared.config.quantization_config = FineGrainedFP8Config()
    assert_method_refused("fp8", tmp_path, "the model is quantised: FineGrainedFP8Config ", model=declared)
    nameless.is_quantized = True
    assert_method_refused("unknown", tmp_path, model=nameless)
    layer = inside.model.layers[1].mlp.up_proj
    for weight, says in (
        (torch.nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn)), "Parameter of float8_e4m3fn"),
        (torch.nn.Parameter(layer.weight.data.to(torch.int32), requires_grad=False), "Parameter of int32"),
        (Int8Params(layer.weight.data, requires_grad=False), "Int8Params of float32"),
    ):
        layer.weight = weight
        assert_refused(
            rf"layers\.1\.mlp\.up_proj\.weight is a {says}: .* only bitsandbytes' 4-bit"
            + (".*FP8 weights: " if "float8" in says else ""),
            tmp_path,
            model=inside,
        )


@pytest.mark.parametrize("quantization", ["fp8", "bitsandbytes"])
def test_a_quantisation_by_the_engine(quantization: str) -> None:
    from patchfastrl import engine

    with pytest.raises(
        UnsupportedError, match=rf"quantization='{quantization}': .* cannot quantise them on the fly"
    ) as refused:
        tiny.engine(tiny.model(), quantization=quantization)
    assert ("FP8 weights: " in str(refused.value)) == (quantization == "fp8")
    assert not engine.live


def test_four_bits_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BitsAndBytesConfig

    from patchfastrl import quantisation

    monkeypatch.setattr(quantisation, "installed", lambda name: None)
    four = BitsAndBytesConfig(load_in_4bit=True)
    path = declaring(four.to_dict(), tmp_path)
    for model, how in ((NOWHERE, {"quantization_config": four}), (path, {})):
        with pytest.raises(ImportError, match=r"\(bitsandbytes\) needs bitsandbytes: `pip install bitsandbytes`"):
            tiny.trainer(tmp_path, model=model, **how)
        with pytest.raises(ImportError, match=r"needs bitsandbytes: `pip install bitsandbytes`"):
            FastLanguageModel.from_pretrained(model, **how)


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
