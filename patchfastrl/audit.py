"""Do both sides really compute with the same weights? Checked when an engine is ready, and on demand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from vllm import SamplingParams

from .errors import SharingError
from .interrupts import uninterrupted
from .llm import SharedLLM
from .packed import scales_of
from .sharing import base_of


def audit(llm: SharedLLM) -> None:
    """Check that both sides compute with the same weights: same storage, same log-probabilities, also after writing.

    Raises:
        SharingError: names what is not shared.
    """
    shared = llm.shared
    shared.check()
    for name, parameter in shared.parameters.items():
        if parameter.is_inference():
            raise SharingError(f"{name} became an inference tensor and could not be trained.")
    llm.publish()
    _probe(llm, "a probe prompt")
    of_home: dict[str, list[torch.Tensor]] = {}
    for name, (home, _) in shared.plan.views.items():
        of_home.setdefault(home, []).append(shared.parameters[name])
    homes = list(of_home.values())
    for half in (homes[0::2], homes[1::2], homes[: len(homes) // 2]):
        with _altered([parameter for parameters in half for parameter in parameters]):
            llm.publish()
            _probe(llm, "a probe prompt after writing into the trainer's parameters")
    llm.publish()
    llm.drop_prefixes()
    llm.seconds.clear()


@contextlib.contextmanager
def _altered(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Other weights in place, exactly undone at the end: matrices change their sign, vectors get other values.

    An engine that computes with copies that it made while loading does not follow, wherever it hides them. Vectors
    (biases, norms) are often all zero in a fresh model, where a sign says nothing, and small enough to be kept.
    """
    packed = [scale for t in tensors for scale in scales_of(t)]
    matrices = packed + [t.data for t in tensors if t.dim() > 1 and not scales_of(t)]
    vectors = [t.data for t in tensors if t.dim() <= 1]
    kept = [v.clone() for v in vectors]
    with uninterrupted(), torch.no_grad():
        torch._foreach_neg_(matrices)
        try:
            for vector in vectors:
                vector.copy_(torch.linspace(0.5, 1.5, vector.numel()).view_as(vector))
            yield
        finally:
            torch._foreach_neg_(matrices)
            for vector, values in zip(vectors, kept, strict=True):
                vector.copy_(values)


@torch.no_grad()
def _probe(llm: SharedLLM, what: str, length: int = 24) -> None:
    """Log-probabilities of a fixed prompt on both sides."""
    model = llm.shared.model
    text_config = base_of(model).config.get_text_config()
    length = min(length, llm.llm_engine.model_config.max_model_len - 1)
    ids = [(7 + 31 * i) % text_config.vocab_size for i in range(length)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    training = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        output = llm.generate([{"prompt_token_ids": ids}], sampling_params=params, use_tqdm=False)[0]
        model.eval()
        try:
            inputs = torch.tensor([ids], device=next(model.parameters()).device)
            logits = model(input_ids=inputs, use_cache=False).logits[0].float()
        finally:
            for module, mode in training.items():
                module.training = mode
    engine = torch.tensor([p[t].logprob for t, p in zip(ids[1:], output.prompt_logprobs[1:], strict=True)])
    trainer = logits[:-1].log_softmax(-1).cpu()[torch.arange(length - 1), torch.tensor(ids[1:])]
    distance = (engine - trainer).abs().mean().item()
    # Rounding grows with the spread of the logits. In half precision, 32 layers deep, it is 5 to 7 % of it.
    exact = {p.dtype for p in llm.shared.engine_model.parameters() if p.is_floating_point()} == {torch.float32}
    limit = (1e-3 if exact else 0.2) * logits.std(-1).mean().item()
    if not distance <= limit:
        raise SharingError(
            f"On {what} the engine's log-probabilities differ from the model's by {distance:.4f} on average "
            f"(limit {limit:.4f}): "
            "the two do not compute the same function, so this model cannot be sampled from a shared engine. "
            "Train it with "
            "stock TRL (leave PatchFastRL() out)."
        )
