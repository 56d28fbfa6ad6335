"""One cell of the support table, run for real: `python tests/cell.py [--json FILE]` in that cell's environment.

A GRPO script with LoRA, with full fine-tuning, with conversations and merged rollouts, and with standby where the
installed TRL has sleep mode. Checked: one storage, every batch sampled from the current weights (also the second one
within a step), the base unchanged under LoRA, a new adapter that beats a cached prefix, and an undo that leaves TRL as
it was. Prints a line for each check; exits with 1 when one fails. It goes with every release, so it uses only what all
of them have.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
if shutil.which("nvidia-smi") is None:  # on a GPU vLLM compiles, and so do the scripts that import this one
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

WORDS = 96
LONG = 300  # tokens: more than two blocks of the KV cache
MODES = {"lora": (True, False), "full": (False, False), "merged": (True, False), "standby": (True, True)}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

results: dict[str, Any] = {"checks": {}}


def check(name: str, good: bool, detail: object = "") -> None:
    results["checks"][name] = {"ok": bool(good), "detail": str(detail)}
    print(f"{'ok  ' if good else 'FAIL'} {name} {detail}", flush=True)


# A model that makes up its mind: greedy choices with wide margins -----------------------------------------------------


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(WORDS - 2))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def make_model(folder: Path) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, tie_word_embeddings=False,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.lm_head.weight.data[:2] = 0.0  # never the greedy choice: a decoded completion has no special tokens
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def agreement(model: Any, prompt: list[int], completion: list[int]) -> float:
    """Share of the completion's tokens that are the model's own choice after what precedes them (or nearly a tie)."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion], device=model.device)).logits[0]
    model.train(training)
    logits = logits[len(prompt) - 1 : -1]
    behind = logits.max(-1).values - logits[range(len(completion)), completion]
    return (behind < 0.05).float().mean().item()


@contextlib.contextmanager
def base_only(model: Any) -> Iterator[None]:
    with model.disable_adapter():
        yield


def move(policy: Any, lora: bool) -> None:
    """A large step: greedy choices change. (Sampled greedily, a policy has no gradient to speak of.)"""
    import torch

    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ("lora_B" in name) if lora else ("layers.0.mlp" in name):
                parameter.add_(torch.randn_like(parameter))


# One mode -------------------------------------------------------------------------------------------------------------


def run(mode: str, model_path: str, folder: Path) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from patchfastrl import PatchFastRL

    lora, standby = MODES[mode]
    talks = mode == "merged"  # TRL before 0.28 calls the engine's `chat` then
    PatchFastRL(rollouts="merged" if talks else None)
    os.environ["UNSLOTH_VLLM_STANDBY"] = "1" if standby else "0"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE if talks else None
    model = AutoModelForCausalLM.from_pretrained(model_path).float()
    trainers: list[Any] = []
    batches: list[tuple[int, float, float]] = []  # (step, agreement with the policy, agreement with the base)
    draws = iter(torch.rand(10_000, generator=torch.Generator().manual_seed(1)).tolist())

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        texts = zip(prompts, completions, strict=True)
        if talks:
            texts = ((p[-1]["content"], c[-1]["content"]) for p, c in texts)
        pairs = [(tokenizer(p)["input_ids"], tokenizer(c)["input_ids"]) for p, c in texts]
        pairs = [(p, c) for p, c in pairs if c]
        policy = trainers[0].accelerator.unwrap_model(trainers[0].model)
        now = [agreement(policy, p, c) for p, c in pairs]
        with base_only(policy) if lora else contextlib.nullcontext():
            base = [agreement(policy, p, c) for p, c in pairs]
        batches.append((trainers[0].state.global_step, sum(now) / len(now), sum(base) / len(base)))
        return [next(draws) for _ in completions]

    class Move(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            move(trainers[0].accelerator.unwrap_model(trainers[0].model), lora)

    vocabulary = [w for w in tokenizer.get_vocab() if w.startswith("w")]
    texts = [" ".join(vocabulary[n : n + 6]) for n in range(0, 64, 2)]
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts] if talks else texts})
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=4, num_generations=4,
        max_completion_length=8, max_steps=3, learning_rate=3e-2, logging_steps=1, report_to=[], save_strategy="no",
        bf16=False, use_cpu=True, temperature=0.001, beta=0.0, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=model, args=arguments, train_dataset=prompts, eval_dataset=prompts.select(range(3)),
        processing_class=tokenizer, reward_funcs=reward, callbacks=[Move()],
        peft_config=adapter if lora else None,
    )  # fmt: skip
    trainers.append(trainer)
    llm = getattr(trainer, "vllm_generation", trainer).llm
    policy = trainer.accelerator.unwrap_model(trainer.model)
    own = {name for name, (home, _) in llm.shared.plan.views.items() if home in llm.shared.plan.own}
    ours = {p.untyped_storage().data_ptr() for n, p in llm.shared.parameters.items() if n not in own}
    theirs = {p.untyped_storage().data_ptr() for p in llm.shared.engine_model.parameters()}
    check(f"{mode}: one storage", ours <= theirs, f"{len(llm.shared.parameters) - len(own)} parameters")
    check(f"{mode}: {'merged rollouts' if talks else 'no copies'}", llm.merges == bool(own) == talks)
    before = llm.shared.checksum()
    trainer.train()
    losses = [h for h in trainer.state.log_history if "loss" in h]
    check(
        f"{mode}: trained", len(losses) == 3 and all(abs(h["loss"]) < 1e3 for h in losses), [h["loss"] for h in losses]
    )
    differences = [h[k] for h in losses if (k := "sampling/sampling_logp_difference/max") in h]
    results.setdefault("logp_difference", {})[mode] = max(differences, default=None)
    unchanged = llm.shared.checksum() == before
    check(f"{mode}: base {'unchanged' if lora else 'trained'}", unchanged == lora)
    trainer.evaluate()  # several samplings within one step
    steps = [step for step, _, _ in batches]
    check(f"{mode}: sampled twice within one step", steps.count(3) >= 2, steps)
    worst = min(now for _, now, _ in batches)
    check(f"{mode}: every batch from the current weights", worst > 0.95, [round(now, 3) for _, now, _ in batches])
    if lora:
        last = batches[-1][2]
        check(f"{mode}: the adapter is applied", last < 0.8, f"agreement with the base {last:.3f}")
    if standby:
        check(f"{mode}: asleep after sampling", not llm.awake)
        llm.wake_up()
    cached_prefix(mode, llm, policy, lora)
    trainers.clear()
    del trainer, llm, policy, model
    gc.unfreeze()
    gc.collect()


