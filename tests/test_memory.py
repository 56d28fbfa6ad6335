"""Bytes: what the KV cache is given, and how often the base weights exist, measured by the operating system.

`python test_memory.py shared|stock FOLDER` measures one engine in a process of its own and prints JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from patchfastrl.errors import UnsupportedError
from patchfastrl.memory import gib, kv_cache_bytes

MIB = 2**20

# The KV cache ---------------------------------------------------------------------------------------------------------


def config(**settings: Any) -> Any:
    from transformers import Qwen3Config

    sizes = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    return Qwen3Config(**{"hidden_size": 1024, "max_position_embeddings": 40960, **sizes, **settings})


PER_TOKEN = 2 * 28 * 8 * 128 * 2  # keys and values, layers, heads, head_dim, bytes of a bfloat16


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine of 64 GiB, whichever runs the tests."""
    memory = psutil.virtual_memory()._replace(total=64 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return memory.total


@pytest.mark.usefixtures("plenty")
def test_room_for_every_sequence_at_full_length() -> None:
    found = kv_cache_bytes(config(), torch.bfloat16, {"max_num_seqs": 4, "max_model_len": 1024})
    assert found == 4 * (1024 + 128) * PER_TOKEN  # a block more per sequence: the last one is never quite full
    assert kv_cache_bytes(config(), torch.float32, {"max_num_seqs": 4, "max_model_len": 1024}) == 2 * found
    assert kv_cache_bytes(config(), torch.bfloat16, {"max_num_seqs": 8, "max_model_len": 1024}) == 2 * found


@pytest.mark.usefixtures("plenty")
def test_lengths_are_rounded_up_to_blocks() -> None:
    def at(length: int) -> int:
        return kv_cache_bytes(config(), torch.bfloat16, {"max_num_seqs": 1, "max_model_len": length})

    assert at(1) == at(128) == 2 * 128 * PER_TOKEN
    assert at(129) == 3 * 128 * PER_TOKEN


def test_never_more_than_the_given_share(plenty: int) -> None:
    def at(**engine: Any) -> int:
        return kv_cache_bytes(config(), torch.bfloat16, engine)

    assert at(gpu_memory_utilization=0.3) == int(plenty * 0.3)  # 256 sequences of 40,960 tokens want 1.2 TB
    assert at(gpu_memory_utilization=0.3, max_num_seqs=None, max_model_len=None) == int(plenty * 0.3)
    assert at() == int(plenty * 0.5)
    assert at(gpu_memory_utilization=0.3, max_model_len=256) == 256 * (256 + 128) * PER_TOKEN  # want less, get less


@pytest.mark.usefixtures("plenty")
def test_heads_that_a_configuration_leaves_out() -> None:
    import transformers as t

    engine = {"max_num_seqs": 1, "max_model_len": 128}
    many = t.GPT2Config(n_embd=64, n_layer=2, n_head=4)  # no grouping, no head_dim
    assert kv_cache_bytes(many, torch.bfloat16, engine) == 2 * 128 * (2 * 2 * 64 * 2)
    grouped = t.Qwen2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)
    assert kv_cache_bytes(grouped, torch.bfloat16, engine) == 2 * 128 * (2 * 2 * 16 * 2)
    nested = t.Gemma3Config(text_config=t.Gemma3TextConfig(num_hidden_layers=2, head_dim=32, num_key_value_heads=1))
    assert kv_cache_bytes(nested, torch.bfloat16, engine) == 2 * 128 * (2 * 2 * 32 * 2)


