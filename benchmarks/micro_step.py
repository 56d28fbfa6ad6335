"""One training micro-step of GRPO by itself: TRL's loss and its gradients, stock and patched, without an engine.

    python benchmarks/micro_step.py --model 8b --tokens 2048 --rows 4        # LoRA, 4 rows of 64 + 2,048 tokens
    python benchmarks/micro_step.py --model 8b --method full --tokens 512 --profile
    python benchmarks/micro_step.py --model tiny --tokens 32                 # on a CPU, in seconds

Every row of `grid.py` is equally long. Here each cell is measured twice: like that, and "padded", with prompts of half
to all of their length and completions of a quarter to all of theirs, as most scripts have them. (The patched side
leaves padding out of attention, not out of the matrix products.) Without gradient checkpointing. Both sides have the
same weights, adapters and tokens, so their log-probabilities are compared, too: they differ by rounding. The model has
random weights of a real shape, and each side is a process of its own (TRL 0.20 or newer). A median is of the steps
after the first; how long that took is in the JSON. A cell that does not fit into the GPU has no time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from shapes import SHAPES, make_model, prompts, versions

PROMPT = 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="8b", help="shape (default: 8b)")
    parser.add_argument("--method", choices=("lora", "full"), default="lora", help="default: lora")
    parser.add_argument("--tokens", type=int, action="append", help="of a completion (default: 512)")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch (default: 8)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="of each cell, after one more (default: 5)")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one more micro-step (on a GPU)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    results = []
    for side in ("stock", "patched"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            results += alone.submit(measure, side, options).result()
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    print_table(results)


def measure(side: str, options: Any) -> list[dict[str, Any]]:
    import torch

    on_gpu = torch.cuda.is_available()
    if side == "patched":
        from patchfastrl import PatchFastRL

        PatchFastRL(use_vllm="keep", fused_training=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, folder, on_gpu)
        if side == "patched":
            from patchfastrl.training import fuse

            fuse(trainer.model)
        model = trainer.accelerator.prepare_model(trainer.model)
        model.train()
        results = []
        for tokens in options.tokens or [512]:
            for padded in (False, True):
                inputs = make_inputs(options.rows, tokens, padded, trainer.accelerator.device)
                try:
                    found = one_cell(trainer, model, inputs, options, on_gpu)
                except torch.OutOfMemoryError:  # 8 rows of 2,048 take stock more than the 140 GiB of an H200, at 8B
                    found = {"micro": None}
                results.append({"side": side, "tokens": tokens, "padded": padded, **found, **versions()})
    return results


def make_trainer(options: Any, folder: str, on_gpu: bool) -> Any:
    from peft import LoraConfig
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    set_seed(0)
    model, tokenizer = make_model(options.model, options.method, folder, on_gpu)
    args = GRPOConfig(
        output_dir=folder, use_vllm=False, per_device_train_batch_size=options.rows, num_generations=options.rows,
        max_completion_length=max(options.tokens or [512]), gradient_checkpointing=False, bf16=on_gpu,
        use_cpu=not on_gpu, report_to=[], beta=0.0,
    )  # fmt: skip
    adapter = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=prompts(options.rows, PROMPT),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        peft_config=adapter if options.method == "lora" else None,
    )  # fmt: skip
    set_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # new ones are zero
            parameter.data.normal_(0, 0.02)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_inputs(rows: int, tokens: int, padded: bool, device: Any) -> dict[str, Any]:
    """A micro-batch as TRL has it: prompts padded on the left, completions on the right."""
    import torch

    chosen = random.Random(0)
    ids = torch.tensor([[chosen.randrange(2, 500) for _ in range(PROMPT + tokens)] for _ in range(rows)])
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        mask[row, : chosen.randrange(PROMPT // 2)] = 0
        mask[row, PROMPT + chosen.randint(tokens // 4, tokens) :] = 0
    ids, mask = ids.to(device), mask.to(device)
    return {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": mask[:, :PROMPT],
        "completion_ids": ids[:, PROMPT:], "completion_mask": mask[:, PROMPT:],
        "advantages": torch.linspace(-1, 1, rows, device=device),
        "num_items_in_batch": mask[:, PROMPT:].sum(),
    }  # fmt: skip


def one_cell(trainer: Any, model: Any, inputs: dict[str, Any], options: Any, on_gpu: bool) -> dict[str, Any]:
    import torch

    logps: list[Any] = []
    kind = type(trainer)
    before = kind._get_per_token_logps_and_entropies

    def noted(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        logps.append(found[0].detach())
        return found

    def step() -> float:
        """Ends when all of it is done."""
        model.zero_grad(set_to_none=True)
        logps.clear()
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.accelerator.backward(trainer.compute_loss(model, inputs))
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    kind._get_per_token_logps_and_entropies = noted
    try:
        first, *times = [step() for _ in range(1 + options.steps)]
        peak = None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = torch.cuda.max_memory_allocated() / 2**30
            if options.profile:
                print_kernels(step)
    finally:
        kind._get_per_token_logps_and_entropies = before
    real = logps[-1][inputs["completion_mask"].bool()]
    return {"micro": statistics.median(times), "first": first, "peak": peak, "logps": real.float().tolist()}


def print_kernels(step: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90))


def print_table(results: list[dict[str, Any]]) -> None:
    print("| tokens | stock, ms | patched, ms | ratio | peak, GiB: stock | patched | log-probs differ |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    half = len(results) // 2
    for stock, patched in zip(results[:half], results[half:], strict=True):
        both = (stock, patched)
        ratio = differ = ""
        if all(r["micro"] for r in both):
            ratio = f"{stock['micro'] / patched['micro']:.2f}"
            pairs = zip(stock["logps"], patched["logps"], strict=True)
            differ = f"{statistics.fmean(abs(a - b) for a, b in pairs):.2g}"
        times = " | ".join(f"{r['micro'] * 1e3:.4g}" if r["micro"] else "out of memory" for r in both)
        peaks = " | ".join(f"{r['peak']:.1f}" if r.get("peak") else "" for r in both)
        print(f"| {stock['tokens']}{', padded' if stock['padded'] else ''} | {times} | {ratio} | {peaks} | {differ} |")


if __name__ == "__main__":
    main()
