"""What is asked of vLLM for a batch: TRL's settings, and `vLLMSamplingParams`, those that TRL has no field for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .compat import flat_logprobs, guided_decoding, validation_error
from .errors import UnsupportedError

# What TRL's loss depends on: the config fields that may own it, by SamplingParams name.
_OWNED_BY_TRL = {"temperature": ("temperature",), "max_tokens": ("max_completion_length", "max_new_tokens")}


class vLLMSamplingParams(dict):
    """Explicitly set fields of `vllm.SamplingParams`.

    A plain mapping: it works with `HfArgumentParser`, serialises to JSON, and pickles as a `dict`, so that a saved
    `training_args.bin` loads without this package.

    Args:
        **settings: fields of `vllm.SamplingParams` (https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html), for
            example `min_p=0.1, stop=["</answer>"], include_stop_str_in_output=True, seed=3407`. They win over the
            values that TRL's configuration would pass. `n`, `logprobs`, `max_tokens` and `temperature` stay TRL's,
            because the importance ratios depend on them: another value there is an error when the trainer is built.
    """

    def __init__(self, *entries: Any, **settings: Any) -> None:
        super().__init__(*entries, **settings)  # `dataclasses.asdict` rebuilds mappings from pairs

    def __reduce__(self) -> tuple[type[dict], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


def sampling_overrides(args: Any, completions: int = 1) -> dict[str, Any] | None:
    """`args.generation_kwargs` with `args.vllm_sampling_params` on top: TRL's own way into `SamplingParams`.

    Args:
        completions: how many TRL asks of the engine for each prompt.

    Raises:
        UnsupportedError: a field that TRL must control, or that is set twice with different values, or that vLLM does
        not
            know.
    """
    given = getattr(args, "vllm_sampling_params", None)
    base = getattr(args, "generation_kwargs", None)
    if not given:
        return base
    if not isinstance(given, dict):
        raise UnsupportedError(
            f"vllm_sampling_params is a {type(given).__name__}; give a vLLMSamplingParams(...) (or a dict): "
            "only there is it "
            "known which values were set on purpose."
        )
    from vllm import SamplingParams

    known = set(getattr(SamplingParams, "__struct_fields__", ()))
    unknown = sorted(set(given) - known) if known else []
    if unknown:
        raise UnsupportedError(f"vllm.SamplingParams has no {', '.join(unknown)} in the installed vLLM.")
    try:
        SamplingParams(**{k: v for k, v in given.items() if k != "structured_outputs"})  # which may be a dict here
    except validation_error.refusals() as error:
        raise UnsupportedError(f"vLLM refuses vllm_sampling_params={dict(given)}: {error}") from error
    fixed = {"n": completions, "logprobs": 0}
    for name, value in given.items():
        if name in fixed and value != fixed[name]:
            raise UnsupportedError(
                f"vLLMSamplingParams({name}={value!r}): TRL needs {name}={fixed[name]} (it repeats "
                "prompts itself and "
                "reads the sampled token's log-probability). Set num_generations for more completions per prompt."
            )
        owner = next((field for field in _OWNED_BY_TRL.get(name, ()) if hasattr(args, field)), None)
        if owner is not None and value != getattr(args, owner):
            raise UnsupportedError(
                f"vLLMSamplingParams({name}={value!r}) against "
                f"{type(args).__name__}({owner}={getattr(args, owner)!r}): TRL's "
                f"loss uses the latter, so the importance ratios would be wrong. Set {owner} in the config."
            )
        if base and name in base and base[name] != value:
            raise UnsupportedError(
                f"{name} is {value!r} in vllm_sampling_params and {base[name]!r} in generation_kwargs. Set it once."
            )
    merged = {**(base or {}), **given}
    if isinstance(given.get("structured_outputs"), dict):  # TRL does this since 0.29
        from vllm.sampling_params import StructuredOutputsParams

        merged["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
    return merged


def with_seeds(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """`vLLMSamplingParams` (a mapping) as vLLM's class; repetitions of a prompt under one seed get seeds of their own.

    TRL repeats a prompt `num_generations` times with n=1. With one seed for all, every completion of a group would be
    the same one and every advantage zero; vLLM itself gives the samples of n > 1 the seeds seed, seed + 1, ...
    """
    from vllm import SamplingParams

    prompts = args[0] if args else kwargs.get("prompts", kwargs.get("messages"))
    params = args[1] if len(args) > 1 else kwargs.get("sampling_params")
    if isinstance(params, dict):
        params = SamplingParams(**params)
    # A list of token ids, or of one conversation's messages, is one prompt.
    one = not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int) or "role" in prompts[0]
    if not one and isinstance(params, SamplingParams) and params.seed is not None:
        seen: Counter[str] = Counter()
        seeded = []
        for prompt in prompts or []:
            own = params.clone()
            own.seed = params.seed + seen[repr(prompt)] * params.n
            seen[repr(prompt)] += 1
            seeded.append(own)
        if len(seen) < len(seeded):
            params = seeded
    if len(args) > 1:
        return (args[0], params, *args[2:]), kwargs
    return args, {**kwargs, "sampling_params": params}


# Called from rewritten TRL code, through `runtime` --------------------------------------------------------------------


def sampling_params(params_class: Any, args: Any, **settings: Any) -> Any:
    """In place of `SamplingParams(...)`: TRL's settings with `args.vllm_sampling_params` on top."""
    given = getattr(args, "vllm_sampling_params", None) or {}
    wanted = sampling_overrides(args, settings.get("n", 1)) or {}
    merged = {**settings, **{name: wanted[name] for name in given}}
    return params_class(**_without_text(guided_decoding.translated(params_class, merged)))


def token_params(params_class: Any, **settings: Any) -> Any:
    """In place of `SamplingParams(...)` where TRL reads token ids, and log-probabilities with `token_log_probs`."""
    return params_class(**flat_logprobs.asked_for(params_class, _without_text(settings)))


def _without_text(settings: dict[str, Any]) -> dict[str, Any]:
    """TRL decodes by itself what it needs as text.

    vLLM would make text of each token as it comes, and of its log-probability once more; a small model waits for that.
    """
    # Strings that end a completion are looked for in its text.
    return {"detokenize": bool(settings.get("stop")), **settings}


def token_log_probs(extract: Any, outputs: list[Any]) -> Any:
    """In place of TRL's `extract_logprobs`: the log-probabilities and ids of what was sampled, (sequences, tokens, 1).

    With more than one for a token, or none, as TRL does it.
    """
    return flat_logprobs.extracted(outputs) or extract(outputs)
