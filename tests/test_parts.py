"""How a KV cache is divided into parts of which an engine that wakes needs only the first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchfastrl.compat.pieces import GRANULE, divided
from patchfastrl.compat.pool_pieces import PoolPieces
from patchfastrl.compat.worker_asleep import Asleep


@given(st.data())
def test_every_block_that_is_wanted_lies_in_a_part_that_is_needed(data: st.DataObject) -> None:
    """And what somebody else has; and a part that nobody needs is not large."""
    size = data.draw(st.integers(1, 40)) * GRANULE
    borders = data.draw(st.lists(st.integers(0, size // 512), min_size=2, max_size=8, unique=True))
    spans = [(512 * a, 512 * b) for a, b in itertools.pairwise(sorted(borders))]
    blocks = data.draw(st.integers(1, 50))
    rows = [(a, a + (b - a) // blocks * blocks) for a, b in spans if data.draw(st.booleans()) and b - a >= blocks]
    others = [span for span in spans if span[0] not in [a for a, _ in rows] and data.draw(st.booleans())]
    parts = divided(size, rows, others, blocks)
    ends = [end for _, end in parts]
    assert [start for start, _ in parts] == [0, *ends[:-1]]
    assert ends[-1] == size
    assert all(start < end and start % GRANULE == 0 for start, end in parts)
    wanted = data.draw(st.integers(1, blocks))
    absent = [part for part, first in parts.items() if first >= wanted]
    for start, end in absent:
        for a, b in others:
            assert b <= start or end <= a
        for a, b in rows:
            assert a + wanted * ((b - a) // blocks) <= start or end <= a


def per_layer() -> list[torch.Tensor]:
    return [torch.empty(8192, 16, 64, 16, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]


def one_layer_after_the_other() -> list[torch.Tensor]:
    return list(torch.empty(3, 8010, 16, 64, 16, dtype=torch.bfloat16))


def layers_in_each_block() -> list[torch.Tensor]:
    return list(torch.empty(8010, 3, 16, 64, 16, dtype=torch.bfloat16).unbind(1))


def keys_before_values() -> list[torch.Tensor]:
    return [torch.empty(2, 8010, 16, 64, 8, dtype=torch.bfloat16) for _ in range(3)]


def eight_bits() -> list[torch.Tensor]:
    return [torch.empty(8010, 16, 64, 32, dtype=torch.uint8) for _ in range(3)]


LAYOUTS = [per_layer, one_layer_after_the_other, layers_in_each_block]


@pytest.mark.parametrize("layout", [*LAYOUTS, keys_before_values, eight_bits])
def test_however_vllm_lays_it_out(layout: Callable[[], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's calls, which only a GPU's build of vLLM has, are noted down: nothing is mapped twice or in part."""
    from vllm.device_allocator import cumem

    caches, mapped = layout(), {}
    blocks = caches[0].shape[0] if layout in LAYOUTS else 8010
    allocator = cumem.CuMemAllocator()
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", allocator)
    allocator.current_tag = "kv_cache"
    segments = []
    for storage in {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches}.values():
        size = -(-storage.nbytes() // GRANULE) * GRANULE
        allocator._python_malloc_callback((0, size, storage.data_ptr(), 0))
        mapped[storage.data_ptr()] = storage.data_ptr() + size
        used = [{"size": n, "state": "active_allocated"} for n in (storage.nbytes(), size - storage.nbytes()) if n]
        segments.append({"address": storage.data_ptr(), "blocks": used})  # something else is behind it

    def unmap(handle: Any) -> None:
        assert mapped.pop(handle[2]) == handle[2] + handle[1]

    def map_(handle: Any) -> None:
        start, end = handle[2], handle[2] + handle[1]
        assert all(end <= a or b <= start for a, b in mapped.items())
        mapped[start] = end

    monkeypatch.setattr(cumem, "unmap_and_release", unmap)
    monkeypatch.setattr(cumem, "create_and_map", map_)
    monkeypatch.setattr(cumem, "libcudart", SimpleNamespace(cudaMemcpy=lambda *_: None))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    before, whole, pieces = dict(mapped), dict(allocator.pointer_to_data), PoolPieces()
    if layout in (keys_before_values, eight_bits):
        assert not pieces.divide(caches, blocks)
        assert (mapped, allocator.pointer_to_data) == (before, whole)
        return
    assert pieces.divide(caches, blocks)
    assert sum(b - a for a, b in mapped.items()) == sum(b - a for a, b in before.items())
    total = sum(size for _, size in pieces.sizes().values())
    for wanted, most in ((2, 0.08), (490, 0.08), (900, 0.14), (1900, 0.27), (3900, 0.52), (blocks, 1)):
        there = [(a, a + size) for a, (_, size) in pieces.sizes().items() if pieces.first_block(a) < wanted]
        assert sum(b - a for a, b in there) <= most * total
        for cache in caches:
            for block in {0, wanted // 2, wanted - 1}:
                start, end = cache[block].data_ptr(), cache[block].data_ptr() + cache[block].nbytes
                assert sum(max(0, min(b, end) - max(a, start)) for a, b in there) == end - start
    assert pieces.first_block(max(pieces.sizes())) == 0 or layout is per_layer  # what is behind it is always needed
    pieces.join()
    assert (mapped, allocator.pointer_to_data) == (before, whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_in_parts() -> None:
    from vllm.device_allocator.cumem import CuMemAllocator

    layers, blocks, per_block = 4, 1000, 64 * 2**10
    allocator = CuMemAllocator.get_instance()
    with allocator.use_memory_pool(tag="kv_cache"):
        raw = [torch.zeros(blocks * per_block, dtype=torch.int8, device="cuda") for _ in range(layers)]
        beside = torch.arange(280 * 2**10, dtype=torch.int32, device="cuda")  # torch lays it behind one of these
    whole, pieces = dict(allocator.pointer_to_data), PoolPieces()
    assert len(whole) == layers
    caches = [cache.view(torch.bfloat16).view(blocks, 8, 16, -1).transpose(1, 2) for cache in raw]
    worker = SimpleNamespace(
        sleep=lambda: allocator.sleep("weights"), wake_up=allocator.wake_up, add_lora=None, pin_lora=None
    )
    asleep = Asleep(worker, True, pieces)
    for other in (blocks, blocks + 1):  # 8 bits a value; a number of blocks that does not fit
        assert not pieces.divide(raw if other == blocks else caches, other)
    assert pieces.divide(caches, blocks)
    assert torch.equal(beside, torch.arange(len(beside), dtype=torch.int32, device="cuda"))
    assert sum(size for _, size in pieces.sizes().values()) == sum(piece.handle[1] for piece in whole.values())
    handed_out: list[int] = []
    limit = SimpleNamespace(all=blocks, wanted=2, hand_out=handed_out.append)
    asleep.parts.blocks = limit  # type: ignore[assignment]
    taken = sum(piece.handle[1] for piece in whole.values())
    torch.cuda.empty_cache()
    awake = torch.cuda.mem_get_info()[0]
    for wanted in (2, 60, 65, 130, 400, 999, 1000, 3):
        worker.sleep()
        torch.cuda.empty_cache()
        assert torch.cuda.mem_get_info()[0] == awake + taken
        limit.wanted = wanted
        worker.wake_up(None)
        there = handed_out[-1]
        assert wanted <= there <= max(2 * wanted, 70)
        assert torch.cuda.mem_get_info()[0] == awake + asleep.left_out()
        for number, cache in enumerate(caches):
            cache[:there] = number
        beside.fill_(7)
        assert all(bool((cache[:there] == number).all()) for number, cache in enumerate(caches))
    limit.wanted = 500
    asleep.extend()
    assert handed_out[-1] >= 500
    assert all(bool((cache[:there] == number).all()) for number, cache in enumerate(caches))
    asleep.take_all()
    assert allocator.pointer_to_data == whole
    for cache in raw:
        cache.fill_(1)
    torch.cuda.synchronize()
    del raw, caches, cache, beside
    allocator.release_pools()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= awake + taken
    assert not allocator.pointer_to_data
