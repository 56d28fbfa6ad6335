"""Settings that every test wants; set before torch or vLLM can be imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

# Tiny models on a CPU: more threads cost time, compilation even more, and nothing may be downloaded.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "WANDB_MODE": "disabled",
}.items():
    os.environ.setdefault(name, value)
# A caller's own standby setting would change what is tested.
os.environ.pop("UNSLOTH_VLLM_STANDBY", None)
# A shell's background job ignores Ctrl-C, and every process that it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes minutes begins first, so that no worker is left with one of these at the end while the others have nothing
# to do (seconds in CI: 620, 390, 210, 140, 130, 110, ...).
LONGEST = ("benchmarks", "demo", "trainers", "standby", "permutations", "process", "recompute", "seams", "old_logprobs",
           "copies", "refusals", "sampling", "checkpoints", "more_trainers")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    """TRL is patched while a file's tests run."""
    import tiny

    from patchfastrl import PatchFastRL, UnpatchFastRL

    PatchFastRL()
    yield
    tiny.close_all()
    UnpatchFastRL()


@pytest.fixture
def set_for_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Set one of vLLM's environment variables. While an engine is open, vLLM keeps what they were when it started."""
    from vllm import envs

    def set_variable(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(vars(envs), name, envs.environment_variables[name]())

    return set_variable