def test_one_sequence_that_does_not_fit(plenty: int) -> None:
    engine = {"max_model_len": 500_000, "gpu_memory_utilization": 0.5}
    with pytest.raises(UnsupportedError) as caught:
        kv_cache_bytes(config(), torch.bfloat16, engine)
    needed = (500_000 // 128 + 2) * 128 * PER_TOKEN
    assert needed > plenty / 2
    for part in ("500000 tokens", gib(needed), "50%", "32.00 GiB", "vllm_max_model_length", "gpu_memory_utilization"):
        assert part in str(caught.value)
    assert kv_cache_bytes(config(), torch.bfloat16, {**engine, "gpu_memory_utilization": 0.9}) > needed


def test_models_without_attention_or_length_are_refused_by_name() -> None:
    import transformers as t

    with pytest.raises(UnsupportedError, match="MambaConfig has no num_attention_heads"):
        kv_cache_bytes(t.MambaConfig(), torch.bfloat16, {})
    bloom = t.BloomConfig(hidden_size=64, n_layer=2, n_head=2)
    with pytest.raises(UnsupportedError, match=r"BloomConfig has no max_position_embeddings.*vllm_max_model_length"):
        kv_cache_bytes(bloom, torch.bfloat16, {})
    assert kv_cache_bytes(bloom, torch.bfloat16, {"max_num_seqs": 1, "max_model_len": 128}) == 2 * 128 * (
        2 * 2 * 64 * 2
    )


def test_sizes_for_people() -> None:
    assert [gib(n) for n in (MIB // 2, 300 * MIB, 2**30, 3 * 2**29)] == ["0.5 MiB", "300.0 MiB", "1.00 GiB", "1.50 GiB"]


# The base weights, measured -------------------------------------------------------------------------------------------


class Peak:
    """The largest resident memory of this process while the block runs, sampled."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, psutil.Process().memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


def _resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def _big_model() -> Any:
    """About 300 MiB in float32. Random bytes: zero pages would not be resident."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 13, "vocab_size": 8192}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **heads, max_position_embeddings=256))


def measure(kind: str, folder: Path) -> dict[str, int]:
    """Build one engine for nothing (libraries, caches), then measure what the next one adds."""
    import tiny
    import vllm

    from patchfastrl import engine
    from patchfastrl.compat import cpu_linear

    small = {"enforce_eager": True, "kv_cache_memory_bytes": 16 * MIB, "max_model_len": 128, "max_num_seqs": 4}

    def build(model: Any) -> Any:
        if kind == "shared":
            return engine.build(model, None, **small)
        model.save_pretrained(folder)
        with cpu_linear.plain_weights():  # what TRL needs of vLLM's CPU build
            return vllm.LLM(str(folder), dtype="float32", skip_tokenizer_init=True, **small)

    first = build(tiny.model("qwen2"))
    first.close("measured next.") if kind == "shared" else first.llm_engine.engine_core.shutdown()
    del first
    model = _big_model()
    copy = sum(p.numel() * p.element_size() for p in model.parameters())
    before = _resident()
    with Peak() as peak:
        llm = build(model)
    after = _resident()
    assert llm is not None
    return {"copy": copy, "growth": after - before, "peak": peak.bytes - before}


@pytest.mark.timeout(240)
def test_base_weights_exist_once(tmp_path: Path) -> None:
    """Resident memory before and after the engine: next to nothing with us, another copy without."""
    running = {
        kind: subprocess.Popen(
            [sys.executable, __file__, kind, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        for kind in ("shared", "stock")
    }
    found = {}
    try:
        for kind, process in running.items():
            out, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors[-3000:]
            found[kind] = json.loads(out.splitlines()[-1])
    finally:
        for process in running.values():
            process.kill()
    copy = found["shared"]["copy"]
    assert copy == found["stock"]["copy"] > 280 * MIB
    assert found["shared"]["growth"] < 0.25 * copy, found
    assert found["shared"]["peak"] < 0.35 * copy, found  # also while building: layer by layer
    assert found["stock"]["growth"] > 0.9 * copy, found


# Memory that is there while a batch runs ----------------------------------------------------------------------------


def test_the_pool_is_used_where_vllm_can_give_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.device_allocator import cumem

    from patchfastrl.compat import cuda_weight_pool

    assert not cuda_weight_pool.usable()  # vLLM's CPU build has none
    monkeypatch.setattr(cumem, "cumem_available", True)
    assert cuda_weight_pool.usable()
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:128,expandable_segments:True")
            assert not cuda_weight_pool.usable()


@pytest.mark.parametrize("fails_at", [None, 0, 2])
def test_a_piece_that_cannot_be_mapped_leaves_none_mapped(
    fails_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's calls, which only a GPU's build of vLLM has, are noted down instead."""
    from vllm.device_allocator import cumem

    from patchfastrl.compat import cuda_weight_pool
    from patchfastrl.errors import StandbyError

    pieces = {n: SimpleNamespace(handle=(0, 100, n), tag="own weights" if n < 3 else "kv_cache") for n in range(4)}
    mapped, free = dict.fromkeys(range(4), True), [1000]

    def create_and_map(handle: tuple[int, int, int]) -> None:
        if handle[2] == fails_at:
            raise RuntimeError("out of memory")
        assert not mapped[handle[2]]
        mapped[handle[2]] = True

    def unmap_and_release(handle: tuple[int, int, int]) -> None:
        assert mapped[handle[2]]
        mapped[handle[2]] = False

    allocator = SimpleNamespace(pointer_to_data=pieces)
    monkeypatch.setattr(cumem.CuMemAllocator, "get_instance", staticmethod(lambda: allocator))
    monkeypatch.setattr(cumem, "create_and_map", create_and_map)
    monkeypatch.setattr(cumem, "unmap_and_release", unmap_and_release)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 2000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    scratch = cuda_weight_pool.Scratch()
    scratch.release()
    assert list(mapped.values()) == [False, False, False, True]
    assert not scratch.resident
    if fails_at is None:
        scratch.take()
        scratch.take()
        assert all(mapped.values())
        scratch.release()
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            scratch.take()
    assert list(mapped.values()) == [False, False, False, True]
    assert not scratch.resident
    free[0] = 299
    with pytest.raises(StandbyError, match=r"need 0\.0 MiB.*rollouts='adapter'"):
        scratch.take()
    assert list(mapped.values()) == [False, False, False, True]


def test_a_later_engine_does_not_put_to_sleep_what_an_earlier_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own record of its pool; the driver's calls, which only a GPU's build of vLLM has, are noted down."""
    from vllm.device_allocator import cumem

    from patchfastrl.compat import cuda_weight_pool
    from patchfastrl.compat.pool_pieces import PoolPieces

    released: list[int] = []
    monkeypatch.setattr(cumem, "unmap_and_release", lambda handle: released.append(handle[2]))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    pool = cumem.CuMemAllocator()
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", pool)

    def allocate(address: int) -> None:
        pool._python_malloc_callback((0, 100, address, address + 1))

    for address in (1000, 2000):
        allocate(address)
    cuda_weight_pool.leave()
    allocate(3000)
    assert PoolPieces().sizes() == {3000: ("default", 100)}
    pool.sleep("weights")
    assert released == [3000]
    assert pool._python_free_callback(1000)[2] == 1000
    cuda_weight_pool.leave()
    allocate(1000)  # the address was free
    assert PoolPieces().sizes() == {1000: ("default", 100)}
    for address in (1000, 2000, 3000):
        assert pool._python_free_callback(address)[2] == address
    with pytest.raises(KeyError):
        pool._python_free_callback(2000)
    allocate(4000)
    cuda_weight_pool.leave()
    allocate(4000)  # the first one failed, and vLLM's record stayed
    assert pool._python_free_callback(4000)[2] == 4000
    assert PoolPieces().sizes() == {}


def test_what_a_failed_build_gives_back_on_a_gpu_and_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's pool first forgets that it had too little memory: as long as it knows, what is freed is not given back."""
    from vllm.device_allocator import cumem
    from vllm.distributed import parallel_state

    from patchfastrl import end
    from patchfastrl.compat import cuda_graphs, cuda_weight_pool

    done: list[str] = []

    def noted(name: str) -> Any:
        return lambda *_: done.append(name)

    def create_and_map(piece: tuple[int, int, int, int]) -> None:
        done.append("error raised")
        device, size, address, handle = piece
        assert (device, size, address) == (0, 0, 0)
        assert handle
        raise RuntimeError("CUDA Error: invalid argument")

    monkeypatch.setattr(cumem, "create_and_map", create_and_map)
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", cumem.CuMemAllocator())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(end.current_platform, "is_cpu", lambda: False)
    for owner, name in (
        (cuda_weight_pool, "leave"), (cuda_weight_pool, "release_pools"), (cuda_graphs, "drop"), (end, "_let_go"),
        (end.memory, "return_cached"), (parallel_state, "cleanup_dist_env_and_memory"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, noted(name))
    worker = SimpleNamespace(model_runner=SimpleNamespace(), vllm_config=None, shutdown=noted("shutdown"))
    made = {"worker": worker}
    with pytest.raises(ArithmeticError), end.if_it_fails(lambda: end.give_up(made)):
        raise ArithmeticError
    assert not made
    first = ["error raised", "shutdown", "leave", "release_pools", "drop", "_let_go", "return_cached"]
    assert done == [*first, "cleanup_dist_env_and_memory"]


def test_pools_go_before_what_frees_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.device_allocator import cumem

    from patchfastrl.compat import cuda_weight_pool

    class Thing:
        pass

    allocator, memory = Thing(), Thing()
    left = weakref.ref(allocator), weakref.ref(memory)
    pool = cumem.CuMemAllocator()
    pool.allocator_and_pools["kv_cache"] = (memory, allocator)
    del allocator, memory
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", pool)
    monkeypatch.setattr(cuda_weight_pool, "_allocators", [])
    cuda_weight_pool.release_pools()
    assert left[0]() is not None
    assert left[1]() is None
    assert not pool.allocator_and_pools


def test_graphs_end_with_their_engine() -> None:
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    from patchfastrl.compat import cuda_graphs

    ours, others = (SimpleNamespace(compilation_config=object()) for _ in range(2))
    wrappers = []
    for config in (ours, others):
        wrapper = CUDAGraphWrapper.__new__(CUDAGraphWrapper)  # it is made for a platform that has graphs
        wrapper.compilation_config, wrapper.concrete_cudagraph_entries = config.compilation_config, {"key": "graph"}
        wrappers.append(wrapper)
    cuda_graphs.drop(ours)
    assert [wrapper.concrete_cudagraph_entries for wrapper in wrappers] == [{}, {"key": "graph"}]


def test_what_this_process_has_beside_the_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference model, or a trainer before this one."""
    import tiny

    from patchfastrl import memory

    model = tiny.model("qwen2-tied")
    ours = sum(p.nbytes for p in model.parameters())
    for name, value in {
        "is_available": True, "mem_get_info": (10_000_000, 50_000_000), "memory_reserved": 30_000_000,
        "memory_allocated": ours + 7_000_000,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert memory.taken_by_others() == 10_000_000
    assert memory.taken_beside(model) == 17_000_000


def test_lora_kernels_forget_where_a_slot_was() -> None:
    from vllm.lora.ops.triton_ops import utils

    from patchfastrl.compat import cuda_slot_addresses

    one, two = torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 16, 8)
    utils._get_lora_a_ptr([one], one.device)
    utils._get_lora_b_ptr([two], 0, two.device)
    address = one.data_ptr()
    remembered = utils._LORA_A_PTR_DICT[(address,)]
    assert remembered[0].data_ptr() == address  # vLLM keeps the tensor's memory alive
    cuda_slot_addresses.forget()
    assert not utils._LORA_A_PTR_DICT
    assert not utils._LORA_B_PTR_DICT


if __name__ == "__main__":
    import conftest  # noqa: F401  the same environment as under pytest

    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
