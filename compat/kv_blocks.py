"""vLLM's scheduler hands out the first blocks of the KV cache, as many as a batch can use; the others need no memory.

Requirement: vLLM whose KV cache is one group of layers, in each of which blocks follow each other (not where all keys
come before all values); elsewhere all of the cache has memory while the engine is awake.
Reason: the cache takes the engine's whole share of a GPU, some 40 GiB where a batch can use three, and standby would
release and map all of that for each batch.
Link: vllm/v1/core/block_pool.py, vllm/v1/core/kv_cache_utils.py (`FreeKVCacheBlockQueue`)
Until: vLLM's KV cache grows as it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchfastrl.errors import StandbyError


class Blocks:
    """Which blocks of a KV cache are handed out. A request that comes adds what it can use, with all its tokens.

    Args:
        scheduler: vLLM's, with all blocks to hand out.
        runner: its worker's, which has a table of each sequence's blocks.
        extend: gives memory to `wanted` blocks, and says so with `hand_out`.

    Attributes:
        all: how many there are.
    """

    def __init__(self, scheduler: Any, runner: Any, extend: Callable[[], None]) -> None:
        self._pool = scheduler.kv_cache_manager.block_pool
        self._runner = runner
        self.all = self._pool.num_gpu_blocks
        self._asked = 0  # by the requests of the latest batch
        size = scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        longest, ahead = scheduler.max_model_len, getattr(scheduler, "num_lookahead_tokens", 0)
        self._spare = 1 + getattr(scheduler.kv_cache_manager, "watermark_blocks", 0)  # which nobody gets
        add = scheduler.add_request

        def add_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            if not scheduler.requests:
                self._asked = 0
            before = self._asked
            self._asked += (min(request.num_tokens + request.max_tokens, longest) + ahead) // size + 1
            try:
                if self.wanted > self._pool.num_gpu_blocks:
                    extend()
                return add(request, *args, **kwargs)
            except BaseException:
                self._asked = before
                raise

        scheduler.add_request = add_request

    @property
    def wanted(self) -> int:
        """Blocks that should have memory: those of the latest batch, and what vLLM keeps to itself."""
        pool = self._pool
        in_use = pool.num_gpu_blocks - pool.get_num_free_blocks() > 1
        return min(max(self._asked + self._spare, pool.num_gpu_blocks if in_use else 2), self.all)

    def hand_out(self, blocks: int) -> None:
        """From now on so many; those that have come first, as the others may be in the prefix cache."""
        pool = self._pool
        if blocks > pool.num_gpu_blocks:
            queue = type(pool.free_block_queue)(pool.blocks[pool.num_gpu_blocks : blocks])
            queue.append_n(pool.free_block_queue.get_all_free_blocks())
        elif blocks < pool.num_gpu_blocks:
            if not pool.reset_prefix_cache():
                raise StandbyError("Requests of this engine still hold blocks of its KV cache, which has less memory.")
            queue = type(pool.free_block_queue)(pool.blocks[1:blocks])
            _clear_tables(self._runner)  # nothing is left there of blocks that have no memory now
        else:
            return
        pool.free_block_queue, pool.num_gpu_blocks = queue, blocks


@torch.inference_mode()  # as vLLM made them
def _clear_tables(runner: Any) -> bool:
    """Which blocks a sequence has, on the GPU. False if this runner has them elsewhere."""
    if (tables := getattr(runner, "block_tables", None)) is not None:  # vLLM's second model runner
        for table in (*tables.block_tables, *tables.input_block_tables):
            getattr(table, "gpu", table).zero_()  # the former are written to in stages, but for older releases
        return True
    tables = getattr(getattr(runner, "input_batch", None), "block_table", None)
    if tables is not None:
        tables.clear()
    return tables is not None


def limit(llm: Any) -> None:
    """From now on this engine, of which everything is there, wakes no more of its KV cache than a batch can use.

    Not where that is another than this module knows.
    """
    scheduler, runner, asleep = llm.llm_engine.engine_core.engine_core.scheduler, llm.model_runner, llm._asleep
    if not asleep.able:
        return
    groups, pool = scheduler.kv_cache_config.kv_cache_groups, scheduler.kv_cache_manager.block_pool
    known = len(groups) == 1 and hasattr(pool.free_block_queue, "append_n") and _clear_tables(runner)
    nothing_in_use = pool.num_gpu_blocks - pool.get_num_free_blocks() == 1  # some models keep blocks for themselves
    if known and nothing_in_use and asleep.parts.pieces.divide(runner.kv_caches, pool.num_gpu_blocks):
        asleep.parts.blocks = Blocks(scheduler, runner, asleep.extend)
