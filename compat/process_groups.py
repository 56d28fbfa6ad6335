"""vLLM's groups of processes, for an engine that is a process of its own only.

Requirement: all supported vLLM; the group of experts is made for mixtures only from 0.17 on, 0.12 always makes it.
Reason: vLLM keeps its groups when an engine ends, and an engine for a mixture, built after one for a dense model, finds
no group of experts and stops. And gloo looks the machine's name up for each group, which takes 9 s where no name server
answers, though a group of one talks to nobody.
Link: vllm/distributed/parallel_state.py, `ensure_model_parallel_initialized`; torch's `ProcessGroupGloo`
Until: vLLM takes its groups down with the engine; gloo makes groups of one without a name.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator


def make_anew() -> None:
    """Before an engine is built, with no other one of ours alive."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """While an engine of one process is built: gloo's groups are on the loopback interface, unless told otherwise."""
    name = "GLOO_SOCKET_IFNAME"
    loopback = next((n for _, n in socket.if_nameindex() if n in ("lo", "lo0")), None)
    if name in os.environ or loopback is None:
        yield
        return
    os.environ[name] = loopback
    try:
        yield
    finally:
        del os.environ[name]
