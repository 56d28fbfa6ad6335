"""`PatchFastRL` and `UnpatchFastRL`: all seams that apply to what is installed, or none."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from . import garbage
from .errors import PatchFastRLError, SeamError, UnsupportedError
from .seam import Seam, choose, variants

if TYPE_CHECKING:
    from .hook import Change
    from .live import Journal
    from .rewrite import Rewritten

logger = logging.getLogger("patchfastrl")

ALGORITHMS = ("GRPO", "RLOO")


@dataclass(frozen=True)
class Settings:
    """What the script asked `PatchFastRL` for; the runtime reads it when a trainer is made."""

    use_vllm: Literal["force", "keep"] = "force"
    strict: bool = True
    gpu_memory_utilization: float = 0.3
    max_model_length: int | None = None
    rollouts: Literal["merged", "adapter"] | None = None
    fused_training: bool | None = None
    recompute: Literal["least", "needed", "always"] = "least"

    def fuses(self, on_gpu: bool) -> bool:
        """Whether training computes with fused operations."""
        return on_gpu if self.fused_training is None else self.fused_training


# One installation at a time, whoever calls. Re-entrant: importing the runtime may end up here again.
_lock = threading.RLock()
_installation: Installation | None = None
_settings = Settings()


def settings() -> Settings:
    """The settings of the latest `PatchFastRL` call."""
    return _settings


def PatchFastRL(
    algorithm: str | None = None,
    FastLanguageModel: Any = None,
    *,
    use_vllm: Literal["force", "keep"] = "force",
    strict: bool = True,
    gpu_memory_utilization: float = 0.3,
    max_model_length: int | None = None,
    rollouts: Literal["merged", "adapter"] | None = None,
    fused_training: bool | None = None,
    recompute: Literal["least", "needed", "always"] = "least",
) -> None:
    """Let TRL's trainers sample from one engine that shares its weights with the model in training.

    Call it before a script's own imports, or after them: names that were bound earlier are patched too. A second call
    changes nothing but the settings.

    Args:
        algorithm: ``"GRPO"``, ``"RLOO"`` (in any case) or None. All of them are patched in any case.
        FastLanguageModel: accepted, as scripts written for Unsloth pass it; it changes nothing.
        use_vllm: ``"force"`` turns `use_vllm` on in every trainer's arguments, ``"keep"`` leaves it to the script.
        gpu_memory_utilization: the engine's share of the GPU, for trainers whose configuration has no `vllm_*` fields
            (PPO, Nash-MD, XPO, GKD, A*-PO); those that have them go by these.
        max_model_length: tokens of a prompt and its completion, for the same trainers; None: what their configuration
            implies.
        rollouts: how an adapter is sampled with. ``"adapter"``: beside the shared weights, from the engine's LoRA slot.
            ``"merged"``: merged into a copy of the weights that it changes, within the engine's share of the memory,
            which is there while a batch runs (with standby: while the engine is awake; and as long as training does
            not lack the memory). Faster per token on a GPU. None: merged on a GPU where the copy fits, else
            the adapter.
        fused_training: whether adapters and log-probabilities (and, on a GPU, attention of padded batches and, where
            `liger-kernel` is installed, norms, gated activations and rotary embeddings) are computed by fused
            operations in training: the same function, rounded in other places. None: on a GPU.
        recompute: which layers gradient checkpointing recomputes, where the script turns it on; the numbers are the
            same. ``"least"``: on a GPU, only those whose activations do not fit into what is free on it; and standby
            releases only what training lacks, once two batches have shown what it takes. ``"needed"``: for a GPU that
            others use as well, only those that do not fit into the memory that the engine gave back after a batch (with
            standby its KV cache and its own weights, without these alone). ``"always"``: every layer, as without
            PatchFastRL.
        strict: False leaves stock TRL wholly in place, with one RuntimeWarning, when something cannot be patched.

    Raises:
        SeamError: the installed TRL is not one whose source the seams fit. Nothing was changed.
        UnsupportedError: releases that were never run together, or an argument that is not one of the above.
    """
    global _installation, _settings
    try:
        _check_arguments(algorithm, FastLanguageModel, use_vllm)
        _check_engine(gpu_memory_utilization, max_model_length, rollouts)
        if recompute not in ("least", "needed", "always"):
            raise UnsupportedError(f"PatchFastRL(recompute={recompute!r}): expected 'least', 'needed' or 'always'.")
        with _lock:
            wanted = Settings(
                use_vllm, strict, gpu_memory_utilization, max_model_length, rollouts, fused_training, recompute
            )
            if _installation is None or not _installation.active:
                with garbage.left():
                    installation = Installation(strict=strict)
                installation.install()
                _installation = installation
            elif wanted != _settings:
                logger.info("PatchFastRL: TRL is patched already; the settings are now %s (were %s)", wanted, _settings)
            _settings = wanted
    except PatchFastRLError as error:
        if strict:
            raise
        warnings.warn(f"PatchFastRL left stock TRL in place: {error}", RuntimeWarning, stacklevel=2)


def UnpatchFastRL() -> None:
    """Put back everything that `PatchFastRL` changed; without a patch, do nothing.

    Raises:
        PatchFastRLError: a trainer that was made while TRL was patched is still alive. Nothing was changed.
    """
    global _installation, _settings
    with _lock:
        if _installation is None:
            return
        alive = _live_trainers()
        if alive:
            raise PatchFastRLError(
                f"UnpatchFastRL() found {len(alive)} patched trainer(s) alive: {'; '.join(alive)}. Expected: none, as "
                "their engine shares the model's weights and stock TRL would write into them. Nothing was changed. "
                "Delete every reference to them (`del trainer`; in a notebook also `_` and variables of earlier cells) "
                "and call it again."
            )
        _installation.uninstall()
        _installation = None
        _settings = Settings()


def _check_arguments(algorithm: Any, FastLanguageModel: Any, use_vllm: Any) -> None:
    if algorithm is not None and (not isinstance(algorithm, str) or algorithm.upper() not in ALGORITHMS):
        raise UnsupportedError(
            f"PatchFastRL({algorithm!r}): unknown algorithm. Expected one of {', '.join(ALGORITHMS)} (in any case), or "
            "nothing for all of them."
        )
    if FastLanguageModel is not None and not hasattr(FastLanguageModel, "from_pretrained"):
        raise UnsupportedError(
            f"PatchFastRL: FastLanguageModel is {FastLanguageModel!r}, which has no from_pretrained. Expected "
            "patchfastrl.FastLanguageModel, or nothing."
        )
    if use_vllm not in ("force", "keep"):
        raise UnsupportedError(f'PatchFastRL(use_vllm={use_vllm!r}): expected "force" or "keep".')


def _check_engine(gpu_memory_utilization: Any, max_model_length: Any, rollouts: Any) -> None:
    if rollouts not in (None, "merged", "adapter"):
        raise UnsupportedError(f"PatchFastRL(rollouts={rollouts!r}): expected 'merged', 'adapter' or None.")
    if not isinstance(gpu_memory_utilization, (int, float)) or not 0 < gpu_memory_utilization < 1:
        raise UnsupportedError(
            f"PatchFastRL(gpu_memory_utilization={gpu_memory_utilization!r}): expected a number between 0 and 1."
        )
    if max_model_length is not None and (not isinstance(max_model_length, int) or max_model_length < 1):
        raise UnsupportedError(f"PatchFastRL(max_model_length={max_model_length!r}): expected a number of tokens.")


def while_patched(change: Callable[[Journal], None]) -> None:
    """Make a change outside of TRL, to be taken back with all others; none where TRL is not patched."""
    with _lock:
        if _installation is not None and _installation.active:
            _installation.add(change)


def _live_trainers() -> list[str]:
    runtime = sys.modules.get("patchfastrl.runtime")
    if runtime is None:
        return []
    alive: list[str] = runtime.live_trainers()
    if alive:
        gc.collect()  # a trainer and its callbacks refer to each other
        alive = runtime.live_trainers()
    return alive


def _seams() -> Sequence[Seam]:
    return importlib.import_module("patchfastrl.patches").SEAMS


def _chosen() -> list[Seam]:
    from patchfastrl.compat import cpu_name, support
    from patchfastrl.compat.versions import installed, platform

    support.check({name: installed(name) for name in ("trl", "vllm")}, platform=platform())
    cpu_name.check()
    chosen = (choose(candidates, installed) for candidates in variants(_seams()).values())
    return [seam for seam in chosen if seam is not None]


def _rewritten(seams: Iterable[Seam]) -> list[Rewritten]:
    """Read and rewrite the files that the seams aim at. Imports nothing of theirs."""
    from .rewrite import Source, rewrite

    by_module: dict[str, list[Seam]] = {}
    for seam in seams:
        by_module.setdefault(seam.module, []).append(seam)
    return [rewrite(Source.read(module, _path(group[0]), group[0]), group) for module, group in by_module.items()]


def _path(seam: Seam) -> Path:
    """The file of a seam's module, found without importing the package."""
    package, *parts = seam.module.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module that somebody put into sys.modules without a spec
        spec = None
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    for root in roots:
        path = Path(root, *parts).with_suffix(".py")
        if path.is_file():
            return path
    raise SeamError(
        f"Seam {seam.name!r} rewrites {seam.target}, but {'/'.join(parts)}.py was not found in {roots or package!r}. "
        f"Expected: the files of {seam.requires}. Nothing was changed. Reinstall it "
        f'(pip install --force-reinstall --no-deps "{seam.requires}").',
        seam=seam.name,
        found=None,
        expected=seam.count,
    )


