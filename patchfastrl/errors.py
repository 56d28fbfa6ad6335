"""Every error that PatchFastRL raises on purpose."""

from __future__ import annotations


class PatchFastRLError(RuntimeError):
    """Base class: the message says what was found, what was expected, and what to do next."""


class SeamError(PatchFastRLError):
    """TRL could not be rewritten: a seam's requirement, target or match count does not hold. Nothing was changed."""

    def __init__(self, message: str, *, seam: str | None = None, found: object = None, expected: object = None) -> None:
        super().__init__(message)
        self.seam = seam
        self.found = found
        self.expected = expected


class UnsupportedError(PatchFastRLError):
    """The script asks for something that cannot be done with a shared engine. Raised before training starts."""


class SharingError(PatchFastRLError):
    """A weight that both sides must see is not, or is no longer, one and the same storage."""


class AdapterError(PatchFastRLError):
    """The engine's adapter slot is missing, partial or stale: a batch sampled with it would come from wrong weights."""


class StandbyError(PatchFastRLError):
    """The engine's KV cache is released, or its sleep state does not allow what was asked."""


class GuardError(PatchFastRLError):
    """An operation that would tear shared weights apart, or write through them by accident, was stopped."""
