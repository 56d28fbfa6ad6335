"""How much memory training takes, so that an engine need not give up more than that while nothing is sampled.

To release memory and to take it back costs some 4 ms a GiB, and a training step mostly lacks a part of it, or nothing.
What it takes is what came with the batches before: forwards, rewards, the optimizer's step. Nothing is known before an
optimizer has stepped and one more batch has been trained on; of a batch with longer rows, or more tokens, than all of
these; while gradients wait for the optimizer; in an evaluation; or after the script made torch's peak start anew.
Everything is released then, and before a forward of the model that is larger than all that were trained with, or of a
size that is not known, such as TRL's Liger loss and transformers' `generate`, and when training has ended.
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
from .sharing import base_of

if TYPE_CHECKING:
    from .llm import SharedLLM

logger = logging.getLogger("patchfastrl")

Batch = tuple[int, int]  # of what was sampled: tokens with every row padded to the longest, length of that


class Room:
    """What is known of one model's training.

    Args:
        model: as the trainer calls it.
        device: where it is; nobody but `Recompute` makes its peak start anew.
        give_back: releases what the engine still holds though nothing is sampled.
    """

    def __init__(self, model: nn.Module, device: memory.Device, give_back: Callable[[], Any]) -> None:
        self._model = weakref.ref(model)  # a copy of the model has copies of the hooks
        self._device = device
        self._give_back = give_back
        self._trainable = frozenset(id(p) for p in model.parameters() if p.requires_grad)
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None  # that has stepped
        self._forwards: list[Size] = []  # in training; none that is smaller than another
        self._batches: list[Batch] = []  # that were trained on, likewise
        self._batch: Batch | None = None  # the latest one, which may be sampled in parts
        self._complete = True  # what is sampled next belongs to another one
        self._trains = False  # it is being trained on
        self._reset = False  # the script made the peak start anew meanwhile
        self._trained_on = 0  # how many batches
        self._allocated: int | None = None  # bytes, when a batch was last sampled
        self._growth = 0  # the most that was allocated on top, until the next one was
        self._resets = 0
        self._said = False
        self._hooks = [
            model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        if (base := base_of(model)) is not model:
            self._hooks.append(base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        self._unhook = weakref.finalize(self, register_optimizer_step_post_hook(_stepped(weakref.ref(self))).remove)
        self._unhook.atexit = False

    def remove(self) -> None:
        """Nothing is known from now on."""
        for hook in self._hooks:
            hook.remove()
        self._unhook()

    def sampled(self, batch: Batch | None) -> None:
        """The trainer sampled so much (None: not known); the engine still has its memory."""
        now = self._read()
        if self._trains and not self._reset and self._optimizer is not None:
            self._trained_on += 1
            if self._trained_on == 1:  # of which the optimizer's state was a part, that is held from now on
                self._forget()
            elif self._batch is not None:
                _add(self._batches, self._batch)
        model = self._model()
        if model is None or not model.training:
            self._batch, self._complete = None, True
        elif self._trains or self._complete:
            self._batch, self._complete = batch, False
        elif self._batch is not None:  # another turn of a conversation, or other prompts of the same batch
            tokens, longest = self._batch
            self._batch = None if batch is None else (tokens + batch[0], max(longest, batch[1]))
        self._allocated, self._trains, self._reset = now.allocated, False, False

    def lacking(self) -> int | None:
        """Bytes that training on the latest batch lacks beside what is held now; None: not known."""
        optimizer = None if self._optimizer is None else self._optimizer()
        known = self._batch is not None and any(covers(seen, self._batch) for seen in self._batches)
        if optimizer is None or not known or self._trained_on < 2:
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
            self._resets, self._trained_on, self._reset = self._device.resets, 0, True
            self._forget()
        if self._allocated is not None:
            self._growth = max(self._growth, now.peak - self._allocated)
        return now

    def _forget(self) -> None:
        self._forwards, self._batches, self._growth = [], [], 0
        self._device.forget_peak()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or model is not self._model():
            return
        self._read()  # before `Recompute`, of which the hook comes next, makes the peak start anew
        size = None if kwargs.get("past_key_values") is not None else size_of(args, kwargs)
        if size is None or not any(covers(seen, size) for seen in self._forwards):
            self._give_back()
        if torch.is_grad_enabled():
            self._trains = True
            if size is not None:
                _add(self._forwards, size)

    def _before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """PEFT's `generate` is the base model's, whose cache grows with every token."""
        model = None if torch.compiler.is_compiling() else self._model()
        if kwargs.get("past_key_values") is not None and model is not None and base is base_of(model):
            self._give_back()

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
    """From now on the engine releases only what this trainer's training lacks.

    Not where there is nothing to release, with another `recompute` than "least", or if the trainer has no callbacks
    yet (Online DPO before TRL 0.23): nobody would give the memory back when it has trained.
    """
    releases = llm.can_sleep or (llm.copies is not None and llm.copies.passing)
    if releases and llm.recompute is not None and llm.recompute.least and hasattr(trainer, "callback_handler"):
        llm.room = Room(llm.shared.model, llm.recompute.device, llm.recompute.give_back)
        trainer.add_callback(AtTheEnd(llm))
