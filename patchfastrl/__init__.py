"""PatchFastRL: TRL trainers sample from one in-process vLLM engine that shares its weights with the model in training.

```python
from patchfastrl import PatchFastRL
PatchFastRL()
from trl import GRPOConfig, GRPOTrainer   # the script below is unchanged
```

Importing this package imports neither torch, nor vLLM, nor TRL.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .install import PatchFastRL, UnpatchFastRL
    from .loader import FastLanguageModel
    from .runtime import engine_report
    from .sampling import vLLMSamplingParams

__version__ = "0.1.0"
__all__ = ["FastLanguageModel", "PatchFastRL", "UnpatchFastRL", "engine_report", "vLLMSamplingParams"]

_HOME = {
    "PatchFastRL": ".install",
    "UnpatchFastRL": ".install",
    "FastLanguageModel": ".loader",
    "engine_report": ".runtime",
    "vLLMSamplingParams": ".sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
