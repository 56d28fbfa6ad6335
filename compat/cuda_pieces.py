"""On a GPU what lies between an engine's products and attention is compiled piece by piece, and decoding is graphs.

Requirement: vLLM on CUDA, 0.26 (seen) and newer; models whose layers are in `_LAYERS`. Others vLLM compiles whole.
Reason: compiling a whole model is 20 s of some 40 until an engine is ready. What it gains in these layers are norms and
the activation, which take vLLM's own kernels longer: 5.3 ms a token instead of 5.1 (8B, an H200). The rotation takes
vLLM's kernel half a microsecond longer, and torch 9 s to compile.
Link: vllm/compilation/decorators.py, `support_torch_compile`; vllm/model_executor/custom_op.py, `CustomOp`
Until: vLLM compiles a model in a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from patchfastrl.compiled import for_any_rows

from .versions import installed

# Those whose forward is products, attention and the pieces below, with a product or attention between any two of them.
_LAYERS = {
    "vllm.model_executor.models.llama.LlamaDecoderLayer",
    "vllm.model_executor.models.qwen2.Qwen2DecoderLayer",
}


def use(engine_model: nn.Module, config: Any) -> bool:
    """Let this model run in compiled pieces if it can, before it first runs; vLLM's `config` is changed."""
    if (installed("vllm") or Version("0")) < Version("0.26") or not _fits(engine_model, config):
        return False
    from vllm.config import CompilationMode, CUDAGraphMode

    compile_pieces(engine_model, config)
    _run_once(engine_model)
    for module in engine_model.modules():
        if hasattr(module, "do_not_compile"):
            module.do_not_compile = True
            module.cleanup()  # a hook that would keep it for good
    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    return True


def _fits(engine_model: nn.Module, config: Any) -> bool:
    """vLLM would compile it, nothing would lose by it, graphs can hold its decoding."""
    from vllm import envs
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    chosen = config.compilation_config
    usual = (CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE)
    if (chosen.mode, chosen.cudagraph_mode) != usual:
        return False
    if config.speculative_config or envs.VLLM_BATCH_INVARIANT:
        return False
    layers = list(getattr(getattr(engine_model, "model", None), "layers", ()))
    if not layers or not {f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in layers} <= _LAYERS:
        return False
    if any(getattr(layer.self_attn, "qk_norm", False) for layer in layers):  # rotated with its norms in one kernel
        return False
    if not all(_kind(m) for m in [*_custom(engine_model), *(layer.self_attn.rotary_emb for layer in layers)]):
        return False
    for attention in chosen.static_forward_context.values():
        builder = attention.get_attn_backend().get_builder_cls()
        if builder.get_cudagraph_support(config, attention.get_kv_cache_spec(config)) == AttentionCGSupport.NEVER:
            return False
    return True


def compile_pieces(engine_model: nn.Module, config: Any) -> None:
    """Norms and activations are what torch compiles of vLLM's own definitions, as of now; rotations vLLM's kernel."""
    from vllm import ir
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    settings = config.compilation_config.inductor_compile_config
    options = {name: value for name, value in settings.items() if isinstance(value, bool)}  # the others are passes
    norm = for_any_rows(ir.ops.rms_norm.impls["native"].impl_fn, 1, options)
    add_norm = for_any_rows(ir.ops.fused_add_rms_norm.impls["native"].impl_fn, 2, options)
    activation = for_any_rows(SiluAndMul.forward_native, 1, options)

    def of_norm(module: Any) -> Callable[..., Any]:
        def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            if residual is None:
                return norm(x, module.weight, module.variance_epsilon)
            return add_norm(x, residual, module.weight, module.variance_epsilon)

        return forward

    for module in _custom(engine_model):
        match _kind(module):
            case "norm":
                module._forward_method = of_norm(module)
            case "activation":
                module._forward_method = activation
            case "rotation":
                module._forward_method = module.forward_cuda
                for key in [key for key, known in _ROPE_DICT.items() if known is module]:
                    del _ROPE_DICT[key]  # vLLM would give it to the next model


@torch.inference_mode()
def _run_once(engine_model: Any) -> None:
    """The pieces of a layer are compiled now, while other kernels are, and not when vLLM first runs the model."""
    layer = engine_model.model.layers[0]
    norm, mlp = layer.input_layernorm, layer.mlp
    rows, residual, halves = (
        torch.zeros(2, width, dtype=norm.weight.dtype, device=norm.weight.device)
        for width in (len(norm.weight), len(norm.weight), mlp.gate_up_proj.output_size_per_partition)
    )
    norm(rows)
    norm(rows, residual)
    mlp.act_fn(halves)


def _custom(engine_model: nn.Module) -> list[nn.Module]:
    """What vLLM has kernels of its own for; not what is in a `RotaryEmbedding`, whose definition does not call it."""
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

    return [m for m in engine_model.modules() if isinstance(m, CustomOp) and type(m) is not ApplyRotaryEmb]


def _kind(module: nn.Module) -> str | None:
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    if type(module) is RMSNorm and module.pass_weight and module.variance_size_override is None:
        return "norm" if module.weight.data_ptr() % 16 == 0 else None  # one kernel for all
    if type(module) is SiluAndMul:
        return "activation"
    forwards = ("forward", "forward_cuda", "forward_native", "forward_static")
    if all(getattr(type(module), name, None) is getattr(RotaryEmbedding, name) for name in forwards):
        return "rotation"
    return None
