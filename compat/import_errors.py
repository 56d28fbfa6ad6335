"""vLLM keeps the error of an optional import, and with its traceback every frame that was importing vLLM.

Requirement: vLLM 0.30 and later, without torchcodec.
Reason: a function that first imports TRL and then builds a trainer is one of these frames: its trainer, model and
engine would live as long as the process.
Link: vllm/multimodal/media/audio.py, `_torchcodec_import_exc`
Until: vLLM keeps the message only.
"""

from __future__ import annotations

import sys


def drop_tracebacks() -> None:
    """Forget where the optional imports failed; that they failed, and why, stays known."""
    module = sys.modules.get("vllm.multimodal.media.audio")
    for error in vars(module).values() if module is not None else ():
        while isinstance(error, BaseException):
            error.__traceback__ = None
            error = error.__context__
