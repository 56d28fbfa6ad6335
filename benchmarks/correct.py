"""Is it right? Engine against trainer, with standby, CUDA graphs and torch.compile on; PASS or FAIL, with the figures.

    python benchmarks/correct.py                           # 0.5b, everything, one process after another
    python benchmarks/correct.py --parallel 2 --json out.json
    python benchmarks/correct.py --only lora --only full --model 1.5b
    python benchmarks/correct.py --model tiny --steps 5 --long 30        # on a CPU

Log-probabilities that the engine returned for 16 x 64 tokens that it sampled are compared with those of the trainer's
model: as built, after an in-place write into trainer parameters, after publishing another adapter, after sleep and
wake, after another adapter (or a write) while the engine slept, and after training. They may differ on average no more
than stock TRL's do right after its weight sync (times 1.15, for the noise of 1,024 tokens); the largest one no more
than twice stock's. Each comparison has its control, which must differ at least five times as much: the engine's
log-probabilities from before the change, against the changed model; where nothing changed (as built, plain sleep and
wake, after training): those of other tokens. Prompts are always the same, so that a prefix cached for an older policy
would show.

In training, after --steps the base must be the same bit for bit, and from there to --long (lora) the driver's memory
must not grow. lora, qlora: the adapter merged into the engine's copy; -adapter: in the engine's slot; -no-standby:
merged, and the engine never sleeps, so that the copy's memory must be there while a batch runs, and no longer. On a GPU
the engine's memory stays in training, as that fits beside it: a change meanwhile, and `sleep`, are checked once more.
fp8-cache, on a GPU only: FastLanguageModel.from_pretrained(float8_kv_cache=True).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grid
import processes
from measure import Memory, gib_of, kv_cache
from shapes import SHAPES, make_model, stock_on_cpu, versions

KINDS = {  # name: (side, method)
    "stock-lora": ("stock", "lora"),
    "stock-full": ("stock", "full"),
    "lora": ("patched", "lora"),
    "lora-no-standby": ("patched", "lora"),
    "lora-adapter": ("adapter", "lora"),
    "qlora": ("patched", "qlora"),
    "qlora-adapter": ("adapter", "qlora"),
    "full": ("patched", "full"),
    "fp8-cache": ("patched", "lora"),
}
PROMPTS, LENGTH, TOKENS = 16, 40, 64
NOISE, NOISE_MAX = 1.15, 2.0  # of stock's difference
FLOOR = 1e-5  # for float32, where stock's is next to nothing
FLOOR_4_BITS = 1e-3  # TRL keeps the adapter of a 4-bit model in bfloat16, and PEFT computes with it in that
CONTROL = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="0.5b")
    parser.add_argument("--only", choices=KINDS, action="append", help="default: all that the machine can run")
    parser.add_argument("--steps", type=int, default=50, help="until the base is compared (default: 50)")
    parser.add_argument("--long", type=int, default=300, help="until the memory is compared (default: 300)")
    parser.add_argument("--share", type=float, default=0.3, help="vllm_gpu_memory_utilization")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--parallel", type=int, default=1, metavar="N",
                        help="N processes at the same time, each with a GPU of its own (default: 1)")  # fmt: skip
    parser.add_argument("--limit", type=float, default=580, metavar="SECONDS", help="of each process")
    parser.add_argument("--json", type=Path, help="write all figures here, after each result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job = json.loads(options.child)
        with processes.reported(job):
            processes.my_turn(job)
            (stock if job["side"] == "stock" else float8 if job["kind"] == "fp8-cache" else patched)(job)
        return
    raise SystemExit(Checks(options).run())


class Checks:
    """The processes, and what they found."""

    def __init__(self, options: Any) -> None:
        self._options = options
        self._found: list[dict[str, Any]] = []

    def run(self) -> int:
        """Returns the number of checks that failed."""
        options = self._options
        kinds = list(options.only or KINDS)
        if options.only is None and not on_gpu():
            kinds.remove("fp8-cache")
            print("fp8-cache is left out: vLLM's CPU backend has no 8-bit KV cache", flush=True)
        needed = [f"stock-{'full' if KINDS[kind][1] == 'full' else 'lora'}" for kind in kinds]
        more = {k: getattr(options, k) for k in ("model", "steps", "long", "share", "rank")}
        jobs = [
            {"kind": kind, "side": KINDS[kind][0], "method": KINDS[kind][1], "cells": [[TOKENS, PROMPTS]], **more}
            for kind in dict.fromkeys([*needed, *kinds])
        ]
        processes.run(
            __file__, jobs, self._on_result, self._on_end, limit=options.limit, at_once=options.parallel
        )  # fmt: skip
        self._judge()
        failed = sum(not found["passed"] for found in self._found)
        print(f"\n{len(self._found) - failed} of {len(self._found)} passed")
        return min(failed, 100)

    def _on_result(self, job: dict[str, Any], result: dict[str, Any]) -> None:
        if "error" in result:
            result = {"check": "the process", "passed": False, "said": result["error"]}
        self._found.append({"kind": job["kind"], "model": job["model"], **result})
        self._write()
        passed = result.get("passed")
        print(f"{'PASS' if passed else '...' if passed is None else 'FAIL'} {line(self._found[-1])}", flush=True)

    def _on_end(self, child: processes.Child) -> None:
        problem = child.problem()
        if problem is not None:
            processes.show_failure(child)
            if not any(f["kind"] == child.job["kind"] and not f.get("passed", True) for f in self._found):
                self._on_result(child.job, {"error": problem})

    def _judge(self) -> None:
        """Compare with stock's differences, which are known now."""
        stocks = {(f["kind"], f["like"]): f for f in self._found if f["kind"].startswith("stock-") and "like" in f}
        print("\nEngine against trainer, and stock TRL's own difference right after its sync:")
        for found in self._found:
            if "like" not in found:
                continue
            full = found["kind"] in ("full", "stock-full")
            stock = stocks.get(("stock-full" if full else "stock-lora", found["like"]))
            if stock is None:
                found |= {"passed": False, "said": "no difference of stock TRL's to compare with"}
            else:
                found["stock_mean"], found["stock_max"] = stock["mean"], stock["max"]
                floor = floor_of(KINDS[found["kind"]][1])
                found["passed"] = (
                    found["mean"] <= max(NOISE * stock["mean"], floor)
                    and found["max"] <= max(NOISE_MAX * stock["max"], floor)
                    and found["control"] >= CONTROL * max(found["mean"], floor)
                )
            print(f"{'PASS' if found['passed'] else 'FAIL'} {line(found)}", flush=True)
        self._write()

    def _write(self) -> None:
        if self._options.json:
            self._options.json.write_text(json.dumps(self._found, indent=1))


