"""Weights that the engine holds for itself, made from the trainer's: cast, unpacked, or with the adapter merged in.

Most of an engine's weights are the trainer's own storage. Some cannot be: float32 master weights (the engine samples in
half precision), packed 4-bit weights, and, where rollouts are to run at the speed of a merged model, the matrices that
the adapter changes. The engine has its own memory for these, and fills it from the trainer's weights and adapter before
it samples. Standby releases it with the KV cache; without standby it is there while a batch runs, and no longer, unless
training fits beside it (`room.py`). The trainer's weights are only ever read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from . import adapters
from .checksum import digests
from .errors import AdapterError, SharingError
from .interrupts import uninterrupted
from .merge import Merge, merge_all
from .packed import quant_state, storages_of, unpacked
from .sharing import Shared, base_parameters
from .trace import View


class Source(NamedTuple):
    """A weight that is copied: its name, the trainer's, and where the engine's lies."""

    name: str
    parameter: nn.Parameter
    whole: torch.Tensor  # the engine's, of which it is a view
    view: View

    @property
    def home(self) -> torch.Tensor:
        """Made anew each time: kept, it would hold the engine's memory when that ends."""
        return self.view.on(self.whole)


class Scratch(Protocol):
    """Memory that can be released and taken again, at the same addresses; its contents are lost."""

    @property
    def resident(self) -> bool: ...

    def take(self) -> None: ...

    def release(self) -> None: ...


