"""vLLM keeps its groups of processes when an engine ends: let the next engine, which may need others, make its own.

Requirement: vLLM that makes the group of experts for mixtures only: seen from 0.17 on, 0.12 always makes it.
Reason: an engine for a mixture, built after one for a dense model, finds no such group and stops.
Link: vllm/distributed/parallel_state.py, `ensure_model_parallel_initialized`
Until: vLLM takes its groups down with the engine.
"""

from __future__ import annotations


def make_anew() -> None:
    """Before an engine is built, with no other one of ours alive."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        parallel_state.destroy_model_parallel()
