"""PatchFastRL in one go: GRPO with LoRA and standby teaches a tiny model to add, on a laptop's CPU or on a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

WINDOW = 5  # logged steps at the start and at the end of a run that "before" and "after" average


@dataclass
class Run:
    """What one seed's training showed."""

    seed: int
    rewards: list[float]  # mean reward of each step's completions, from the trainer's log
    seconds: dict[str, float]  # by phase
    bytes_shared: int
    publishes: int

    @property
    def before(self) -> float:
        return mean(self.rewards[:WINDOW])

    @property
    def after(self) -> float:
        return mean(self.rewards[-WINDOW:])


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    quiet()

    import matplotlib  # for the plot at the end: if it is missing, say so now

    from patchfastrl import PatchFastRL

    matplotlib.use("Agg")

    PatchFastRL()  # the one line: below here is what anyone writes for TRL

    runs = [train(seed, options.steps, options.publish) for seed in range(options.seed, options.seed + options.seeds)]

    figures, plot = options.output_dir / "runs.json", options.output_dir / "reward.png"
    figures.write_text(json.dumps([asdict(run) for run in runs], indent=1))
    save_plot(runs, plot, options.publish)
    show_table(runs)
    print(f"Reward curve: {plot}   figures: {figures}")
    print(f"The mean reward {'at least doubled' if doubled(runs) else 'did not double'}.")
    return 0 if doubled(runs) == options.publish else 1


def train(seed: int, steps: int, publish: bool = True) -> Run:
    """Warm up a model, then train it with GRPO and LoRA; its rollouts come from the shared engine."""
    import torch
    from arithmetic import LONGEST_ANSWER, correct, make_checkpoint, problems
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from patchfastrl import engine_report
    from patchfastrl.adapters import publishing_disabled

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        checkpoint = make_checkpoint(folder, seed)
        warmed_up = time.perf_counter()

        trainer = GRPOTrainer(
            model=checkpoint,
            reward_funcs=correct,
            train_dataset=problems(),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            args=GRPOConfig(
                output_dir=f"{folder}/trainer",
                seed=seed,
                max_steps=steps,
                learning_rate=3e-3,
                per_device_train_batch_size=256,
                num_generations=8,
                max_completion_length=LONGEST_ANSWER,
                bf16=torch.cuda.is_available(),
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress(seed, steps))
        ready = time.perf_counter()

        with contextlib.nullcontext() if publish else publishing_disabled():
            trainer.train()
        finished = time.perf_counter()

    report = engine_report(trainer)
    engine = report["seconds"]
    seconds = {
        "warm-up": warmed_up - started,
        "trainer and engine ready": ready - warmed_up,
        "sampling": engine["generate"],
        "publish": engine["publish"],
        "standby": engine["sleep"] + engine["wake"],
    }
    seconds["training"] = finished - ready - sum(seconds[phase] for phase in ("sampling", "publish", "standby"))
    rewards = [log["rewards/correct/mean"] for log in trainer.state.log_history if "rewards/correct/mean" in log]
    return Run(seed, rewards, seconds, report["bytes_shared"], report["publishes"])


def doubled(runs: list[Run]) -> bool:
    return mean(run.after for run in runs) >= 2 * mean(run.before for run in runs)


# What the reader sees -------------------------------------------------------------------------------------------------


def progress(seed: int, steps: int) -> Any:
    """A callback that prints the reward ten times in a run."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            every = max(1, steps // 10)
            if logs and "reward" in logs and (state.global_step % every == 0 or state.global_step == 1):
                bar = "#" * round(40 * logs["reward"])
                print(f"seed {seed}  step {state.global_step:>3}  reward {logs['reward']:.2f}  {bar}", flush=True)

    return Progress()


def show_table(runs: list[Run]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Reward: share of right answers, mean of the first and of the last {WINDOW} steps")
    table.add_column("")
    for run in runs:
        table.add_column(f"seed {run.seed}", justify="right")
    table.add_column("all", justify="right", style="bold")

    def row(name: str, values: list[float], form: str, total: float, **style: Any) -> None:
        table.add_row(name, *(form.format(value) for value in values), form.format(total), **style)

    before, after = [run.before for run in runs], [run.after for run in runs]
    times = [a / b for a, b in zip(after, before, strict=True)]
    row("reward before", before, "{:.2f}", mean(before))
    row("reward after", after, "{:.2f}", mean(after))
    row("after / before", times, "{:.1f}", mean(after) / mean(before), end_section=True)
    for phase in ("warm-up", "trainer and engine ready", "sampling", "publish", "training", "standby"):
        spent = [run.seconds[phase] for run in runs]
        row(f"seconds: {phase}", spent, "{:.2f}", sum(spent), end_section=phase == "standby")
    row("bytes shared", [run.bytes_shared for run in runs], "{:,}", max(run.bytes_shared for run in runs))
    row("adapter publishes", [run.publishes for run in runs], "{}", sum(run.publishes for run in runs))
    Console().print(table)


def save_plot(runs: list[Run], path: Path, publish: bool = True) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(runs[0].rewards) + 1)
    for run in runs:
        axes.plot(steps, run.rewards, linewidth=0.8, alpha=0.6, label=f"seed {run.seed}")
    axes.plot(steps, [mean(step) for step in zip(*(run.rewards for run in runs), strict=True)], "k", label="mean")
    axes.set(
        xlabel="GRPO step",
        ylabel="reward (share of right answers)",
        ylim=(0, 1),
        title="GRPO with LoRA, " + ("shared engine, standby on" if publish else "control: no adapter is published"),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def quiet() -> None:
    """Standby on; one thread, which a model this small is fastest with; nobody's log but the demo's."""
    import logging
    import warnings

    os.environ.setdefault("UNSLOTH_VLLM_STANDBY", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory")  # there may be no GPU
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
what happens, for each seed:
  1. warm-up    a Llama of 84,000 parameters reads a textbook that is wrong two times in three
  2. engine     GRPOTrainer builds vLLM round that model: one copy of the weights
  3. steps      256 completions are sampled with the adapter in training, rewarded when the sum is right, trained on
                with LoRA; the KV cache is released while training (standby)
  4. publish    the new adapter goes to the engine's slot, in memory; the base weights never change
Then a table and a plot of the reward. Exit code 0: the mean reward at least doubled.

examples:
  python examples/demo.py                          three seeds, about a minute and a half on two cores
  python examples/demo.py --seeds 1 --steps 40     a short look (doubling may take more steps)
  python examples/demo.py --no-publish             the control: samples stay the base model's, so the reward must NOT
                                                   double (exit code 0 when it does not)""",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, one after the other (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="GRPO steps for each seed (default: %(default)s)")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("outputs/demo"),
        help="where reward.png and runs.json go (default: %(default)s)",
    )
    parser.add_argument(
        "--no-publish", dest="publish", action="store_false", help="control: never hand the adapter to the engine"
    )
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.steps < 2 * WINDOW:
        parser.error(f"--seeds must be at least 1 and --steps at least {2 * WINDOW}")
    return options


if __name__ == "__main__":
    sys.exit(main())