def cached_prefix(mode: str, llm: Any, policy: Any, lora: bool) -> None:
    """The same long prompt twice, with other weights in between."""
    from vllm import SamplingParams

    prompt = [2 + (7 * n) % (WORDS - 2) for n in range(LONG)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    shares = []
    for _ in range(2):
        llm.publish()
        output = llm.generate([{"prompt_token_ids": prompt}], sampling_params=params, use_tqdm=False)[0]
        shares.append(agreement(policy, prompt, list(output.outputs[0].token_ids)))
        move(policy, lora)
    check(f"{mode}: new weights beat a cached prefix", min(shares) > 0.95, shares)


def log_probabilities() -> None:
    """TRL's function for them, which is ours before TRL had a kernel: its numbers and its gradients."""
    import torch
    from packaging.version import Version
    from trl.trainer.utils import selective_log_softmax

    from patchfastrl import PatchFastRL, log_probs

    PatchFastRL(fused_training=True)
    calls: list[int] = []
    before = log_probs._forward

    def counted(*args: Any) -> Any:
        calls.append(1)
        return before(*args)

    log_probs._forward = counted
    logits = torch.randn(2, 9, WORDS, requires_grad=True)
    index = torch.randint(0, WORDS, (2, 7))
    exact = logits[:, 1:-1].double().log_softmax(-1).gather(-1, index[..., None])[..., 0]
    found = selective_log_softmax(logits[:, 1:-1], index)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (exact, found)]
    log_probs._forward = before
    wrong = [(a - b).abs().max().item() for a, b in ((exact, found), gradients)]
    check("log-probabilities and their gradients", max(wrong) < 1e-5, wrong)
    check("log-probabilities: whose", len(calls) == (Version(results["versions"]["trl"]) < Version("1.14")), calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write versions, checks and seconds here")
    options = parser.parse_args()
    start = time.perf_counter()
    from patchfastrl import PatchFastRL, UnpatchFastRL
    from patchfastrl.compat.support import PACKAGES
    from patchfastrl.compat.versions import installed

    results["versions"] = {name: str(installed(name)) for name in PACKAGES}
    print(" ".join(f"{k} {v}" for k, v in results["versions"].items()), flush=True)
    PatchFastRL()
    from trl import GRPOConfig, GRPOTrainer

    modes = [m for m in MODES if m != "standby" or hasattr(GRPOConfig, "vllm_enable_sleep_mode")]
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder, "model"))
        for mode in modes:
            run(mode, path, Path(folder, mode))
    log_probabilities()
    UnpatchFastRL()
    home = str(Path(sys.modules["trl"].__file__).parent)
    file = inspect.unwrap(GRPOTrainer.__init__).__code__.co_filename
    check("unpatched", file.startswith(home), file.removeprefix(home))
    results["seconds"] = round(time.perf_counter() - start, 1)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    failed = [name for name, result in results["checks"].items() if not result["ok"]]
    print(f"{len(results['checks']) - len(failed)} of {len(results['checks'])} checks passed in {results['seconds']} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
