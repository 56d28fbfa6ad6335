"""GRPO steps of real model shapes: stock TRL against PatchFastRL, phase by phase, with the memory over time.

    python benchmarks/grid.py --model 8b --method lora                    # stock, then patched
    python benchmarks/grid.py --model 0.5b --model 8b --method lora --method full --tokens 512 --tokens 2048 \\
        --completions 8 --completions 32 --json out.json
    python benchmarks/grid.py --model 8b --parallel 2                     # each side on a GPU of its own
    python benchmarks/grid.py --model 0.5b --in-turn 3                    # where the processor is not always as fast
    python benchmarks/grid.py --model 8b --no-standby                     # TRL's default: the engine never sleeps
    python benchmarks/grid.py --model 8b --checkpoint --steps 2 --verbose # what the time until the trainer is ready is
    python benchmarks/grid.py --model 8b --warm                           # the time until it is ready in a second run
    python benchmarks/grid.py --model tiny --tokens 16 --completions 8 --steps 3   # on a CPU, in a minute or two

Weights are random and made on the device, so no checkpoint is needed (--checkpoint writes one, and every side reads it
as a script would: by its name); random models never stop, so every completion has exactly the asked length.

All cells of a model, method and side are measured in one process, small ones first: building an engine takes a minute.
The engine is built for the largest of them, with the same settings on every side, and each cell is another
`trainer.train()` with that cell's lengths and batch sizes: what TRL reads when it trains, not when it is built. The
process' first step is left out of the medians, and shown as "first step". Nothing is in the caches of vLLM, torch and
Triton at first, such as graphs that were compiled before; with --warm it is what a process left there that built the
same trainer. Memory is the driver's count for the whole device (on a CPU: the resident set); the peak is the cell's
own. The next process imports while one is measured; with --parallel each GPU's processes have an equal share of the
processors.

With --in-turn N the sides' processes stay, and each cell is measured N times over, with one side after the other. Small
models wait for the processor, whose speed can halve for some seconds where others use it, too (shown as "a loop in
Python", timed before each step). There are no figures of memory then: it would be that of all sides.

Sides: stock is TRL as it is; patched the same script after PatchFastRL(); adapter and needed after
PatchFastRL(rollouts="adapter") and PatchFastRL(recompute="needed"); unsloth is Unsloth with its standby, where it is
installed (always from a checkpoint).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import processes
from measure import Clock, Memory, gaps, gib_of, kv_cache, said, say_times
from shapes import SHAPES, four_bits, make_model, prompts, stock_on_cpu, tokenizer_of, versions

SETTINGS: dict[str, dict[str, Any]] = {  # of PatchFastRL
    "patched": {},
    "adapter": {"rollouts": "adapter"},
    "needed": {"recompute": "needed"},
}
SIDES = ("stock", *SETTINGS, "unsloth")
PROMPT = 64  # tokens
READY = "the trainer is ready"  # what a process prints before its cells
PHASES = (
    ("step", "whole step, s"),
    ("rollout", "  rollout in all, s"),
    ("generate", "    llm.generate, s"),
    ("merges", "    merged (1) or in the slot (0)"),
    ("weights", "    weights to the engine, ms"),
    ("standby", "    sleep + wake, ms"),
    ("logprobs", "    old log-probabilities, s"),
    ("micro", "  training micro-step, s"),
    ("layers_kept", "  layers that are not recomputed"),
    ("retried", "  allocations retried, all steps"),
    ("processor", "a loop in Python, ms"),
    ("processor_max", "  the slowest"),
    ("first", "first step, s"),
    ("ready", "trainer ready, s"),
    ("weights_size", "one copy of the weights, GiB"),
    ("kv_cache", "KV cache, GiB"),
    ("memory_loading", "peak memory while loading, GiB"),
    ("memory_ready", "memory at engine-ready, GiB"),
    ("memory_peak", "peak memory, GiB"),
    ("difference", "log-probability difference, mean"),
    ("difference_max", "log-probability difference, max"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, action="append", help="shape; may be repeated (default: 8b)")
    parser.add_argument("--method", choices=("lora", "qlora", "full"), action="append", help="default: lora")
    parser.add_argument("--tokens", type=int, action="append", help="new tokens per completion (default: 512)")
    parser.add_argument("--completions", type=int, action="append", help="per step (default: 32)")
    parser.add_argument("--side", choices=SIDES, action="append", help="default: stock and patched")
    parser.add_argument("--steps", type=int, default=5, help="of each cell, after one more in the first (default: 5)")
    parser.add_argument("--share", type=float, default=0.3, help="vllm_gpu_memory_utilization")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--parallel", type=int, default=1, metavar="N",
                        help="N processes at the same time, each with a GPU of its own (default: 1)")  # fmt: skip
    parser.add_argument("--in-turn", type=int, default=1, metavar="N",
                        help="measure each cell N times over, the sides in turn (default: 1)")  # fmt: skip
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS",
                        help="of each process: cells not begun by then are left out, and said so")  # fmt: skip
    parser.add_argument("--no-standby", action="store_true", help="the engine never sleeps, on no side")
    parser.add_argument("--checkpoint", action="store_true", help="the model given by the name of a saved checkpoint")
    parser.add_argument("--warm", action="store_true", help="each side's second run, with --checkpoint")
    parser.add_argument("--verbose", action="store_true", help="what building takes, and what lies in memory then")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one training step of each cell")
    parser.add_argument("--json", type=Path, help="write all figures here, after each cell")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm and options.parallel > 1:
        parser.error("--warm: the second run comes after the first, so --parallel must be 1")
    if options.in_turn < 1:
        parser.error("--in-turn: once or more")
    if options.in_turn > 1 and (options.warm or options.parallel > 1):
        parser.error("--in-turn: all sides are on one GPU, each in one process; without --warm and --parallel")
    options.checkpoint |= options.warm
    if options.child:
        job = json.loads(options.child)
        with processes.reported(job):
            write_checkpoint(job) if job["side"] == "checkpoint" else measure(job)
        return
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        Grid(options, folder).run()


class Grid:
    """The processes of a run, and what came of them."""

    def __init__(self, options: Any, folder: str) -> None:
        self._options = options
        self._folder = folder
        self._results: list[dict[str, Any]] = []
        self._sides = options.side or list(SIDES[:2])
        sizes = {(t, c) for t in options.tokens or [512] for c in options.completions or [32]}
        self._cells = sorted(sizes, key=lambda cell: (cell[0] * cell[1], cell))
        for _, completions in self._cells:
            if completions < 2 or completions % min(8, completions):
                raise SystemExit(f"--completions {completions}: 2 to 8, or a multiple of 8")

    def run(self) -> None:
        options = self._options
        names = ("steps", "share", "rank", "verbose", "profile", "no_standby", "in_turn")
        more = {name: getattr(options, name) for name in names}
        jobs, written = [], []
        for model in options.model or ["8b"]:
            for method in options.method or ["lora"]:
                for side in self._sides:
                    job = {"side": side, "model": model, "method": method, "cells": self._cells, **more}
                    job["ahead"] = side != "unsloth"  # importing it takes memory of the GPU
                    job["checkpoint"] = None
                    if options.checkpoint or side == "unsloth":
                        job["checkpoint"] = str(Path(self._folder, model))
                        made = {"side": "checkpoint", "model": model, "checkpoint": job["checkpoint"]}
                        written += [made] if made not in written else []
                    jobs += [{**job, "only_build": True}, job] if options.warm else [job]
        # The checkpoints first, and alone.
        processes.run(__file__, written, self._on_result, self._on_end, limit=options.limit)
        heard = (self._on_result, self._on_end)
        if options.in_turn == 1:
            processes.run(__file__, jobs, *heard, limit=options.limit, at_once=options.parallel)
            return
        for _, group in itertools.groupby(jobs, lambda job: (job["model"], job["method"])):
            processes.run_in_turn(__file__, list(group), *heard, limit=options.limit)

    def _on_result(self, job: dict[str, Any], result: dict[str, Any]) -> None:
        if job["side"] == "checkpoint" or job.get("only_build"):
            return
        done = [r for r in self._results if all(r[k] == job[k] for k in ("model", "method", "side"))]
        if "tokens" not in result:  # an error, of the cell that was next
            left = [cell for cell in self._cells if cell not in {(r["tokens"], r["completions"]) for r in done}]
            for number, (tokens, completions) in enumerate(left):
                error = result["error"] if not number else "the process had ended in a smaller cell"
                self._add(job, {"tokens": tokens, "completions": completions, "error": error})
        else:
            self._add(job, result)

    def _add(self, job: dict[str, Any], result: dict[str, Any]) -> None:
        settings = {k: job[k] for k in ("model", "method", "side", "share", "rank", "no_standby")}
        how = {"from_checkpoint": job["checkpoint"] is not None, "warm": self._options.warm}
        self._results.append({**settings, **how, **result})
        if self._options.json:
            self._options.json.write_text(json.dumps(self._results, indent=1))
        shown = result.get("error") or f"{result['step']:.3g} s a step"
        name = f"{job['model']} {job['method']} {job['side']}"
        print(f"{name}, {result['completions']} x {result['tokens']} tokens: {shown}", flush=True)

    def _on_end(self, child: processes.Child) -> None:
        job, problem = child.job, child.problem()
        lines = child.lines()
        for line in lines:
            if line.startswith("SHOW "):
                print(line.removeprefix("SHOW "))
        if job.get("verbose"):
            print(f"\n{job['model']} {job['method']} {job['side']}: what took how long")
            while_building = itertools.takewhile(lambda line: line != READY, lines)
            print("\n".join("  " + line for line in processes.seconds_said(while_building)), flush=True)
        if problem is not None:
            processes.show_failure(child)
        if job.get("only_build"):
            return
        if problem is not None:
            if job["side"] == "checkpoint":
                raise SystemExit(f"the checkpoint could not be written: {problem}")
            self._on_result_missing(job, problem)
        if job["side"] != "checkpoint":
            self._print_when_complete(job)

    def _on_result_missing(self, job: dict[str, Any], problem: str) -> None:
        """A process that died without a word."""
        done = [r for r in self._results if all(r[k] == job[k] for k in ("model", "method", "side"))]
        if len(done) < len(self._cells):
            self._on_result(job, {"error": problem})

    def _print_when_complete(self, job: dict[str, Any]) -> None:
        of_group = [r for r in self._results if all(r[k] == job[k] for k in ("model", "method"))]
        if len(of_group) < len(self._cells) * len(self._sides):
            return
        for tokens, completions in self._cells:
            found = [r for r in of_group if (r["tokens"], r["completions"]) == (tokens, completions)]
            found.sort(key=lambda r: self._sides.index(r["side"]))
            title = f"{job['model']} {job['method']}, {completions} x {tokens} tokens"
            if self._options.no_standby:
                title += ", without standby"
            if self._options.checkpoint:
                title += ", from a checkpoint"
            if self._options.warm:
                title += ", second run"
            if self._options.in_turn > 1:
                title += f", {self._options.in_turn} times in turn"
            if self._options.parallel > 1:
                title += f" ({self._options.parallel} processes at the same time, each with a GPU of its own)"
            print_table(title, found)


def print_table(title: str, results: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print(f"| {'':34} | " + " | ".join(f"{r['side']:>9}" for r in results) + " |")
    print("|---|" + "---:|" * len(results))
    for key, label in PHASES:
        shown = [f"{r[key]:9.3g}" if r.get(key) is not None else f"{'':9}" for r in results]
        print(f"| {label:34} | " + " | ".join(shown) + " |", flush=True)
    for result in results:
        if "error" in result:
            print(f"{result['side']} did not run: {result['error']}")


# One process --------------------------------------------------------------------------------------------------------


def write_checkpoint(job: dict[str, Any]) -> None:
    import torch

    processes.my_turn(job)
    model, tokenizer = make_model(job["model"], "full", job["checkpoint"], torch.cuda.is_available())
    model.save_pretrained(job["checkpoint"])
    tokenizer.save_pretrained(job["checkpoint"])


def measure(job: dict[str, Any]) -> None:
    """Build the trainer once, and train it in each cell."""
    side = job["side"]
    os.environ["UNSLOTH_VLLM_STANDBY"] = "0" if job["no_standby"] else "1"
    if side == "unsloth":
        import unsloth  # noqa: F401  (before TRL and transformers)
    elif side != "stock":
        from patchfastrl import PatchFastRL

        PatchFastRL(**SETTINGS[side])
    import peft  # noqa: F401
    import torch
    import trl.generation.vllm_generation
    import trl.trainer.grpo_trainer  # noqa: F401
    from transformers import set_seed

    processes.my_turn(job)
    on_gpu = torch.cuda.is_available()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        memory = stack.enter_context(Memory(on_gpu))
        if job["in_turn"] > 1:
            memory.no_more_samples()  # nobody shall ask the driver while it is another side's turn
        build = unsloth_trainer if side == "unsloth" else trl_trainer
        trainer, llm, ready = build(job, folder, memory, stack, on_gpu)
        clock = Clock(trainer, llm, memory.begin, on_gpu)
        cache = None if side == "unsloth" else gib_of(kv_cache(llm))
        can_sleep = side != "unsloth" and (on_gpu or side != "stock")  # vLLM's CPU build cannot by itself
        if can_sleep and not job["no_standby"]:
            llm.sleep(level=2 if side == "stock" else 1)
        memory.give_back()
        memory.mark("ready")
        if job["verbose"]:
            for name, sizes in memory.details.items():
                print(f"\nTOOK {memory.times[name]:8.2f} s  until {name}: " + gib(sizes))
            for line in gaps() if on_gpu else ():
                print(f"\nSHOW {line}", flush=True)
        print(f"\n{READY}", flush=True)
        if job.get("only_build"):
            return
        common = {"ready": ready, "memory_ready": memory.marks["ready"], "details": memory.details,
                  "weights_size": gib_of(p for name, p in trainer.model.named_parameters() if "lora_" not in name),
                  "kv_cache": cache, "memory_loading": memory.details.get("loaded", {}).get("peak"),
                  "marks": memory.times, **versions()}  # fmt: skip
        if side == "unsloth":
            del common["memory_ready"]  # its engine is not asleep yet
        if job["in_turn"] > 1:  # it is the other sides', too
            common = {k: v for k, v in common.items() if not k.startswith("memory") and k != "details"}
        stop_in_time(trainer, job)
        for number, (tokens, completions) in enumerate(job["cells"]):
            cell = {"tokens": tokens, "completions": completions}
            if time.time() > job["deadline"]:
                result: dict[str, Any] = {"error": "left out: the time limit of its process was over"}
            else:
                warm_up = 0 if number else 1  # step: afterwards everything is warm
                result = common | one_cell(trainer, clock, memory, job, tokens, completions, warm_up)
                if side in SETTINGS:
                    result["layers_kept"] = llm.report()["layers_kept"]
                    result["merges"] = None if job["method"] == "full" else int(llm.merges)
            processes.report(job, {**cell, **result})
            memory.give_back()


def gib(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {size:.2f} GiB" for name, size in sizes.items())


def configuration(job: dict[str, Any], folder: str, on_gpu: bool, **more: Any) -> Any:
    """GRPO's, for the largest cell; `more` wins."""
    from trl import GRPOConfig

    tokens = max(t for t, _ in job["cells"])
    completions = max(c for _, c in job["cells"])
    per_device = min(8, completions)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": job["share"],
        "vllm_max_model_length": PROMPT + tokens + 16,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": completions // per_device,
        "num_generations": per_device,
        "max_completion_length": tokens,
        "max_steps": job["steps"],
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": True,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "generation_kwargs": {"ignore_eos": True},
    }
    return GRPOConfig(**{**settings, **more})


