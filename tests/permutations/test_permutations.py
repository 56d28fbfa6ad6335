"""Every order of import, patch and unpatch gives what it should; see cases.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import zygote

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    command = [sys.executable, "-m", "permutations.zygote"]
    run = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", zygote.names())
def test_permutation(case: str, outcome: dict[str, str]) -> None:
    assert outcome[case] == ""
