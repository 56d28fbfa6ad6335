"""How much memory training takes, so that an engine need not give up more than that while nothing is sampled.

To release memory and to take it back costs some 4 ms a GiB, and a training step mostly lacks a part of it, or nothing.
What it takes is what came with the batches before: forwards, rewards, the optimizer's step. Nothing is known before an
optimizer has stepped and two batches have been trained on; of a batch with longer rows, or more tokens, than all before
it; while gradients wait for the optimizer; or after the script made torch's peak start anew. Everything is released
then, and before a forward of the model that is larger than all that were trained with, and at the end of training.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from . import memory
from .recompute import Size, covers, size_of

if TYPE_CHECKING:
    from .llm import SharedLLM

logger = logging.getLogger("patchfastrl")

Batch = tuple[int, int]  # of what was sampled: tokens with every row padded to the longest, length of that


class Room:
    """What is known of one model's training.

    Args:
        model: as the trainer calls it.
        device: where it is; nobody else makes its peak start anew.
        give_back: releases what the engine still holds though nothing is sampled.
    """

    def __init__(self, model: nn.Module, device: memory.Device, give_back: Callable[[], Any]) -> None:
        self.ends = False  # whether somebody gives the memory back when training ends
        self._model = weakref.ref(model)  # a copy of the model has copies of the hooks
        self._device = device
        self._give_back = give_back
        self._trainable = frozenset(id(p) for p in model.parameters() if p.requires_grad)
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None  # that has stepped
        self._forwards: list[Size] = []  # in training; none that is smaller than another
        self._batches: list[Batch] = []  # that were trained on, likewise
        self._batch: Batch | None = None  # the latest one
        self._trains = False  # it is being trained on
        self._spoiled = False  # what it takes was not all seen
        self._trained_on = 0  # how many batches
        self._allocated: int | None = None  # bytes, when a batch was last sampled
        self._growth = 0  # the most that was allocated on top, until the next one was
        self._resets = 0
        self._said = False
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        self._unhook = weakref.finalize(self, register_optimizer_step_post_hook(_stepped(weakref.ref(self))).remove)
        self._unhook.atexit = False

    def remove(self) -> None:
        """Nothing is known from now on."""
        for hook in self._hooks:
            hook.remove()
        self._unhook()
        self.ends = False

    def sampled(self, batch: Batch | None) -> None:
        """A batch of this size (None: not known) was sampled; the engine still has its memory."""
        now = self._read()
        if self._trains and not self._spoiled and self._batch is not None and self._optimizer is not None:
            self._trained_on += 1
            _add(self._batches, self._batch)
        self._allocated, self._batch, self._trains, self._spoiled = now.allocated, batch, False, False

    def lacking(self) -> int | None:
        """Bytes that training on the latest batch lacks beside what is held now; None: not known."""
        optimizer = None if self._optimizer is None else self._optimizer()
        known = self._batch is not None and any(covers(seen, self._batch) for seen in self._batches)
        if not self.ends or optimizer is None or not known or self._trained_on < 2:
            return None
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return None
        now = self._device.read()
        lacking = max(0, now.held + self._growth - (now.total - now.total // memory.SPARE))
        if not self._said:
            self._said = True
            logger.info(
                "PatchFastRL: training takes %s and lacks %s beside the engine, which releases no more than it lacks",
                memory.gib(self._growth),
                memory.gib(lacking),
            )
        return lacking

    def _read(self) -> memory.Reading:
        now = self._device.read()
        if self._device.resets != self._resets:
            self._resets, self._trained_on, self._spoiled = self._device.resets, 0, True
            self._forwards, self._batches = [], []
        if self._allocated is not None:
            self._growth = max(self._growth, now.peak - self._allocated)
        return now

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or model is not self._model():
            return
        self._read()  # what was before may make the peak start anew
        size = size_of(args, kwargs)
        if size is None or not any(covers(seen, size) for seen in self._forwards):
            self._give_back()
        if torch.is_grad_enabled():
            self._trains = True
            if size is not None:
                _add(self._forwards, size)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and model is self._model() and torch.is_grad_enabled():
            self._read()


def _add(sizes: list[Any], size: Any) -> None:
    """Add to a list of which no entry covers another."""
    if not any(covers(seen, size) for seen in sizes):
        sizes[:] = [seen for seen in sizes if not covers(size, seen)] + [size]


def _stepped(room: weakref.ref[Room]) -> Callable[..., None]:
    def stepped(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        known = room()
        if known is not None and any(id(p) in known._trainable for g in optimizer.param_groups for p in g["params"]):
            known._optimizer = weakref.ref(optimizer)

    return stepped


def batch_of(outputs: Any) -> Batch | None:
    """The size of what `LLM.generate` returned; None: it is something else."""
    rows = [
        len(output.prompt_token_ids or ()) + len(made.token_ids)
        for output in outputs
        for made in getattr(output, "outputs", ())
    ]
    return (len(rows) * max(rows), max(rows)) if rows else None


class AtTheEnd(TrainerCallback):
    """After training, and after an evaluation, the memory is the script's."""

    def __init__(self, llm: SharedLLM) -> None:
        self._llm = weakref.ref(llm)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if (llm := self._llm()) is not None and not llm._closed:
            llm.give_back()

    on_evaluate = on_predict = on_train_end


def watch(llm: SharedLLM, trainer: Any) -> None:
    """The memory may stay while this trainer trains, if it is one that can be told to give it back."""
    if llm.room is not None and hasattr(trainer, "callback_handler"):
        trainer.add_callback(AtTheEnd(llm))
        llm.room.ends = True