def given(job: dict[str, Any]) -> dict[str, Any]:
    """The trainer's other arguments."""
    return {
        "reward_funcs": lambda completions, **kwargs: [random.random() for _ in completions],
        "train_dataset": prompts(max(c for _, c in job["cells"]) * job["steps"], PROMPT),
    }


def trl_trainer(
    job: dict[str, Any], folder: str, memory: Memory, stack: contextlib.ExitStack, on_gpu: bool
) -> tuple[Any, Any, float]:
    """Stock TRL's trainer or the patched one, its engine, and the seconds that it took."""
    from peft import LoraConfig
    from trl import GRPOTrainer

    import trl.generation.vllm_generation as generation  # isort: skip

    side, method, checkpoint = job["side"], job["method"], job["checkpoint"]
    model: Any = checkpoint
    extra: dict[str, Any] = {}
    if checkpoint is None:
        model, extra["processing_class"] = make_model(job["model"], method, folder, on_gpu)
        memory.forget_peak()
        memory.mark("model")
        loading = {}
    else:
        extra["processing_class"] = tokenizer_of(checkpoint)
        loading = {"model_init_kwargs": {"dtype": "bfloat16" if on_gpu else "float32"}}
        if method == "qlora":
            extra["quantization_config"] = four_bits(on_gpu)
    if side == "stock":
        if checkpoint is None:  # TRL pushes the weights anyway
            generation.LLM = functools.partial(generation.LLM, load_format="dummy")
        if not on_gpu:
            stack.enter_context(stock_on_cpu(generation))
    else:
        from patchfastrl import materialise

        memory.mark_after(materialise, "materialise", "loaded")
    if job["verbose"]:
        say_what_takes_long(side)
    rank = job["rank"]
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    args = configuration(
        job, folder, on_gpu, vllm_enable_sleep_mode=on_gpu and not job["no_standby"],
        gradient_checkpointing_kwargs={"use_reentrant": False}, **loading,
    )  # fmt: skip
    start = time.perf_counter()
    trainer = GRPOTrainer(
        model=model, args=args, peft_config=None if method == "full" else adapter, **given(job), **extra
    )
    return trainer, trainer.vllm_generation.llm, time.perf_counter() - start


