"""Tiny models, tokenizers and data made on the spot: real classes, random weights, nothing downloaded."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()  # the tests run without one; tests/cell_trainers.py and tests/cell_generate.py with it
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
CLOSE, FAR = (0.3, 1.0) if GPU else (1e-3, 1e-2)  # differences of log-probabilities

WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789+-=?.,", "the", "cat", "sat", "on", "mat"]


def tokenizer() -> Any:
    """A word-level tokenizer of some fifty tokens with pad, eos and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # as causal models have it
    )  # fmt: skip
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


_SIZES: dict[str, Any] = {
    "vocab_size": 101,  # not a multiple of 64: the engine pads its vocabulary
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def _config(family: str, layers: int = 2) -> Any:
    import transformers as t

    sizes = {**_SIZES, "num_hidden_layers": layers}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    match family:
        case "qwen2":
            sizes.pop("head_dim")
            return t.Qwen2Config(
                **{**sizes, "num_attention_heads": 2, "num_key_value_heads": 1}, tie_word_embeddings=False
            )
        case "qwen2-tied":
            sizes.pop("head_dim")
            return t.Qwen2Config(
                **{**sizes, "num_attention_heads": 2, "num_key_value_heads": 1}, tie_word_embeddings=True
            )
        case "qwen3":
            return t.Qwen3Config(**sizes, tie_word_embeddings=True)
        case "llama":
            return t.LlamaConfig(**sizes, tie_word_embeddings=False)
        case "mistral":
            return t.MistralConfig(**sizes, sliding_window=None)
        case "gemma":
            return t.GemmaConfig(**sizes)
        case "gemma2":
            # Its published checkpoints say the activation under both names, and vLLM before 0.18 reads the older one.
            older = {"hidden_act": "gelu_pytorch_tanh"}
            return t.Gemma2Config(**sizes, **older, query_pre_attn_scalar=32, sliding_window=128)
        case "phi3":
            sizes.pop("head_dim")
            return t.Phi3Config(**{**sizes, "num_attention_heads": 2, "num_key_value_heads": 1})
        case "qwen3-moe":
            return t.Qwen3MoeConfig(
                **sizes, **moe, decoder_sparse_step=2, mlp_only_layers=[], tie_word_embeddings=False
            )
    raise ValueError(family)


FAMILIES = ("qwen2", "qwen2-tied", "qwen3", "llama", "mistral", "gemma", "gemma2", "phi3", "qwen3-moe")


def model(
    family: str = "qwen2-tied",
    dtype: torch.dtype = DTYPE,
    seed: int = 0,
    positions: int = 256,
    layers: int = 2,
) -> Any:
    """A random model of a family, sharpened so that its greedy choices have no near-ties."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = _config(family, layers)
    config.max_position_embeddings = positions
    # Some transformers releases choose for Gemma 2 an attention that leaves its soft-capping out: another function.
    attention = {"attn_implementation": "eager"} if family == "gemma2" else {}
    made = AutoModelForCausalLM.from_config(config, **attention)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return made.to(DEVICE, dtype)


def checkpoint(folder: Path, family: str = "qwen2-tied", dtype: torch.dtype = DTYPE) -> str:
    """A saved model with its tokenizer; returns the path."""
    model(family, dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(n: int = 8) -> Any:
    """A prompt-only data set."""
    from datasets import Dataset

    texts = ["the cat sat on the mat", "a b c d e f g", "1 + 2 = ?", "the mat sat on the cat . a cat"]
    return Dataset.from_dict({"prompt": [texts[i % len(texts)] for i in range(n)]})


def ids(n: int = 12, start: int = 3) -> list[int]:
    return [(start + 7 * i) % 90 + 3 for i in range(n)]


def greedy(model: Any, prompt: list[int], tokens: int = 12) -> list[int]:
    """The model's own greedy completion: argmax over full forward passes, no cache, no early stop."""
    device = next(model.parameters()).device
    sequence = list(prompt)
    was = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([sequence], device=device), use_cache=False).logits
            sequence.append(int(logits[0, -1].argmax()))
    model.train(was)
    return sequence[len(prompt) :]


