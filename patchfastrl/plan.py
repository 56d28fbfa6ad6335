"""The byte budget of a run: what lies in the device's memory while sampling and while training, before any of it does.

Counted exactly: weights, adapter, gradients, the optimizer's state, the engine's own weights. Estimated: activations
(of one micro-step of a decoder), what layers keep instead of being recomputed (only what is free is used for it), and
a fixed head-room for CUDA, its libraries and graphs.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from .errors import UnsupportedError
from .memory import SPARE, gib

logger = logging.getLogger("patchfastrl")

Method = Literal["lora", "qlora", "full"]

HEADROOM = 3 * 2**30  # bytes: CUDA's context, cuBLAS, the engine's graphs, fragmentation
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: packed values, nested scales, scales of the scales


@dataclass(frozen=True)
class Shape:
    """What the budget needs to know of a model. All are numbers of elements, but for `itemsize` (bytes)."""

    parameters: int
    linear: int  # in the layers' linear weights, which adapters change and QLoRA packs
    adapter: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    cache: int  # of the KV cache, for one token
    itemsize: int = 2


@dataclass(frozen=True)
class Run:
    """What is asked for.

    Attributes:
        tokens: of a prompt and its completion. completion: those that logits are computed for; None: all.
        micro_batch: sequences in a micro-step.
        recompute: `PatchFastRL(recompute=...)`; "always" on a CPU.
    """

    method: Method
    tokens: int
    micro_batch: int
    share: float
    standby: bool
    merged: bool = True
    checkpointing: bool = True
    completion: int | None = None
    recompute: str = "least"
    float8_kv_cache: bool = False
    optimizer_bytes: int = 8  # a trained parameter: AdamW in float32
    taken: int = 0  # bytes of the device that other processes hold, or this one beside the trainer


@dataclass(frozen=True)
class Budget:
    """Bytes, by what they are for.

    Attributes:
        device: what of the device this process can have.
        sampling, training: the parts that are resident in each phase.
    """

    device: int
    sampling: dict[str, int]
    training: dict[str, int]

    @property
    def peak(self) -> int:
        return max(sum(self.sampling.values()), sum(self.training.values()))

    @property
    def fits(self) -> bool:
        return self.peak <= self.device

    def lines(self) -> list[str]:
        names = dict.fromkeys([*self.sampling, *self.training])
        width = max(map(len, names))
        rows = [f"  {'':{width}}  {'sampling':>11}  {'training':>11}"]
        for name in names:
            cells = [gib(part[name]) if part.get(name) else "-" for part in (self.sampling, self.training)]
            rows.append(f"  {name:{width}}  {cells[0]:>11}  {cells[1]:>11}")
        sums = [gib(sum(part.values())) for part in (self.sampling, self.training)]
        rows.append(f"  {'in all':{width}}  {sums[0]:>11}  {sums[1]:>11}  of {gib(self.device)}")
        return rows


def budget(shape: Shape, run: Run, device: int) -> Budget:
    """The budget of a run on a device of `device` bytes."""
    states = _states(shape, run)
    engine = int(device * run.share)
    own = shape.linear * shape.itemsize if run.method == "qlora" or (run.method == "lora" and run.merged) else 0
    cache = max(engine - own - HEADROOM // 2, 0)
    standing = {} if run.standby else {"KV cache": cache}
    sampling = {**states, "gradients": 0, "engine's own weights": own, "KV cache": cache, "head-room": HEADROOM}
    training = {**states, **standing, "activations": _activations(shape, run), "head-room": HEADROOM}
    training["kept activations"] = _kept(shape, run, device, sum(sampling.values()), sum(training.values()))
    return Budget(device - run.taken, sampling, training)


def beside_the_trainer(shape: Shape, run: Run, device: int) -> Run:
    """`run` with no larger share for the engine than the trainer's weights, adapter and optimizer leave of the device.

    They stay while the engine samples. A share of 0.95 means: all that there is.
    """
    states = _states(shape, run)
    resident = sum(states.values()) - states["gradients"]
    most = math.floor((device - run.taken - resident - HEADROOM) / device * 1000) / 1000
    return replace(run, share=most) if 0 < most < run.share else run


def _states(shape: Shape, run: Run) -> dict[str, int]:
    """What the trainer holds, activations apart."""
    size = shape.itemsize
    weights = shape.parameters * size
    if run.method == "qlora":
        weights = (shape.parameters - shape.linear) * size + int(shape.linear * _NF4)
    trained = shape.parameters if run.method == "full" else shape.adapter
    each = size if run.method == "full" else 4  # PEFT keeps adapters in float32
    return {
        "weights, shared": weights,
        "adapter": 0 if run.method == "full" else trained * 4,
        "gradients": trained * each,
        "optimizer": trained * min(run.optimizer_bytes, 2 * each),
    }


def _activations(shape: Shape, run: Run) -> int:
    """For one micro-step: what is kept of each layer, what one layer computes with, and the logits."""
    tokens = run.micro_batch * run.tokens
    kept = tokens * shape.hidden * shape.itemsize if run.checkpointing else _layer(shape, run)
    scored = run.micro_batch * (run.tokens if run.completion is None else min(run.completion + 1, run.tokens))
    logits = 6 * scored * shape.vocabulary * shape.itemsize  # as computed, scaled, in log-softmax; gradients of these
    return shape.layers * kept + max(3 * _layer(shape, run), logits)


def _layer(shape: Shape, run: Run) -> int:
    """What one layer computes with in a micro-step, and keeps unless it is recomputed."""
    return run.micro_batch * run.tokens * (10 * shape.hidden + 5 * shape.intermediate) * shape.itemsize


def _kept(shape: Shape, run: Run, device: int, sampling: int, training: int) -> int:
    """What layers keep that are not recomputed, though the script asks for it."""
    if run.recompute == "always" or not run.checkpointing:
        return 0
    limit = device - device // SPARE - run.taken if run.recompute == "least" else sampling
    return min(max(limit - training, 0), shape.layers * _layer(shape, run))


def one_sequence(shape: Shape, run: Run) -> int:
    """Bytes of the KV cache that one full sequence needs."""
    return shape.cache * run.tokens * (1 if run.float8_kv_cache else shape.itemsize)


def problem(shape: Shape, run: Run, device: int, estimated: bool = True) -> str | None:
    """Why the run cannot work, and the settings that would; None if it can.

    Args:
        estimated: False leaves the activations out: what does not fit then cannot work for certain.
    """
    found = budget(shape, run, device)
    if not estimated:
        found = replace(found, training={**found.training, "activations": 0, "kept activations": 0})
    cache = found.sampling["KV cache"]
    if cache < one_sequence(shape, run):
        needed = (one_sequence(shape, run) + found.sampling["engine's own weights"] + HEADROOM // 2) / found.device
        return (
            f"The engine's share ({run.share:.0%}) leaves {gib(cache)} for the KV cache, and one sequence of "
            f"{run.tokens} tokens needs {gib(one_sequence(shape, run))}. "
            + _first_that_fits(shape, run, device, share=min(round(needed + 0.01, 2), 0.95))
        )
    if not found.fits:
        return f"{gib(found.peak)} are needed and the device has {gib(device)}. " + _first_that_fits(shape, run, device)
    return None


def check(shape: Shape, run: Run, device: int) -> None:
    """Before anything is allocated.

    Raises:
        UnsupportedError: the run cannot work, whatever the activations take. With the settings that would.
    """
    if wrong := problem(shape, run, device, estimated=False):
        raise UnsupportedError(wrong)
    if likely := problem(shape, run, device):
        logger.warning("PatchFastRL: training will probably run out of memory (activations are estimated): %s", likely)


def _fits(shape: Shape, run: Run, device: int) -> bool:
    found = budget(shape, run, device)
    return found.fits and found.sampling["KV cache"] >= one_sequence(shape, run)


def _first_that_fits(shape: Shape, run: Run, device: int, share: float | None = None) -> str:
    """The smallest change of the settings with which the run fits."""
    resident = run.method == "lora" and run.merged
    steps: list[tuple[str, dict[str, Any]]] = [
        *([(f"vllm_gpu_memory_utilization={share}", {"share": share})] if share is not None else []),
        ("UNSLOTH_VLLM_STANDBY=1 (standby)", {"standby": True}),
        ("gradient_checkpointing=True", {"checkpointing": True}),
        *([("PatchFastRL(rollouts='adapter')", {"merged": False})] if resident else []),
        ("per_device_train_batch_size=1 (with more gradient accumulation)", {"micro_batch": 1}),
        *(
            (f"vllm_gpu_memory_utilization={part / 20}", {"share": part / 20})
            for part in range(int(run.share * 20), 1, -1)
        ),
        *([("load_in_4bit=True (QLoRA)", {"method": "qlora"})] if run.method == "lora" else []),
    ]
    changed = run
    asked: dict[tuple[str, ...], str] = {}  # the words, by the setting that they are about
    for words, setting in steps:
        if all(getattr(changed, name) == value for name, value in setting.items()):
            continue
        changed, asked = replace(changed, **setting), {**asked, tuple(setting): words}
        if _fits(shape, changed, device):
            return f"This fits: {', '.join(asked.values())}."
    longest = run.tokens
    while longest > 64:
        longest //= 2
        if _fits(shape, replace(changed, tokens=longest), device):
            return f"This fits: {', '.join([*asked.values(), f'sequences of {longest} tokens'])}."
    return "No setting makes it fit: the model is too large for this device."


def shape_of_model(model: Any, rank: int | None) -> Shape:
    """The shape of a model, which may be on the meta device.

    Args:
        rank: of an adapter on all linear layers that is still to be made; None: the model's own, or none.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from . import packed
    from .sharing import base_of, base_parameters, dtype_of

    base = base_of(model)
    text = base.config.get_text_config()
    head = base.get_output_embeddings()
    inside = {id(m) for layer in base.modules() if isinstance(layer, LoraLayer) for m in layer.modules()}
    inside -= {id(layer.base_layer) for layer in base.modules() if isinstance(layer, LoraLayer)}
    linear = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head and id(m) not in inside]
    weights = [(m.in_features, m.out_features) for m in linear]
    existing = sum(p.numel() for p in model.parameters() if p.requires_grad) if rank is None else 0
    parameters = base_parameters(model)
    dtype = dtype_of(model)
    attention = getattr(text, "num_attention_heads", None) or 0
    # Without attention, with compressed or with windowed caches vLLM alone knows what a sequence needs.
    counted = attention and not getattr(text, "kv_lora_rank", None) and not getattr(text, "sliding_window", None)
    heads = getattr(text, "num_key_value_heads", None) or attention
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(attention, 1)
    return Shape(
        parameters=sum(packed.shape_of(p).numel() for p in parameters.values()),
        linear=sum(i * o for i, o in weights),
        adapter=existing if rank is None else sum(rank * (i + o) for i, o in weights),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        cache=2 * text.num_hidden_layers * heads * head_dim if counted else 0,
        itemsize=2 if dtype == torch.float32 and next(iter(parameters.values())).is_meta else dtype.itemsize,
    )


