"""One storage for both sides: for every family, after every way of writing, and refused by name where it cannot be."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from patchfastrl.compat import sampler_warmup
from patchfastrl.errors import GuardError, PatchFastRLError, SharingError, UnsupportedError
from patchfastrl.sharing import base_parameters
from patchfastrl.trace import storage_key

pytestmark = pytest.mark.timeout(180)

PROMPT = tiny.ids(24)


@pytest.fixture(autouse=True, scope="module")
def _no_engine_left() -> Iterator[None]:
    yield
    from patchfastrl import engine

    gc.collect()
    for llm in list(engine.live):
        llm.close("the tests are over.")


def assert_agree(llm: Any, model: Any, tokens: int = 12, tolerance: float = 1e-3) -> None:
    """Engine and model: the same greedy tokens, and log-probabilities that differ by float32 rounding at most."""
    distance = (tiny.engine_logprobs(llm, PROMPT) - tiny.logprobs(model, PROMPT)).abs().max()
    assert distance < tolerance
    assert tiny.engine_greedy(llm, PROMPT, tokens) == tiny.greedy(model, PROMPT, tokens)


def assert_in_engine(llm: Any, model: Any) -> None:
    """Every base parameter of the model lies in the storage of a parameter of the engine's."""
    storages = {storage_key(p): p for p in llm.shared.engine_model.parameters()}
    for name, parameter in base_parameters(model).items():
        assert storage_key(parameter) in storages, name
        assert not parameter.is_inference(), name
        home = storages[storage_key(parameter)]
        first, last = home.data_ptr(), home.data_ptr() + home.untyped_storage().nbytes()
        assert first <= parameter.data_ptr() < last, name
        assert parameter.dtype == home.dtype, name


# Every family, bare and with an adapter -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=itertools.product(tiny.FAMILIES, ("bare", "lora")), ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """An engine and its model, never saved, float32."""
    family, kind = request.param
    model = tiny.model(family)
    if kind == "lora":
        # The experts of a mixture are no linear layers: "all-linear" aims at them all the same, and is refused.
        model = tiny.adapted(model, **({"target_modules": ["q_proj", "v_proj"]} if "moe" in family else {}))
    return tiny.engine(model), model


