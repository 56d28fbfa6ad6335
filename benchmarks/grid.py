"""GRPO steps of real model shapes: stock TRL against PatchFastRL, phase by phase, with the memory over time.

    python benchmarks/grid.py --model 8b --method lora                    # stock, then patched
    python benchmarks/grid.py --model 0.5b --model 8b --method lora --method full --tokens 2048 --json out.json
    python benchmarks/grid.py --model tiny --tokens 16 --completions 8 --steps 3   # on a CPU, in a minute or two

Weights are random and made on the device, so no checkpoint is needed; random models never stop, so every completion has
exactly the asked length. Each cell and side is a process of its own. Figures are medians of the steps after the first;
memory is the driver's count for the whole device (on a CPU: the resident set).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
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
                     "num_attention_heads": 32, **LLAMA}),
    "32b": ("Qwen3", {"vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                      "num_attention_heads": 64, "head_dim": 128, **LLAMA}),
}  # fmt: skip
SIDES = ("stock", "patched", "adapter")
PHASES = (
    ("step", "whole step, s"),
    ("rollout", "  rollout in all, s"),
    ("generate", "    llm.generate, s"),
    ("weights", "    weights to the engine, ms"),
    ("standby", "    sleep + wake, ms"),
    ("logprobs", "    old log-probabilities, s"),
    ("micro", "  training micro-step, s"),
    ("first", "first step, s"),
    ("ready", "trainer ready, s"),
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
    parser.add_argument("--side", choices=SIDES, action="append", help="default: stock and patched. adapter: patched, "
                        "with the adapter beside the weights instead of merged into a copy")  # fmt: skip
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--share", type=float, default=0.3, help="vllm_gpu_memory_utilization")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="print the kernels of one training step")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print("RESULT " + json.dumps(one_run(**json.loads(options.cell))), flush=True)
        return
    results = []
    for model in options.model or ["8b"]:
        for method in options.method or ["lora"]:
            for tokens in options.tokens or [512]:
                for completions in options.completions or [32]:
                    cell = {"model": model, "method": method, "tokens": tokens, "completions": completions}
                    more = {"steps": options.steps, "share": options.share, "rank": options.rank}
                    for side in options.side or SIDES[:2]:
                        done = in_process_of_its_own(cell | more | {"side": side, "profile": options.profile})
                        results.append(done)
                        if options.json:
                            options.json.write_text(json.dumps(results, indent=1))
                    print_table(cell, [r for r in results if cell.items() <= r.items()])


def in_process_of_its_own(cell: dict[str, Any]) -> dict[str, Any]:
    print(" ".join(f"{k}={v}" for k, v in cell.items()), file=sys.stderr, flush=True)
    # vLLM's cache of compiled graphs is keyed by its configuration, not by what is patched: one cache for each side.
    cache = Path(os.environ.get("VLLM_CACHE_ROOT", Path.home() / ".cache" / "vllm"), cell["side"])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_CACHE_ROOT": str(cache)}
    env.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    shown = [line for line in done.stdout.splitlines() if line.startswith("PROFILE ")]
    print("\n".join(line.removeprefix("PROFILE ") for line in shown), file=sys.stderr)
    if not lines:
        said = [s for s in (done.stdout + done.stderr).strip().splitlines() if not s.startswith("frame #")]
        error = "\n".join(said[-40:])
        print(error, file=sys.stderr, flush=True)
        return {**cell, "error": error.splitlines()[-1]}
    return {**cell, **json.loads(lines[-1].removeprefix("RESULT "))}


def print_table(cell: dict[str, Any], results: list[dict[str, Any]]) -> None:
    print(f"\n{cell['model']} {cell['method']}, {cell['completions']} x {cell['tokens']} tokens")
    print(f"| {'':34} | " + " | ".join(f"{r['side']:>9}" for r in results) + " |")
    print("|---|" + "---:|" * len(results))
    for key, label in PHASES:
        shown = [f"{r[key]:9.3g}" if r.get(key) is not None else f"{'':9}" for r in results]
        print(f"| {label:34} | " + " | ".join(shown) + " |", flush=True)
    for result in results:
        if "error" in result:
            print(f"{result['side']} did not run: {result['error']}")


# One side -----------------------------------------------------------------------------------------------------------


def one_run(
    *, side: str, model: str, method: str, tokens: int, completions: int, steps: int, share: float, rank: int,
    profile: bool,
) -> dict[str, Any]:  # fmt: skip
    if side != "stock":
        os.environ["UNSLOTH_VLLM_STANDBY"] = "1"
        from patchfastrl import PatchFastRL

        PatchFastRL(rollouts={"adapter": "adapter"}.get(side))
    import torch
    from peft import LoraConfig
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    import trl.generation.vllm_generation as generation  # isort: skip

    on_gpu = torch.cuda.is_available()
    memory = Memory(on_gpu)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(memory)
        policy, tokenizer = make_model(model, method, folder, on_gpu)
        memory.mark("model")
        if side == "stock":
            generation.LLM = functools.partial(generation.LLM, load_format="dummy")  # TRL pushes the weights anyway
            if not on_gpu:
                stack.enter_context(stock_on_cpu(generation))
        per_device = min(8, completions)
        args = GRPOConfig(
            output_dir=folder, use_vllm=True, vllm_mode="colocate", vllm_enable_sleep_mode=on_gpu,
            vllm_gpu_memory_utilization=share, vllm_max_model_length=64 + tokens + 16,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=completions // per_device,
            num_generations=per_device, max_completion_length=tokens, max_steps=steps, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, learning_rate=1e-6, beta=0.0,
            generation_kwargs={"ignore_eos": True},
        )  # fmt: skip
        adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        start = time.perf_counter()
        trainer = GRPOTrainer(
            model=policy,
            reward_funcs=lambda completions, **kwargs: [random.random() for _ in completions],
            args=args,
            train_dataset=prompts(completions * steps),
            processing_class=tokenizer,
            peft_config=None if method == "full" else adapter,
        )
        clock = Clock(trainer, torch if on_gpu else None)
        ready = time.perf_counter() - start
        if on_gpu or side != "stock":  # vLLM's CPU build cannot sleep by itself
            trainer.vllm_generation.llm.sleep(level=2 if side == "stock" else 1)
        if on_gpu:
            torch.cuda.empty_cache()
        memory.mark("ready")
        if profile:
            clock.profile_step = steps - 1
        trainer.train()
        memory.mark("end")
        logs = [line for line in trainer.state.log_history if "sampling/sampling_logp_difference/mean" in line]
        figures = clock.medians()
        mean, largest = (
            [line[f"sampling/sampling_logp_difference/{kind}"] for line in logs] for kind in ("mean", "max")
        )
        return {
            **figures,
            "ready": ready,
            "memory_ready": memory.marks["ready"],
            "memory_end": memory.marks["end"],
            "memory_peak": max(size for _, size in memory.samples),
            "difference": statistics.mean(mean),
            "difference_max": max(largest),
            "memory": memory.samples,
            "marks": memory.times,
            "spans": clock.spans,
            **versions(),
        }


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {name: metadata.version(name) for name in ("trl", "torch", "transformers", "peft")}
    import vllm

    return {**found, "vllm": vllm.__version__}


def make_model(shape: str, method: str, folder: str, on_gpu: bool) -> tuple[Any, Any]:
    """A model of this shape with random weights on the device, and a tokenizer with a word for each of its tokens."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    kind, settings = SHAPES[shape]
    config = getattr(transformers, f"{kind}Config")(**settings, max_position_embeddings=65536, bos_token_id=None,
        eos_token_id=1, pad_token_id=0)  # fmt: skip
    words = ["<p>", "<e>", *(f"w{n}" for n in range(config.vocab_size - 2))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<p>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<e>", pad_token="<p>", padding_side="left"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
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


def in_4_bits(model: Any) -> Any:
    """What `from_pretrained(quantization_config=...)` makes of a checkpoint, without one."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=model.dtype)  # fmt: skip
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


def prompts(n: int) -> Any:
    from datasets import Dataset

    chosen = random.Random(0)
    return Dataset.from_dict({"prompt": [" ".join(f"w{chosen.randrange(500)}" for _ in range(64)) for _ in range(n)]})


@contextlib.contextmanager
def stock_on_cpu(generation: Any) -> Iterator[None]:
    """vLLM's CPU build repacks linear weights so that they cannot be loaded again; and it needs a small KV cache."""
    from vllm.model_executor.layers import linear

    before = linear.UnquantizedLinearMethod.process_weights_after_loading
    linear.UnquantizedLinearMethod.process_weights_after_loading = lambda self, layer: setattr(
        layer, "cpu_linear", lambda x, weight, bias: __import__("torch").nn.functional.linear(x, weight, bias)
    )
    generation.LLM = functools.partial(
        generation.LLM, enforce_eager=True, kv_cache_memory_bytes=64 * 2**20, dtype="float32"
    )
    try:
        yield
    finally:
        linear.UnquantizedLinearMethod.process_weights_after_loading = before


# Measuring ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of each phase of each step, and when they were, for the plot."""

    def __init__(self, trainer: Any, torch: Any) -> None:
        self._torch = torch
        self._begin = time.perf_counter()
        self.spans: list[tuple[str, float, float]] = []
        self._steps: list[dict[str, list[float]]] = []
        self._now: dict[str, list[float]] = defaultdict(list)
        self.profile_step: int | None = None
        engine, llm = trainer.vllm_generation, trainer.vllm_generation.llm
        kind = type(trainer)  # replaced on the instance they would look like somebody else's
        self._wrap(kind, "_generate_and_score_completions", "rollout")
        self._wrap(llm, "generate", "generate")
        self._wrap(engine, "sync_weights", "weights")
        self._wrap(llm, "sleep", "standby")
        self._wrap(llm, "wake_up", "standby")
        if hasattr(llm, "publish"):
            self._wrap(llm, "publish", "weights")
        self._wrap(kind, "_get_per_token_logps_and_entropies", "logprobs", when="rollout")
        self._wrap(kind, "training_step", "training_step")
        before, clock = kind.training_step, self

        @functools.wraps(before)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if clock.profile_step == len(clock._steps) and len(clock._now["training_step"]) == 1:
                return clock._profiled(lambda: before(*args, **kwargs))
            return before(*args, **kwargs)

        kind.training_step = counted
        from transformers import TrainerCallback

        class Steps(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock._end_step()

        trainer.add_callback(Steps())
        self._step_began: float | None = None
        self._inside: list[str] = []

    def _wrap(self, owner: Any, name: str, phase: str, when: str | None = None) -> None:
        before: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(before)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if phase in self._inside or (when is not None and when not in self._inside):
                return before(*args, **kwargs)
            start = self._time()
            if self._step_began is None:
                self._step_began = start
            self._inside.append(phase)
            try:
                return before(*args, **kwargs)
            finally:
                self._inside.remove(phase)
                end = self._time()
                self._now[phase].append(end - start)
                self.spans.append((phase, start, end))

        setattr(owner, name, timed)

    def _time(self) -> float:
        if self._torch is not None:
            self._torch.cuda.synchronize()
        return time.perf_counter() - self._begin

    def _end_step(self) -> None:
        now = self._time()
        assert self._step_began is not None
        self._now["step"].append(now - self._step_began)
        self._steps.append(dict(self._now))
        self._now, self._step_began = defaultdict(list), None

    def _profiled(self, call: Callable[[], Any]) -> Any:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._torch is not None else [])
        with profile(activities=kinds) as found:
            result = call()
            self._time()
        key = "self_cuda_time_total" if self._torch is not None else "self_cpu_time_total"
        for line in found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90).splitlines():
            print("PROFILE " + line[:95] + line[-110:])
        return result

    def medians(self) -> dict[str, float]:
        late = self._steps[1:]
        figures = {
            phase: statistics.median(sum(step.get(phase, [0.0])) for step in late)
            for phase in ("step", "rollout", "generate", "weights", "standby", "logprobs")
        }
        figures["weights"] *= 1e3
        figures["standby"] *= 1e3
        # The first micro-step of a step contains the rollout.
        figures["micro"] = statistics.median(t for step in late for t in step["training_step"][1:] or [0.0])
        figures["first"] = self._steps[0]["step"][0]
        return figures


class Memory(contextlib.AbstractContextManager[Any]):
    """GiB in use on the device, every 20 ms, seen from the driver."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.samples: list[tuple[float, float]] = []
        self.marks: dict[str, float] = {}
        self.times: dict[str, float] = {}
        self._stop = threading.Event()
        self._begin = time.perf_counter()

    def _now(self) -> float:
        if self._on_gpu:
            import torch

            free, total = torch.cuda.mem_get_info()
            return (total - free) / 2**30
        import psutil

        return psutil.Process().memory_info().rss / 2**30

    def mark(self, name: str) -> None:
        self.marks[name], self.times[name] = self._now(), time.perf_counter() - self._begin

    def __enter__(self) -> Memory:
        def watch() -> None:
            while not self._stop.wait(0.02):
                self.samples.append((round(time.perf_counter() - self._begin, 3), round(self._now(), 3)))

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
