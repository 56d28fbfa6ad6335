"""The byte budget of the engine."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from .errors import UnsupportedError
from .install import settings
from .packed import storages_of

SPARE = 10  # with recompute="least", this part of the device stays free

_BLOCK = 128  # tokens; no vLLM backend uses larger KV blocks by default


def gib(n: int) -> str:
    """`n` bytes for a person: MiB below one GiB."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Reading:
    """A device's memory at one moment, in bytes.

    Attributes:
        total: all that this process may make it hold.
        held: what is in use, by whomever, without what torch keeps at hand for its next allocations.
        cached: what torch keeps.
        allocated: by torch.
        peak: the largest `allocated` since it was last made to start anew.
    """

    total: int
    held: int
    cached: int
    allocated: int
    peak: int


class Device:
    """The memory of a GPU.

    Args:
        idle: bytes that torch keeps and that nobody can use (`idle`); they count as held.

    Attributes:
        resets: how often somebody else made torch's peak start anew, as far as it was noticed.
    """

    def __init__(self, device: torch.device, idle: int = 0) -> None:
        self._device = device
        self._idle = idle
        self._peak = 0
        self.resets = 0

    def read(self) -> Reading:
        free, total = torch.cuda.mem_get_info(self._device)
        stats = torch.cuda.memory_stats(self._device)
        allocated = stats["allocated_bytes.all.current"]
        cached = max(0, stats["reserved_bytes.all.current"] - allocated - self._idle)
        held = total - free - cached
        fraction = torch.cuda.get_per_process_memory_fraction(self._device)
        if fraction < 1:  # the script's own bound
            total = min(total, held - allocated + int(fraction * total))
        before, self._peak = self._peak, stats["allocated_bytes.all.peak"]
        self.resets += self._peak < before
        return Reading(total, held, cached, allocated, self._peak)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = 0


def return_cached() -> None:
    """Give the memory of a GPU that torch keeps for later allocations back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def idle() -> int:
    """Bytes of a GPU that torch keeps and cannot give back, such as what the graphs of an engine leave of theirs."""
    return_cached()
    return Device(torch.device("cuda", torch.cuda.current_device())).read().cached


def make_room(nbytes: int) -> None:
    """Before an engine takes `nbytes` of a GPU past torch: what torch keeps is given back, as far as that is needed.

    That costs a ms a GiB, what was just given back takes 4 ms a GiB to map, not 1 (an H200), and training takes it
    anew. (With recompute="needed" the device holds no more than it must, so all of it is given back.)
    """
    if torch.cuda.is_available():
        now = Device(torch.device("cuda", torch.cuda.current_device())).read()
        lacking = nbytes + now.total // SPARE - (now.total - now.held - now.cached)
        if settings().recompute != "least":
            return_cached()
        elif lacking > 0:
            return_some(lacking, now.peak - now.allocated)


def return_some(nbytes: int, hidden: int) -> None:
    """Give `nbytes` of what torch keeps of the current GPU back to it, and a little more, or all.

    torch gives back every segment in which nothing lies. In those that are to stay something lies meanwhile: `hidden`
    bytes of it at most, so that torch's peak stays as it was.
    """
    lying = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in to_stay(_free_segments(), nbytes, hidden)]
    return_cached()
    del lying


def to_stay(free: Iterable[int], nbytes: int, hidden: int) -> list[int]:
    """Which of free segments, by their bytes, need not be given back; of these no more than `hidden` bytes."""
    free, stay = sorted(free), []
    left = min(sum(free) - nbytes, hidden)
    for size in free:  # those that are given back are few, then
        if size > left:
            break
        stay.append(size)
        left -= size
    return stay


def _free_segments() -> list[int]:
    """Bytes of the segments that torch would fill for a tensor of that size; none where it was told how to allocate."""
    if os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"):
        return []
    here, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    return [
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == here
        and segment["stream"] == stream
        and tuple(segment["segment_pool_id"]) == (0, 0)
        and segment["segment_type"] == "large"
        and segment["active_size"] == 0
        and not segment["is_expandable"]
    ]


def make_workspace(device: torch.device) -> None:
    """cuBLAS takes 32 MiB for good with the first matrix product: now, in memory that is its own.

    Later it might be cut out of a block that torch keeps at hand, which could then never be given back (seen: 1 GiB).
    """
    if device.type == "cuda":
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        torch.mm(one, one)


def return_workspaces() -> None:
    """cuBLAS has one for each stream that ever multiplied; those in use are made again."""
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()


def return_freed() -> None:
    """Give what was freed back: a GPU's memory, and the host's, which glibc keeps for later allocations."""
    return_cached()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries keep nothing, or have no such call
    if trim is not None:
        trim(0)


def kv_cache_bytes(config: Any, dtype: torch.dtype, engine: dict[str, Any]) -> int:
    """KV cache for an engine on the CPU, in bytes: what `max_num_seqs` full sequences can use, within the given share.

    vLLM's own answer is the whole share of the machine's memory at once (and it touches it).

    Args:
        config: the model's transformers configuration.
        dtype: of the cache.
        engine: `vllm.LLM` arguments; read are max_num_seqs, max_model_len, gpu_memory_utilization (on the CPU: a share
            of the machine's memory).

    Raises:
        UnsupportedError: one sequence does not fit, or the model has no attention heads to cache anything for.
    """
    per_sequence, sequences, length = kv_cache_of(config, dtype, engine)
    share = engine.get("gpu_memory_utilization") or 0.5
    limit = int(device_bytes() * share)
    if per_sequence > limit:
        raise UnsupportedError(
            f"One sequence of {length} tokens needs {gib(per_sequence)} of KV cache, and {share:.0%} of this "
            f"machine's memory is {gib(limit)}. Lower vllm_max_model_length (max_seq_length) or raise "
            "vllm_gpu_memory_utilization."
        )
    return min(sequences * per_sequence, limit)


def device_bytes() -> int:
    """Memory of the device that the engine runs on."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total


def taken_by_others() -> int:
    """Bytes of the GPU that this process could not have: other processes' memory, and CUDA's own."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def taken_beside(model: nn.Module) -> int:
    """`taken_by_others`, and what else this process has there: a reference model, a trainer before this one."""
    if not torch.cuda.is_available():
        return 0
    storages = [t.untyped_storage() for p in model.parameters() for t in storages_of(p)]
    ours = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    return taken_by_others() + max(torch.cuda.memory_allocated() - ours, 0)


def kv_cache_of(config: Any, dtype: torch.dtype, engine: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of a full sequence, how many sequences there are, and how many tokens a full one has."""
    text = config.get_text_config()
    attention_heads = getattr(text, "num_attention_heads", None)
    length = engine.get("max_model_len") or getattr(text, "max_position_embeddings", None)
    if attention_heads is None or length is None:
        missing = "num_attention_heads" if attention_heads is None else "max_position_embeddings"
        raise UnsupportedError(
            f"{type(text).__name__} has no {missing}, so the size of the engine's KV cache cannot be told. "
            + ("Set vllm_max_model_length (max_seq_length)." if length is None else "Train this model with stock TRL.")
        )
    heads = getattr(text, "num_key_value_heads", None) or attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // attention_heads
    per_block = 2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize * _BLOCK
    blocks = -(-length // _BLOCK) + 1
    sequences = engine.get("max_num_seqs") or 256
    return blocks * per_block, sequences, length
