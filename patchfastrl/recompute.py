"""Gradient checkpointing only where memory needs it: layers keep activations in memory that is free anyway.

While the model trains, what the engine held for a batch lies idle: with standby its KV cache and its own weights,
without these alone. As many of the last layers as fit there, and into what else is free on the device, are called
plainly; the others are recomputed, as transformers does with all of them. The numbers are the same bit by bit. (With
"needed" the device holds no more than when a batch was last sampled, with all of the engine's share of it; with "least"
it may hold all but a margin.)

With "least", where an engine that sleeps still holds memory (`room.py`), and without it more layers could keep theirs,
that is given back first.

Everything is measured. The first generation batch, and later each micro-batch that is larger than all before it, is
recomputed as without PatchFastRL, which shows what each layer would keep and what all else takes. (For that,
`torch.cuda.max_memory_allocated` starts anew.) Left as it is: a model whose layers are not one list of transformers'
`GradientCheckpointingLayer`, a forward that is asked for router logits, attentions or hidden states (a reentrant
checkpoint cuts these off), a compiled forward, one that does not come through the model's own call, such as TRL's
Liger loss, and one that comes before the backward of another: a reentrant checkpoint would sum up in another order.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import memory
from .sharing import base_of

logger = logging.getLogger("patchfastrl")

# Of the device, one part is left free: allocations do not fill memory without gaps. More of it (`memory.SPARE`) with
# `least`, where nothing else lies between the limit and the device's end.
_MARGIN = 20
_ASKED = ("output_router_logits", "output_attentions", "output_hidden_states")

Size = tuple[int, int, int]  # of a micro-batch: tokens, length of a row, tokens that logits are computed for


def layers_kept(limit: int, held: int, rest: int, layers: Sequence[int]) -> int:
    """How many of the last layers can keep their activations.

    The last ones, because backward has freed theirs when it starts to recompute others: the two never add up.

    Args:
        limit: bytes that the device may hold.
        held: bytes that it holds before the forward.
        rest: bytes that a micro-step takes on top, with every layer recomputed.
        layers: bytes that each layer keeps, in the model's order.
    """
    room = limit - held - rest
    for kept, layer in enumerate(reversed(layers)):
        room -= layer
        if room < 0:
            return kept
    return len(layers)


@dataclass(eq=False)
class _Measured:
    """A micro-step with every layer recomputed.

    Attributes:
        size: of its micro-batch.
        start: bytes allocated before its forward.
        layers: bytes that each layer would keep, in the model's order; 0 before it was recomputed.
        rest: bytes that all of it took.
    """

    size: Size
    start: int
    layers: dict[Any, int]
    rest: int = 0


class Recompute:
    """Decides at each forward of a model in training which layers keep their activations.

    Args:
        model: as the trainer calls it.
        least: the device may hold all that it has, not just what it held when a batch was last sampled.
        give_back: releases so many bytes of what the engine still holds (or all), if it does, and says whether it did.

    Attributes:
        kept: layers that kept their activations in the latest training forward.
        limit: bytes that the device held when a batch was last sampled, with all of the engine's memory; None before
            the first.
    """

    def __init__(
        self,
        model: nn.Module,
        device: memory.Device,
        least: bool,
        give_back: Callable[..., bool] = lambda nbytes=None: False,
    ) -> None:
        self.kept = 0
        self.limit: int | None = None
        self.device = device
        self.least = least
        self.give_back = give_back
        self._config = base_of(model).config.get_text_config()
        self._layers = _stack(base_of(model))
        self._batches = 0
        self._first: int | None = None  # which batch the first training forward came after
        self._measured: dict[Size, _Measured] = {}
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()  # what a forward left for its backward, still to come
        self._stock: list[tuple[nn.Module, Any]] = []  # while in a forward: what is put back after it
        self._logged: int | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Every layer is recomputed again."""
        for hook in self._hooks:
            hook.remove()

    def sampled(self, left_out: int = 0) -> None:
        """A batch was sampled; the engine still has its memory, but so many bytes that the batch could not use."""
        now = self.device.read()
        self.limit = now.held + min(left_out, max(0, now.total - now.held))  # as far as others left it
        self._batches += 1

    # A forward ------------------------------------------------------------------------------------------------------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers: list[Any] = [m for m in self._layers if m.gradient_checkpointing and m.training]
        size = size_of(args, kwargs)
        asked = any(kwargs.get(name) or getattr(self._config, name, False) for name in _ASKED)
        training = bool(layers) and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if self.limit is None or size is None or asked or not training:
            return
        self.kept = 0
        if self._open:
            return
        now = self.device.read()
        if self._first is None:
            self._first = self._batches
        larger = [s for s, m in self._measured.items() if covers(s, size) and list(m.layers) == layers]
        # In the first batch the optimizer's state is still to come, which must not end up between activations.
        if not larger or self._batches == self._first:
            self._measure(layers, size, now)
        else:
            self._keep(layers, self._measured[min(larger)], now)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for layer, stock in self._stock:
            layer._gradient_checkpointing_func = stock
        self._stock = []

    def _replace(self, layer: Any, call: partial[Any]) -> None:
        self._stock.append((layer, layer._gradient_checkpointing_func))
        layer._gradient_checkpointing_func = call

    # Keeping --------------------------------------------------------------------------------------------------------

    def _keep(self, layers: list[Any], found: _Measured, now: memory.Reading) -> None:
        sizes = [found.layers[layer] for layer in layers]

        def limit(now: memory.Reading) -> int:
            assert self.limit is not None
            most, margin = (now.total, memory.SPARE) if self.least else (self.limit, _MARGIN)
            return most - now.total // margin

        self.kept = layers_kept(limit(now), now.held, found.rest, sizes)
        if self.kept < len(layers) and self.give_back(now.held + found.rest + sum(sizes) - limit(now)):
            now = self.device.read()
            self.kept = layers_kept(limit(now), now.held, found.rest, sizes)
        first = len(layers) - self.kept
        expected = sum(sizes[first:])
        if self._logged is None or self.kept < self._logged:
            self._logged = self.kept
            logger.info(
                "PatchFastRL: gradient checkpointing: %d of %d layers keep their activations (%s, of the memory that "
                "%s), %d are recomputed",
                self.kept,
                len(layers),
                memory.gib(expected),
                "is free" if self.least else "the engine gave back",
                first,
            )
        learn = partial(self._learn, found, now, expected)
        self._open.add(learn)
        for number, layer in enumerate(layers[first:]):
            stock = layer._gradient_checkpointing_func
            self._replace(layer, partial(_plainly, layer, stock, None if number else learn))

    def _learn(self, found: _Measured, before: memory.Reading, expected: int, gradient: torch.Tensor) -> None:
        """Backward is through with the layers that kept theirs: if it took more than expected, the rest is larger."""
        self._open.clear()
        peak = self.device.read().peak
        if peak > before.peak:
            found.rest = max(found.rest, peak - before.allocated - expected)

    # Measuring ------------------------------------------------------------------------------------------------------

    def _measure(self, layers: list[Any], size: Size, now: memory.Reading) -> None:
        self.device.forget_peak()
        made = _Measured(size, now.allocated, dict.fromkeys(layers, 0))
        self._open.add(made)
        for layer in layers:
            self._replace(layer, partial(self._recomputed, made, layer, layer._gradient_checkpointing_func))

    def _recomputed(self, made: _Measured, layer: Any, stock: Any, function: Any, *args: Any) -> Any:
        """In place of the checkpoint of a layer: the same, measured."""

        def measured(*args: Any) -> Any:
            if self._stock:
                return function(*args)  # this is the forward; later on it is backward that calls
            before = self.device.read().allocated
            try:
                return function(*args)
            finally:  # torch may end a recomputation early, by an exception
                now = self.device.read()
                made.layers[layer] = max(made.layers[layer], now.allocated - before)
                made.rest = now.peak - made.start
                if all(made.layers.values()):
                    self._open.discard(made)
                    self._add(made)

        return stock(measured, *args)

    def _add(self, made: _Measured) -> None:
        known = self._measured.setdefault(made.size, made)
        known.rest = max(known.rest, made.rest)
        known.layers = {layer: max(n, made.layers[layer]) for layer, n in known.layers.items()}