def shape_of_name(name: str, rank: int) -> Shape:
    """The shape of a model of which only the configuration is read.

    Raises:
        UnsupportedError: there is no such model, it is no causal language model, or it is quantised in a way that
            an engine cannot be filled from.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from . import quantisation

    try:
        quantisation.refuse_loading(name, {})
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ImportError, OSError, ValueError) as error:
        raise UnsupportedError(f"plan: {name} cannot be read as a causal language model: {error}") from error
    return shape_of_model(model, rank)


def of_trainer(model: Any, args: Any, engine: dict[str, Any], taken: int, rank: int | None = None) -> tuple[Shape, Run]:
    """What a trainer is about to do.

    Args:
        args: its configuration.
        engine: `vllm.LLM` arguments.
        rank: of the engine's adapter slot. A bare model that gets one is to be trained with an adapter.
        taken: bytes of the device that other processes hold, or this one beside the trainer.
    """
    from peft import PeftModel

    from . import packed
    from .sharing import base_parameters

    adapted = isinstance(model, PeftModel)
    shape = shape_of_model(model, None if adapted else rank)
    quantised = any(packed.quant_state(p) is not None for p in base_parameters(model).values())
    run = Run(
        method="qlora" if quantised else "lora" if adapted or rank is not None else "full",
        tokens=engine.get("max_model_len") or 2048,
        micro_batch=getattr(args, "per_device_train_batch_size", 8),
        share=engine.get("gpu_memory_utilization") or 0.9,
        standby=bool(engine.get("enable_sleep_mode")),
        taken=taken,
        checkpointing=bool(getattr(args, "gradient_checkpointing", True)),
        completion=getattr(args, "max_completion_length", None),
        float8_kv_cache=str(engine.get("kv_cache_dtype", "")).startswith("fp8"),
        optimizer_bytes=2 if "8bit" in str(getattr(args, "optim", "")) else 8,
    )
    return shape, run