class Copies:
    """The engine's own weights.

    Args:
        shared: where everything lies.
        merges: whether the adapter in training is merged in. Otherwise they are the base's.

    Attributes:
        version: grows with every adapter (or base) that is published.
        releases: how often the memory was released; the contents are lost each time.
    """

    def __init__(self, shared: Shared, merges: bool) -> None:
        self._shared = shared
        self.merges = merges
        self.version = 0
        self.releases = 0
        self._scratch: Scratch | None = None
        self._held: _Values | None = None  # what was published: the memory, where it is there, has it
        self._sources: list[Source] = []
        self._sources_of: Any = None  # the parameters among which they were found
        self._merged: dict[str, adapters.Adapter] = {}
        self._merged_of: Any = None

    def hold_all_of(self, model: nn.Module) -> bool:
        """Whether the engine has a copy of everything that the model's adapter changes. False without an adapter."""
        views, own = self._shared.plan.views, self._shared.plan.own
        places = [views.get(f"{a.module}.weight", ("",))[0] for a in adapters.active_adapters(model)]
        return bool(places) and own.issuperset(places)

    def release(self) -> None:
        """The memory is gone, or is about to be: nothing may be sampled until the next `refresh`."""
        self.releases += 1
        self._held = None

    def live_in(self, scratch: Scratch | None) -> None:
        """Their memory is this one, there while a batch runs. None: it stays, or standby sees to it."""
        self._scratch = scratch
        self.give_back()

    @property
    def passing(self) -> bool:
        """Whether the memory is there for a batch, not for good, and not as standby has it."""
        return self._scratch is not None

    @property
    def resident(self) -> bool:
        """Whether the memory is there. With standby, whether the engine is awake counts too."""
        return self._scratch is None or self._scratch.resident

    @contextlib.contextmanager
    def in_memory(self, lacking: Callable[[], int | None]) -> Iterator[None]:
        """Inside the block the memory is there, with what was published; afterwards, too, if nothing is `lacking`."""
        if self._scratch is None:
            yield
            return
        stays = False
        try:
            with uninterrupted():
                if not self._scratch.resident:
                    self._scratch.take()
                    if self._held is not None and adapters.publishing():
                        self._fill(self._copied(), self._adapters() if self._held.scalings else {})
            yield
            stays = lacking() == 0
        finally:
            if not stays:
                self.give_back()

    def give_back(self) -> bool:
        """Release memory that is there while a batch runs, and has stayed after it. Returns whether there was any."""
        if self._scratch is None or not self._scratch.resident:
            return False
        self.releases += 1
        with uninterrupted():
            self._scratch.release()
        return True

    @torch.no_grad()
    def refresh(self, adapter: bool = True) -> bool:
        """Make the engine's own weights those of the trainer now; without memory: what they will be made of.

        On a GPU the work is queued, not waited for: what is sampled afterwards runs after it.

        Args:
            adapter: with the adapter in training; False: the base model's.

        Returns:
            Whether they were others before.
        """
        wanted, sources, merged = self._now(adapter)
        if self._held is not None and self._held.same_as(wanted):
            return False
        self._held = None  # interrupted half-way, they are nobody's weights
        self.version += 1
        if self.resident:
            self._fill(sources, merged)
        self._held = wanted
        return True

    @torch.no_grad()
    def _fill(self, sources: list[Source], merged: dict[str, adapters.Adapter]) -> None:
        others = [(source.home, source.parameter) for source in sources if source.name not in merged]
        plain = [(home, parameter) for home, parameter in others if quant_state(parameter) is None]
        if plain:
            torch._foreach_copy_(*map(list, zip(*plain, strict=True)))
        for home, parameter in others:
            if quant_state(parameter) is not None and (values := unpacked(parameter, home)) is not home:
                home.copy_(values)
        merge_all(_merges(sources, merged))

    def check(self, adapter: bool = True) -> None:
        """Raise unless the engine's own weights are made of the trainer's as these are now."""
        now, _, _ = self._now(adapter)
        if self._held is None or not self._held.same_as(now):
            raise SharingError(
                "The model was trained (or written to) since the engine's copy of its weights was refreshed, or the "
                "copy was released. Publish first (trainer: sync_weights(); model: fast_generate does it)."
            )

    def request(self) -> Any:
        """The `LoRARequest` that stands for the merged adapter. Its name says which version."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"policy-v{self.version}", adapters.ADAPTER_ID, adapters.ADAPTER_PATH)

    def storages(self) -> list[torch.Tensor]:
        return [self._shared.homes[name].data for name in self._shared.plan.own]

    # What they are made of ------------------------------------------------------------------------------------------

    def _copied(self) -> list[Source]:
        """All that is copied, and where to."""
        current, plan, homes = base_parameters(self._shared.model), self._shared.plan, self._shared.homes
        if current is not self._sources_of:  # it is remembered: another one means that the model has changed
            self._sources = [
                Source(name, current[name], homes[home], view)
                for name, (home, view) in plan.views.items()
                if home in plan.own
            ]
            self._sources_of = current
        return self._sources

    def _now(self, adapter: bool) -> tuple[_Values, list[Source], dict[str, adapters.Adapter]]:
        """The trainer's values, what is copied, and the adapter's modules by the name of the weight they change."""
        known = self._sources
        base = _digests_of(known)  # a GPU goes over the weights while it is found out whether they are still the ones
        if (sources := self._copied()) is not known:
            base = _digests_of(sources)
        merged = self._adapters() if adapter else {}
        low_rank = digests(tensor for a in merged.values() for tensor in (a.a, a.b))
        return _Values(base, low_rank, tuple((name, a.scaling) for name, a in merged.items())), sources, merged

    def _adapters(self) -> dict[str, adapters.Adapter]:
        """The active adapter's modules, by name."""
        if not self.merges:
            return {}
        active = adapters.active_adapters(self._shared.model)
        if active is not self._merged_of:  # it is remembered, too
            if active and not self.hold_all_of(self._shared.model):
                raise AdapterError(
                    "The adapter that is active now changes weights that the engine was not built to merge. Build the "
                    "trainer with the adapter that it trains."
                )
            self._merged, self._merged_of = {f"{a.module}.weight": a for a in active}, active
        return self._merged


def _merges(sources: list[Source], merged: dict[str, adapters.Adapter]) -> Iterator[Merge]:
    for source in sources:
        if (adapter := merged.get(source.name)) is not None:
            weight = unpacked(source.parameter, home := source.home)
            yield Merge(home, weight, adapter.a, adapter.b, adapter.scaling, adapter.layer.fan_in_fan_out)


def _digests_of(sources: list[Source]) -> torch.Tensor:
    return digests(tensor for source in sources for tensor in storages_of(source.parameter))


@dataclass(frozen=True)
class _Values:
    """Which values the trainer has. torch's version counters miss `.data` and the kernels of 8-bit optimizers."""

    base: torch.Tensor
    low_rank: torch.Tensor
    scalings: tuple[tuple[str, float], ...]

    def same_as(self, other: _Values) -> bool:
        return (
            self.scalings == other.scalings
            and torch.equal(self.low_rank, other.low_rank)
            and torch.equal(self.base, other.base)
        )
