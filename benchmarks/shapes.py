"""Models of real shapes with random weights, prompts for them, and what stock TRL needs to run on a CPU.

Random weights are enough for speed and memory; the models never stop by themselves, so every completion has exactly the
asked length.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import Any

QWEN = {"num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True}
LLAMA = {"num_key_value_heads": 8, "rope_theta": 5e5, "tie_word_embeddings": False}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("Qwen2", {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                       "num_attention_heads": 2, **QWEN}),
    "0.5b": ("Qwen2", {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                       "num_attention_heads": 14, **QWEN}),
    "1.5b": ("Qwen2", {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                       "num_attention_heads": 12, **QWEN}),
    "8b": ("Llama", {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "max_position_embeddings": 131072, **LLAMA}),
    "32b": ("Qwen3", {"vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                      "num_attention_heads": 64, "head_dim": 128, **LLAMA}),
}  # fmt: skip


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {name: metadata.version(name) for name in ("trl", "torch", "transformers", "peft")}
    import vllm

    return {**found, "vllm": vllm.__version__}


def make_model(shape: str, method: str, folder: str, on_gpu: bool, dtype: Any = None) -> tuple[Any, Any]:
    """A model of this shape with random weights on the device, and a tokenizer with a word for each of its tokens.

    `dtype`: by default bfloat16 on a GPU, float32 on a CPU.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    kind, settings = SHAPES[shape]
    made_with = {
        "max_position_embeddings": 65536,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **settings,
    }
    config = getattr(transformers, f"{kind}Config")(**made_with)
    words = ["<p>", "<e>", *(f"w{n}" for n in range(config.vocab_size - 2))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<p>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<e>", pad_token="<p>", padding_side="left"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.bfloat16 if on_gpu else torch.float32))
    try:
        with torch.device("cuda" if on_gpu else "cpu"):
            made = getattr(transformers, f"{kind}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    config.architectures = [f"{kind}ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made.config._name_or_path = made.name_or_path = folder
    if method == "qlora":
        made = in_4_bits(made)
    return made, tokenizer


def tokenizer_of(folder: str) -> Any:
    """The tokenizer saved there as it is: `AutoTokenizer` makes one of the model's family of it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def four_bits(on_gpu: bool) -> Any:
    """QLoRA's usual settings."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32)  # fmt: skip


def in_4_bits(model: Any) -> Any:
    """What `from_pretrained(quantization_config=...)` makes of a checkpoint, without one."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.quantizers import AutoHfQuantizer

    settings = four_bits(model.device.type == "cuda")
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            parent, _, leaf = path.rpartition(".")
            device = module.weight.device
            with torch.device("meta"):
                packed = Linear4bit(module.in_features, module.out_features, bias=module.bias is not None,
                                    compute_dtype=model.dtype, quant_type="nf4", compress_statistics=True)  # fmt: skip
            packed.weight = Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4").to(device)
            packed.bias = module.bias
            setattr(model.get_submodule(parent), leaf, packed)
    model.config.quantization_config = settings
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = settings.quant_method
    model.hf_quantizer = AutoHfQuantizer.from_config(settings)
    return model


def prompts(n: int, length: int) -> Any:
    """`n` prompts of `length` tokens."""
    from datasets import Dataset

    chosen = random.Random(0)
    return Dataset.from_dict(
        {"prompt": [" ".join(f"w{chosen.randrange(500)}" for _ in range(length)) for _ in range(n)]}
    )


@contextlib.contextmanager
def stock_on_cpu(generation: Any) -> Iterator[None]:
    """vLLM's CPU build repacks linear weights so that they cannot be loaded again; and it needs a small KV cache."""
    from patchfastrl.compat import cpu_linear

    before = generation.LLM
    generation.LLM = functools.partial(before, enforce_eager=True, kv_cache_memory_bytes=64 * 2**20, dtype="float32")
    try:
        with cpu_linear.plain_weights():
            yield
    finally:
        generation.LLM = before
