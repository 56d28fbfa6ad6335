"""What `patchfastrl doctor` finds out about this environment, without importing TRL, vLLM or torch."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from . import __version__, runtime
from .compat import bnb_plugin, cpu_name, support, versions
from .errors import PatchFastRLError

if TYPE_CHECKING:
    from packaging.version import Version

    from .seam import SeamReport

SHOWN = (*support.PACKAGES, "datasets", "libcst", "bitsandbytes", "deepspeed", "torchvision")
NEEDED = ("trl", "vllm", "torch", "transformers")
# Settings that change what a run does. Secrets live in such variables too (VLLM_API_KEY).
SETTINGS = re.compile(
    r"(VLLM|PYTORCH|TORCH|NCCL|ACCELERATE|TRL|FSDP|CUDA|UNSLOTH|HF|OMP)_\w+|TORCHDYNAMO_\w+|(LOCAL_)?(RANK|WORLD_SIZE)"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
ALWAYS_REFUSED = "more than one process, vllm_tensor_parallel_size above 1, FSDP, DeepSpeed ZeRO-3"


@dataclass
class Gpu:
    """One line of nvidia-smi; memory as it prints it (``"81559 MiB"``)."""

    name: str
    memory: str
    memory_free: str
    driver: str


@dataclass
class Findings:
    """All that `doctor` prints. `refused`: reasons why a run would not start; `notes`: what else deserves a look."""

    python: str
    system: str
    platform: str
    packages: dict[str, str | None]
    match: support.Match | None
    seams: list[SeamReport]
    gpus: list[Gpu]
    settings: dict[str, str]
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine() -> Findings:
    """Looks at the environment; takes about as long as reading TRL's source (2 s)."""
    refused: list[str] = []
    found: dict[str, Version | None] = {}
    for name in SHOWN:
        try:
            found[name] = versions.installed(name)
        except PatchFastRLError as error:
            found[name] = None
            refused.append(str(error))
    refused += [f"{name} is not installed" for name in NEEDED if found[name] is None]
    kind = versions.platform()
    try:
        support.check(found, platform=kind)
        cpu_name.check()
    except PatchFastRLError as error:
        refused.append(str(error))
    python = platform.python_version()
    match = support.row_for(found, platform=kind, python=".".join(python.split(".")[:2]))
    findings = Findings(
        python=python,
        system=f"{platform.system()} {platform.machine()}",
        platform=kind,
        packages={name: str(version) if version else None for name, version in found.items()},
        match=match,
        seams=_seams(refused),
        gpus=_gpus(refused),
        settings={name: _shown(name, value) for name, value in sorted(os.environ.items()) if SETTINGS.fullmatch(name)},
        refused=refused,
    )
    refused += [f"seam {seam.name}: {seam.detail}" for seam in findings.seams if seam.status == "refused"]
    _judge(findings)
    return findings


def _seams(refused: list[str]) -> list[SeamReport]:
    from . import report

    try:
        return list(report.seams())
    except PatchFastRLError as error:
        refused.append(str(error))
        return []


