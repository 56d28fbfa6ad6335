"""Stock TRL against PatchFastRL, side by side: the same script, the same model, processes in turn.

    python benchmarks/compare.py                 # every case, 3 pairs each, a table at the end
    python benchmarks/compare.py --case string --pairs 5 --json out.json

Sides: `stock` is TRL as it is (on a CPU plus the one shim that vLLM's CPU build needs to take weights at all),
`stock-tuned` is stock with the engine settings that PatchFastRL chooses on a CPU (eager, a KV cache of the size
needed), `patched` is the same script after PatchFastRL(). Figures are medians over the pairs; a step is the median of
the steps after the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = {
    "string": "model as a string, nothing set (full fine-tuning, float32)",
    "string-lora": "model as a string, peft_config=LoraConfig(r=16)",
    "lora-standby": "the same with the engine asleep while training",
}
SIDES = ("stock", "stock-tuned", "patched")
ROWS = (
    ("import", "import (with PatchFastRL()), s"),
    ("patch", "PatchFastRL() alone, s"),
    ("construct", "GRPOTrainer(...) to ready, s"),
    ("step", "GRPO step, s"),
    ("sync", "weight sync / adapter publish, ms"),
    ("resident", "resident after training, MiB"),
    ("peak", "peak resident, MiB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="which script; may be repeated (default: all)")
    parser.add_argument("--pairs", type=int, default=3, help="how often each side runs, in turn")
    parser.add_argument("--steps", type=int, default=12, help="GRPO steps per run")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("RESULT " + json.dumps(one_run(options.side, options.case[0], options.folder, options.steps)))
        return
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--side", "stock", "--case", "string", "--folder", folder,
        "--steps", "0"],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())  # fmt: skip
        for case in options.case or CASES:
            figures[case] = {side: [] for side in SIDES}
            for pair in range(options.pairs):
                for side in SIDES:
                    print(f"{case} {side} {pair + 1}/{options.pairs}", file=sys.stderr)
                    result = in_process_of_its_own(side, case, folder, options.steps)
                    if result is not None:
                        figures[case][side].append(result)
            print_table(case, figures[case])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TRL_EXPERIMENTAL_SILENCE": "1"}


def in_process_of_its_own(side: str, case: str, folder: str, steps: int) -> dict[str, float] | None:
    env = environment()
    if side != "stock":
        env["TORCHDYNAMO_DISABLE"] = "1"  # both run eagerly on a CPU
    if case == "lora-standby":
        env["UNSLOTH_VLLM_STANDBY"] = "1"
    command = [sys.executable, __file__, "--side", side, "--case", case, "--folder", folder, "--steps", str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{side} did not run: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(lines[0].removeprefix("RESULT "))


def print_table(case: str, figures: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{case}: {CASES[case]}")
    print(f"| {'':34} | " + " | ".join(f"{s:>11}" for s in SIDES) + " | patched / stock-tuned |")
    print("|---|" + "---:|" * (len(SIDES) + 1))
    for key, label in ROWS:
        medians = [statistics.median(r[key] for r in figures[s]) if figures[s] else None for s in SIDES]
        shown = [f"{m:11.3g}" if m is not None else f"{'did not run':>11}" for m in medians]
        ratio = f"{medians[2] / medians[1]:.2f}" if medians[1] and medians[2] else ""
        print(f"| {label:34} | " + " | ".join(shown) + f" | {ratio:>21} |")


# One side -----------------------------------------------------------------------------------------------------------


def one_run(side: str, case: str, folder: str, steps: int) -> dict[str, float]:
    model = Path(folder, "model")
    if not model.exists():
        make_checkpoint(model)
    if steps == 0:
        return {}
    figures: dict[str, float] = {}
    start = time.perf_counter()
    if side == "patched":
        from patchfastrl import PatchFastRL

        PatchFastRL()
    figures["patch"] = time.perf_counter() - start
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    import trl.generation.vllm_generation as generation  # isort: skip

    figures["import"] = time.perf_counter() - start
    with contextlib.ExitStack() as stack:
        if side != "patched":
            stack.enter_context(stock_on_cpu(generation, tuned=side == "stock-tuned"))
        config = GRPOConfig(
            output_dir=str(Path(folder, "out")),
            use_vllm=True,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=32,
            max_steps=steps,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        start = time.perf_counter()
        trainer = GRPOTrainer(
            model=str(model),
            reward_funcs=lambda completions, **kwargs: [float(len(c) % 5) for c in completions],
            args=config,
            train_dataset=prompts(),
            peft_config=LoraConfig(r=16, target_modules="all-linear") if "lora" in case else None,
        )
        figures["construct"] = time.perf_counter() - start
    sync = timed_sync(trainer.vllm_generation)
    trainer.train()
    steps_taken = [h["step_time"] for h in trainer.state.log_history if "step_time" in h][1:]
    figures["step"] = statistics.median(steps_taken)
    figures["sync"] = 1000 * statistics.median(sync[1:])
    figures |= resident()
    return figures


def timed_sync(generation: Any) -> list[float]:
    """Seconds of each weight sync, with the publishing of the batch after it, which only ours has."""
    seconds: list[float] = []

    def time_it(owner: Any, name: str, begins: bool) -> None:
        before = getattr(owner, name)

        def timed() -> Any:
            if begins:
                seconds.append(0.0)
            start = time.perf_counter()
            result = before()
            seconds[-1] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    time_it(generation, "sync_weights", begins=True)
    if hasattr(generation.llm, "publish"):
        time_it(generation.llm, "publish", begins=False)
    return seconds


def resident() -> dict[str, float]:
    import resource

    import psutil

    return {
        "resident": psutil.Process().memory_info().rss / 2**20,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


@contextlib.contextmanager
def stock_on_cpu(generation: Any, tuned: bool) -> Any:
    import functools

    import torch

    from patchfastrl import memory
    from patchfastrl.compat import cpu_linear

    llm = generation.LLM
    if tuned:

        def build(**kwargs: Any) -> Any:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(kwargs["model"])
            kwargs["kv_cache_memory_bytes"] = memory.kv_cache_bytes(config, torch.float32, kwargs)
            return functools.partial(llm, enforce_eager=True)(**kwargs)

        generation.LLM = build
    with cpu_linear.plain_weights():
        yield
    generation.LLM = llm


def make_checkpoint(folder: Path) -> None:
    """A Llama of about 31 million random parameters, 125 MB in float32, with a small tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(1000))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    ).save_pretrained(folder)


def prompts() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [" ".join(f"w{(7 * i + j) % 1000}" for j in range(24)) for i in range(64)]})


if __name__ == "__main__":
    main()
