"""The adapter in training, served from the slot: PEFT's own function, always the current one, never a wrong one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from patchfastrl import adapters
from patchfastrl.errors import AdapterError, UnsupportedError

pytestmark = pytest.mark.timeout(180)

PROMPT = tiny.ids(24)


@pytest.fixture(autouse=True)
def _no_engine_left() -> Iterator[None]:
    yield
    from patchfastrl import engine

    gc.collect()
    for llm in list(engine.live):
        llm.close("the test is over.")


def assert_served(llm: Any, model: Any, tolerance: float = 1e-4) -> None:
    """Engine and PEFT agree on log-probabilities and greedy tokens; the adapter matters; None serves the base."""
    theirs = tiny.logprobs(model, PROMPT)
    with model.disable_adapter():
        base, base_greedy = tiny.logprobs(model, PROMPT), tiny.greedy(model, PROMPT)
    assert (theirs - base).abs().mean() > 0.1
    assert (tiny.engine_logprobs(llm, PROMPT) - theirs).abs().max() < tolerance
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)
    assert (tiny.engine_logprobs(llm, PROMPT, lora_request=None) - base).abs().max() < tolerance
    assert tiny.engine_greedy(llm, PROMPT, lora_request=None) == base_greedy
    assert tiny.engine_greedy(llm, PROMPT) == tiny.greedy(model, PROMPT)  # and the adapter again


# What PEFT computes ---------------------------------------------------------------------------------------------------

SETTINGS = {
    "r=1": {"r": 1},
    "r=4": {"r": 4},
    "r=6": {"r": 6},
    "r=8": {"r": 8},
    "r=64": {"r": 64, "lora_alpha": 128},
    "alpha": {"lora_alpha": 3},
    "rslora": {"r": 16, "use_rslora": True},
    "q": {"target_modules": ["q_proj"]},
    "q,v": {"target_modules": ["q_proj", "v_proj"]},
    "k,up,down": {"target_modules": ["k_proj", "up_proj", "down_proj"]},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "one-layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "regex": {"target_modules": r".*layers\.0\..*\.(v_proj|gate_proj)"},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 16},
        "alpha_pattern": {"q_proj": 64, "o_proj": 1},
    },
    "dropout": {"lora_dropout": 0.5},
}


class TestWhatPeftComputes:
    """One engine with a slot of rank 64, one adapter after the other made active on its model."""

    @pytest.fixture(scope="class")
    def served(self) -> Iterator[tuple[Any, Any]]:
        model = tiny.adapted(tiny.model("llama"), trained=False)
        llm = tiny.engine(model, max_lora_rank=64)
        yield llm, model
        llm.close("the tests are over.")

    @pytest.fixture(autouse=True)
    def _no_engine_left(self) -> None:
        """The engine outlives a test of this class."""

    @pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
    def test_setting(self, served: tuple[Any, Any], settings: dict[str, Any]) -> None:
        llm, model = served
        model.add_adapter("other", tiny.lora(**settings))
        model.set_adapter("other")
        tiny.scramble(model, "other")
        try:
            assert llm.publish()
            assert_served(llm, model)
        finally:
            model.set_adapter("default")
            model.delete_adapter("other")

    def test_a_deleted_adapter_made_again_under_its_name(self, served: tuple[Any, Any]) -> None:
        llm, model = served
        for seed, settings in enumerate(({"r": 8}, {"r": 2, "lora_alpha": 3}, {"target_modules": ["q_proj"]})):
            model.add_adapter("again", tiny.lora(**settings))
            model.set_adapter("again")
            tiny.scramble(model, "again", seed)
            llm.publish()
            assert_served(llm, model)
            model.delete_adapter("again")
            model.add_adapter("again", tiny.lora(**settings))
            model.set_adapter("again")
            tiny.scramble(model, "again", seed + 10)
            with pytest.raises(AdapterError, match="another adapter|not the one in training"):
                tiny.engine_greedy(llm, PROMPT)
            llm.publish()
            assert_served(llm, model)
            model.set_adapter("default")
            model.delete_adapter("again")

    def test_an_adapter_rescaled_in_place(self, served: tuple[Any, Any]) -> None:
        from peft.helpers import rescale_adapter_scale

        llm, model = served
        tiny.scramble(model)
        llm.publish()
        with rescale_adapter_scale(model, 0.25):
            with pytest.raises(AdapterError, match="lora_B of .* differs"):
                tiny.engine_greedy(llm, PROMPT)
            llm.publish()
            assert_served(llm, model)
        llm.publish()
        assert_served(llm, model)


@pytest.mark.parametrize(
    "settings", [{"r": 1}, {"r": 6}, {"r": 8, "init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_a_slot_of_its_own(settings: dict[str, Any]) -> None:
    """The rank comes from the model; initialisations that change the base are in the storage that both sides share."""
    model = tiny.adapted(tiny.model("llama"), trained="init_lora_weights" not in settings, **settings)
    assert_served(tiny.engine(model), model)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "phi3"])
def test_all_linear_in_other_families(family: str) -> None:
    """Biases, tied embeddings, and a checkpoint whose query, key and value are one matrix."""
    model = tiny.adapted(tiny.model(family))
    assert_served(tiny.engine(model), model)


def test_attention_of_a_mixture_of_experts() -> None:
    model = tiny.adapted(tiny.model("qwen3-moe"), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert_served(tiny.engine(model), model)


@pytest.mark.parametrize("targets", ["all-linear", ["gate"], ["gate_proj", "up_proj", "down_proj"]], ids=str)
def test_experts_and_router_are_served_right_or_refused(targets: Any) -> None:
    """What is an adapter on an expert differs between releases of transformers and PEFT."""
    from peft import get_peft_model

    try:
        model = get_peft_model(tiny.model("qwen3-moe"), tiny.lora(target_modules=targets))
    except (ValueError, NotImplementedError):
        pytest.skip("this PEFT refuses it itself")
    tiny.scramble(model)
    try:
        llm = tiny.engine(model)
    except UnsupportedError as error:
        assert "experts" in str(error) or "gate" in str(error) or "target_parameters" in str(error)
    else:
        assert_served(llm, model)


def test_float32_adapter_on_a_bfloat16_base() -> None:
    model = tiny.adapted(tiny.model("llama", torch.bfloat16))
    kinds = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert kinds == {torch.float32}
    llm = tiny.engine(model)
    with model.disable_adapter():
        base = tiny.logprobs(model, PROMPT)
    theirs, ours = tiny.logprobs(model, PROMPT), tiny.engine_logprobs(llm, PROMPT)
    # What bfloat16 itself costs on this model: the engine's base against the trainer's.
    noise = (tiny.engine_logprobs(llm, PROMPT, lora_request=None) - base).abs().mean()
    assert (theirs - base).abs().mean() > 10 * noise
    assert (ours - theirs).abs().mean() < 3 * noise + 0.02


# Refused by name ------------------------------------------------------------------------------------------------------


def _config(name: str) -> Any:
    import peft

    targets = ["q_proj"]
    match name:
        case "dora":
            return tiny.lora(use_dora=True)
        case "bias-all":
            return tiny.lora(bias="all")
        case "bias-lora-only":
            return tiny.lora(bias="lora_only")
        case "lora-bias":
            return tiny.lora(lora_bias=True, target_modules=targets)
        case "modules-to-save":
            return tiny.lora(modules_to_save=["lm_head"])
        case "target-parameters":
            return tiny.lora(target_parameters=["mlp.experts.gate_up_proj"])
        case "token-indices":
            return tiny.lora(trainable_token_indices=[1, 2])
        case "adalora":
            return peft.AdaLoraConfig(target_modules=targets, total_step=10, task_type="CAUSAL_LM")
        case "ia3":
            return peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        case "prefix-tuning":
            return peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        case "prompt-tuning":
            return peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        case "loha":
            return peft.LoHaConfig(target_modules=targets)
        case "oft":
            return peft.OFTConfig(target_modules=targets, oft_block_size=4)
        case "vera":
            return peft.VeraConfig(target_modules=targets)
    raise ValueError(name)


REFUSED = {
    "dora": "use_dora=True",
    "bias-all": "bias='all'",
    "bias-lora-only": "bias='lora_only'",
    "lora-bias": "lora_bias=True",
    "modules-to-save": r"modules_to_save=\['lm_head'\]",
    "target-parameters": "target_parameters=.*experts",
    "token-indices": "trainable_token_indices",
    "adalora": "AdaLora",
    "ia3": "IA3",
    "prefix-tuning": "PrefixTuning",
    "prompt-tuning": "PromptTuning",
    "loha": "LoHa",
    "oft": "OFT",
    "vera": "Vera",
}


@pytest.mark.parametrize(("name", "says"), REFUSED.items(), ids=REFUSED.keys())
def test_refused_from_the_configuration(name: str, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        adapters.refuse_unservable(_config(name))


@pytest.mark.parametrize(
    "name", ["dora", "bias-all", "lora-bias", "modules-to-save", "adalora", "ia3", "prompt-tuning", "loha"]
)
def test_refused_as_a_wrapped_model(name: str) -> None:
    """Before an engine is built, also when a script has wrapped the model itself."""
    from peft import get_peft_model

    from patchfastrl import engine

    model = get_peft_model(tiny.model("llama"), _config(name))
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        tiny.engine(model)
    assert not engine.live
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_refused_targets(family: str, target: str) -> None:
    from patchfastrl import engine

    model = tiny.adapted(tiny.model(family), target_modules=["q_proj", target])
    with pytest.raises(UnsupportedError, match=target):
        tiny.engine(model)
    assert not engine.live


def test_refused_states_of_the_model() -> None:
    model = tiny.adapted(tiny.model("llama"))
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"merged.*unmerge_adapter"):
        tiny.engine(model)
    model.unmerge_adapter()

    model.add_adapter("other", tiny.lora())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedError, match=r"2 adapters are active.*default, other"):
        tiny.engine(model)
    model.set_adapter("default")

    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"norm\.weight would be trained beside adapter 'default'"):
        tiny.engine(model)


def test_adapters_without_a_peft_model_are_refused() -> None:
    """transformers can inject adapters by itself; TRL takes such a model for one without."""
    model = tiny.model("llama")
    model.add_adapter(tiny.lora())
    with pytest.raises(UnsupportedError, match="adapters inside"):
        tiny.engine(model)


def test_a_rank_above_the_slot_is_refused() -> None:
    model = tiny.adapted(tiny.model("llama"), r=16)
    with pytest.raises(UnsupportedError, match=r"rank 16.*slot holds 8.*max_lora_rank=16"):
        tiny.engine(model, max_lora_rank=8)
    with pytest.raises(UnsupportedError, match=r"rank 513"):
        tiny.engine(tiny.adapted(tiny.model("llama"), target_modules=["q_proj"], r=513))


# Publishing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """An engine with a slot of rank 8, and its model with an adapter of rank 4 on some of the layers."""
    model = tiny.adapted(tiny.model("llama"), target_modules=["q_proj", "v_proj", "down_proj"])
    return tiny.engine(model, max_lora_rank=8), model


def test_published_only_when_it_changed(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    before, version = llm.publishes, llm.slot.version
    assert not llm.publish()
    tiny.engine_greedy(llm, PROMPT)
    assert not llm.publish()
    assert (llm.publishes, llm.slot.version) == (before, version)
    for seed in (5, 6):
        tiny.scramble(model, seed=seed)
        assert llm.publish()
        assert not llm.publish()
    assert (llm.publishes, llm.slot.version) == (before + 2, version + 2)
    # The smallest change of one element is a change.
    with torch.no_grad():
        b = model.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight
        b[3, 2] = torch.nextafter(b[3, 2], torch.tensor(9.0))
    assert llm.publish()


def test_a_publish_opens_no_file_and_leaves_the_adapter_alone(pair: tuple[Any, Any], tmp_path: Path) -> None:
    llm, model = pair
    opened: list[str] = []
    listening = True

    def listen(event: str, args: tuple) -> None:
        if listening and event in ("open", "os.mkdir", "os.rename", "shutil.copyfile"):
            opened.append(str(args[0]))

    tiny.scramble(model, seed=9)
    values = {n: p.clone() for n, p in model.named_parameters()}
    sys.addaudithook(listen)
    try:
        assert llm.publish()
        llm.slot.check()
    finally:
        listening = False
    assert opened == []
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]), name


def test_a_new_adapter_beats_the_cached_prefix(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    block = llm.llm_engine.vllm_config.cache_config.block_size
    prompt = tiny.ids(block + 9)
    assert tiny.cached_tokens(llm, prompt) == 0
    assert tiny.cached_tokens(llm, prompt) == block  # within a step the cache keeps hitting
    assert not llm.publish()
    assert tiny.cached_tokens(llm, prompt) == block
    old = tiny.engine_greedy(llm, prompt)
    for seed in (2, 3):
        tiny.scramble(model, seed=seed)
        llm.publish()
        assert tiny.cached_tokens(llm, prompt) == 0
        assert tiny.cached_tokens(llm, prompt) == block
        new = tiny.engine_greedy(llm, prompt)
        assert new == tiny.greedy(model, prompt)
        assert new != old
        old = new
    # The base and the adapter do not share prefixes either.
    assert tiny.cached_tokens(llm, prompt, lora_request=None) == 0
    with model.disable_adapter():
        assert tiny.engine_greedy(llm, prompt, lora_request=None) == tiny.greedy(model, prompt)


def test_a_publish_that_was_interrupted_cannot_hit_old_prefixes(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, model = pair
    block = llm.llm_engine.vllm_config.cache_config.block_size
    prompt = tiny.ids(block + 9)
    tiny.engine_greedy(llm, prompt)
    copy = torch._foreach_copy_

    def copy_and_interrupt(*args: Any) -> None:
        copy(*args)
        raise KeyboardInterrupt

    tiny.scramble(model, seed=2)
    monkeypatch.setattr(torch, "_foreach_copy_", copy_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.publish()
    monkeypatch.undo()
    llm.publish()
    assert tiny.cached_tokens(llm, prompt) == 0
    assert tiny.engine_greedy(llm, prompt) == tiny.greedy(model, prompt)


# A wrong slot fails the batch -----------------------------------------------------------------------------------------


def _layer(llm: Any, name: str) -> Any:
    return llm.slot._manager.modules[name]


def _zero_one_slice(llm: Any, model: Any) -> None:
    _layer(llm, "model.layers.1.self_attn.qkv_proj").lora_b_stacked[2].zero_()


def _zero_one_row(llm: Any, model: Any) -> None:
    _layer(llm, "model.layers.0.self_attn.qkv_proj").lora_a_stacked[0][0, 0, 3].zero_()


def _zero_all(llm: Any, model: Any) -> None:
    for layer in llm.slot._manager.modules.values():
        layer.reset_lora(0)


def _remove_from_the_manager(llm: Any, model: Any) -> None:
    llm.slot._manager.remove_adapter(adapters.ADAPTER_ID)


def _remove_through_vllm(llm: Any, model: Any) -> None:
    assert llm.llm_engine.remove_lora(adapters.ADAPTER_ID)


def _remove_all(llm: Any, model: Any) -> None:
    llm.model_runner.lora_manager.remove_all_adapters()


def _leave_something_in_another_slice(llm: Any, model: Any) -> None:
    _layer(llm, "model.layers.0.self_attn.qkv_proj").lora_b_stacked[1].fill_(0.5)  # k_proj is not targeted


def _leave_something_in_another_module(llm: Any, model: Any) -> None:
    _layer(llm, "model.layers.1.self_attn.o_proj").lora_b_stacked[0].fill_(0.5)


def _leave_something_behind_the_rank(llm: Any, model: Any) -> None:
    layer = _layer(llm, "model.layers.1.mlp.down_proj")
    layer.lora_a_stacked[0][:, :, 4:].fill_(0.5)
    layer.lora_b_stacked[0][..., 4:].fill_(0.5)


def _leave_nan_behind_the_rank_of_a(llm: Any, model: Any) -> None:
    """It would be multiplied by zeros of lora_B, and stay."""
    _layer(llm, "model.layers.0.mlp.down_proj").lora_a_stacked[0][:, :, 4:].fill_(torch.nan)


def _write_in_the_trainer(llm: Any, model: Any) -> None:
    tiny.scramble(model, seed=4)


def _write_behind_autograd_s_back(llm: Any, model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[2, 5] += 1.0


def _replace_the_data(llm: Any, model: Any) -> None:
    parameter = model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight
    parameter.data = torch.randn(parameter.shape)


def _an_optimizer_step(llm: Any, model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()


def _another_adapter(llm: Any, model: Any) -> None:
    model.add_adapter("other", tiny.lora(r=2, target_modules=["v_proj", "o_proj"]))
    model.set_adapter("other")
    tiny.scramble(model, "other", seed=8)


SPOILED = {
    _zero_one_slice: r"lora_B of model\.layers\.1\.self_attn\.v_proj differs",
    _zero_one_row: r"lora_A of model\.layers\.0\.self_attn\.q_proj differs",
    _zero_all: "lora_A of .* differs",
    _remove_from_the_manager: "missing",
    _remove_through_vllm: "missing",
    _remove_all: "missing",
    _leave_something_in_another_slice: "left-over",
    _leave_something_in_another_module: "left-over",
    _leave_something_behind_the_rank: "left-over",
    _leave_nan_behind_the_rank_of_a: "left-over",
    _write_in_the_trainer: "differs",
    _write_behind_autograd_s_back: r"lora_A of model\.layers\.0\.self_attn\.q_proj differs",
    _replace_the_data: r"lora_B of model\.layers\.0\.self_attn\.v_proj differs",
    _an_optimizer_step: "differs",
    _another_adapter: "another adapter|differs",
}


def test_a_wrong_slot_fails_the_batch_and_a_publish_mends_it(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    for spoil, says in SPOILED.items():
        assert_served(llm, model)
        spoil(llm, model)
        for _ in range(2):  # and stays wrong until it is mended
            with pytest.raises(AdapterError, match=says):
                tiny.engine_greedy(llm, PROMPT)
            with pytest.raises(AdapterError, match=says):
                llm.chat([{"role": "user", "content": "the cat"}], use_tqdm=False)
        assert llm.publish(), spoil.__name__
        assert_served(llm, model)


def test_two_adapters_of_the_same_tensors_are_two(pair: tuple[Any, Any]) -> None:
    """They differ in their scaling, which is in the slot."""
    llm, model = pair
    assert_served(llm, model)
    model.add_adapter("twin", tiny.lora(lora_alpha=4, target_modules=model.peft_config["default"].target_modules))
    for module in model.modules():
        if "twin" in getattr(module, "lora_A", {}):
            module.lora_A["twin"].weight = module.lora_A["default"].weight
            module.lora_B["twin"].weight = module.lora_B["default"].weight
    model.set_adapter("twin")
    with pytest.raises(AdapterError, match="another adapter"):
        tiny.engine_greedy(llm, PROMPT)
    assert llm.publish()
    assert_served(llm, model)


def test_an_adapter_with_nan_is_not_published(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    weight = model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight
    with torch.no_grad():
        weight[1, 1] = float("nan")
    with pytest.raises(AdapterError, match=r"lora_B of model\.layers\.0\.self_attn\.v_proj is not finite"):
        llm.publish()
    with pytest.raises(AdapterError, match="is not finite"):
        tiny.engine_greedy(llm, PROMPT)
    tiny.scramble(model)
    llm.publish()
    assert_served(llm, model)


# Requests by hand -----------------------------------------------------------------------------------------------------


def test_every_way_of_sampling_uses_the_adapter(pair: tuple[Any, Any]) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    llm, model = pair
    tok = tiny.tokenizer()
    text = "the cat sat on the mat . a b c"
    expected = tiny.greedy(model, tok(text)["input_ids"], 8)
    with model.disable_adapter():
        assert tiny.greedy(model, tok(text)["input_ids"], 8) != expected
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    outputs = [
        llm.generate(text, greedy, use_tqdm=False),
        llm.generate(prompts=[text], sampling_params=greedy, use_tqdm=False),
        llm.generate([{"prompt": text}], [greedy], use_tqdm=False),
        llm.chat([{"role": "user", "content": text}], greedy, use_tqdm=False),
    ]
    assert [list(o[0].outputs[0].token_ids) for o in outputs] == [expected] * 4
    beam = llm.beam_search([{"prompt": text}], BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True))
    assert beam[0].sequences[0].tokens[-8:] == expected
    with pytest.raises(UnsupportedError, match="enqueue"):
        llm.enqueue_chat([[{"role": "user", "content": text}]])


def test_explicit_requests(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """None is the base, a request of the user's own is that adapter, and afterwards the current one is served again."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm, model = pair
    saved = tiny.adapted(tiny.model("llama"), r=8, lora_alpha=4, target_modules=["k_proj", "up_proj"])
    tiny.scramble(saved, seed=21)
    saved.save_pretrained(tmp_path / "saved")
    request = LoRARequest("saved", 7, str(tmp_path / "saved"))
    current = tiny.greedy(model, PROMPT)
    with model.disable_adapter():
        base = tiny.greedy(model, PROMPT)
        assert tiny.engine_greedy(llm, PROMPT) == base  # the model's own function: without its adapters
    other = tiny.greedy(saved, PROMPT)
    assert len({tuple(t) for t in (current, base, other)}) == 3
    for _ in range(2):
        assert tiny.engine_greedy(llm, PROMPT) == current
        assert tiny.engine_greedy(llm, PROMPT, lora_request=request) == other
        assert tiny.engine_greedy(llm, PROMPT) == current
        assert tiny.engine_greedy(llm, PROMPT, lora_request=request) == other
        assert tiny.engine_greedy(llm, PROMPT, lora_request=None) == base
        assert tiny.engine_greedy(llm, PROMPT, lora_request=llm.current_request()) == current
    # One request for each prompt of a batch.
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": PROMPT}] * 3
    for requests, expected in (
        ([llm.current_request(), request, request], [current, other, other]),
        ([None, llm.current_request(), None], [base, current, base]),
    ):
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=requests)
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    assert tiny.engine_greedy(llm, PROMPT) == current
    with model.disable_adapter():
        assert tiny.engine_greedy(llm, PROMPT, lora_request=request) == other
    llm.publish()
    assert tiny.engine_greedy(llm, PROMPT) == current
