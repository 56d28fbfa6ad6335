"""What vLLM reads about the live model, and where: compiled graphs are found again by its path."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from patchfastrl import config_folder
from patchfastrl.config_folder import ConfigFolder


@pytest.fixture(scope="module", autouse=True)
def an_open_engine() -> Iterator[None]:
    """What other files' tests may leave: vLLM no longer looks at its environment variables."""
    llm = tiny.engine(tiny.model())
    yield
    llm.close("the test is over.")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, set_for_vllm: Callable[[str, str], None]) -> Path:
    set_for_vllm("VLLM_CACHE_ROOT", str(tmp_path))
    return tmp_path / "patchfastrl-engines"


def path_of(model: Any, tokenizer: Any = None, settings: Any = ("bfloat16", True)) -> Path:
    folder = ConfigFolder(model, tokenizer, True, settings)
    folder.cleanup()
    return folder.path


def test_an_engine_that_is_not_compiled_leaves_nothing(cache: Path) -> None:
    folder = ConfigFolder(tiny.model(), tiny.tokenizer(), False, ())
    assert json.loads((folder.path / "config.json").read_text())["vocab_size"]
    assert (folder.path / "tokenizer_config.json").exists()
    folder.cleanup()
    assert not folder.path.exists()
    assert not cache.exists()


def test_the_same_model_finds_its_folder_again(cache: Path) -> None:
    first = path_of(tiny.model(), tiny.tokenizer())
    assert first.parent == cache
    written = (first / "config.json").stat().st_mtime_ns
    assert path_of(tiny.model(seed=1), tiny.tokenizer()) == first  # weights are none of vLLM's business here
    assert path_of(tiny.adapted(tiny.model()), tiny.tokenizer()) == first
    assert (first / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in cache.iterdir()] == [first.name]
    assert first.stat().st_mode == cache.stat().st_mode  # as the user's mask has it


def test_whatever_makes_another_graph_makes_another_folder() -> None:
    model, tied = tiny.model("qwen2"), tiny.model()
    turned = tiny.model("qwen2")
    weight = turned.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    renamed = tiny.tokenizer()
    renamed.chat_template = "{{ messages[0]['content'] }}"
    paths = [
        path_of(model),
        path_of(model, tiny.tokenizer()),
        path_of(model, renamed),
        path_of(model, settings=("bfloat16", False)),
        path_of(tied),
        path_of(tiny.model("qwen2", layers=3)),
        path_of(tiny.model("qwen2", torch.bfloat16)),
        path_of(turned),
    ]
    assert len(set(paths)) == len(paths)
    assert all(sorted(path.iterdir()) for path in paths)


def test_another_version_makes_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    before = path_of(tiny.model())
    monkeypatch.setattr(config_folder, "__version__", "0.0.1")
    assert path_of(tiny.model()) != before


def test_of_two_processes_either_may_be_first(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    rename = os.rename
    expected = path_of(tiny.model())
    shutil.rmtree(expected)

    def after_another(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", after_another)
    assert path_of(tiny.model()) == expected
    assert list(cache.iterdir()) == [expected]


def test_a_folder_that_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        path_of(tiny.model())
    assert not list(cache.iterdir())
