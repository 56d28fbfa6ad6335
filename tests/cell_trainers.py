"""Every trainer that samples from the shared engine, in one cell of the support table: `python tests/cell_trainers.py
[--json FILE] [TITLE ...]` in that cell's environment.

Each trainer of the installed release trains with LoRA, with standby where it has sleep mode. Its adapter is moved by a
large step between any two samplings, also between two within one step of the optimizer, which TRL's step counter does
not notice. Checked: one storage, each batch sampled from the adapter as it is then (the adapter as it was one batch
before is far off, and so is the base), the base bit-identical afterwards. Prints a line for each check; exits with 1
when one fails. What tests/cell.py checks of GRPO is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from cell import check, move, results  # first: it sets the environment

# They have an engine of their own in some release: with and without standby. The others: with, if they can.
OWN_ENGINE = ("RLOO", "Online DPO", "GOLD", "OpenEnv's rollouts")
# From 1.0 on they sample for all of a step's micro-batches at once; the second sampling is asked of the engine's owner.
SAMPLES_AHEAD = ("GOLD", "Distillation", "IW-OPD")
MAKES_NO_ADAPTERS = ("A*-PO",)
# TRL's own fault: they unpack another number of values than GRPO's `_generate` returns there. From, before.
BROKEN_IN_TRL = {"GFPO": ("0.26", "1.1"), "GRPO with replay buffer": ("0.24", "0.25")}
LOSS_OF_IMAGES = ("PAPO",)  # text has no place in it: its samplings are called, as its `training_step` would
LEFT_OUT = {
    "GRPO": "tests/cell.py",
    "Server distillation": "it wants a server, and samples as Distillation does",
    **dict.fromkeys(
        ("PPO", "Nash-MD", "XPO", "RLOO, the older trainer", "SDFT, the older trainer"), "tests/cell_generate.py"
    ),
}


def modes(title: str) -> list[bool]:
    """Without standby, with it."""
    import cases

    able = title in [t.title for t in cases.BESIDE] or hasattr(cases.classes(title)[1], "vllm_enable_sleep_mode")
    return ([False] if title in OWN_ENGINE or not able else []) + ([True] if able else [])


def run(title: str, standby: bool, folder: Path) -> None:
    import cases
    import tiny
    import torch
    from packaging.version import Version
    from transformers import TrainerCallback

    os.environ["UNSLOTH_VLLM_STANDBY"] = "1" if standby else "0"
    name = f"{title}{', standby' if standby else ''}"
    lora = title not in MAKES_NO_ADAPTERS
    trainer = cases.make(title, folder, peft=lora, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=2)
    policy, llm = cases.policy_of(trainer), cases.engine_of(trainer)
    check(f"{name}: one storage", not cases.outside_one_copy(trainer), f"{len(llm.shared.plan.views)} parameters")
    base = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" not in n}

    class Move(TrainerCallback):
        moves = 0

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            self.move()
            if title in SAMPLES_AHEAD and hasattr(trainer, "vllm_generation"):
                trainer.vllm_generation.generate(prompts=[tiny.ids(24)], images=None, num_generations=1)

        def move(self) -> None:
            self.moves += 1
            if lora:
                tiny.scramble(policy, seed=self.moves)
            else:
                move(policy, lora=False)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.move()

    mover = Move()
    trainer.add_callback(mover)
    watch = cases.Watch(trainer)
    first, end = BROKEN_IN_TRL.get(title, ("0", "0"))
    if Version(first) <= cases.RELEASE < Version(end):
        try:
            trainer.train()
            check(f"{name}: TRL's own does not run", False)
        except ValueError as error:
            check(f"{name}: TRL's own does not run", "values to unpack" in str(error) and len(watch.off) == 1, error)
        return
    if title in LOSS_OF_IMAGES:
        for _ in range(4):
            trainer._generate_and_score_completions([dict(trainer.train_dataset[0]) for _ in range(4)])
            mover.move()
    else:
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        check(f"{name}: trained", len(losses) == 2 and all(abs(loss) < 1e6 for loss in losses), losses)
    twice = max(map(watch.steps.count, watch.steps))
    check(f"{name}: sampled twice within one step", twice >= 2, watch.steps)
    check(f"{name}: each batch from the current weights", max(watch.off) < tiny.CLOSE, f"{max(watch.off):.1e} at most")
    stale = [f"{difference:.1e}" for difference in watch.stale]
    check(f"{name}: no batch from the weights before", min(watch.stale) > tiny.FAR, stale)
    same = all(torch.equal(p, base[n]) for n, p in policy.named_parameters() if n in base)
    check(f"{name}: base {'unchanged' if lora else 'trained'}", same == lora)
    if lora:
        check(f"{name}: the adapter is applied", watch.apart[-1] > tiny.FAR, f"{watch.apart[-1]:.1e} from the base")
    if standby:
        check(f"{name}: asleep after sampling", not llm.awake)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write versions, checks and seconds here")
    parser.add_argument("title", nargs="*", help="these trainers only, by their titles in the README")
    options = parser.parse_args()
    start = time.perf_counter()
    from patchfastrl import PatchFastRL, UnpatchFastRL

    PatchFastRL()
    import cases
    import tiny

    from patchfastrl.compat.support import PACKAGES
    from patchfastrl.compat.versions import installed

    results["versions"] = {name: str(installed(name)) for name in PACKAGES}
    print(" ".join(f"{k} {v}" for k, v in results["versions"].items()), flush=True)
    here = cases.present()
    print(f"not in this release: {', '.join(title for title in cases.CASES if title not in here)}")
    check("every trainer of this release has a case", here.keys() <= {*cases.CASES, *LEFT_OUT}, ", ".join(here))
    for title in [t for t in options.title if t in here] if options.title else here:
        if title in LEFT_OUT and title not in {*options.title} & cases.CASES.keys():
            print(f"     {title}: {LEFT_OUT[title]}")
            continue
        for standby in modes(title):
            began = time.perf_counter()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    run(title, standby, Path(folder))
            except Exception as error:  # noqa: BLE001 (the other trainers are still to be tried)
                traceback.print_exc()
                check(f"{title}: ran", False, repr(error))
            tiny.close_all()
            print(f"     {time.perf_counter() - began:.1f} s", flush=True)
    UnpatchFastRL()
    results["seconds"] = round(time.perf_counter() - start, 1)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    failed = [name for name, result in results["checks"].items() if not result["ok"]]
    print(f"{len(results['checks']) - len(failed)} of {len(results['checks'])} checks passed in {results['seconds']} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
