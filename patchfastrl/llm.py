"""The object that TRL and users talk to: `vllm.LLM` over the weights of a model in training."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from peft import PeftModel
from torch import nn
from vllm import LLM
from vllm.lora.request import LoRARequest

from . import adapters, guards, memory, sharing
from .compat import cpu_standby, cuda_weight_pool, prefix_cache, request_ids, sampled_log_probs, worker_asleep
from .copies import Copies
from .errors import PatchFastRLError, StandbyError, UnsupportedError
from .interrupts import between_steps, uninterrupted
from .recompute import Recompute
from .room import Room, batch_of
from .sampling import with_seeds
from .slot import Slot
from .structure import looked_at_once

CURRENT: Any = object()  # default of `lora_request`: the adapter in training

live: weakref.WeakSet[SharedLLM] = weakref.WeakSet()  # engines that are open


class PublishFirst(LoRARequest):
    """The adapter in training, published when the batch begins, if it has changed. TRL's calls bring it."""


class SharedLLM(LLM):
    """`vllm.LLM` over the weights of a model in training. Made by `engine.build`.

    `generate` and `chat` sample with the adapter in training unless told otherwise: `lora_request=None` is the base
    model, another `LoRARequest` that adapter. Before each batch the shared storage and the adapter slot are checked.
    `sleep` and `wake_up` release and restore the KV cache, whatever level is asked for: weights stay.
    """

    # Set by `engine.build`.
    shared: sharing.Shared
    slot: Slot | None
    copies: Copies | None
    recompute: Recompute | None
    room: Room | None
    merging: bool  # whether an adapter is to be merged, if the copies hold all that it changes
    _end: weakref.finalize
    _reachable: Callable[[], None]  # before the end

    def __init__(self, **kwargs: Any) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.publishes = 0
        self.slot = None
        self.copies = None
        self.recompute = self.room = None
        self._closed: str | None = None
        self._failed = ""
        self._samples_in: int | None = None  # the thread in which a batch runs
        self._asleep: worker_asleep.Asleep | None = None  # of the worker's memory; None: it is being built
        self._standby: cpu_standby.Storages | None = None  # what that is on a CPU
        self._weights: Any = None  # those of the latest batch
        self._publish_first = False  # when the next batch begins
        self._trainers_batch = False  # the latest batch was asked for by TRL, which trains on it now
        self._prefixes_of: Any = None  # those that vLLM's prefix cache was filled with; None: others than now
        super().__init__(**kwargs)

    # A model that carries its engine as an attribute copies and pickles without it.
    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    # Access ---------------------------------------------------------------------------------------------------------

    @property
    def model_runner(self) -> Any:
        return self.worker.model_runner

    @property
    def worker(self) -> Any:
        worker = self.llm_engine.model_executor.driver_worker
        return getattr(worker, "worker", worker)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    # Sampling -------------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, lora_request: Any = CURRENT, **kwargs: Any) -> Any:
        return self._sample(super().generate, args, kwargs, lora_request)

    def chat(self, *args: Any, lora_request: Any = CURRENT, **kwargs: Any) -> Any:
        return self._sample(super().chat, args, kwargs, lora_request)

    def beam_search(self, *args: Any, lora_request: Any = CURRENT, **kwargs: Any) -> Any:
        return self._sample(super().beam_search, args, kwargs, lora_request)

    def enqueue(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            "enqueue() would sample later, past the checks of weights, adapter and standby. Use generate() or chat()."
        )

    enqueue_chat = enqueue

    def _sample(self, call: Any, args: tuple, kwargs: dict[str, Any], lora_request: Any) -> Any:
        if self._samples_in == threading.get_ident():
            # A batch inside a batch, with what the outer one was prepared for: `chat` of some vLLM releases calls
            # `generate`, and `beam_search` does so for each token.
            return call(*args, lora_request=lora_request, **kwargs)
        if self._closed:
            raise PatchFastRLError(f"This engine is closed: {self._closed}")
        if self._failed:
            raise PatchFastRLError(
                f"This engine failed in the middle of a batch ({self._failed}) and cannot go on. Make a new trainer."
            )
        if not self.awake:
            raise StandbyError("The engine's KV cache is released (standby). Call wake_up() before sampling.")
        with looked_at_once():
            lora_request, unmerged, explicit = self._prepared(lora_request)
        args, kwargs = with_seeds(args, kwargs)
        try:
            in_memory = contextlib.nullcontext() if self.copies is None else self.copies.in_memory(self._lacking)
            one_pass = sampled_log_probs.in_one_pass()
            with self._timed("generate"), in_memory, one_pass, between_steps(self.llm_engine) as failed:
                if self._prefixes_of != self._weights:
                    self.drop_prefixes()  # while a GPU merges
                    self._prefixes_of = self._weights
                self._samples_in = threading.get_ident()
                try:
                    outputs = call(*args, lora_request=lora_request, **kwargs)
                    if self.recompute is not None:
                        self.recompute.sampled(0 if self._asleep is None else self._asleep.left_out())
                    if self.room is not None and self._trainers_batch:
                        self.room.sampled(batch_of(outputs))
                    return outputs
                except BaseException:
                    self._failed = ", ".join(map(repr, failed))
                    self._trainers_batch = False
                    self._abort_requests()
                    raise
                finally:
                    self._samples_in = None
        finally:
            if unmerged:
                self._refresh()
            elif explicit and self.slot is not None and self.slot.version and self.current_request() is not None:
                self.slot.publish()  # the other adapter took the slot

    def _prepared(self, lora_request: Any) -> tuple[Any, bool, bool]:
        """Everything is as it must be for a batch with this request.

        Returns:
            The request for vLLM; whether the adapter had to be taken out of the engine's own weights for it; whether it
            is for another adapter than the one in training.
        """
        if published := isinstance(lora_request, PublishFirst) or self._publish_first:
            self.publish()
            self._publish_first = False
        if isinstance(lora_request, PublishFirst) or lora_request is CURRENT:
            lora_request = self.current_request()
        current = getattr(lora_request, "lora_int_id", None) == adapters.ADAPTER_ID
        explicit = lora_request is not None and not current
        unmerged = self.merges and not current and bool(adapters.active_adapters(self.shared.model))
        if unmerged:
            self._refresh(adapter=False)
        self._check_weights(adapter=not unmerged, published=published)
        if current and self.merges:
            lora_request = None  # it is in the weights
        elif current and self.slot is not None:
            if not published:
                self.slot.check()
        elif explicit and self.slot is None:
            raise UnsupportedError(
                "lora_request: this engine has no slot for another adapter (it was built with rollouts='merged', or "
                "without an adapter). Load the model with FastLanguageModel.from_pretrained(max_lora_rank=...)."
            )
        return lora_request, unmerged, explicit

    def request_to_publish(self) -> Any:
        """What TRL's calls bring as `lora_request`; None for a model without adapters, which is published at once.

        Which adapter is active, if any is, is found out when the batch begins.
        """
        self._trainers_batch = True
        if isinstance(self.shared.model, PeftModel):
            return PublishFirst("policy", adapters.ADAPTER_ID, adapters.ADAPTER_PATH)
        self.publish()
        return self.current_request()  # or an error: adapters inside the model, which PEFT does not wrap

    def current_request(self) -> Any:
        """The `LoRARequest` of the adapter in training; None without one."""
        if adapters.active_adapter(self.shared.model) is None:
            return None
        if self.merges:
            assert self.copies is not None
            return self.copies.request()
        return None if self.slot is None else self.slot.request()

    @property
    def merges(self) -> bool:
        """Whether the adapter in training is merged into weights of the engine's own."""
        return self.copies is not None and self.copies.merges

    def _check_weights(self, adapter: bool, published: bool) -> None:
        """The trainer's weights are the engine's.

        Args:
            adapter: whether the adapter in training is to be in the engine's own weights.
            published: these were compared with the trainer's just now.
        """
        self.shared.check()
        if self.copies is not None and not published and adapters.publishing():
            self.copies.check(adapter)
        releases = None if self._asleep is None else self._asleep.releases  # also by a worker's own `sleep`
        self._weights = (self.shared.checksum(), releases)

    def drop_prefixes(self) -> None:
        if not prefix_cache.reset(self):
            raise StandbyError("vLLM would not reset its prefix cache: requests are still running in this engine.")

    def _abort_requests(self) -> None:
        """Leave nothing behind that the next batch would return."""
        request_ids.abort_all(self.llm_engine)

    # Weights --------------------------------------------------------------------------------------------------------

    def publish(self) -> bool:
        """Make the trainer's current weights what the next batch samples from. Returns whether anything was copied."""
        with self._timed("publish"), uninterrupted(), looked_at_once():
            changed = self._refresh()
            slot = None if self.merges or adapters.active_adapter(self.shared.model) is None else self.slot
            if slot is not None and not self.awake:
                self._publish_first = True  # its memory may be released
            elif slot is not None and slot.publish():
                self._prefixes_of = None
                changed = True
            self.publishes += changed
        return changed

    def publish_first(self) -> None:
        """The next batch begins with `publish`: in place of a weight sync, which may come while the engine sleeps."""
        self._publish_first = True

    def _refresh(self, adapter: bool = True) -> bool:
        """Bring the engine's own weights up to date. While it sleeps they have no memory."""
        if self.copies is None or not self.awake or not adapters.publishing():
            return False
        changed = self.copies.refresh(adapter)
        if changed:
            self._prefixes_of = None
        return changed

    # Standby --------------------------------------------------------------------------------------------------------

    @property
    def can_sleep(self) -> bool:
        return self._asleep is not None and self._asleep.able

    @property
    def awake(self) -> bool:
        resident = self._asleep is None or self._asleep.resident
        return resident and not self.llm_engine.engine_core.is_sleeping()

    def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> None:
        """Release the KV cache, and what else only sampling needs: copies, the adapter's slot.

        Weights stay where they are at every level (level 0 only pauses, as in vLLM). Where TRL goes on to train, and
        what that takes is known, memory that it does not lack stays, until it does or `sleep` comes again.

        Raises:
            StandbyError: the engine was built without standby.
        """
        if level and self._asleep is not None:
            self._asleep.need_standby()  # before vLLM pauses its scheduler
        if level and self.llm_engine.model_executor.is_sleeping:
            self.give_back()
        elif not self.llm_engine.model_executor.is_sleeping:
            with self._timed("sleep"), uninterrupted():
                if level and self.copies is not None:
                    self.copies.release()
                with self._asleep.releasing(self._lacking()) if level and self._asleep else contextlib.nullcontext():
                    super().sleep(min(level, 1), *args, **kwargs)

    def _lacking(self) -> int | None:
        """Bytes that training lacks beside what only sampling needs, after this batch; None: not known."""
        trains, self._trainers_batch = self._trainers_batch, False
        return self.room.lacking() if trains and self.room is not None else None

    def give_back(self, nbytes: int | None = None) -> bool:
        """Release memory that has stayed since the latest batch: all, or enough for `nbytes`. Returns whether it did.

        Without standby that is the engine's own weights, all of them.
        """
        with self._timed("sleep"), uninterrupted():
            asleep = self._asleep is not None and self._asleep.give_back(nbytes)
            return asleep or (self.copies is not None and self.copies.give_back())

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Restore the KV cache. Waking only "weights" has nothing to do: they never left.

        Raises:
            StandbyError: the GPU has not enough memory left. Free some, and call it again.
        """
        if tags is not None and not {"kv_cache", "scheduling"} & set(tags):
            return
        with self._timed("wake"), uninterrupted():
            if self._asleep is not None and not self.awake:
                if released := self._asleep.released():
                    memory.make_room(released)
                self._asleep.need_room()
            if self.llm_engine.engine_core.is_sleeping():
                self._wake()
            self.worker.wake_up(None)  # nothing to do, but where the worker was put to sleep directly

    def _wake(self) -> None:
        """The engine's own weights first: on a GPU they are made while the driver maps the KV cache."""
        if self.copies is None or not self.llm_engine.model_executor.is_sleeping or not adapters.publishing():
            super().wake_up(None)  # all tags: vLLM stays asleep until each has been woken
            return
        self.worker.wake_up([cuda_weight_pool.OWN_WEIGHTS])
        try:
            with looked_at_once():
                self.publishes += self.copies.refresh()
        finally:
            super().wake_up(["weights", "kv_cache"])

    @contextlib.contextmanager
    def awakened(self) -> Iterator[None]:
        """Awake inside the block; asleep again afterwards if it was before."""
        asleep = not self.awake
        if asleep:
            self.wake_up()
        try:
            yield
        finally:
            if asleep:
                self.sleep()

    # What would tear the weights apart ------------------------------------------------------------------------------

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        if method in ("reload_weights", "update_weights", "load_weights"):
            raise guards.stopped(
                f"collective_rpc({method!r})", "it would write other weights through the shared storage"
            )
        return super().collective_rpc(method, *args, **kwargs)

    def report(self) -> dict[str, Any]:
        return {
            "bytes_shared": self.shared.bytes,
            "publishes": self.publishes,
            "layers_kept": None if self.recompute is None else self.recompute.kept,
            "seconds": {k: self.seconds[k] for k in ("build", "publish", "generate", "sleep", "wake")},
        }

    def adopt(self, model: nn.Module) -> None:
        """`model` wraps the one that the engine was built round: its adapters are the ones in training now."""
        self.shared.model = model
        if self.copies is not None:
            self.copies.merges = self.merging and self.copies.hold_all_of(model)
        if self.slot is not None:
            self.slot.serve(model)

    def require_slot(self, rank: int) -> None:
        """Raises UnsupportedError unless the engine serves adapters of `rank`."""
        limit = 0 if self.slot is None else self.llm_engine.vllm_config.lora_config.max_lora_rank
        if rank > limit:
            raise UnsupportedError(
                f"An adapter of rank {rank} does not fit this engine ("
                + (f"its slot holds rank {limit}" if limit else "it was built without an adapter slot")
                + f"). Pass max_lora_rank={rank} to FastLanguageModel.from_pretrained."
            )

    def close(self, reason: str) -> None:
        """Shut down and give the memory back. The trainer's parameters keep their storage.

        Raises:
            StandbyError: not all of the engine is awake, and a GPU has not enough memory left for that: what is not
                mapped cannot be freed. Nothing has changed then.
        """
        if self._closed:
            return
        self._reachable()
        self._closed = reason
        live.discard(self)
        for hooks in (self.room, self.recompute):
            if hooks is not None:
                hooks.remove()
        self._end()
        for name in list(vars(self)):
            if name not in ("_closed", "seconds", "publishes"):
                delattr(self, name)
        gc.collect()
        memory.return_freed()

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("_closed"):
            raise PatchFastRLError(f"This engine is closed: {self._closed}")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