def _judge(rewritten: Iterable[Rewritten], seams: Iterable[Seam]) -> None:
    """Raise one SeamError unless every seam matched as often as it declares."""
    found = {name: count for file in rewritten for name, count in file.found.items()}
    broken = [seam for seam in seams if found[seam.name] != seam.count]
    if not broken:
        return
    from patchfastrl.compat.versions import installed

    first = broken[0]
    package = first.requirement.name
    others = "".join(f" Seam {s.name!r} ({s.target}): expected {s.count}, found {found[s.name]}." for s in broken[1:])
    raise SeamError(
        f"Seam {first.name!r} does not fit the installed {package} {installed(package)}: expected {first.count} "
        f"match(es) in {first.target}, found {found[first.name]}.{others} Nothing was changed. "
        f"Has {package} been modified? "
        f'Install a release (pip install --force-reinstall --no-deps "{first.requires}"), see '
        "`patchfastrl doctor`, or call PatchFastRL(strict=False) to go on with stock TRL.",
        seam=first.name,
        found=found[first.name],
        expected=first.count,
    )


class Installation:
    """One transaction: everything is matched and compiled when this is made, and changed by `install`."""

    def __init__(self, *, strict: bool) -> None:
        from patchfastrl.compat.versions import installed, origin

        from .compat import guided_decoding
        from .hook import Finder, Home, ModulePatch, Supplement
        from .live import Journal

        source = origin("trl")
        try:
            seams = _chosen()
            rewritten = _rewritten(seams)
            _judge(rewritten, seams)
        except (SeamError, UnsupportedError) as error:
            if source:
                error.args = (f"{error} The installed TRL is no release ({source}).",)
            raise
        if source:
            logger.warning(
                "PatchFastRL: TRL %s is no release (%s). Every seam matches it as declared, so it passes by its shape.",
                installed("trl"),
                source,
            )
        self._strict = strict
        self._home = Home()
        try:
            files = [ModulePatch(file, self._home.file(file.source.module)) for file in rewritten]
            self._home.write(files)
        except SyntaxError as error:
            self._home.remove()
            raise SeamError(
                f"The rewritten text of {error.filename} does not compile: {error}. Nothing was changed. This is a bug "
                "in a seam, or TRL is modified: `patchfastrl show` prints the text.",
                found=str(error),
            ) from error
        except BaseException:
            self._home.remove()
            raise
        self.patches: list[Change] = [*files]
        if guided_decoding.needed():
            self.patches.append(Supplement(guided_decoding.MODULE, guided_decoding.supply))
        self._journal = Journal()
        # Held while modules are changed, never while waiting for an import: an import may be waiting for it.
        self._changing = threading.Lock()
        self.active = False
        self._finder = Finder(self.patches, self._imported)

    def install(self) -> None:
        """Change what is imported, and see to what is imported later; on any error, change nothing."""
        from .hook import wait_for_import

        self.active = True
        # The finder first: what starts to be imported from now on comes through it, and what is being imported by
        # other threads is waited for.
        sys.meta_path.insert(0, self._finder)
        try:
            modules = [(patch, module) for patch in self.patches if (module := wait_for_import(patch.name)) is not None]
            if modules:
                importlib.import_module("patchfastrl.runtime")
            with self._changing:
                for patch, module in modules:
                    patch.check(module)
                for patch, module in modules:
                    patch.apply(module, self._journal)
        except BaseException:
            self.uninstall()
            raise

    def _imported(self, patch: Change, module: ModuleType) -> None:
        """Called by the import system with a module that was just executed."""
        try:
            patch.check_file(module)
            importlib.import_module("patchfastrl.runtime")
            with self._changing:
                if self.active:
                    done = len(self._journal)
                    try:
                        patch.apply(module, self._journal)
                    except BaseException:
                        self._journal.rollback(to=done)
                        raise
        except PatchFastRLError as error:
            if self._strict:
                raise
            self.uninstall()
            warnings.warn(f"PatchFastRL left stock TRL in place: {error}", RuntimeWarning, stacklevel=2)

    def add(self, change: Callable[[Journal], None]) -> None:
        with self._changing:
            change(self._journal)

    def uninstall(self) -> None:
        with self._changing:
            self.active = False
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._finder]
            self._journal.rollback()
        # A tool may still be showing a line of it, or a generator be half-way through one.
        if not self._home.in_use():
            self._home.remove()
