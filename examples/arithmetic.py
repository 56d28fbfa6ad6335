"""A task that a tiny model learns in seconds: sums of two numbers below 20, with answers that code can check.

The warm-up is a careless textbook: of three lines about a sum, one adds ("7+12=19") and two copy a number ("7+12=7" and
"7+12=12"). The model reads it until one sample in five is right. Nothing but the reward then says that adding is meant.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LONGEST_ANSWER = 3  # tokens: two digits and the end of the sequence
PROBLEMS = list(product(range(20), repeat=2))


def prompt(a: int, b: int) -> str:
    return f"{a}+{b}="


def textbook() -> list[tuple[str, str]]:
    """Prompts with the answers that the textbook gives: to each a right one and two wrong ones."""
    return [(prompt(a, b), str(answer)) for a, b in PROBLEMS for answer in (a + b, a, b)]


def problems() -> Dataset:
    """What TRL trains on: prompts, and the right answers for the reward function."""
    return Dataset.from_list([{"prompt": prompt(a, b), "answer": str(a + b)} for a, b in PROBLEMS])


def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Reward: 1 for exactly the right answer, otherwise 0."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *"0123456789+="])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 84,000 parameters with random weights, float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.1,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, lines: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (-100 except for the answer and its end), each (lines, tokens of the longest line)."""
    width = max(len(question + answer) for question, answer in lines) + 1
    ids = torch.full((len(lines), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (question, answer) in enumerate(lines):
        tokens = torch.tensor([*tokenizer(question + answer)["input_ids"], tokenizer.eos_token_id])
        ids[row, : len(tokens)] = tokens
        labels[row, len(question) : len(tokens)] = tokens[len(question) :]
    return ids, labels


def loss_per_token(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy, (lines, tokens - 1), 0 where there is no label."""
    logits = model(ids).logits[:, :-1].float()
    return functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """The exact probability that a completion sampled at temperature 1 is right, averaged over all problems."""
    ids, labels = encode(tokenizer, [(prompt(a, b), str(a + b)) for a, b in PROBLEMS])
    with torch.no_grad():
        return loss_per_token(model, ids, labels).sum(1).neg().exp().mean().item()


def warm_up(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, goal: float = 0.2, max_steps: int = 600, seed: int = 0
) -> float:
    """Read the textbook until one sample in five is right; returns the accuracy."""
    ids, labels = encode(tokenizer, textbook())
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(1, max_steps + 1):
        batch = torch.randint(len(ids), (128,), generator=order)
        loss = loss_per_token(model, ids[batch], labels[batch]).sum() / (labels[batch] != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 and (reached := accuracy(model, tokenizer)) >= goal:
            return reached
    return accuracy(model, tokenizer)


def make_checkpoint(folder: str | Path, seed: int = 0, warmed_up: bool = True) -> str:
    """A checkpoint with its tokenizer, as one would download it; bfloat16 where there is a GPU. Returns its path."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    if warmed_up:
        warm_up(model, tokenizer, seed=seed)
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
