"""The peak of a GPU's memory while the shared weights are laid out, worked out where there is no GPU.

    python benchmarks/loading.py --model 0.5b --model 1.5b
    python benchmarks/loading.py --model 32b --method full         # no weight is written: takes next to no memory

The trainer and its engine are built for real, on the CPU and in bfloat16, up to where the engine has its weights, but
that nothing is written into these. torch's profiler notes every allocation and every release, and they are replayed by
the rules of torch's allocator for GPUs: it takes the device's memory in segments, cuts tensors out of the smallest gap
that holds them, and can give back only segments in which nothing lies. "In copies" is what it has taken at the peak, of
one copy of the base weights; "kept" is what it holds in the end and nobody uses.

A model is either made layer by layer on the device, as one that was moved there, or read by its name: then transformers
takes one block for all of it first. What differs on a GPU is not in the figures: CUDA's context, and what vLLM's
worker for GPUs allocates that the one for CPUs does not. `grid.py` measures it there.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any
from unittest import mock

import grid
from shapes import SHAPES, make_model

MIB = 2**20
DEVICE = 139 * 2**30  # bytes
METHODS = {  # method and PatchFastRL's settings
    "full": ("full", {}),
    "lora": ("lora", {"rollouts": "merged"}),
    "lora in the slot": ("lora", {"rollouts": "adapter"}),
}


# torch's allocator --------------------------------------------------------------------------------------------------


class Block:
    """A part of a segment, in use or not, between two others."""

    def __init__(self, segment: int, offset: int, size: int, small: bool) -> None:
        self.segment, self.offset, self.size, self.small = segment, offset, size, small
        self.before: Block | None = None
        self.after: Block | None = None
        self.used = True

    @property
    def key(self) -> tuple[int, int, int]:
        return self.size, self.segment, self.offset


class Allocator:
    """`c10/cuda/CUDACachingAllocator.cpp`, without streams, pools and expandable segments. Sizes are bytes."""

    def __init__(self) -> None:
        self._gaps: dict[bool, list[Block]] = {True: [], False: []}  # smallest first, of small segments and of others
        self._sizes: dict[int, int] = {}  # of the segments
        self._numbers = itertools.count()
        self.allocated = self.reserved = self.peak = 0

    def allocate(self, nbytes: int) -> Block:
        size = max(512, -(-nbytes // 512) * 512)
        small = size <= MIB
        gaps = self._gaps[small]
        index = bisect.bisect_left(gaps, size, key=lambda gap: gap.size)
        block = gaps.pop(index) if index < len(gaps) else self._segment(size, small)
        rest = block.size - size
        if rest >= 512 and (small or rest > MIB):
            gap = Block(block.segment, block.offset + size, rest, small)
            gap.before, gap.after, block.after, block.size = block, block.after, gap, size
            if gap.after is not None:
                gap.after.before = gap
            self._add(gap)
        block.used = True
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.size
        for gap in (block.before, block.after):
            if gap is None or gap.used:
                continue
            self._gaps[gap.small].remove(gap)
            if gap is block.before:
                block.offset, block.before = gap.offset, gap.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = gap.after
                if block.after is not None:
                    block.after.before = block
            block.size += gap.size
        self._add(block)

    def empty_cache(self) -> None:
        for small, gaps in self._gaps.items():
            whole = [gap for gap in gaps if gap.size == self._sizes[gap.segment]]
            self._gaps[small] = [gap for gap in gaps if gap not in whole]
            for gap in whole:
                self.reserved -= self._sizes.pop(gap.segment)

    def _segment(self, size: int, small: bool) -> Block:
        taken = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.reserved += taken
        self.peak = max(self.peak, self.reserved)
        number = next(self._numbers)
        self._sizes[number] = taken
        return Block(number, 0, taken, small)

    def _add(self, gap: Block) -> None:
        gap.used = False
        bisect.insort(self._gaps[gap.small], gap, key=lambda other: other.key)


# Recording ----------------------------------------------------------------------------------------------------------


class Mark(IntEnum):
    """Bytes of a tensor that says in the record what happens there."""

    MODEL_MADE = 7_000_001
    CACHE_EMPTIED = 7_000_003
    BEGIN = 7_000_005
    END = 7_000_007

    def put(self) -> None:
        import torch

        torch.empty(int(self), dtype=torch.uint8)


@dataclass(frozen=True)
class Recording:
    """Addresses with the bytes that were allocated (released: negative) there, in order; where each parameter was."""

    events: list[tuple[int, int]]
    parameters: list[tuple[int, int]]


class _LaidOut(BaseException):
    """The rest of the engine is not built."""


@contextmanager
def _marked() -> Iterator[None]:
    """Laying out goes by a GPU's rules, is marked in the record, and ends building the engine. No weight is written."""
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from patchfastrl import materialise, memory

    lay_out, return_cached = materialise.materialise, memory.return_cached

    def marked(*args: Any) -> None:
        Mark.BEGIN.put()
        with (
            mock.patch.object(torch.Tensor, "copy_", lambda self, *_: self),
            mock.patch.object(torch, "equal", torch.is_same_size),  # a Mock would keep what it is called with
        ):
            lay_out(*args)
        Mark.END.put()
        raise _LaidOut

    def emptied() -> None:
        Mark.CACHE_EMPTIED.put()
        return_cached()

    with (
        mock.patch.object(materialise, "materialise", marked),
        mock.patch.object(memory, "return_cached", emptied),
        mock.patch.object(materialise, "_in_segments", return_value=True),
        mock.patch.object(memory, "device_bytes", return_value=DEVICE),
        mock.patch.object(nn.Linear, "reset_parameters"),
        mock.patch.object(nn.Embedding, "reset_parameters"),
        mock.patch.object(PreTrainedModel, "init_weights", PreTrainedModel.tie_weights),
    ):
        yield