def engine_greedy(llm: Any, prompt: list[int], tokens: int = 12, **kwargs: Any) -> list[int]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    out = llm.generate([{"prompt_token_ids": prompt}], sampling_params=params, use_tqdm=False, **kwargs)
    return list(out[0].outputs[0].token_ids)


# Engines and adapters -----------------------------------------------------------------------------------------------


def engine(model: Any, **kwargs: Any) -> Any:
    """An engine round `model`, small and quick to build; the previous one is closed by it."""
    from patchfastrl import engine as module

    tok = kwargs.pop("tokenizer", None) or tokenizer()
    defaults = {"max_num_seqs": 8, "max_model_len": 256, "gpu_memory_utilization": 0.2}
    return module.build(model, tok, **{**defaults, "logprobs_mode": "processed_logprobs", **kwargs})


def close_all() -> None:
    """No engine stays open. (A trainer that is still referred to keeps its weights.)"""
    from patchfastrl import engine as module

    gc.unfreeze()  # vLLM freezes the heap when it builds an engine
    gc.collect()
    for llm in list(module.live):
        llm.close("the test is over.")


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )


def adapted(model: Any, *, trained: bool = True, **settings: Any) -> Any:
    """`model` wrapped by PEFT. `trained`: with random values in both matrices, as after training."""
    from peft import get_peft_model

    wrapped = get_peft_model(model, lora(**settings))
    if trained:
        scramble(wrapped)
    return wrapped


def scramble(model: Any, adapter: str = "default", seed: int = 1) -> None:
    """Random values in both matrices of an adapter, written in place as an optimizer writes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter}." in name:
                scale = 0.5 / parameter.shape[1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def logprobs(model: Any, sequence: list[int]) -> torch.Tensor:
    """The model's log-probability of each token of `sequence` but the first, shape (len - 1,), float32."""
    was = model.training
    model.eval()
    with torch.no_grad():
        given = torch.tensor([sequence], device=next(model.parameters()).device)
        logits = model(input_ids=given, use_cache=False).logits[0, :-1].float().cpu()
    model.train(was)
    return logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]


def engine_logprobs(llm: Any, sequence: list[int], **kwargs: Any) -> torch.Tensor:
    """The engine's log-probability of each token of `sequence` but the first."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    out = llm.generate([{"prompt_token_ids": sequence}], sampling_params=params, use_tqdm=False, **kwargs)[0]
    return torch.tensor([p[t].logprob for t, p in zip(sequence[1:], out.prompt_logprobs[1:], strict=True)])


def cached_tokens(llm: Any, prompt: list[int], **kwargs: Any) -> int:
    """How many tokens of `prompt` the engine takes from its prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    out = llm.generate([{"prompt_token_ids": prompt}], sampling_params=params, use_tqdm=False, **kwargs)[0]
    return out.num_cached_tokens


class Roomy:
    """A device that has room for training beside the engine, or (`total=100`) lacks 10 bytes of it."""

    resets = 0

    def __init__(self, total: int = 1000) -> None:
        self.total = total

    def read(self) -> Any:
        from patchfastrl.memory import Reading

        return Reading(self.total, held=50, cached=0, allocated=50, peak=100)

    def forget_peak(self) -> None:
        pass


# Trainers -----------------------------------------------------------------------------------------------------------


def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(c) % 7) for c in completions]


def quick(folder: Any) -> dict[str, Any]:
    """Settings that train a tiny model in a second. What sampling and the loss depend on is left alone."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not GPU,
        "bf16": GPU,
        "disable_tqdm": True,
        "vllm_gpu_memory_utilization": 0.2,
    }


def config(folder: Any, algorithm: str = "GRPO", **settings: Any) -> Any:
    import trl

    return getattr(trl, f"{algorithm}Config")(**{**quick(folder), **settings})


def trainer(folder: Any, algorithm: str = "GRPO", *, model: Any = None, args: Any = None, **given: Any) -> Any:
    """A trainer as a script makes it. Settings of the configuration go into `args` (a dict)."""
    import trl

    made = globals()["model"]() if model is None else model
    given.setdefault("reward_funcs", length_reward)
    given.setdefault("train_dataset", prompts(16))
    if not isinstance(made, str):
        given.setdefault("processing_class", tokenizer())
    return getattr(trl, f"{algorithm}Trainer")(model=made, args=config(folder, algorithm, **(args or {})), **given)
