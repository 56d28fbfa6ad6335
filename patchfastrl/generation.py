"""transformers' `generate`, answered by the shared engine: for trainers that TRL gave no vLLM path."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm import SamplingParams

from .errors import UnsupportedError
from .sharing import base_of

if TYPE_CHECKING:
    from .llm import SharedLLM

engines: weakref.WeakSet[SharedLLM] = weakref.WeakSet()  # those that were built for such a trainer

# What the engine does not do, and what it means there to be off.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "top_h"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("penalty_alpha", "stop_strings", "watermarking_config", "max_time", "dola_layers"), ()),
}
# Cut-offs: two computations may put a sampled token on either side, and then it has no log-probability.
_CUT = {"top_k": (0,), "top_p": (1.0,), "min_p": (0.0,)}


def engine_settings(trainer: Any, args: Any, model: nn.Module, settings: Any, standby: bool) -> dict[str, Any]:
    """What an engine for a trainer without `vllm_*` arguments is built with."""
    if hasattr(args, "response_length"):  # PPO and the older RLOO: prompts are of any length, and token ids already
        prompt, new = _longest(trainer.train_dataset, trainer.eval_dataset), args.response_length
    else:
        prompt = getattr(args, "max_length", None) or getattr(args, "max_prompt_length", None)
        new = getattr(args, "max_new_tokens", None) or getattr(args, "max_completion_length", None)
    positions = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    wanted = prompt + new if prompt and new else None
    length = settings.max_model_length or min((n for n in (wanted, positions) if n), default=None)
    return {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_model_len": length,
        "max_num_seqs": getattr(args, "local_rollout_forward_batch_size", args.per_device_train_batch_size),
        "enable_sleep_mode": standby,
        "seed": args.seed,
    }


def _longest(*datasets: Any) -> int | None:
    """The length of the longest prompt; None when the data sets have no column of them."""
    known = [data for data in datasets if "input_ids" in (getattr(data, "column_names", None) or ())]
    return max((len(ids) for data in known for ids in data["input_ids"]), default=None)


def generate(model: nn.Module, **given: Any) -> Any:
    """`model.generate(...)`. The model in training is sampled by its engine, any other one (a teacher) by itself."""
    llm = next((llm for llm in engines if base_of(llm.shared.model) is base_of(model)), None)
    if llm is None:
        return model.generate(**given)  # type: ignore[operator]
    ids, mask = given.pop("input_ids"), given.pop("attention_mask", None)
    as_dict, config = given.pop("return_dict_in_generate", False), given.pop("generation_config")
    scored = given.pop("output_scores", False)
    if given:
        raise UnsupportedError(f"generate({', '.join(given)}): the shared engine samples from text only.")
    config = base_of(model)._prepare_generation_config(config)[0]  # type: ignore[operator]
    params = sampling_params(config, scored)
    pad = config.pad_token_id
    if pad is None and params.stop_token_ids:
        pad = params.stop_token_ids[0]  # transformers' choice
    mask = ids != pad if mask is None else mask.bool()
    prompts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    limit = llm.llm_engine.model_config.max_model_len
    if (longest := max(map(len, prompts)) + params.max_tokens) > limit:
        raise UnsupportedError(
            f"A prompt and its completion need {longest} tokens, the engine was built for {limit}. Pass "
            f"max_model_length={longest} to PatchFastRL."
        )
    completions = _sampled(llm, prompts, params)
    width = max(map(len, completions))
    padded = [completion + [pad] * (width - len(completion)) for completion in completions]
    sequences = torch.cat([ids, torch.tensor(padded, dtype=ids.dtype, device=ids.device)], dim=1)
    if not as_dict:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    scores = _scores(model, sequences, mask, config) if scored else None
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores)


@torch.no_grad()
def _scores(model: nn.Module, sequences: torch.Tensor, mask: torch.Tensor, config: Any) -> tuple[torch.Tensor, ...]:
    """What transformers calls scores: for each new token the logits that it was drawn from, as the model has them.

    One forward pass of the model in training, and transformers' own processors (temperature, repetition penalty). The
    engine's numbers would be those of its own kernels, and a policy would start with a distance from its reference.

    Args:
        sequences: prompts, padded on the left, and completions, (batch, tokens).
        mask: True for the prompts' own tokens.

    Returns:
        Float32, for each new token (batch, vocabulary).
    """
    start = mask.shape[1]
    whole = torch.nn.functional.pad(mask, (0, sequences.shape[1] - start), value=True)
    positions = whole.long().cumsum(1) - whole.long()  # as TRL has them in its other passes
    output = model(input_ids=sequences, attention_mask=whole, position_ids=positions, use_cache=False)
    process = base_of(
        model
    )._get_logits_processor(  # type: ignore[operator]
        generation_config=config,
        input_ids_seq_length=start,
        encoder_input_ids=sequences[:, :start],
        prefix_allowed_tokens_fn=None,
        logits_processor=[],
        model_kwargs={"attention_mask": mask},
    )
    ends = range(start, sequences.shape[1])
    return tuple(process(sequences[:, :end], output.logits[:, end - 1].float()) for end in ends)


def _sampled(llm: SharedLLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    with llm.awakened() if llm.can_sleep else contextlib.nullcontext():
        llm.publish()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling_params=params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def sampling_params(config: Any, scored: bool = False) -> SamplingParams:
    """A `GenerationConfig`, with the model's defaults filled in, in vLLM's terms.

    Args:
        scored: whether the trainer takes log-probabilities from what `generate` gives it.

    Raises:
        UnsupportedError: it asks for something that vLLM does not do.
    """
    for name, off in (_OFF | _CUT if scored else _OFF).items():
        value = getattr(config, name, None)
        if value is not None and value not in off:
            here = " for a trainer that takes log-probabilities from it" if name in _CUT else ""
            raise UnsupportedError(
                f"generation_config.{name}={value!r}: the shared engine does not do that{here}. Set it to "
                f"{off[0] if off else None!r}, or call PatchFastRL(use_vllm='keep') to sample with transformers."
            )
    if not config.max_new_tokens:
        raise UnsupportedError("generation_config.max_new_tokens is not set: the shared engine needs it.")
    eos = config.eos_token_id
    stops = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return SamplingParams(
        n=1,
        temperature=config.temperature if config.do_sample else 0.0,
        top_k=config.top_k or -1,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=getattr(config, "min_p", None) or 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
        max_tokens=config.max_new_tokens,
        stop_token_ids=stops,
        ignore_eos=True,  # as in transformers, what ends a completion is the configuration's alone
        detokenize=False,
    )
