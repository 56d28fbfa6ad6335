"""The trainers of one cell that TRL gave no vLLM path: `python tests/cell_generate.py [--json FILE]`.

Each one that the installed TRL has (PPO, Nash-MD, XPO, GKD, A*-PO, the older RLOO and SDFT) trains with LoRA, standby
on, and with full fine-tuning. Checked: one storage, every batch sampled from the current weights, the base unchanged
under LoRA; and that stock TRL, in a process of its own and given the very same tokens, logs the same losses, KL and
log-probabilities and ends with the same weights. There only the draw is replaced (`torch.multinomial`): prompts,
caches, scores, padding and stopping are transformers' own. Prints a line for each check; exits with 1 when one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cell  # before torch: it sets the environment up
import tiny

UPDATES, BATCH, NEW = 3, 4, 8
MODES = {"lora": True, "full": False}

# The same arithmetic on the same tokens: what differs is the order of float32 additions, in a forward pass over whole
# sequences against transformers' steps over a cache. Log-probabilities differ by some 1e-6, sums over a completion and
# means over a batch of them by little more; with plain SGD the weights differ as much as the gradients do.
CLOSE = {"rel": 2e-4, "abs": 2e-5}
CLOCK = ("eps", "runtime", "per_second", "flos")


# One of each ----------------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.model_input_names = ["input_ids", "attention_mask"]
    return made


def scorer(seed: int) -> Any:
    """A reward or value model."""
    import torch
    from transformers import Qwen2ForSequenceClassification

    config = tiny.model().config
    config.num_labels = 1
    torch.manual_seed(seed)
    made = Qwen2ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return made


def classes(folder: str, name: str) -> tuple[Any, Any]:
    """The trainer and its configuration, wherever this TRL has them."""
    import trl

    found = importlib.util.find_spec(f"trl.experimental.{folder}") if _has_experimental() else None
    module = trl if found is None else importlib.import_module(f"trl.experimental.{folder}")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def _has_experimental() -> bool:
    return importlib.util.find_spec("trl.experimental") is not None


def config(made: Any, folder: Path, **own: Any) -> Any:
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 2,
        "max_steps": UPDATES, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "optim": "sgd", "report_to": [], "save_strategy": "no", "use_cpu": not tiny.GPU, "bf16": tiny.GPU,
        "disable_tqdm": True, "gradient_checkpointing": False, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    return made(**{**common, **own})


def tokenised(rows: int) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [tiny.ids(4 + 3 * (n % 4), start=n) for n in range(rows)]})


def columns(rows: int, **more: str) -> Any:
    data = tiny.prompts(rows)
    for name, text in more.items():
        data = data.add_column(name, [text] * rows)
    return data


def adapter(lora: bool) -> Any:
    return tiny.lora() if lora else None


def ppo(folder: Path, lora: bool) -> Any:
    trainer, made = classes("ppo", "PPO")
    args = config(
        made, folder, response_length=NEW, total_episodes=UPDATES * BATCH, num_mini_batches=1, num_ppo_epochs=2,
        local_rollout_forward_batch_size=2, stop_token="eos", temperature=0.7, missing_eos_penalty=1.0,
        num_sample_generations=1,
    )  # fmt: skip
    return trainer(
        args=args, processing_class=tokenizer(), model=tiny.model(), ref_model=None, reward_model=scorer(5),
        value_model=scorer(6), train_dataset=tokenised(UPDATES * BATCH), eval_dataset=tokenised(2),
        peft_config=adapter(lora),
    )  # fmt: skip


def old_rloo(folder: Path, lora: bool) -> Any:
    from peft import get_peft_model
    from trl import RLOOConfig, RLOOTrainer

    args = config(
        RLOOConfig, folder, response_length=NEW, total_episodes=UPDATES * BATCH, num_mini_batches=1, num_ppo_epochs=2,
        local_rollout_forward_batch_size=2, stop_token="eos", temperature=0.7, missing_eos_penalty=1.0, rloo_k=2,
        num_sample_generations=1, learning_rate=3e-4,  # larger ones amplify the last bit of a float32
    )  # fmt: skip
    policy = tiny.model()
    return RLOOTrainer(
        config=args, processing_class=tokenizer(), policy=get_peft_model(policy, adapter(lora)) if lora else policy,
        ref_policy=tiny.model(), reward_model=scorer(5), train_dataset=tokenised(UPDATES * BATCH),
        eval_dataset=tokenised(2),
    )  # fmt: skip


def paired(key: str, name: str) -> Callable[[Path, bool], Any]:
    """Nash-MD and XPO."""

    def make(folder: Path, lora: bool, **own: Any) -> Any:
        trainer, made = classes(key, name)
        args = config(
            made, folder, max_new_tokens=NEW, max_length=64, temperature=0.9, missing_eos_penalty=1.0, **own
        )  # fmt: skip
        known = inspect.signature(trainer.__init__).parameters
        rewards = {"reward_model": scorer(5), "reward_funcs": scorer(5), "reward_processing_classes": tokenizer()}
        return trainer(
            model=tiny.model(), args=args, processing_class=tokenizer(), train_dataset=columns(UPDATES * BATCH),
            peft_config=adapter(lora), **{name: value for name, value in rewards.items() if name in known},
        )  # fmt: skip

    return make


def gkd(folder: Path, lora: bool) -> Any:
    from datasets import Dataset

    trainer, made = classes("gkd", "GKD")
    talk = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on the mat"}]
    data = Dataset.from_dict({"messages": [talk] * UPDATES * BATCH})
    args = config(made, folder, lmbda=1.0, max_length=64, max_new_tokens=NEW)
    return trainer(
        model=tiny.model(), teacher_model=tiny.model(seed=7), args=args, processing_class=tokenizer(),
        train_dataset=data, peft_config=adapter(lora),
    )  # fmt: skip


def a2po(folder: Path, lora: bool) -> Any:
    trainer, made = classes("a2po", "A2PO")
    args = config(
        made, folder, max_prompt_length=32, max_completion_length=NEW, num_value_samples=2, filter_all_incorrect=False,
        learning_rate=1.0,
    )  # fmt: skip

    def even(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(c) % 2) for c in completions]

    return trainer(
        model=tiny.model(), reward_funcs=even, args=args, processing_class=tokenizer(), train_dataset=columns(12)
    )


def old_sdft(folder: Path, lora: bool, **own: Any) -> Any:
    trainer, made = classes("sdft", "SDFT")
    args = config(made, folder, max_prompt_length=64, max_completion_length=NEW, num_generations=2, **own)
    return trainer(
        model=tiny.model(), args=args, processing_class=tokenizer(), peft_config=adapter(lora),
        train_dataset=columns(12, privileged_context="the mat"),
    )  # fmt: skip


MAKERS: dict[str, Callable[..., Any]] = {
    "ppo": ppo,
    "old_rloo": old_rloo,
    "nash_md": paired("nash_md", "NashMD"),
    "xpo": paired("xpo", "XPO"),
    "gkd": gkd,
    "a2po": a2po,
    "old_sdft": old_sdft,
}
INHERITS_USE_VLLM = ("nash_md", "xpo", "old_sdft")


chosen: list[str] = []  # by name, on the command line


def mixture_generates() -> bool:
    """Whether TRL's own mixture does: a release may lack attributes that a newer `generate` of transformers' reads."""
    import torch
    from transformers import GenerationConfig

    trainer, _ = classes("nash_md", "NashMD")
    how = GenerationConfig(max_new_tokens=2, do_sample=True, pad_token_id=0, eos_token_id=1)
    mixture = sys.modules[trainer.__module__].GeometricMixtureWrapper
    made = mixture(tiny.model(), tiny.model(seed=7), how, mixture_coef=0.5, device=torch.device(tiny.DEVICE))
    try:
        made.generate(torch.tensor([tiny.ids(4)], device=tiny.DEVICE))
    except AttributeError as error:
        if error.obj is not made and error.obj is not mixture:
            raise
        print(f"     Nash-MD: TRL's own mixture does not generate with this transformers ({error})")
        return False
    return True


def cases() -> list[tuple[str, str]]:
    """Every trainer that the installed release has, in each of its modes."""
    from packaging.version import Version

    from patchfastrl.compat.versions import installed
    from patchfastrl.patches.trainers import BESIDE

    here = installed("trl")
    assert here is not None
    keys = [t.key for t in BESIDE if Version(t.first) <= here < Version(t.end) and t.key in (chosen or MAKERS)]
    if "nash_md" in keys and not mixture_generates():
        keys.remove("nash_md")
    return [(key, mode) for key in keys for mode in MODES if (key, mode) != ("a2po", "lora")]  # it makes no adapters


# One run, and the tokens that were drawn in it ------------------------------------------------------------------------


def policy_of(trainer: Any) -> Any:
    return getattr(trainer, "policy_model", None) or trainer.accelerator.unwrap_model(trainer.model)


def train(trainer: Any, lora: bool) -> dict[str, Any]:
    """Logs and final weights."""
    from transformers import set_seed

    policy = policy_of(trainer)
    if lora:
        tiny.scramble(policy)
    started = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    set_seed(0)
    trainer.train()
    ended = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    return {
        "logs": [
            {k: v for k, v in entry.items() if not any(word in k for word in CLOCK)}
            for entry in trainer.state.log_history
        ],
        "weights": ended,
        "moved": max(float((ended[name] - started[name]).abs().max()) for name in ended),
    }


@contextlib.contextmanager
def drawing(replaced: Callable[..., Any]) -> Iterator[None]:
    """`torch.multinomial`, with which transformers draws its tokens and the engine does not, is another function."""
    import torch

    before = torch.multinomial
    torch.multinomial = replaced
    try:
        yield
    finally:
        torch.multinomial = before


class Watch:
    """The engine's batches: their tokens, and how far they are from the model as it is at that moment."""

    def __init__(self, llm: Any, model: Any, draws: list[list[int]]) -> None:
        self.off: list[float] = []  # largest difference of a sampled token's log-probability, one per batch
        self.apart: list[float] = []  # the same against the base model, under LoRA
        self.model = model
        generate = llm.generate

        def watched(prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
            asked = sampling_params.clone()
            asked.logprobs = 0
            outputs = generate(prompts, sampling_params=asked, **kwargs)
            rows = [list(output.outputs[0].token_ids) for output in outputs]
            draws.extend([row[n] if n < len(row) else 0 for row in rows] for n in range(max(map(len, rows))))
            self.off.append(self.distance(outputs))
            if hasattr(model, "disable_adapter"):
                with model.disable_adapter():
                    self.apart.append(self.distance(outputs))
            return outputs

        llm.generate = watched

    def distance(self, outputs: Any) -> float:
        import torch

        found = []
        for output in outputs:
            sample, start = output.outputs[0], len(output.prompt_token_ids) - 1
            said = torch.tensor([p[t].logprob for t, p in zip(sample.token_ids, sample.logprobs, strict=True)])
            ids = [*output.prompt_token_ids, *sample.token_ids]
            found.append(float((said - tiny.logprobs(self.model, ids)[start:]).abs().max()))
        return max(found)


def patched(key: str, mode: str, folder: Path) -> dict[str, Any]:
    import torch
    from cases import outside_one_copy
    from transformers import set_seed

    lora, name = MODES[mode], f"{key} {mode}"
    os.environ["UNSLOTH_VLLM_STANDBY"] = "1" if lora else "0"
    set_seed(0)
    trainer = MAKERS[key](folder, lora)
    llm, policy = trainer.llm, policy_of(trainer)
    outside = outside_one_copy(trainer, policy)
    cell.check(f"{name}: one storage", not outside, f"{len(llm.shared.plan.views)} parameters, outside: {outside}")
    draws: list[list[int]] = []
    before, watch, draw = llm.shared.checksum(), Watch(llm, policy, draws), torch.multinomial

    def recorded(*args: Any, **kwargs: Any) -> Any:
        drawn = draw(*args, **kwargs)
        draws.append(drawn[:, 0].tolist())
        return drawn

    with drawing(recorded):
        found = train(trainer, lora)
    cell.check(f"{name}: trained", found["moved"] > 1e-4, f"{found['moved']:.1e}")
    cell.check(f"{name}: base {'unchanged' if lora else 'trained'}", (llm.shared.checksum() == before) == lora)
    cell.check(
        f"{name}: sampled from the current weights",
        len(watch.off) >= UPDATES and max(watch.off) < tiny.CLOSE,
        watch.off,
    )
    if lora:
        cell.check(f"{name}: the adapter is applied", min(watch.apart) > tiny.FAR, watch.apart)
        cell.check(f"{name}: asleep after sampling", not llm.awake)
    del trainer, llm, policy, watch
    gc.unfreeze()
    gc.collect()
    return {"draws": draws, **found}


def stock(key: str, mode: str, folder: Path, draws: list[list[int]]) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    left = list(draws)

    def scripted(probabilities: Any, *args: Any, **kwargs: Any) -> Any:
        assert len(left[0]) == len(probabilities), f"{len(probabilities)} sequences, the tokens are of {len(left[0])}"
        return torch.tensor(left.pop(0), device=probabilities.device)[:, None]

    set_seed(0)
    trainer = MAKERS[key](folder, MODES[mode])
    with drawing(scripted):
        return {**train(trainer, MODES[mode]), "left": len(left)}


# Against each other ---------------------------------------------------------------------------------------------------


def compare(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    cell.check(
        f"{name}: as many draws as stock TRL", theirs["left"] == 0, f"{len(ours['draws'])}, {theirs['left']} left"
    )
    keys = [[sorted(entry) for entry in run["logs"]] for run in (ours, theirs)]
    cell.check(f"{name}: stock TRL's log entries", keys[0] == keys[1], len(keys[0]))
    worst, where, apart = 0.0, "", 0
    for entry, other in zip(ours["logs"], theirs["logs"], strict=True):
        for key, value in other.items():
            if isinstance(value, (int, float)):
                excess = abs(entry[key] - value) / (CLOSE["abs"] + CLOSE["rel"] * abs(value))
                apart += excess > 1
                worst, where = max((worst, where), (excess, f"{key} {entry[key]} {value}"))
    cell.check(
        f"{name}: stock TRL's losses, KL and log-probabilities", apart == 0, f"{worst:.3f} of what may be: {where}"
    )
    off = max(float((ours["weights"][n] - w).abs().max()) for n, w in theirs["weights"].items())
    cell.check(f"{name}: stock TRL's weights", off < 1e-2 * ours["moved"], f"{off:.1e} of {ours['moved']:.1e}")
    if name in ("ppo full", "old_rloo full"):
        first = next(e["objective/kl"] for e in ours["logs"] if "objective/kl" in e)
        cell.check(f"{name}: the first KL is none", abs(first) < CLOSE["abs"], first)


def refusals(folder: Path) -> None:
    from patchfastrl import PatchFastRL
    from patchfastrl.errors import UnsupportedError

    keys = dict.fromkeys(key for key, _ in cases())
    for key in keys:
        if key in INHERITS_USE_VLLM:
            said = ""
            try:
                MAKERS[key](folder, True, use_vllm=True)
            except UnsupportedError as error:
                said = str(error)
            cell.check(f"{key}: use_vllm=True is refused", "never samples from" in said, said)
    PatchFastRL(use_vllm="keep")
    for key in keys:
        cell.check(f"{key}: use_vllm='keep' builds no engine", not hasattr(MAKERS[key](folder, False), "llm"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", nargs="*", choices=[[], *MAKERS], help="these alone (default: all that there are)")
    parser.add_argument("--json", type=Path, help="write checks and seconds here")
    parser.add_argument("--stock", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen.extend(options.trainer)
    import torch

    if options.stock:
        run_stock(options.stock)
        return
    start = time.perf_counter()
    from patchfastrl import PatchFastRL, UnpatchFastRL
    from patchfastrl.compat.support import PACKAGES
    from patchfastrl.compat.versions import installed

    cell.results["versions"] = {name: str(installed(name)) for name in PACKAGES}
    PatchFastRL()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {f"{key} {mode}": patched(key, mode, folder) for key, mode in cases()}
        torch.save({run: found["draws"] for run, found in runs.items()}, folder / "draws.pt")
        refusals(folder)
        UnpatchFastRL()
        if not tiny.GPU:  # in half precision the same tokens' figures are too far apart to say anything
            subprocess.run([sys.executable, __file__, *chosen, "--stock", str(folder)], check=True, timeout=600)
            theirs = torch.load(folder / "stock.pt")
            for run, ours in runs.items():
                compare(run, ours, theirs[run])
    checks, seconds = cell.results["checks"], round(time.perf_counter() - start, 1)
    cell.results["seconds"] = seconds
    if options.json:
        options.json.write_text(json.dumps(cell.results, indent=1))
    failed = [name for name, result in checks.items() if not result["ok"]]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed in {seconds} s")
    sys.exit(1 if failed else 0)


def run_stock(folder: Path) -> None:
    """The same trainers, TRL as installed (with the name that older releases import from vLLM, see compat/)."""
    import torch

    from patchfastrl.compat import guided_decoding

    if guided_decoding.needed():
        guided_decoding.supply(importlib.import_module(guided_decoding.MODULE), setattr)
    draws = torch.load(folder / "draws.pt")
    found = {f"{key} {mode}": stock(key, mode, folder, draws[f"{key} {mode}"]) for key, mode in cases()}
    assert "patchfastrl.runtime" not in sys.modules
    torch.save(found, folder / "stock.pt")


if __name__ == "__main__":
    main()