def record(shape: str, method: str) -> Recording:
    """What building `grid.py`'s trainer allocates, TRL patched. No engine stays."""
    import torch
    from peft import LoraConfig
    from torch.profiler import ProfilerActivity, profile
    from transformers.core_model_loading import dot_natural_key
    from trl import GRPOTrainer

    job = {"cells": [(512, 8)], "steps": 1, "share": 0.95}
    with tempfile.TemporaryDirectory() as folder, _marked():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model, tokenizer = make_model(shape, method, folder, on_gpu=False, dtype=torch.bfloat16)
            named = sorted(model.named_parameters(), key=lambda item: dot_natural_key(item[0]))
            parameters = [(parameter.data_ptr(), parameter.nbytes) for _, parameter in named]
            Mark.MODEL_MADE.put()
            args = grid.configuration(job, folder, on_gpu=False, bf16=True)
            lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            with suppress(_LaidOut):
                GRPOTrainer(model=model, args=args, processing_class=tokenizer,
                            peft_config=None if method == "full" else lora, **grid.given(job))  # fmt: skip
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    in_order = sorted(events, key=lambda event: event["ts"])
    return Recording([(event["args"]["Addr"], event["args"]["Bytes"]) for event in in_order], parameters)


# Replaying ----------------------------------------------------------------------------------------------------------


def replay(recording: Recording, by_name: bool) -> dict[str, float]:
    """Figures of the allocator, in MiB; `peak` is from when the model was there to when the engine has its weights."""
    allocator, live = Allocator(), dict[int, Block]()
    events = iter(recording.events)
    figures = {}
    if by_name:
        for _, nbytes in events:
            if nbytes == Mark.MODEL_MADE:
                break
        allocator.free(allocator.allocate(sum(nbytes for _, nbytes in recording.parameters)))
        live = {address: allocator.allocate(nbytes) for address, nbytes in recording.parameters}
        figures["model"] = allocator.reserved
    for address, nbytes in events:
        if nbytes < 0:
            if address in live:
                allocator.free(live.pop(address))
        elif nbytes not in tuple(Mark):
            live[address] = allocator.allocate(nbytes)
        elif nbytes == Mark.MODEL_MADE:
            allocator.empty_cache()
            allocator.peak = figures["model"] = allocator.reserved
        elif nbytes == Mark.CACHE_EMPTIED:
            allocator.empty_cache()
        elif nbytes == Mark.BEGIN:
            figures["begin"] = allocator.peak
        else:
            break
    figures |= {"end": allocator.reserved, "kept": allocator.reserved - allocator.allocated, "peak": allocator.peak}
    copy = sum(nbytes for _, nbytes in recording.parameters)
    return {name: n / MIB for name, n in figures.items()} | {"in copies": allocator.peak / copy}


def measure(shape: str, name: str) -> dict[str, dict[str, float]]:
    from patchfastrl import PatchFastRL

    method, settings = METHODS[name]
    PatchFastRL(**settings)
    recording = record(shape, method)
    return {"made": replay(recording, by_name=False), "by name": replay(recording, by_name=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, action="append", help="shape; may be repeated (default: 0.5b)")
    parser.add_argument("--method", choices=METHODS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    import torch

    if torch.cuda.is_available():
        parser.error("this machine has a GPU, where grid.py measures it")
    columns = ("model", "begin", "end", "kept", "peak")
    found = []
    print("| model | method | | " + " | ".join(f"{name}, MiB" for name in columns) + " | in copies |")
    print("|---|---|---|" + "---:|" * (len(columns) + 1), flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for shape, method in itertools.product(options.model or ["0.5b"], options.method or METHODS):
            for how, figures in pool.submit(measure, shape, method).result().items():
                shown = " | ".join(f"{figures[name]:.0f}" for name in columns)
                print(f"| {shape} | {method} | {how} | {shown} | {figures['in copies']:.3f} |", flush=True)
                found.append({"model": shape, "method": method, "how": how, **figures})
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
