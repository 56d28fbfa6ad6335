"""The folder from which vLLM reads the configuration and the tokenizer of the live model. No weights are in it.

Its path is part of what vLLM looks compiled graphs up by, in later runs. So an engine that is compiled gets a folder in
vLLM's cache that is named by its contents, and by what else decides how the engine's weights are laid out; an engine
that is not gets one that goes with it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from vllm import envs

from . import __version__
from .compat import dense_layers
from .sharing import base_of, base_parameters


class ConfigFolder:
    """Written when it is made.

    Args:
        model: the live model, with or without adapters.
        tokenizer: tokenizer or processor; None: there is none.
        compiled: whether the engine will be compiled.
        settings: whatever decides which weights the engine shares, and which it has for itself.

    Attributes:
        path: where it is.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, compiled: bool, settings: Any) -> None:
        cache = Path(envs.VLLM_CACHE_ROOT, "patchfastrl-engines")  # no name that Python could import
        if compiled:
            cache.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(
            prefix="patchfastrl-engine-", dir=cache if compiled else None, ignore_cleanup_errors=True
        )
        self.path = Path(self._temporary.name, "model")  # unlike the temporary one, others may read it
        self.path.mkdir()
        _write(model, tokenizer, self.path)
        if compiled:
            weights = [(n, p.dtype, tuple(p.shape), p.stride()) for n, p in base_parameters(model).items()]
            with self._temporary:
                self.path = _moved(self.path, cache / _digest(self.path, repr((__version__, settings, weights))))

    def cleanup(self) -> None:
        self._temporary.cleanup()


def _write(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    base = base_of(model)
    if not getattr(base.config, "architectures", None):
        base.config.architectures = [type(base).__name__]
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)  # the engine's own weights are unpacked
    dense_layers.name(config)
    config.save_pretrained(folder)
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _digest(folder: Path, settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def _moved(folder: Path, named: Path) -> Path:
    """Whole or not there at all. One that is there already has the same contents."""
    try:
        os.rename(folder, named)
    except OSError:
        if not named.exists():
            raise
    return named