def _gpus(refused: list[str]) -> list[Gpu]:
    """Asks nvidia-smi: torch would need seconds, and a context on the GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = "--query-gpu=name,memory.total,memory.free,driver_version"
    try:
        done = subprocess.run([command, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        refused.append("nvidia-smi does not answer within 20 s: the driver hangs, and so would a run")
        return []
    lines = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [Gpu(*line) for line in lines if len(line) == 4]


def _shown(name: str, value: str) -> str:
    return "(hidden)" if SECRET.search(name) else value


def _judge(findings: Findings) -> None:
    """What a run would stumble over, besides missing packages and seams."""
    env, refused, notes = os.environ, findings.refused, findings.notes
    packages = findings.packages
    if (size := env.get("WORLD_SIZE", "1")) != "1":
        refused.append(f"WORLD_SIZE={size}: more than one process; start one (accelerate launch --num_processes 1)")
    if env.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        refused.append("ACCELERATE_USE_FSDP is set: FSDP cannot shard parameters that live in the engine's storage")
    if env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        refused.append("ACCELERATE_DEEPSPEED_ZERO_STAGE=3: ZeRO-3 cannot shard parameters in the engine's storage")
    for name in ("trl", "vllm"):
        try:
            if packages[name] and (source := versions.origin(name)):
                notes.append(f"{name} {packages[name]} is no release ({source}): it passes by its shape, or is refused")
        except PatchFastRLError as error:
            refused.append(str(error))
    if packages["peft"] is None:
        notes.append("peft is not installed: full fine-tuning works, LoRA does not")
    if packages["bitsandbytes"] and packages["vllm"] and bnb_plugin.missing():
        notes.append(
            f"QLoRA: the shared engine unpacks 4-bit weights by itself; with vLLM {packages['vllm']} stock TRL's, or a "
            "server, needs `pip install vllm-bnb-plugin` for them"
        )
    standby = False
    try:
        standby = runtime.standby_requested() is True
    except PatchFastRLError as error:
        refused.append(str(error))
    if findings.platform == "cuda":
        if not findings.gpus:
            refused.append("vLLM's CUDA build is installed, and nvidia-smi shows no GPU")
        elif env.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            refused.append(f"CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']!r} hides every GPU")
        for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            if re.search(r"expandable_segments:\s*true", env.get(variable, ""), re.IGNORECASE):
                text = f"{variable}: expandable_segments does not go with standby's memory pool; take it out"
                (refused if standby else notes).append(text if standby else f"{text} before UNSLOTH_VLLM_STANDBY=1")
    elif findings.gpus:
        notes.append("this machine has a GPU, and vLLM's CPU build is installed: the GPU will not be used")
    torch, vision = packages["torch"] or "", packages["torchvision"]
    if "+cpu" in torch and vision and "+cpu" not in vision:
        refused.append(
            f"torchvision {vision} is built for CUDA and torch {torch} for the CPU, so transformers fails to import: "
            "pip uninstall -y torchvision torchaudio torchcodec"
        )


def as_json(findings: Findings) -> str:
    """One JSON object: the fields of `Findings`, and the row's pip line."""
    data = {"patchfastrl": __version__, "ok": not findings.refused, **asdict(findings)}
    match = findings.match
    data["support"] = "none" if match is None else "exact" if match.exact else "nearest"
    data["pip"] = support.pip_line(match.row if match else support.newest(findings.platform))
    return json.dumps(data, indent=2)


def as_markdown(findings: Findings) -> str:
    """The block to paste into an issue."""
    match = findings.match
    wanted = {"python": ", ".join(match.row.python)} if match else {}
    if match:
        wanted |= {name: getattr(match.row, name) for name in support.PACKAGES}
    rows = [(name, version or "not installed", wanted.get(name, "")) for name, version in findings.packages.items()]
    lines = ["### patchfastrl doctor", ""]
    lines += _table(
        ("", "installed", "support table"),
        [
            ("patchfastrl", __version__, ""),
            ("python", findings.python, wanted.get("python", "")),
            ("system", f"{findings.system}, {findings.platform} build", match.row.platform if match else ""),
            *(row for row in rows if row[1] != "not installed" or row[0] in support.PACKAGES),
        ],
    )
    lines += ["", *_support(findings), ""]
    here = [seam for seam in findings.seams if seam.status != "not for this version"]
    seams = [(s.name, s.target, s.requires, str(s.expected), _count(s.found), s.status) for s in here]
    head = ("seam", "target", "requires", "expected", "found", "status")
    lines += _table(head, seams) if seams else ["Seams: none read."]
    gpus = [f"{gpu.name}, {gpu.memory} ({gpu.memory_free} free), driver {gpu.driver}" for gpu in findings.gpus]
    lines += ["", *_list("GPU", gpus or ["none found by nvidia-smi"])]
    lines += _list("Settings in the environment", [f"`{k}={v}`" for k, v in findings.settings.items()] or ["none"])
    lines += _list("Worth a look", findings.notes) if findings.notes else []
    lines += _list("Would be refused", findings.refused or ["nothing"])
    lines += [f"Refused in every script, for now: {ALWAYS_REFUSED}."]
    return "\n".join(lines)


def _support(findings: Findings) -> list[str]:
    match = findings.match
    if match is None:
        row = support.newest(findings.platform)
        return [f"Support table: no row without TRL and vLLM. The newest: `{support.pip_line(row)}`"]
    pair = f"TRL {match.row.trl} with vLLM {match.row.vllm}, {match.row.platform}, {match.row.status}"
    if match.exact:
        return [f"Support table: exactly the row {pair}."]
    differ = ", ".join(f"{name} {have} (row: {want})" for name, have, want in match.differences)
    return [
        f"Support table: no row for exactly this; the nearest is {pair}. Different: {differ}.",
        f"To get it: `{support.pip_line(match.row)}`",
    ]


def _count(found: int | None) -> str:
    return "-" if found is None else str(found)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]


def _list(title: str, items: list[str]) -> list[str]:
    return [f"{title}:", "", *(f"- {item}" for item in items), ""]
