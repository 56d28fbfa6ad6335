"""Every trainer of TRL that samples: where it is, by release, and who samples. Seams and README go by this alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from packaging.version import Version

from .releases import END, FIRST, outside


@dataclass(frozen=True)
class Home:
    """Where a class is, from `first` to before `end`: ``module_trainer:nameTrainer``."""

    module: str
    name: str
    first: str
    end: str = END

    def target(self, method: str = "__init__") -> str:
        return f"{self.module}_trainer:{self.name}Trainer.{method}"

    def config(self, attribute: str) -> str:
        # SelfDistillationConfig belongs to BaseSelfDistillationTrainer.
        module, name = self.module.replace(".base_", "."), self.name.removeprefix("Base")
        return f"{module}_config:{name}Config.{attribute}"


@dataclass(frozen=True)
class Trainer:
    """`key`: what its seams' names start with. `samples`: from where, with PatchFastRL, in words for the README."""

    title: str
    key: str
    samples: str
    homes: tuple[Home, ...]

    @property
    def first(self) -> str:
        return self.homes[0].first

    @property
    def end(self) -> str:
        return self.homes[-1].end

    def between(self, first: str = FIRST, end: str = END) -> Iterator[tuple[Home, str, str]]:
        """Each home in a range of releases, with the part of the range that it holds for."""
        for home in self.homes:
            start, stop = max(first, home.first, key=Version), min(end, home.end, key=Version)
            if Version(start) < Version(stop):
                yield home, start, stop

    def absent(self, first: str = FIRST, end: str = END) -> tuple[str, ...]:
        return outside(max(first, self.first, key=Version), min(end, self.end, key=Version))


def _moved(folder: str, name: str, moved: str, end: str = END) -> tuple[Home, Home]:
    """`trl.trainer` before the release `moved`, `trl.experimental` from it on."""
    return Home(f"trl.trainer.{folder}", name, FIRST, moved), _own(folder, name, moved, end)


def _own(folder: str, name: str, first: str, end: str = END) -> Home:
    return Home(f"trl.experimental.{folder}.{folder}", name, first, end)


ENGINE = "shared engine"
# With seams of their own, round VLLMGeneration or an engine of their own.
SHARED = (
    Trainer("GRPO", "grpo", ENGINE, (Home("trl.trainer.grpo", "GRPO", FIRST),)),
    Trainer("RLOO", "rloo", ENGINE, (Home("trl.trainer.rloo", "RLOO", "0.22"),)),
    Trainer("Online DPO", "online_dpo", ENGINE, _moved("online_dpo", "OnlineDPO", "0.26")),
    Trainer("GOLD", "gold", ENGINE, (_own("gold", "GOLD", "0.25"),)),
    Trainer(
        "Distillation",
        "distillation",
        ENGINE,
        (_own("distillation", "Distillation", "1.1", "1.10"), Home("trl.trainer.distillation", "Distillation", "1.10")),
    ),
    Trainer("IW-OPD", "iw_opd", ENGINE, (_own("iw_opd", "IWOPD", "1.9"),)),
    Trainer("SDFT", "sdft", ENGINE, (_own("sdft", "SDFT", "1.6"),)),
    Trainer(
        "SDPO",
        "sdpo",
        ENGINE,
        (
            Home("trl.experimental.self_distillation.base_self_distillation", "BaseSelfDistillation", "1.0", "1.6"),
            _own("sdpo", "SDPO", "1.6"),
        ),
    ),
    Trainer("SSD", "ssd", ENGINE, (_own("ssd", "SSD", "1.2", "1.16"),)),
)
GRPO, RLOO, ONLINE_DPO, GOLD, DISTILLATION, IW_OPD, SDFT, SDPO, SSD = SHARED

