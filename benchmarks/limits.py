"""The longest context that trains under a cap of the device's memory, and where the bytes are.

    python benchmarks/limits.py --model 32b --method lora --cap 79.6 --tokens 6144 --completion 1024
    python benchmarks/limits.py --model 8b --method qlora --cap 79.6 --tokens 42000 --tokens 47500 --completion 1024
    python benchmarks/limits.py --model 8b --method lora --cap 79.6 --share 0.95 --tokens 4096 --no-standby
    python benchmarks/limits.py --model tiny --tokens 256 --completion 32          # on a CPU: no cap, nothing runs out

One GRPO step (--steps for more) of 2 generations, one sequence in a micro-step, gradient checkpointing, LoRA r=32 on
all linear layers; random weights of a real shape, made on the device. A sequence has --tokens tokens, of which
--completion are sampled and the rest is the prompt: what is kept of the layers depends on all of them, the logits only
on the sampled ones (--liger: TRL's chunked loss, which never has all logits at once; it needs liger-kernel). Sampling
takes as long as there are new tokens.

The cap is another process that holds the rest of the device's memory: a cap, not a smaller GPU. (An 80 GB H100 has 79.6
GiB.) Each --tokens is a process of its own; one that runs out of memory, or is refused, is a line with its message.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grid
import processes
from measure import Memory, gib_of, kv_cache
from shapes import SHAPES, make_model, prompts, stock_on_cpu, versions

HOLDING = "holding "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="8b")
    parser.add_argument("--method", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument("--side", choices=("patched", "stock"), default="patched")
    parser.add_argument("--cap", type=float, metavar="GIB", help="how much of the device may be used (default: all)")
    parser.add_argument("--tokens", type=int, action="append", help="of prompt and completion; may be repeated")
    parser.add_argument("--completion", type=int, default=512, metavar="N", help="new tokens among them (default: 512)")
    parser.add_argument("--generations", type=int, default=2, help="per prompt, and per step (default: 2)")
    parser.add_argument("--share", type=float, help="vllm_gpu_memory_utilization, as a share of the cap (default: what "
                        "the model and the optimizer leave, but 1 GiB)")  # fmt: skip
    parser.add_argument("--no-standby", action="store_true", help="the KV cache stays while training")
    parser.add_argument("--engine-first", action="store_true", help="build the engine before there is an adapter, as "
                        "FastLanguageModel does, and say how much is in use when it sleeps")  # fmt: skip
    parser.add_argument("--rollouts", choices=("merged", "adapter"), help="as in PatchFastRL(rollouts=...)")
    parser.add_argument("--liger", action="store_true", help="use_liger_kernel: TRL's chunked loss")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--limit", type=float, default=540, metavar="SECONDS", help="of each process")
    parser.add_argument("--json", type=Path, help="write all figures here, after each result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--hold", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine_first and options.side == "stock":
        parser.error("--engine-first: stock TRL builds the engine itself")
    if options.hold is not None:
        hold(options.hold)
        return
    if options.child:
        measure(json.loads(options.child))
        return
    not_of_a_job = ("tokens", "no_standby", "limit", "json", "child", "hold")
    more = {name: value for name, value in vars(options).items() if name not in not_of_a_job}
    more["standby"] = not options.no_standby
    results: list[dict[str, Any]] = []

    def on_result(job: dict[str, Any], result: dict[str, Any]) -> None:
        results.append({**job, **result})
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
        show(results[-1])

    def on_end(child: processes.Child) -> None:
        if (problem := child.problem()) is not None:
            processes.show_failure(child)
            if not any(child.job.items() <= result.items() for result in results):
                on_result(child.job, {"error": problem})

    with capped(options.cap) as held:
        jobs = [{"tokens": tokens, **more, "held": held} for tokens in options.tokens or [4096]]
        processes.run(__file__, jobs, on_result, on_end, limit=options.limit)


# The cap ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def capped(cap: float | None) -> Iterator[float]:
    """Another process has all but `cap` GiB of the device's memory. Yields how much that is."""
    if cap is None:
        yield 0.0
        return
    command = [sys.executable, __file__, "--hold", str(cap)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            said = holder.stdout.readline()
            if not said.startswith(HOLDING):
                raise SystemExit("the process that holds the memory did not start")
            held = float(said.removeprefix(HOLDING))
            print(f"Another process holds {held:.2f} GiB of the device: {cap:g} GiB may be used.", flush=True)
            yield held
        finally:
            holder.stdin.close()  # and it ends; so it does if this process is killed


def hold(cap: float) -> None:
    """Keep all but `cap` GiB of the device until the standard input ends. Without a GPU there is nothing to keep."""
    import torch

    kept, held = None, 0.0
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        kept = torch.empty(max(free - int(cap * 2**30), 0), dtype=torch.uint8, device="cuda")
        free, total = torch.cuda.mem_get_info()
        held = (total - free) / 2**30
    print(f"{HOLDING}{held}", flush=True)
    sys.stdin.read()
    del kept


# One process --------------------------------------------------------------------------------------------------------


def measure(job: dict[str, Any]) -> None:
    """Build, sample, train; report how far it came and where the bytes were."""
    import torch

    processes.my_turn(job)
    gpu = torch.cuda.is_available()
    found: dict[str, Any] = {"phase": "importing"}
    with tempfile.TemporaryDirectory() as folder, Memory(gpu, job["held"]) as memory, contextlib.ExitStack() as stack:
        try:
            steps(job, found, folder, memory, stack, gpu)
        except BaseException as error:
            text = str(error).strip() or repr(error)
            found["error"] = f"{type(error).__name__} while {found['phase']}: {text}"
            raise
        finally:
            found["peak"] = max([size for _, size in memory.samples], default=0.0)
            found["marks"], found["details"], found["memory"] = memory.marks, memory.details, memory.samples
            processes.report(job, found)


def steps(
    job: dict[str, Any], found: dict[str, Any], folder: str, memory: Memory, stack: contextlib.ExitStack, gpu: bool
) -> None:
    os.environ["UNSLOTH_VLLM_STANDBY"] = "1" if job["standby"] else "0"
    if job["side"] == "patched":
        from patchfastrl import PatchFastRL

        PatchFastRL(rollouts=job["rollouts"])
    import torch
    from peft import LoraConfig
    from transformers import set_seed
    from trl import GRPOTrainer

    import trl.generation.vllm_generation as generation  # isort: skip

    set_seed(0)
    found["phase"] = "making the model"
    model, tokenizer = make_model(job["model"], job["method"], folder, gpu)
    if gpu:
        torch.cuda.empty_cache()
    memory.mark("model")
    share = 0.3
    if gpu:
        free, total = torch.cuda.mem_get_info()
        usable = total - job["held"] * 2**30
        left = free - 2**30 - states(model, job)
        share = left / total if job["share"] is None else job["share"] * usable / total
    found["gpu_memory_utilization"] = share
    if job["side"] == "stock":
        generation.LLM = functools.partial(generation.LLM, load_format="dummy")
        if not gpu:
            stack.enter_context(stock_on_cpu(generation))
    many, prompt = job["generations"], job["tokens"] - job["completion"]
    sized = {**job, "share": share, "cells": [[job["completion"], many]]}
    args = grid.configuration(
        sized, folder, gpu, vllm_enable_sleep_mode=gpu and job["standby"], vllm_max_model_length=job["tokens"],
        per_device_train_batch_size=1, gradient_accumulation_steps=many, num_generations=many,
        gradient_checkpointing_kwargs={"use_reentrant": False}, use_liger_kernel=job["liger"],
    )  # fmt: skip
    lora = LoraConfig(r=job["rank"], lora_alpha=job["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    found["phase"] = "building the engine"
    if job["engine_first"]:
        from patchfastrl import engine

        model.vllm_engine = engine.build(
            model, tokenizer, max_lora_rank=job["rank"], max_model_len=job["tokens"], max_num_seqs=many, seed=0,
            gpu_memory_utilization=share, enable_sleep_mode=job["standby"], logprobs_mode="processed_logprobs",
        )  # fmt: skip
        model.vllm_engine.sleep()
        if gpu:
            torch.cuda.empty_cache()
        memory.mark("engine asleep")
    trainer = GRPOTrainer(
        model=model, args=args, processing_class=tokenizer, peft_config=None if job["method"] == "full" else lora,
        **{**grid.given(sized), "train_dataset": prompts(8, prompt)},
    )  # fmt: skip
    llm = trainer.vllm_generation.llm
    if gpu:
        torch.cuda.empty_cache()
    memory.mark("ready")
    begun: dict[str, float] = {}
    generate = llm.generate

    def generated(*arguments: Any, **kwargs: Any) -> Any:
        found["phase"] = "sampling"
        memory.mark("sampling begins")
        output = generate(*arguments, **kwargs)
        memory.mark("sampling ends")
        trains()
        return output

    def trains() -> None:
        found["phase"] = "training"
        begun["training"] = time.perf_counter() - memory.begin
        if gpu:
            torch.cuda.reset_peak_memory_stats()

    def slept(*arguments: Any, **kwargs: Any) -> None:
        sleep(*arguments, **kwargs)
        trains()

    sleep = llm.sleep
    llm.generate, llm.sleep = generated, slept
    grid.stop_in_time(trainer, job)
    trainer.train()
    memory.mark("trained")
    found["phase"] = "done"
    found["sampling"] = highest(memory, memory.times["sampling begins"], memory.times["sampling ends"])
    found["training"] = highest(memory, begun["training"], memory.times["trained"])
    found["tokens_trained_on"] = grid.figures_of(trainer, "num_tokens")[-1] / (many * trainer.state.global_step)
    found["seconds"] = {
        "sampling": memory.times["sampling ends"] - memory.times["sampling begins"],
        "training": memory.times["trained"] - begun["training"],
    }
    unmapped = unmapped_while_training(memory) if gpu else 0.0
    found["bytes"] = where(trainer, job, gpu, found["training"], unmapped)
    found["unmapped_while_training"] = unmapped
    found["retried"] = memory.retried()
    if job["side"] == "patched":
        found["layers_kept"] = llm.report()["layers_kept"]
    found |= versions()


def states(model: Any, job: dict[str, Any]) -> int:
    """Bytes of what training adds for good: the adapter in float32, and AdamW's two states of what is trained."""
    from patchfastrl.plan import shape_of_model

    shape = shape_of_model(model, job["rank"])
    return 2 * shape.itemsize * shape.parameters if job["method"] == "full" else 3 * 4 * shape.adapter


def highest(memory: Memory, begin: float, end: float) -> float:
    """GiB. Between two samples 20 ms pass, so what torch counted itself is more exact (`where`)."""
    return max([size for _, size in memory.between(begin, end)], default=memory.used())


def where(trainer: Any, job: dict[str, Any], gpu: bool, driver: float, unmapped: float) -> dict[str, float]:
    """GiB at the peak of training, by what they are for: counted, but for the two lines that say computed.

    Args:
        driver: what the driver saw. unmapped: what torch counts and the driver does not.
    """
    import torch

    from patchfastrl.packed import storages_of
    from patchfastrl.sharing import base_parameters

    model, text = trainer.model, trainer.model.config.get_text_config()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [t for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    parts = {
        "weights": gib_of(t for p in base_parameters(model).values() for t in storages_of(p)),
        "adapter": 0.0 if job["method"] == "full" else gib_of(trained),
        "gradients": sum(p.numel() * p.element_size() for p in trained) / 2**30,
        "optimizer": gib_of(state),
    }
    itemsize = 2 if gpu else 4
    computed = {
        "computed: inputs that checkpointing keeps of the layers": text.num_hidden_layers * job["tokens"]
        * text.hidden_size * itemsize / 2**30,
        "computed: one tensor of all logits, in float32": job["completion"] * text.vocab_size * 4 / 2**30,
    }  # fmt: skip
    if not gpu:
        return parts | computed
    if not job["standby"]:
        parts["KV cache"] = gib_of(kv_cache(trainer.vllm_generation.llm))
    allocated, reserved = (
        torch.cuda.max_memory_allocated() / 2**30 - unmapped,
        torch.cuda.max_memory_reserved() / 2**30 - unmapped,
    )
    parts["activations, logits, the engine's buffers"] = allocated - sum(parts.values())
    parts["kept by torch's allocator, unused"] = reserved - allocated
    parts["outside of torch: CUDA's context, kernels, graphs"] = driver - reserved
    return {**parts, "in all, at the driver": driver, **computed}


def unmapped_while_training(memory: Memory) -> float:
    """GiB in vLLM's allocator that torch counts as reserved although the engine has given them back."""
    from vllm.device_allocator.cumem import CuMemAllocator

    if memory.details["ready"]["reserved"] <= memory.details["ready"]["driver"]:
        return 0.0  # not counted, or not given back
    return CuMemAllocator.get_instance().get_current_usage() / 2**30


def show(result: dict[str, Any]) -> None:
    prompt = result["tokens"] - result["completion"]
    cap = f"cap {result['cap']:g} GiB" if result["cap"] else "no cap"
    print(
        f"\n{result['model']} {result['method']} {result['side']}: {result['tokens']} tokens ({prompt} of the prompt, "
        f"{result['completion']} new), {result['generations']} generations, {cap}, standby "
        f"{'on' if result['standby'] else 'off'}, "
        f"vllm_gpu_memory_utilization {result.get('gpu_memory_utilization', 0):.3f} of the device"
    )
    print(f"  {'DOES NOT TRAIN: ' + result['error'] if 'error' in result else 'TRAINS'}")
    marks = {**result.get("marks", {}), **{k: result[k] for k in ("sampling", "training", "peak") if k in result}}
    print("  device memory, GiB: " + ", ".join(f"{name} {size:.2f}" for name, size in marks.items()))
    if result.get("retried"):
        print(f"  allocations that were retried after torch had given back what it kept: {result['retried']}")
    if result.get("layers_kept") is not None:
        print(f"  layers that were not recomputed: {result['layers_kept']}")
    if "bytes" in result:
        print("  at the peak of training, GiB:")
        for name, size in result["bytes"].items():
            print(f"    {size:9.3f}  {name}")
    if result["cap"] and "peak" in result:
        print(f"  left of the cap at the highest: {result['cap'] - result['peak']:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