def say_what_takes_long(side: str) -> None:
    """The parts of building that vLLM's log has no line for."""
    import vllm
    from trl.trainer import grpo_trainer

    say_times(grpo_trainer, "create_model_from_path", "reading the trainer's model")
    say_times(vllm.LLM, "__init__", "vLLM's engine in all")
    if side != "stock":
        from patchfastrl import engine, materialise, sharing

        say_times(engine, "build", "the shared engine in all")
        say_times(engine, "audit", "audit of the shared engine")
        say_times(sharing, "make_plan", "tracing vLLM's loading")
        say_times(materialise, "materialise", "laying out the shared weights")


def unsloth_trainer(
    job: dict[str, Any], folder: str, memory: Memory, stack: contextlib.ExitStack, on_gpu: bool
) -> tuple[Any, Any, float]:
    """The trainer as Unsloth's documentation makes one, its engine, and the seconds that it took."""
    if job["method"] == "full":
        raise RuntimeError("Unsloth has no full fine-tuning with vLLM")
    start = time.perf_counter()
    from trl import GRPOTrainer
    from unsloth import FastLanguageModel

    with said("Unsloth's model and engine"):
        model, _ = FastLanguageModel.from_pretrained(
            model_name=job["checkpoint"],
            max_seq_length=PROMPT + max(t for t, _ in job["cells"]) + 16,
            load_in_4bit=job["method"] == "qlora",
            fast_inference=True,
            max_lora_rank=job["rank"],
            gpu_memory_utilization=job["share"],
            fix_tokenizer=False,
            use_exact_model_name=True,
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["rank"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=job["rank"],
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer_of(job["checkpoint"]),
        args=configuration(job, folder, on_gpu),
        **given(job),
    )
    return trainer, model.vllm_engine, time.perf_counter() - start


# One cell -----------------------------------------------------------------------------------------------------------


def one_cell(
    trainer: Any, clock: Clock, memory: Memory, job: dict[str, Any], tokens: int, completions: int, warm_up: int
) -> dict[str, Any]:
    clock.start_over()
    begin, retried = time.perf_counter() - memory.begin, memory.retried()
    mean, largest, turns = [], [], []
    for number in range(job["in_turn"]):
        if job["in_turn"] > 1:
            memory.give_back()
            processes.pass_on(job)
        steps = job["steps"] + (0 if number else warm_up)
        aim(trainer, tokens, completions, steps)
        if job["profile"]:
            clock.profile_step = steps - 1
        began = time.time()
        trainer.train()
        turns.append((began, time.time()))
        if len(clock.steps) <= warm_up:
            return {"error": f"the time limit of its process was over after {len(clock.steps)} steps"}
        lengths = figures_of(trainer, "completions/mean_length")
        if set(lengths) != {float(tokens)}:
            raise RuntimeError(f"completions of {sorted(set(lengths))} tokens were trained on instead of {tokens}")
        mean += figures_of(trainer, "sampling/sampling_logp_difference/mean")
        largest += figures_of(trainer, "sampling/sampling_logp_difference/max")
    memory.mark("end")
    found: dict[str, Any] = {"turns": turns}
    if mean:
        found |= {"difference": statistics.mean(mean), "difference_max": max(largest)}
    if job["in_turn"] == 1:
        samples = memory.between(begin, memory.times["end"])
        peak = max(size for _, size in samples)
        found |= {"memory_end": memory.marks["end"], "memory_peak": peak, "memory": samples}
    return {
        **clock.medians(warm_up),
        **found,
        "steps_measured": len(clock.steps) - warm_up,
        "step_seconds": [sum(step["step"]) for step in clock.steps],
        "retried": memory.retried() - retried,
        "spans": clock.spans,
    }


def figures_of(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def aim(trainer: Any, tokens: int, completions: int, steps: int) -> None:
    """Make the next `train()` one of this cell, on a trainer that was built for one at least as large.

    In TRL 1.10 to 1.16 the sampler, the data loader, the loop and the engine's request read these when they are made
    or used, and nothing else remembers a batch size or a length.
    """
    args, per_device = trainer.args, min(8, completions)
    args.max_steps = steps
    args.per_device_train_batch_size = args.num_generations = trainer.num_generations = per_device
    args.gradient_accumulation_steps = args.steps_per_generation = completions // per_device
    args.generation_batch_size = completions
    args.max_completion_length = trainer.max_completion_length = tokens
    if hasattr(trainer, "vllm_generation"):
        trainer.vllm_generation.max_completion_length = tokens
    trainer._step, trainer._buffered_inputs = 0, None


def stop_in_time(trainer: Any, job: dict[str, Any]) -> None:
    from transformers import TrainerCallback

    class Deadline(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= time.time() > job["deadline"]

    trainer.add_callback(Deadline())


if __name__ == "__main__":
    main()
