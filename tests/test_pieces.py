"""An engine's norms and activations compiled piece by piece: vLLM's numbers, and which models it fits."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from packaging.version import Version

from patchfastrl.compat import cuda_pieces
from patchfastrl.compiled import for_any_rows

pytest.importorskip("vllm.ir", reason="a vLLM that compiles whole models only")

PROMPT = tiny.ids(24)
# norms, norms of sums, activation; norms of the heads of queries and of keys
PIECES = {"llama": 3, "qwen2": 3, "qwen3": 5}


@pytest.fixture
def engine_of() -> Iterator[Any]:
    from patchfastrl import engine

    def build(family: str) -> Any:
        return engine.build(tiny.model(family), None, max_model_len=128, max_num_seqs=8)

    yield build
    for llm in list(engine.live):
        llm.close("the test is over.")


def scores(llm: Any, prompts: int) -> torch.Tensor:
    """Log-probabilities of the tokens of prompts of different lengths, and of what follows."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    asked = [{"prompt_token_ids": PROMPT[: 24 - i]} for i in range(prompts)]
    found = []
    llm.drop_prefixes()
    for output in llm.generate(asked, sampling_params=params, use_tqdm=False):
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        found += [next(iter(entry.values())).logprob for entry in entries]
    return torch.tensor(found)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", PIECES)