def _plainly(layer: Any, stock: Any, learn: Any, function: Any, *args: Any) -> Any:
    """In place of the checkpoint of a layer that keeps its activations."""
    hidden = args[0] if args else None
    if not isinstance(hidden, torch.Tensor) or not hidden.requires_grad:
        return stock(function, *args)  # a reentrant checkpoint would compute no gradients
    layer._gradient_checkpointing_func = stock  # for a layer that is called again in this forward
    if learn is not None:
        hidden.register_hook(learn)
    return function(*args)


def _stack(base: nn.Module) -> list[Any]:
    """The model's layers, if they are one list and none is inside another."""
    found = {name: m for name, m in base.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    return list(found.values()) if len({name.rpartition(".")[0] for name in found}) == 1 else []


def size_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Size | None:
    """Of a forward with these arguments; None: it is not known."""
    rows = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if rows is None and args:
        rows = args[0]
    if not isinstance(rows, torch.Tensor) or rows.dim() < 2:
        return None
    number, length = rows.shape[:2]
    wanted = kwargs.get("logits_to_keep")
    logits = min(wanted, length) if isinstance(wanted, int) and wanted > 0 else length
    return number * length, length, number * logits


def covers(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether nothing of `other` is larger."""
    return all(a >= b for a, b in zip(size, other, strict=True))