def line(found: dict[str, Any]) -> str:
    hidden = ("kind", "check", "model", "passed", "like", "versions", "series")
    figures = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items() if k not in hidden]
    return f"{found['kind']:14} {found['check']}: {', '.join(figures)}"


def floor_of(method: str) -> float:
    return FLOOR_4_BITS if method == "qlora" else FLOOR


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# Sampling and scoring -----------------------------------------------------------------------------------------------


def sample(llm: Any) -> tuple[list[list[int]], Any]:
    """Sequences that the engine made of the fixed prompts, and its log-probabilities of what it sampled."""
    import torch
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=TOKENS, logprobs=0, ignore_eos=True, detokenize=False)
    prompts = [[2 + (31 * i + 7 * n) % 500 for i in range(LENGTH)] for n in range(PROMPTS)]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling_params=params, use_tqdm=False)
    made = [output.outputs[0] for output in outputs]
    logps = [[found[t].logprob for t, found in zip(m.token_ids, m.logprobs, strict=True)] for m in made]
    return [ids + list(m.token_ids) for ids, m in zip(prompts, made, strict=True)], torch.tensor(logps)


def score(model: Any, sequences: list[list[int]], first: int = LENGTH) -> Any:
    """The trainer's model's log-probabilities of the tokens from number `first` on, as training computes them."""
    import torch

    device = next(model.parameters()).device
    training, found = model.training, []
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for start in range(0, len(sequences), 4):
            ids = torch.tensor(sequences[start : start + 4], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[:, first - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(-1, ids[:, first:, None])[..., 0].cpu())
    model.train(training)
    return torch.cat(found)


def difference(one: Any, other: Any) -> dict[str, float]:
    distance = (one - other).abs()
    return {"mean": distance.mean().item(), "max": distance.max().item()}


class Compared:
    """One comparison after another, each with the control of the one before."""

    def __init__(self, job: dict[str, Any], model: Any) -> None:
        self._job, self._model = job, model
        self._before: tuple[Any, Any] | None = None

    def __call__(self, check: str, llm: Any, like: str, changed: bool = True) -> None:
        """Compare now. `changed`: the policy is another one than last time."""
        sequences, engine = sample(llm)
        found: dict[str, Any] = difference(engine, score(self._model, sequences))
        if changed and self._before is not None:
            old_sequences, old_engine = self._before
            # Had the engine not followed, this would be the difference.
            found["control"] = difference(old_engine, score(self._model, old_sequences))["mean"]
        else:  # somebody else's tokens: each sequence's log-probabilities against the next one's
            found["control"] = difference(engine, engine.roll(1, 0))["mean"]
        self._before = (sequences, engine)
        processes.report(self._job, {"check": check, "like": like, **found})


# What the processes do ----------------------------------------------------------------------------------------------


def trainer_of(job: dict[str, Any], folder: str, stack: contextlib.ExitStack) -> Any:
    """A GRPO trainer, stock or patched, with its engine awake."""
    import torch
    from peft import LoraConfig
    from transformers import set_seed
    from trl import GRPOTrainer

    import trl.generation.vllm_generation as generation  # isort: skip

    set_seed(0)
    gpu = torch.cuda.is_available()
    model, tokenizer = make_model(job["model"], job["method"], folder, gpu)
    if job["side"] == "stock":
        generation.LLM = functools.partial(generation.LLM, load_format="dummy")
        if not gpu:
            stack.enter_context(stock_on_cpu(generation))
    args = grid.configuration(
        job, folder, gpu, vllm_enable_sleep_mode=gpu and sleeps(job), learning_rate=1e-5,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    lora = LoraConfig(r=job["rank"], lora_alpha=job["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    return GRPOTrainer(
        model=model, args=args, processing_class=tokenizer, peft_config=None if job["method"] == "full" else lora,
        **grid.given(job),
    )  # fmt: skip


def another_adapter(model: Any, seed: int) -> None:
    """New values, in place, of which the product is half as large as the weights are."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    sigma = getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                scale = parameter.shape[1] ** -0.5
            elif ".lora_B." in name:
                inner = dict(model.named_parameters())[name.replace(".lora_B.", ".lora_A.")].shape[1]
                scale = 0.5 * sigma * (inner / parameter.shape[1]) ** 0.5
            else:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def write(model: Any) -> None:
    """Every second layer's o_proj and down_proj change their sign, in place. Written twice it is as it was."""
    import torch

    from patchfastrl.packed import scales_of
    from patchfastrl.sharing import base_parameters

    with torch.no_grad():
        for name, parameter in base_parameters(model).items():
            words = name.split(".")
            if words[-2] in ("o_proj", "down_proj") and any(w.isdigit() and int(w) % 2 for w in words):
                for tensor in scales_of(parameter) or [parameter.data]:
                    tensor.neg_()


def stock(job: dict[str, Any]) -> None:
    """Stock TRL's difference right after its own weight sync: what ours is compared with."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trainer = trainer_of(job, folder, stack)
        llm, compared = trainer.vllm_generation.llm, Compared(job, trainer.model)

        def synced(check: str, like: str) -> None:
            trainer.vllm_generation.sync_weights()
            if on_gpu():
                llm.wake_up(tags=["kv_cache"])
            compared(check, llm, like)
            if on_gpu():
                llm.sleep(level=2)

        synced("after the first weight sync", "fresh")
        write(trainer.model)
        synced("after the sync of other weights", "written")
        write(trainer.model)
        if job["method"] != "full":
            another_adapter(trainer.model, 1)
            synced("after the sync of another adapter", "adapter")


def sleeps(job: dict[str, Any]) -> bool:
    return not job["kind"].endswith("-no-standby")


def patched(job: dict[str, Any]) -> None:
    os.environ["UNSLOTH_VLLM_STANDBY"] = "1" if sleeps(job) else "0"
    from patchfastrl import PatchFastRL

    PatchFastRL(rollouts="adapter" if job["side"] == "adapter" else "merged")
    import torch

    from patchfastrl.errors import PatchFastRLError

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        memory = stack.enter_context(Memory(torch.cuda.is_available()))
        trainer = trainer_of(job, folder, stack)
        llm, model, adapted = trainer.vllm_generation.llm, trainer.model, job["method"] != "full"
        compared = Compared(job, model)
        processes.report(job, engine_check(llm))
        llm.wake_up()
        llm.publish()
        if not sleeps(job) and on_gpu():
            processes.report(job, scratch_check(llm, memory))
        compared("as built", llm, "fresh")
        write(model)
        llm.publish()
        compared("after an in-place write into trainer parameters", llm, "written")
        write(model)
        like = "fresh"
        if adapted:
            like = "adapter"
            llm.publish()
            another_adapter(model, 1)
            said = None
            try:
                sample(llm)
            except PatchFastRLError as error:
                said = str(error)
            check = "sampling before another adapter is published is refused"
            processes.report(job, {"check": check, "passed": said is not None, "said": said})
            llm.publish()
            compared("after publishing another adapter", llm, like)
        if sleeps(job):
            llm.sleep(level=2)
            llm.wake_up()
            llm.publish()
            compared("after sleep and wake", llm, like, changed=False)
        if adapted or sleeps(job):
            if sleeps(job):
                llm.sleep(level=2)
            if adapted:
                another_adapter(model, 2)
            else:
                write(model)
            if sleeps(job):
                llm.wake_up()
            llm.publish()
            change = "publishing another adapter" if adapted else "an in-place write"
            compared(
                f"after {change} {'while it slept' if sleeps(job) else 'once more'}",
                llm,
                like if adapted else "written",
            )
            if not adapted:
                write(model)
        if sleeps(job):
            llm.sleep(level=2)
        train(job, trainer, memory)
        llm.wake_up()
        llm.publish()
        compared("after training", llm, like, changed=False)
        if sleeps(job) and on_gpu():
            from patchfastrl.room import AtTheEnd

            trainer.remove_callback(AtTheEnd)  # it would release what is looked at here
            grid.aim(trainer, 16, PROMPTS, 3)
            trainer.train()
            stayed = llm._asleep.released() == 0
            if adapted:
                another_adapter(model, 3)
            else:
                write(model)
            llm.wake_up()
            llm.publish()
            change = "publishing another adapter" if adapted else "an in-place write"
            compared(f"after {change} while it slept and its memory stayed", llm, like if adapted else "written")
            if not adapted:
                write(model)
            grid.aim(trainer, 16, PROMPTS, 1)
            trainer.train()
            processes.report(job, stay_check(llm, memory, stayed))


def stay_check(llm: Any, memory: Memory, stayed: bool) -> dict[str, Any]:
    """The driver still sees the memory of an engine that sleeps while training fits beside it, until `sleep`."""
    import torch

    cache = gib_of(kv_cache(llm)) - llm._asleep.left_out() / 2**30
    torch.cuda.synchronize()
    before, awake = memory.used(), llm.awake
    llm.sleep()
    torch.cuda.synchronize()
    freed = before - memory.used()
    return {
        "check": "the engine's memory stays where training fits beside it, and goes when it is asked for",
        "passed": stayed and not awake and freed > 0.95 * (cache + llm.shared.own_bytes / 2**30),
        "stayed": stayed, "freed": freed, "kv_cache": cache, "own_gib": llm.shared.own_bytes / 2**30,
    }  # fmt: skip


def engine_check(llm: Any) -> dict[str, Any]:
    """That what is checked is what users run: compiled and graphed on a GPU, piece by piece where it can be."""
    config = llm.llm_engine.vllm_config
    mode = getattr(config.compilation_config.cudagraph_mode, "name", None)
    eager = config.model_config.enforce_eager
    in_pieces = type(llm.shared.engine_model).__name__ in ("LlamaForCausalLM", "Qwen2ForCausalLM")
    wanted = "FULL_DECODE_ONLY" if in_pieces else "FULL_AND_PIECEWISE"
    return {
        "check": "the engine is compiled and uses CUDA graphs" if on_gpu() else "the engine is eager on a CPU",
        "passed": (not eager and mode == wanted) if on_gpu() else eager,
        "cudagraph_mode": str(mode),
        "compilation": str(getattr(config.compilation_config, "mode", None)),
        "merged": llm.merges,
        "versions": versions(),
    }


def scratch_check(llm: Any, memory: Memory) -> dict[str, Any]:
    """The driver sees the engine's own weights while a batch runs, and neither before nor after it."""
    import torch

    def settled() -> float:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return memory.used()

    own = llm.shared.own_bytes / 2**30
    sample(llm)  # what the first batch makes for good
    before, begin = settled(), time.perf_counter() - memory.begin
    sample(llm)
    during = max(size for _, size in memory.between(begin, time.perf_counter() - memory.begin))
    after = settled()
    return {
        "check": "the copy's memory is there while a batch runs, and no longer",
        "passed": during - before > 0.9 * own and after - before < 0.1 * own,
        "own_gib": own, "before": before, "during": during, "after": after,
    }  # fmt: skip


def train(job: dict[str, Any], trainer: Any, memory: Memory) -> None:
    """The base stays what it is, the adapter does not, and memory does not grow."""
    import torch
    from transformers import TrainerCallback

    from patchfastrl.checksum import checksum
    from patchfastrl.packed import storages_of
    from patchfastrl.sharing import base_parameters

    steps, model = job["steps"], trainer.model
    longer = job["kind"] == "lora"
    grid.aim(trainer, 16, PROMPTS, max(steps, job["long"]) if longer else steps)

    def base() -> int:
        return checksum([t for p in base_parameters(model).values() for t in storages_of(p)])

    def trained() -> int:
        return checksum([p for p in model.parameters() if p.requires_grad])

    begin = (base(), trained())
    after: list[tuple[int, int]] = []
    sizes: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            sizes.append(memory.used())
            if state.global_step == steps:
                after.append((base(), trained()))
            control.should_training_stop |= time.time() > job["deadline"] - 20

    trainer.add_callback(Watch())
    trainer.train()
    check = (
        f"after {steps} steps the base is bit-identical" if job["method"] != "full" else f"{steps} steps of training"
    )
    if not after:
        processes.report(job, {"check": check, "passed": False, "said": f"only {len(sizes)} steps within the limit"})
        return
    same, moved = after[0][0] == begin[0], after[0][1] != begin[1]
    passed = moved and (same or job["method"] == "full")
    processes.report(job, {"check": check, "passed": passed, "same_base": same, "trained_weights_moved": moved})
    mean = grid.figures_of(trainer, "sampling/sampling_logp_difference/mean")
    largest = grid.figures_of(trainer, "sampling/sampling_logp_difference/max")
    first, last = statistics.mean(mean[:5]), statistics.mean(mean[-5:])
    processes.report(job, {"check": "TRL's own log-probability difference does not grow in training",
        "passed": last <= max(1.5 * first, floor_of(job["method"])), "steps": len(mean),
        "first_steps": first, "last_steps": last, "max": max(largest)})  # fmt: skip
    if longer:
        settled = min(steps, len(sizes) // 2)
        early, late = max(sizes[settled - settled // 5 - 1 : settled]), max(sizes[-max(settled // 5, 1) :])
        growth = (late - early) * 1024
        limit = 16 if torch.cuda.is_available() else 64  # MiB; the resident set of a process is never still
        processes.report(job, {"check": f"memory from step {settled} to step {len(sizes)}",
            "passed": growth <= limit and len(sizes) == max(steps, job["long"]), "growth_mib": growth,
            "limit_mib": limit, "gib_early": early, "gib_late": late,
            "series": [round(size, 4) for size in sizes]})  # fmt: skip


def float8(job: dict[str, Any]) -> None:
    """An 8-bit KV cache: the model samples, agrees with the trainer's side within reason, and survives standby."""
    os.environ["UNSLOTH_VLLM_STANDBY"] = "1"
    from patchfastrl import FastLanguageModel, PatchFastRL

    PatchFastRL()
    import torch
    from vllm import SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = make_model(job["model"], "full", folder, torch.cuda.is_available())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=LENGTH + TOKENS + 16, load_in_4bit=False, float8_kv_cache=True,
            gpu_memory_utilization=job["share"], max_lora_rank=job["rank"],
        )  # fmt: skip
    model = FastLanguageModel.get_peft_model(model, r=job["rank"], lora_alpha=job["rank"])
    llm = model.vllm_engine
    kind = str(llm.llm_engine.vllm_config.cache_config.cache_dtype)
    processes.report(job, {"check": "the KV cache is in 8 bits", "passed": kind.startswith("fp8"), "dtype": kind})
    another_adapter(model, 1)

    def prompt_logps(sequences: list[list[int]]) -> Any:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": s} for s in sequences], sampling_params=params, use_tqdm=False)
        rows = [o.prompt_logprobs[LENGTH:] for o in outputs]
        return torch.tensor([
            [found[t].logprob for t, found in zip(s[LENGTH:], row, strict=True)]
            for s, row in zip(sequences, rows, strict=True)
        ])  # fmt: skip

    def compare(check: str) -> tuple[list[list[int]], Any]:
        sequences, engine = sample(llm)
        found = difference(engine, score(model, sequences))
        spread = engine.std().item()  # of the log-probabilities of what was sampled
        processes.report(job, {"check": check, "passed": found["mean"] <= 0.2 * spread, **found, "spread": spread})
        return sequences, engine

    llm.publish()
    sequences, _ = compare("8-bit KV cache, engine against trainer")
    llm.drop_prefixes()
    before = prompt_logps(sequences)
    llm.sleep(level=2)
    llm.wake_up()
    llm.publish()
    after = prompt_logps(sequences)
    found = difference(before, after)
    own = difference(before, score(model, sequences))["mean"]
    processes.report(job, {"check": "8-bit KV cache, the same tokens before and after sleep and wake",
        "passed": found["mean"] <= 0.1 * own, **found, "to_the_trainer": own})  # fmt: skip
    compare("8-bit KV cache, engine against trainer after sleep and wake")


if __name__ == "__main__":
    main()