def test_compiled_pieces_compute_what_vllm_computes(
    family: str, engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters
    from vllm.model_executor.layers import rotary_embedding

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # the other tests compile nothing
    llm = engine_of(family)
    before = [scores(llm, prompts) for prompts in (8, 1, 3)]
    model = llm.shared.engine_model
    forwards = [m._forward_method for m in cuda_pieces._custom(model)]
    cuda_pieces.compile_pieces(model, llm.llm_engine.vllm_config)
    assert all(m._forward_method is not f for m, f in zip(cuda_pieces._custom(model), forwards, strict=True))
    counters.clear()
    for prompts, wanted in zip((8, 1, 3), before, strict=True):
        torch.testing.assert_close(scores(llm, prompts), wanted, rtol=1e-4, atol=1e-4)
    made = counters["stats"]["unique_graphs"]
    assert made == PIECES[family], "one for each piece"
    rotation = next(m for m in cuda_pieces._custom(model) if cuda_pieces._kind(m) == "rotation")
    assert not any(known is rotation for known in rotary_embedding._ROPE_DICT.values()), "for the next model"
    llm.shared.parameters["model.norm.weight"].data.mul_(2.0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(scores(llm, 8), before[0], rtol=1e-2, atol=1e-2)
    assert counters["stats"]["unique_graphs"] == made


def compiled_by_vllm(monkeypatch: pytest.MonkeyPatch, model: Any, config: Any, support: str = "ALWAYS") -> Any:
    """What a GPU's engine is configured with, whose attention goes into graphs as far as `support` says."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    layers = config.compilation_config.static_forward_context
    builder = next(iter(layers.values())).get_attn_backend().get_builder_cls()
    monkeypatch.setattr(builder, "get_cudagraph_support", lambda *args: AttentionCGSupport[support])
    model.model.do_not_compile, model.model.cleanup = False, lambda: None
    return SimpleNamespace(
        cache_config=config.cache_config,
        speculative_config=None,
        compilation_config=SimpleNamespace(
            mode=CompilationMode.VLLM_COMPILE,
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            static_forward_context=layers,
            inductor_compile_config={},
        ),
    )


@pytest.mark.parametrize(
    ("family", "fits"), [("llama", True), ("qwen2", True), ("qwen3", False), ("gemma", False), ("qwen3-moe", False)]
)
def test_which_models_it_fits(family: str, fits: bool, engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CompilationMode, CUDAGraphMode

    llm = engine_of(family)
    model = llm.shared.engine_model
    config = compiled_by_vllm(monkeypatch, model, llm.llm_engine.vllm_config)
    chosen = config.compilation_config
    forwards = [m._forward_method for m in cuda_pieces._custom(model)]
    assert cuda_pieces.use(model, config) is fits
    assert (chosen.mode, chosen.cudagraph_mode) == (
        (CompilationMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY)
        if fits
        else (CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE)
    )
    assert model.model.do_not_compile is fits
    assert fits or forwards == [m._forward_method for m in cuda_pieces._custom(model)]


def test_where_vllm_compiles_as_before(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs
    from vllm.config import CompilationMode, CUDAGraphMode, set_current_vllm_config
    from vllm.model_executor.layers import activation

    llm = engine_of("llama")
    model, real = llm.shared.engine_model, llm.llm_engine.vllm_config
    config = compiled_by_vllm(monkeypatch, model, real, support="NEVER")
    assert not cuda_pieces.use(model, config), "its attention goes into no graph"
    for name, value in (("mode", CompilationMode.NONE), ("cudagraph_mode", CUDAGraphMode.PIECEWISE)):
        config = compiled_by_vllm(monkeypatch, model, real)
        setattr(config.compilation_config, name, value)
        assert not cuda_pieces.use(model, config), name
    config = compiled_by_vllm(monkeypatch, model, real)
    config.speculative_config = object()
    assert not cuda_pieces.use(model, config), "tokens that another model proposes"
    config = compiled_by_vllm(monkeypatch, model, real)
    with monkeypatch.context() as patched:
        patched.setitem(vars(envs), "VLLM_BATCH_INVARIANT", True)
        assert not cuda_pieces.use(model, config), "the same bits in every batch"
    with monkeypatch.context() as patched:
        patched.setattr(model.model.norm, "pass_weight", False)
        assert not cuda_pieces.use(model, config), "a norm of another kind"
    with monkeypatch.context() as patched:
        with set_current_vllm_config(real):
            patched.setitem(model.model._modules, "another", activation.GeluAndMul())
        assert not cuda_pieces.use(model, config), "something else that vLLM would compile"
    attention = model.model.layers[1].self_attn
    with monkeypatch.context() as patched:
        patched.setattr(attention, "qk_norm", True, raising=False)
        assert not cuda_pieces.use(model, config), "vLLM would compile the norms of heads with the rotation"
    with monkeypatch.context() as patched:
        patched.setitem(attention._modules, "rotary_emb", torch.nn.Identity())
        assert not cuda_pieces.use(model, config), "another rotation"
    config = compiled_by_vllm(monkeypatch, model, real)
    with monkeypatch.context() as patched:
        patched.setattr(cuda_pieces, "installed", lambda name: Version("0.25.1"))
        assert not cuda_pieces.use(model, config)
    assert config.compilation_config.mode == CompilationMode.VLLM_COMPILE
    assert cuda_pieces.use(model, config)


def test_rows_of_each_shape_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    asked: list[Any] = []
    compile_ = torch.compile

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(dict(kwargs["options"]))
        return compile_(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    options = {"size_asserts": False}
    counters.clear()
    for _ in range(2):  # an engine, and the next one
        double = for_any_rows(lambda x, factor: x * factor + x.shape[1], 1, options)
        for width in (4, 6, 8):
            for rows in (5, 1, 3):
                x = torch.randn(rows, width)
                torch.testing.assert_close(double(x, 2.0), x * 2 + width)
        assert torch.equal(double(torch.ones(2, 4), 3.0), torch.full((2, 4), 7.0)), "another number"
        torch.use_deterministic_algorithms(True)  # a setting of the process
        try:
            double(torch.ones(3, 4), 2.0)
        finally:
            torch.use_deterministic_algorithms(False)
    assert [o["size_asserts"] for o in asked] == [False] * 8
    assert options == {"size_asserts": False}
    assert counters["stats"]["unique_graphs"] == 8


def test_the_next_engines_rows_are_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    variables: list[int] = []
    compile_ = torch.compile

    def backend(module: Any, inputs: list[Any]) -> Any:
        variables.append(sum(isinstance(i, torch.SymInt) for i in inputs))
        return module.forward

    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph, options: compile_(f, fullgraph=fullgraph, backend=backend)
    )

    def function(x: torch.Tensor) -> torch.Tensor:
        return x[..., : x.shape[-1] // 2] * 2

    for width in (256, 512, 384):
        assert for_any_rows(function, 1, {})(torch.ones(5, width)).shape == (5, width // 2)
    assert variables == [1, 1, 1], "the number of rows"


class AskedError(Exception):
    """An engine on a CPU need not be compiled to find out."""


def test_every_compiled_engine_is_asked(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchfastrl import engine

    def use(*args: Any) -> bool:
        raise AskedError(args)

    monkeypatch.setattr(cuda_pieces, "use", use)
    assert engine_of("llama"), "an eager one is not"
    settings = {"max_model_len": 128, "max_num_seqs": 8, "enforce_eager": False}
    with pytest.raises(AskedError) as raised:
        engine.build(tiny.model("llama"), None, **settings)
    model, config = raised.value.args[0]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert config.compilation_config is not None
    with pytest.raises(RuntimeError, match="torch.compile"):  # is turned off in tests: vLLM does what it always does
        engine.build(tiny.model("llama"), None, **settings, compilation_config={})


@pytest.mark.timeout(300)
@pytest.mark.parametrize("slot", [False, True])
def test_the_pieces_of_a_layer_are_compiled_when_the_model_is_loaded(
    slot: bool, engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an engine is built, and once: vLLM's first run, of other rows, finds them."""
    from torch._dynamo.utils import counters

    from patchfastrl import engine

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    made: list[int] = []

    def use(model: Any, config: Any) -> bool:
        counters.clear()
        cuda_pieces.compile_pieces(model, config)
        cuda_pieces._run_once(model)
        made.append(counters["stats"]["unique_graphs"])
        with torch.inference_mode():
            layer = model.model.layers[1]
            for rows in (1, 5):
                x, residual = torch.randn(2, rows, len(layer.input_layernorm.weight)).bfloat16()
                layer.mlp(layer.input_layernorm(x, residual)[0])
                model.model.layers[0].input_layernorm(x)
        made.append(counters["stats"]["unique_graphs"])
        raise AskedError

    monkeypatch.setattr(cuda_pieces, "use", use)
    model = tiny.model("llama", torch.bfloat16)
    settings = {"max_model_len": 128, "max_num_seqs": 8, "enforce_eager": False}
    with pytest.raises(AskedError):
        engine.build(tiny.adapted(model) if slot else model, None, **settings)
    assert made == [3, 3], "norm, norm of a sum, activation"
