"""A training process that ends, or is ended, leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import os, sys, tempfile
sys.path.insert(0, {tests!r})
import tiny
from patchfastrl import PatchFastRL
PatchFastRL()
from trl import GRPOConfig, GRPOTrainer

def reward(completions, **kwargs):
    print("SAMPLED", flush=True)
    return [float(len(c) % 7) for c in completions]

trainer = GRPOTrainer(
    model=tiny.model(), processing_class=tiny.tokenizer(), reward_funcs=reward, train_dataset=tiny.prompts(16),
    args=GRPOConfig(output_dir={folder!r}, per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
                    max_steps={steps}, report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
                    vllm_gpu_memory_utilization=0.2),
)
trainer.train()
print("TRAINED", flush=True)
"""


def start(tmp_path: Path, steps: int, before: str = "") -> subprocess.Popen[str]:
    code = before + SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out"), steps=steps)
    environment = {**os.environ, "UNSLOTH_VLLM_STANDBY": "1", "TMPDIR": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        cwd=tmp_path,
    )


def left_over(session: int) -> list[str]:
    """Processes of the session that `start` opened."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or [])[:100])
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.timeout(240)
def test_an_ordinary_end(tmp_path):
    process = start(tmp_path, steps=2)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-2000:]
    assert "TRAINED" in out
    assert left_over(process.pid) == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("patchfastrl-")] == []


@pytest.mark.timeout(240)
def test_ctrl_c_while_training(tmp_path):
    process = start(tmp_path, steps=100_000)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("SAMPLED"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert left_over(process.pid) == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("patchfastrl-")] == []


TAKEN = """
import os, socket
import torch.distributed as dist

init_process_group, others = dist.init_process_group, []

def init(*args, **kwargs):
    if port := int(os.environ["MASTER_PORT"]):
        others.append(socket.create_server(("localhost", port)))
    print("JOINED", flush=True)
    return init_process_group(*args, **kwargs)

dist.init_process_group = init
"""


@pytest.mark.timeout(240)
def test_no_other_process_can_take_the_port_first(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    process = start(tmp_path, steps=1, before=TAKEN)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-2000:]
    assert "JOINED" in out
    assert "TRAINED" in out


LOGGED = """
import gc, logging, sys, weakref
sys.path.insert(0, {tests!r})
import vllm
records = []

class Keeps(logging.Handler):
    def emit(self, record):
        records.append(record)

logging.getLogger("vllm").addHandler(Keeps())
import tiny

def engine():
    llm = tiny.engine(tiny.model())
    return weakref.ref(llm)

alive = engine()
gc.collect()
print("RECORDS", len(records), "ALIVE", alive() is not None)
"""


@pytest.mark.timeout(240)
def test_who_keeps_log_records_keeps_no_engine():
    """vLLM logs errors of its optional imports, and each has the frames that were importing."""
    code = LOGGED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    _, records, _, alive = done.stdout.split()[-4:]
    assert int(records) > 0
    assert alive == "False"