_GRPO, _DISTILLATION = f"{ENGINE}, inherited from GRPO", f"{ENGINE}, inherited from Distillation"
_REPLAY = "GRPOWithReplayBuffer"
INHERITING = (
    Trainer("DPPO", "", _GRPO, (_own("dppo", "DPPO", "1.0", "1.9"),)),
    Trainer("GFPO", "", f"{_GRPO} (0.26 to 1.0: TRL's own does not run)", (_own("gfpo", "GFPO", "0.24", "1.8"),)),
    Trainer("GMPO", "", _GRPO, (_own("gmpo", "GMPO", "1.7"),)),
    Trainer("GRPO with replay buffer", "", _GRPO, (_own("grpo_with_replay_buffer", _REPLAY, "0.24", "1.14"),)),
    Trainer("GSPO-token", "", _GRPO, (Home("trl.experimental.gspo_token.grpo", "GRPO", "0.24", "1.14"),)),
    Trainer("MiniLLM", "", _GRPO, (_own("minillm", "MiniLLM", "0.26", "1.15"),)),
    Trainer("PAPO", "", _GRPO, (_own("papo", "PAPO", "0.25", "1.8"),)),
    Trainer("Server distillation", "", _DISTILLATION, (_own("server_distillation", "ServerDistillation", "1.9"),)),
)

# No vLLM path in TRL: an engine beside them answers the `generate` calls for the model in training.
_BESIDE = f"{ENGINE} beside the trainer, for the model in training (settings: `PatchFastRL(...)`)"
_REFERENCE = f"{_BESIDE}; transformers for the reference"
_MIXTURE = f"{_BESIDE}; transformers for the mixture with the reference"
_OLD_MIXTURE = " (TRL's own does not run before 0.20 with transformers 4.57, nor in 1.8 with 5.23)"
_SCORED = f"{_BESIDE}, whose own forward pass gives the log-probabilities"
BESIDE = (
    Trainer("A*-PO", "a2po", _REFERENCE, (_own("a2po", "A2PO", "1.6"),)),
    Trainer("GKD", "gkd", f"{_BESIDE}; transformers for the teacher", _moved("gkd", "GKD", "0.26")),
    Trainer("Nash-MD", "nash_md", f"{_MIXTURE}{_OLD_MIXTURE}", _moved("nash_md", "NashMD", "0.26", "1.14")),
    Trainer("PPO", "ppo", _SCORED, _moved("ppo", "PPO", "0.26", "1.13")),
    Trainer("RLOO, the older trainer", "old_rloo", _SCORED, (Home("trl.trainer.rloo", "RLOO", FIRST, "0.22"),)),
    Trainer("SDFT, the older trainer", "old_sdft", _BESIDE, (_own("sdft", "SDFT", "1.0", "1.6"),)),
    Trainer("XPO", "xpo", _REFERENCE, _moved("xpo", "XPO", "0.26", "1.14")),
)
A2PO, GKD, NASH_MD, PPO, OLD_RLOO, OLD_SDFT, XPO = BESIDE

_SERVER = "a vLLM server in another process, which PatchFastRL leaves alone"
ELSEWHERE = (
    Trainer("Async GRPO", "async_grpo", _SERVER, (_own("async_grpo", "AsyncGRPO", "1.0"),)),
    Trainer(
        "Async distillation", "async_distillation", _SERVER, (_own("async_distillation", "AsyncDistillation", "1.11"),)
    ),
)

TRAINERS = (*SHARED, *INHERITING, *BESIDE, *ELSEWHERE)


def markdown_table() -> str:
    """The table as the README shows it."""
    lines = ["| trainer | TRL | completions come from |", "| --- | --- | --- |"]
    for trainer in TRAINERS:
        modules = dict.fromkeys(home.module.rpartition(".")[0] for home in trainer.homes)
        span = f"{trainer.first} and later" if trainer.end == END else f"from {trainer.first}, before {trainer.end}"
        where = " then ".join(f"`{module}`" for module in modules)
        lines.append(f"| {trainer.title} ({where}) | {span} | {trainer.samples} |")
    return "\n".join(lines)