def test_every_base_parameter_lies_in_the_engine(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    assert llm.copies is None
    parameters = base_parameters(model)
    assert parameters.keys() == llm.shared.plan.views.keys()  # what is not shared: nothing
    assert_in_engine(llm, model)
    of_base = {id(p) for n, p in model.named_parameters() if "lora_" not in n}
    assert {id(p) for p in parameters.values()} == of_base
    assert llm.shared.bytes == sum(
        p.untyped_storage().nbytes() for n, p in llm.shared.engine_model.named_parameters() if "lora" not in n
    )
    wrapped = [n for n, _ in llm.shared.engine_model.named_parameters() if n.endswith("base_layer.weight")]
    assert bool(wrapped) == (len(of_base) != len(list(model.parameters())))


def test_a_mixture_after_a_dense_model_has_slots_in_its_dense_layers() -> None:
    tiny.engine(tiny.model("llama"))
    model = tiny.adapted(tiny.model("qwen3-moe"), target_modules=["q_proj", "v_proj"])
    assert base_parameters(model)["model.layers.0.mlp.gate_proj.weight"].shape == (96, 64)
    llm = tiny.engine(model)
    assert "model.layers.0.mlp.gate_up_proj.base_layer.weight" in dict(llm.shared.engine_model.named_parameters())
    assert_agree(llm, model)


def test_the_padded_vocabulary_stays_padding(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    embedding = model.get_input_embeddings().weight
    name, view = llm.shared.plan.views[next(n for n, p in base_parameters(model).items() if p is embedding)]
    home = llm.shared.homes[name]
    assert view.size == embedding.shape == (101, 64)
    assert home.shape == (128, 64)
    assert not home[101:].any()
    assert embedding.data_ptr() == home.data_ptr()


def test_completions_agree_before_training(pair: tuple[Any, Any]) -> None:
    assert_agree(*pair, tolerance=1e-4)


@pytest.mark.parametrize("how", ["in place", ".data"])
def test_completions_agree_after_writing_into_each_parameter(pair: tuple[Any, Any], how: str) -> None:
    llm, model = pair
    generator = torch.Generator().manual_seed(0)
    before = tiny.engine_logprobs(llm, PROMPT)
    for name, parameter in base_parameters(model).items():
        change = torch.randn(parameter.shape, generator=generator) * 0.3
        if how == "in place":
            with torch.no_grad():
                parameter.add_(change)
        else:
            parameter.data[:] = parameter.data + change
        after = tiny.engine_logprobs(llm, PROMPT)
        assert (after - before).abs().max() > 1e-2, f"the engine did not notice the change of {name}"
        assert (after - tiny.logprobs(model, PROMPT)).abs().max() < 1e-3, name
        assert tiny.engine_greedy(llm, PROMPT, 4) == tiny.greedy(model, PROMPT, 4), name
        before = after
    assert_in_engine(llm, model)


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_completions_agree_after_adamw_on_all_parameters(pair: tuple[Any, Any], kind: str) -> None:
    llm, model = pair
    trained = list(base_parameters(model).values())
    frozen = [p.requires_grad for p in trained]
    before = [p.detach().clone() for p in trained]
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, **{kind: True})
    ids = torch.tensor([tiny.ids(24, start=s) for s in (1, 5, 9)])
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter, grad in zip(trained, frozen, strict=True):
        parameter.requires_grad_(grad)
    assert not any(torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    llm.publish()
    assert_agree(llm, model)
    assert_in_engine(llm, model)


def test_what_is_saved_is_what_is_trained(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """Views of fused tensors save like any other parameter, and load again without the engine."""
    _, model = pair
    base = base_parameters(model)
    if len(base) != len(list(model.parameters())):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2**20
        return
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, base[name]), name


# Writes that a sum does not show, and the prefix cache ----------------------------------------------------------------

WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda w: w + 0.1,
    "negate": lambda w: -w,
    "reverse rows": lambda w: w.flip(0),
    "reverse columns": lambda w: w.flip(1),
    "roll": lambda w: w.roll(1, 0),
    "exchange two elements": lambda w: w.index_put((torch.tensor([3, 4]), torch.tensor([7, 9])), w[[4, 3], [9, 7]]),
    "one bit": lambda w: (w.view(torch.int32) ^ (torch.arange(w.numel()).view(w.shape) == 1234)).view(torch.float32),
}


def test_prefixes_of_older_weights_are_never_hit() -> None:
    """A prompt longer than a block is cached while nothing changes, and computed anew after any kind of write."""
    model = tiny.model("qwen2")
    llm = tiny.engine(model)
    prompt = tiny.ids(200)
    weight = model.model.layers[0].self_attn.v_proj.weight
    for name, write in WRITES.items():
        tiny.cached_tokens(llm, prompt)
        assert tiny.cached_tokens(llm, prompt) >= 128, "the prefix cache does not work at all"
        checksum = llm.shared.checksum()
        assert llm.shared.checksum() == checksum
        weight.data[:] = write(weight.data)
        assert llm.shared.checksum() != checksum, name
        assert tiny.cached_tokens(llm, prompt) == 0, name
    assert tiny.engine_greedy(llm, prompt) == tiny.greedy(model, prompt)


# Whose values --------------------------------------------------------------------------------------------------------


def test_the_live_models_values_win_over_its_files(tmp_path: Path) -> None:
    """A model changed after loading, whose checkpoint was overwritten by another one."""
    from transformers import AutoModelForCausalLM

    path = tiny.checkpoint(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
        model.lm_head.weight.copy_(torch.randn(101, 64))
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    tiny.model("llama", seed=5).save_pretrained(path)
    on_disk = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    llm = tiny.engine(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]), name
    assert_agree(llm, model)
    assert tiny.engine_greedy(llm, PROMPT) != tiny.greedy(on_disk, PROMPT)


def test_without_files_and_without_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model made from a configuration. The engine reads no weights: it cannot even open a safetensors file."""
    import safetensors

    from patchfastrl import engine

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the engine reads weights from disk")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    model = tiny.model("mistral", seed=3)
    llm = engine.build(model, None, max_num_seqs=4, gpu_memory_utilization=0.1, logprobs_mode="processed_logprobs")
    assert_agree(llm, model)


def test_vllm_looks_at_the_model_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_for_vllm: Callable[[str, str], None]
) -> None:
    """A child of its own would import everything again."""
    from vllm.model_executor.models import registry

    def child(inspect: Any) -> Any:
        raise AssertionError("vLLM started a child process")

    monkeypatch.setattr(registry, "_run_in_subprocess", child)
    set_for_vllm("VLLM_CACHE_ROOT", str(tmp_path))  # where it would remember what it saw in earlier runs
    registry._try_inspect_model_cls.cache_clear()
    model = tiny.model("mistral", seed=3)
    assert_agree(tiny.engine(model), model)
    assert list(tmp_path.rglob("*.json"))  # it has looked
    assert registry._run_in_subprocess is child


def test_the_sampler_is_warmed_up_with_what_trainers_use() -> None:
    from vllm import SamplingParams

    everything = SamplingParams.for_sampler_warmup()
    with sampler_warmup.of_a_trainer():
        found = SamplingParams.for_sampler_warmup()
    assert (found.logprobs, found.prompt_logprobs, found.temperature) == (0, 0, 0.9)
    assert everything.logit_bias
    assert not found.logit_bias
    assert SamplingParams.for_sampler_warmup() == everything


def test_tied_embeddings_stay_tied() -> None:
    model = tiny.model("qwen2-tied")
    llm = tiny.engine(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    engine_model = llm.shared.engine_model
    assert storage_key(engine_model.lm_head.weight) == storage_key(engine_model.model.embed_tokens.weight)
    assert storage_key(engine_model.lm_head.weight) == storage_key(model.lm_head.weight)
    assert "lm_head.weight" not in llm.shared.plan.views
    model.tie_weights()
    assert_agree(llm, model)


def test_transposed_weights_are_shared() -> None:
    """GPT-2 keeps its linear layers the other way round; its parameters become transposed views."""
    import transformers

    config = transformers.GPT2Config(vocab_size=101, n_embd=64, n_layer=2, n_head=2, n_positions=256)
    config.update({"bos_token_id": 0, "eos_token_id": 1})
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    llm = tiny.engine(model, max_model_len=128)
    weight = model.transformer.h[0].attn.c_attn.weight
    assert weight.shape == (64, 192)
    assert weight.stride() == (1, 64)
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    assert_in_engine(llm, model)
    assert_agree(llm, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()
    assert_agree(llm, model)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "qwen3-moe"])
def test_bfloat16(family: str) -> None:
    model = tiny.model(family, torch.bfloat16)
    llm = tiny.engine(model)
    assert llm.copies is None
    assert_in_engine(llm, model)
    assert {p.dtype for p in llm.shared.engine_model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours, theirs = tiny.engine_logprobs(llm, PROMPT), tiny.logprobs(model, PROMPT)
    assert (ours - theirs).abs().mean() < 0.1
    assert theirs.abs().mean() > 1  # so that the line above says something


def test_a_second_engine_takes_over_the_same_model() -> None:
    model = tiny.model("llama")
    first = tiny.engine(model)
    second = tiny.engine(model)
    assert_in_engine(second, model)
    assert_agree(second, model)
    with pytest.raises(PatchFastRLError, match="closed"):
        tiny.engine_greedy(first, PROMPT)


# Refused by name, and nothing has changed ----------------------------------------------------------------------------


@contextlib.contextmanager
def refused(
    model: nn.Module, match: str, *, same_storage: bool = True, kind: type = PatchFastRLError
) -> Iterator[None]:
    """The block raises; afterwards the model has the values (and the storage) that it had, and computes as before."""
    before = {n: (storage_key(p), p.detach().clone()) for n, p in model.named_parameters() if not p.is_meta}
    kinds = {(p.device, p.dtype) for p in model.parameters()}
    expected = tiny.logprobs(model, PROMPT) if len(kinds) == 1 and not next(model.parameters()).is_meta else None
    with pytest.raises(kind, match=match):
        yield
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            assert torch.equal(parameter, before[name][1]), name
            assert not same_storage or storage_key(parameter) == before[name][0], name
    if expected is not None:
        assert torch.equal(tiny.logprobs(model, PROMPT), expected)
    from patchfastrl import engine

    assert not any(llm.shared.model is model for llm in list(engine.live))


_SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_DEEPSEEK = {
    **_SIZES,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize(
    ("config", "settings", "match"),
    [
        # Its fused qkv is stored head by head, vLLM's is not.
        ("BloomConfig", {**_SIZES, "n_layer": 2, "n_head": 2}, r"BloomForCausalLM.*reshapes \S*query_key_value"),
        # vLLM would run transformers' own class for it.
        ("OlmoConfig", _SIZES, "no OlmoForCausalLM of its own"),
        # vLLM does not know it at all.
        ("XGLMConfig", {**_SIZES, "d_model": 64, "num_layers": 2, "attention_heads": 2}, "XGLMForCausalLM"),
        # Computes with products of weights made while loading.
        ("DeepseekV3Config", _DEEPSEEK, "multi-head latent attention"),
        # No attention, no KV cache.
        ("MambaConfig", {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2}, "MambaConfig"),
    ],
    ids=["bloom", "olmo", "xglm", "deepseek-mla", "mamba"],
)
def test_architectures_that_cannot_be_shared(config: str, settings: dict, match: str) -> None:
    import transformers

    torch.manual_seed(0)
    settings = {k: v for k, v in settings.items() if not (config == "BloomConfig" and k == "max_position_embeddings")}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings))
    with refused(model, match):
        tiny.engine(model, max_model_len=128)


def test_a_parameter_of_the_engine_that_is_none_of_the_model(set_for_vllm: Callable[[str, str], None]) -> None:
    """The bias is a buffer in transformers and a parameter in vLLM."""
    import transformers

    set_for_vllm("VLLM_MLA_DISABLE", "1")
    config = transformers.DeepseekV3Config(**_DEEPSEEK, topk_method="noaux_tc")
    model = transformers.AutoModelForCausalLM.from_config(config)
    with refused(model, "e_score_correction_bias have no source"):
        tiny.engine(model, max_model_len=128)


def _extra_parameter(model: Any) -> None:
    model.model.layers[0].mlp.extra = nn.Parameter(torch.randn(64))


def _value_head(model: Any) -> None:
    model.score = nn.Linear(64, 1, bias=False)


def _mixed_dtypes(model: Any) -> None:
    model.bfloat16()
    for layer in model.model.layers:
        layer.input_layernorm.float()


def _untied(model: Any) -> None:
    model.config.tie_word_embeddings = True


def _a_bias_less(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.bias = None


def _a_layer_less(model: Any) -> None:
    del model.model.layers[1]


def _a_layer_more(model: Any) -> None:
    model.config.layer_types = model.config.layer_types[:1]
    model.config.num_hidden_layers = 1


def _other_vocabulary(model: Any) -> None:
    model.config.vocab_size = 80


def _one_on_meta(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.to("meta")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_extra_parameter, r"Qwen2ForCausalLM.*model\.layers\.0\.mlp\.extra"),
        (_value_head, r"Qwen2ForCausalLM.*score\.weight"),
        (_mixed_dtypes, r"input_layernorm\.weight is torch\.float32 in the trainer and torch\.bfloat16 in the engine"),
        (_untied, r"does not load lm_head\.weight"),
        (
            _a_bias_less,
            r"32 of 128 elements of the engine's model\.layers\.1\.self_attn\.qkv_proj\.bias have no source",
        ),
        (_a_layer_less, r"elements of the engine's model\.layers\.1\."),
        (_a_layer_more, r"model\.layers\.1\."),
        (_other_vocabulary, r"(embed_tokens|lm_head)\.weight"),
        (_one_on_meta, r"on cpu, meta and vLLM runs on cpu"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_changed_models_that_cannot_be_shared(change: Callable[[Any], None], match: str) -> None:
    model = tiny.model("qwen2")
    change(model)
    if change in (_a_layer_less, _other_vocabulary):
        model.config.use_cache = False
    with refused(model, match):
        tiny.engine(model)


def test_another_device_is_refused() -> None:
    model = tiny.model("qwen2").to("meta")
    with refused(model, "on meta and vLLM runs on cpu", kind=UnsupportedError):
        tiny.engine(model)


def test_a_gpu_that_is_not_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchfastrl import engine

    model = tiny.model("qwen2")
    second = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(engine, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(model, "parameters", lambda: iter([second]))
    with pytest.raises(UnsupportedError, match=r"on cuda:1.*CUDA_VISIBLE_DEVICES"):
        engine.check_model(model, placed=True)


# Engines that compute with copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shim"), [("llama", "cpu_linear"), ("qwen2-tied", "cpu_linear"), ("qwen3-moe", "cpu_experts")]
)
def test_repacked_weights_are_noticed(monkeypatch: pytest.MonkeyPatch, family: str, shim: str) -> None:
    """vLLM's own CPU behaviour, without our shim against it."""
    from patchfastrl import compat

    module = getattr(compat, shim)
    monkeypatch.setattr(module, "plain_weights", contextlib.nullcontext)
    model = tiny.model(family)
    with refused(model, "engine has replaced|do not compute the same function", same_storage=False, kind=SharingError):
        tiny.engine(model)
    monkeypatch.undo()
    assert_agree(tiny.engine(model), model)


@contextlib.contextmanager
def hidden_copy(llm: Any, destination: str) -> Iterator[nn.Parameter]:
    """While the engine computes, `destination` is a private copy; whenever somebody looks, it is the shared tensor.

    Yields the copy.
    """
    path, _, leaf = destination.rpartition(".")
    model = llm.shared.engine_model
    module = model.get_submodule(path)
    private = nn.Parameter(getattr(module, leaf).detach().clone(), requires_grad=False)

    def with_private(call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            shared, module._parameters[leaf] = module._parameters[leaf], private
            try:
                return call(*args, **kwargs)
            finally:
                module._parameters[leaf] = shared

        return run

    users = [(model.get_submodule(path.removesuffix(".routed_experts")), "forward"), (model, "compute_logits")]
    for owner, name in users:
        setattr(owner, name, with_private(getattr(owner, name)))
    try:
        yield private
    finally:
        for owner, name in users:
            delattr(owner, name)


def _computes_with(llm: Any, private: nn.Parameter) -> bool:
    with torch.no_grad():
        before, values = tiny.engine_logprobs(llm, PROMPT), private.clone()
        private.neg_().sub_(0.5)  # a mere shift would leave a router's choice as it is
        changed = bool((tiny.engine_logprobs(llm, PROMPT) - before).abs().max() > 1e-6)
        private.copy_(values)
        llm.drop_prefixes()
    return changed


@pytest.mark.parametrize("family", ["llama", "qwen2-tied", "gemma2", "qwen3-moe"])
def test_a_hidden_copy_of_any_weight_fails_the_audit(family: str) -> None:
    """Also of biases and norms that are all zero in a fresh model."""
    from patchfastrl.audit import audit

    model = tiny.model(family)
    llm = tiny.engine(model)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    audit(llm)
    for destination in llm.shared.homes:
        with hidden_copy(llm, destination) as private:
            if not _computes_with(llm, private):
                assert (
                    ".experts." in destination
                )  # vLLM 0.26 keeps views of each expert: there is no way to hide a copy
                continue
            with pytest.raises(SharingError, match="do not compute the same function"):
                audit(llm)
        assert all(torch.equal(p, values[n]) for n, p in model.named_parameters()), destination
    audit(llm)
    assert_agree(llm, model)


def test_a_hidden_copy_fails_the_audit_in_bfloat16_too() -> None:
    """At the scale of a freshly initialised model, where log-probabilities are all alike."""
    from patchfastrl.audit import audit

    model = tiny.model("llama", torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1)
    llm = tiny.engine(model)
    for destination in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.qkv_proj.weight"):
        with hidden_copy(llm, destination), pytest.raises(SharingError, match="do not compute the same function"):
            audit(llm)
    audit(llm)


# Torn apart afterwards -----------------------------------------------------------------------------------------------


def _data(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.clone()


def _shifted_view(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = model.model.layers[1].mlp.gate_proj.weight.data


def _cast(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.double()


def _parameter(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def _module(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = copy.deepcopy(model.model.layers[1].mlp.up_proj)


def _assigned(model: Any) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" in k}
    model.load_state_dict(state, strict=False, assign=True)


def _swapped(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))


@pytest.fixture(scope="module")
def sharing() -> tuple[Any, Any]:
    model = tiny.model("qwen2")
    return tiny.engine(model), model


@pytest.mark.parametrize(
    "tear",
    [_data, _shifted_view, _cast, _parameter, _module, _assigned, _swapped],
    ids=lambda tear: tear.__name__.strip("_"),
)
def test_a_parameter_that_leaves_the_storage_fails_the_next_batch(
    sharing: tuple[Any, Any], tear: Callable[[Any], None]
) -> None:
    llm, model = sharing
    mlp = model.model.layers[1].mlp
    module, parameter, view = mlp.up_proj, mlp.up_proj.weight, mlp.up_proj.weight.data
    assert_agree(llm, model)
    tear(model)
    for _ in range(2):
        with pytest.raises(SharingError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of the model in training"):
            tiny.engine_greedy(llm, PROMPT)
    mlp.up_proj, module.weight, parameter.data = module, parameter, view
    assert_agree(llm, model)


def test_new_weights_fail_the_next_batch(sharing: tuple[Any, Any]) -> None:
    llm, model = sharing
    model.model.layers[0].extra = nn.Linear(4, 4)
    with pytest.raises(SharingError, match=r"new base weights \(model\.layers\.0\.extra\.weight"):
        tiny.engine_greedy(llm, PROMPT)
    del model.model.layers[0].extra
    assert_agree(llm, model)


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.model.to("meta")],
    ids=["bfloat16", "half", "meta"],
)
def test_moving_and_casting_are_stopped(sharing: tuple[Any, Any], move: Callable[[Any], Any]) -> None:
    llm, model = sharing
    with pytest.raises(GuardError, match="shared with the vLLM engine"):
        move(model)
    assert_in_engine(llm, model)
    assert model.to("cpu").float() is model  # what changes nothing is allowed
    assert_agree(llm, model)


def test_a_torn_model_gets_a_new_engine() -> None:
    """What the messages say to do."""
    model = tiny.model("llama")
    llm = tiny.engine(model)
    _data(model)
    with pytest.raises(SharingError, match="Build a new trainer"):
        tiny.engine_greedy(llm, PROMPT)
    assert_agree(tiny.engine(model), model)
