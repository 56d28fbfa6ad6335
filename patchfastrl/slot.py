"""The adapter in training, served from the engine's LoRA slot: device to device, no file, no merge.

The slot is one row of vLLM's stacked LoRA tensors. Which rows belong to which of the trainer's modules follows from the
plan of the shared weights: `q_proj.weight` is rows 0 to n of `qkv_proj.weight`, so `q_proj`'s `lora_B` goes to the
slices that make up these rows. `publish` copies the live tensors in when they differ from what the slot holds;
`check` compares the two again right before a batch, so that a missing, partial or stale adapter cannot be sampled
from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._utils import _unflatten_dense_tensors

from .adapters import ADAPTER_ID, ADAPTER_PATH, Adapter, active_adapters, publishing
from .checksum import digests
from .compat import lora_model
from .errors import AdapterError, UnsupportedError
from .sharing import Plan


@dataclass(frozen=True)
class _Place:
    """Where one slice of an adapter lives: engine module, slice number, rows of `lora_B`."""

    adapter: Adapter
    layer: Any
    slice: int
    rows: tuple[int, int]


@dataclass(frozen=True)
class _Views:
    """Views of one row of the slot's memory.

    `adapter`: lora_A's (slot's rank, in), then lora_B's (rows, slot's rank), each in the order of the places. `flat`:
    the same in one dimension each. `outside`: what vLLM keeps for modules without an adapter.
    """

    adapter: list[torch.Tensor]
    flat: list[torch.Tensor]
    outside: list[torch.Tensor]


@dataclass(frozen=True)
class _Values:
    """What one row of the slot should hold, in the order of its views: in one piece of memory, and its parts."""

    whole: torch.Tensor
    parts: list[torch.Tensor]


class Slot:
    """The engine's one LoRA slot.

    Args:
        worker: vLLM's.
        model: PEFT model in training.
        plan: where the base weights lie.

    Attributes:
        version: grows with every adapter that is published.
        lost: a digest of what was published, and standby has taken; None: it is there.
    """

    def __init__(self, worker: Any, model: nn.Module, plan: Plan) -> None:
        self._manager = worker.model_runner.lora_manager._adapter_manager
        self._plan = plan
        self.serve(model)

    def serve(self, model: nn.Module) -> None:
        """The adapter in training is one of `model`'s, and has not been published."""
        self._model = model
        self._laid_out: list[Adapter] = []
        self._places: list[_Place] = []
        self._views: dict[int, _Views] = {}
        self.version = 0
        self.lost: torch.Tensor | None = None

    # Layout ---------------------------------------------------------------------------------------------------------

    def _locate(self, adapter: Adapter) -> list[_Place]:
        if f"{adapter.module}.weight" not in self._plan.views:
            raise UnsupportedError(
                f"{adapter.module} is tied to another weight, so an adapter on it cannot be served. Take it out of "
                "target_modules."
            )
        destination, view = self._plan.views[f"{adapter.module}.weight"]
        path = destination.removesuffix(".weight")
        layer = self._manager.modules.get(path)
        if layer is None or not hasattr(layer, "lora_b_stacked") or layer.lora_b_stacked[0].dim() != 4:
            raise UnsupportedError(
                f"vLLM cannot serve an adapter on {adapter.module} (its {path} takes none). Take it out of "
                "target_modules."
            )
        out_features, in_features = view.size
        rank, limit = adapter.a.shape[0], layer.lora_a_stacked[0].shape[2]
        if rank > limit:
            raise UnsupportedError(
                f"{adapter.module} has rank {rank}, the engine's slot holds {limit}. Build the engine with "
                f"max_lora_rank={rank} or more."
            )
        if view.stride != (in_features, 1) or view.offset % in_features:
            raise UnsupportedError(f"The engine holds {adapter.module} transposed; an adapter on it cannot be served.")
        first, last = view.offset // in_features, view.offset // in_features + out_features
        places, start = [], 0
        for number, stacked in enumerate(layer.lora_b_stacked):
            end = start + stacked.shape[2]
            if first <= start and end <= last:
                places.append(_Place(adapter, layer, number, (start - first, end - first)))
            elif start < last and first < end:
                raise UnsupportedError(f"The engine's slices of {path} cut through {adapter.module}.")
            start = end
        if sum(p.rows[1] - p.rows[0] for p in places) != out_features:
            raise UnsupportedError(f"The engine's slot for {path} does not cover all of {adapter.module}.")
        return places

    def _layout(self) -> bool:
        """Find the places of the active adapter. Returns whether they are new."""
        active = active_adapters(self._model)
        if not active:
            raise AdapterError("The model's adapters are disabled: there is no adapter to publish.")
        if active is self._laid_out:  # it is remembered: another one means that the model has changed
            return False
        places = self._places
        if list(map(_identity, active)) != list(map(_identity, self._laid_out)):
            places = [p for a in active for p in self._locate(a)]
        moved, self._laid_out = places is not self._places, active
        if moved:
            self._places, self._views = places, {}
        return moved

    def _held(self, index: int) -> _Views:
        """Views of the slot's memory in row `index` of the stacked tensors."""
        if index not in self._views:
            a = [p.layer.lora_a_stacked[p.slice][index, 0] for p in self._places]
            b = [p.layer.lora_b_stacked[p.slice][index, 0] for p in self._places]
            self._views[index] = _Views(a + b, [t.view(-1) for t in a + b], self._outside(index))
        return self._views[index]

    def _live(self) -> _Values:
        """What the slot should hold, in its dtype: the scaling inside lora_B, and zeros behind the adapter's rank."""
        a = [p.adapter.a for p in self._places]
        b = [p.adapter.b if p.rows == (0, p.adapter.b.size(0)) else p.adapter.b[slice(*p.rows)] for p in self._places]
        held = self._held(0).adapter
        whole = held[0].new_empty(sum(map(torch.Tensor.numel, held)))
        parts = filled = list(_unflatten_dense_tensors(whole, held))
        if any(tensor.size(0) != row.size(0) for tensor, row in zip(a, held, strict=False)):
            whole.zero_()  # a rank that does not fill the slot's
            filled = [self._of_adapter(number, part) for number, part in enumerate(parts)]
        scalings = [p.adapter.scaling for p in self._places]
        if any(scaling != 1 for scaling in scalings):
            b = list(torch._foreach_mul(b, scalings))
        torch._foreach_copy_(filled, a + b)
        return _Values(whole, parts)

    def _of_adapter(self, number: int, part: torch.Tensor) -> torch.Tensor:
        """What the adapter has of part `number` of a row: the rest is behind its rank."""
        rank = self._places[number % len(self._places)].adapter.a.size(0)
        return part[:rank] if number < len(self._places) else part[:, :rank]

    # Publishing -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def lose(self) -> None:
        """The memory is about to be released: what it holds is lost, ours and what vLLM knows of."""
        if self.version and self.lost is None and (index := self._index()) is not None:
            self.lost = digests([torch.cat(self._held(index).flat)])
        for other in self._manager.list_adapters().keys() - {ADAPTER_ID}:
            self._manager.remove_adapter(other)

    def _index(self) -> int | None:
        """Row of the stacked tensors that vLLM maps our id to; None when the slot is not resident."""
        manager = self._manager
        if ADAPTER_ID not in manager.list_adapters() or ADAPTER_ID not in manager.lora_index_to_id:
            return None
        return manager.lora_index_to_id.index(ADAPTER_ID)

    def _make_resident(self) -> int:
        manager = self._manager
        manager.remove_adapter(ADAPTER_ID)
        if len(manager) >= manager.capacity:
            manager.remove_oldest_adapter()
        # An adapter without tensors, which `add_adapter` would not take: activating it zeroes every layer's row.
        rank = manager.lora_config.max_lora_rank
        manager._registered_adapters[ADAPTER_ID] = lora_model.without_tensors(ADAPTER_ID, rank)
        manager.activate_adapter(ADAPTER_ID)
        index = self._index()
        if index is None:
            raise AdapterError("vLLM did not take the adapter slot.")
        return index

    @torch.no_grad()
    def publish(self) -> bool:
        """Bring the slot up to date. Returns whether anything had to be copied."""
        if not publishing():
            if self._index() is None:
                self._make_resident()
            return False
        moved = self._layout()
        index, live = self._index(), self._live()
        clean = index is not None and not moved and not self._has_leftovers(index)
        if index is not None and clean and not _anything(self._apart(index, live)):
            self.lost = None
            return False
        # Grows first: interrupted after the copy, the new values must not pass under the name of the old prefixes.
        self.version += 1
        if index is None:
            index = self._make_resident()
        self._fill(index, live, clean)
        if (problem := self._differs(index, live)) is not None:
            raise AdapterError(f"The adapter cannot be published: {problem}.")
        return True

    def _fill(self, index: int, live: _Values, clean: bool) -> None:
        if not clean:
            torch._foreach_zero_([stacked for _, _, stacked in _stacked(self._manager)])
        torch._foreach_copy_(self._held(index).adapter, live.parts)
        self.lost = None

    @torch.no_grad()
    def check(self) -> None:
        """Raise unless the slot holds the adapter exactly as it is in the trainer now.

        What standby has taken is put back, if the trainer's is that still.
        """
        if not publishing():
            return
        if self.version == 0:
            raise AdapterError("No adapter has been published yet: sampling now would use the base model.")
        index = self._index()
        if index is None:
            raise AdapterError(
                "The adapter is missing from the engine's slot: something removed it. Publish it again "
                "(trainer: sync_weights(); model: fast_generate does it)."
            )
        moved, live = self._layout(), self._live()
        if self.lost is not None and not moved and torch.equal(self.lost, digests([live.whole])):
            self._fill(index, live, clean=False)
        if (problem := "another adapter was made active" if moved else self._differs(index, live)) is not None:
            raise AdapterError(
                f"The adapter in the engine's slot is not the one in training: {problem}. Publish it before sampling "
                "(trainer: sync_weights(); model: fast_generate does it)."
            )

    def _apart(self, index: int, live: _Values) -> torch.Tensor:
        """The slot's content less what it should be, in one piece: zeros if they are the same, bit for bit."""
        return torch.cat(self._held(index).flat).sub_(live.whole)

    def _differs(self, index: int, live: _Values) -> str | None:
        """Why the slot's content is not the live adapter's; None when it is."""
        apart, left_over = self._apart(index, live), self._has_leftovers(index)
        if _anything(apart):
            parts = enumerate(_unflatten_dense_tensors(apart, live.parts))
            which = next((n for n, part in parts if _anything(self._of_adapter(n, part))), None)
            if which is not None:
                adapter = self._places[which % len(self._places)].adapter
                side, tensor = ("lora_A", adapter.a) if which < len(self._places) else ("lora_B", adapter.b)
                why = "differs (stale or partial)" if torch.isfinite(tensor).all() else "is not finite"
                return f"{side} of {adapter.module} {why}"
            left_over = True
        return "modules or ranks without an adapter hold left-over values" if left_over else None

    def _has_leftovers(self, index: int) -> bool:
        """Whether the slot holds anything for modules without an adapter: vLLM's kernels would add it in."""
        outside = self._held(index).outside
        return bool(outside) and bool(torch.stack(list(torch._foreach_norm(outside, ord=math.inf))).ne(0).any())

    def _outside(self, index: int) -> list[torch.Tensor]:
        filled = {(id(p.layer), p.slice) for p in self._places}
        return [stacked[index] for layer, n, stacked in _stacked(self._manager) if (id(layer), n) not in filled]

    def request(self) -> Any:
        """The `LoRARequest` for the current version. Its name keys the prefix cache: old versions cannot be hit."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"policy-v{self.version}", ADAPTER_ID, ADAPTER_PATH)


def memory_of(worker: Any) -> list[torch.Tensor]:
    """The slot's memory, but for embeddings and the head: there vLLM keeps one tensor, of embeddings with views."""
    all_of_it = _stacked(worker.model_runner.lora_manager._adapter_manager)
    return [tensor for layer, _, tensor in all_of_it if isinstance(layer.lora_b_stacked, tuple)]


def _stacked(manager: Any) -> Iterator[tuple[Any, int, torch.Tensor]]:
    """All that vLLM keeps of adapters, one row for each: engine module, slice number, tensor."""
    for layer in manager.modules.values():
        for side in ("lora_a_stacked", "lora_b_stacked"):
            slices = getattr(layer, side, ())
            for number, tensor in enumerate((slices,) if isinstance(slices, torch.Tensor) else slices):
                yield layer, number, tensor


def _identity(adapter: Adapter) -> tuple[Any, ...]:
    """What two of them have in common exactly if they are the same: PEFT puts other parameters in under old names."""
    return adapter.name, id(adapter.layer), id(adapter.a), id(adapter.b)


def _anything(tensor: torch.Tensor) -> bool:
    """Whether a number in it is not zero. NaN is not."""
    return bool(torch.linalg.vector_norm(tensor, ord=math.inf) != 0)
