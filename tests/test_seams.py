"""Declarations, and TRL sources that no longer fit them: nothing may be patched, and the error says what is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from patchfastrl import install
from patchfastrl.errors import SeamError
from patchfastrl.seam import choose, variants
from patchfastrl.sources import RELEASES

SEAMS = {seam.name: seam for seam in install._chosen()}


def test_declarations_are_complete() -> None:
    for seam in install._seams():
        assert seam.requirement.name in ("trl", "vllm", "peft")
        assert seam.count >= 1
        assert seam.link.startswith("https://")
        assert seam.reason
        assert seam.until
        assert seam.module.startswith(f"{seam.requirement.name}.")
        assert all(Requirement(known).name == seam.requirement.name for known in seam.absent)


# The first release that has a seam, and the first that has it no longer.
SPANS = {
    **{f"grpo.{n}": ("0.18.0", None) for n in ("configure", "load_model", "trainer_mode", "sampling_overrides")},
    **{f"rloo.{n}": ("0.22.0", None) for n in ("configure", "load_model", "trainer_mode", "sampling_overrides")},
    **{f"grpo.{n}": ("0.18.0", None) for n in ("config_field", "config_json")},
    **{f"rloo.{n}": ("0.22.0", None) for n in ("config_field", "config_json")},
    **{f"{trainer}.generation_mode": ("0.28.0", None) for trainer in ("grpo", "rloo")},
    **{f"grpo.{n}": ("0.18.0", "0.28.0") for n in ("build", "publish", "lora_request")},
    **{f"rloo.{n}": ("0.22.0", "0.28.0") for n in ("build", "publish", "lora_request")},
    **{f"engine.{n}": ("0.28.0", None) for n in ("build", "publish", "lora_request", "token_ids")},
    **{f"{trainer}.reload": ("0.26.0", "0.28.0") for trainer in ("grpo", "rloo")},
    "engine.token_log_probs": ("0.29.0", None),
    "engine.reload": ("0.28.0", "1.10.0"),
    **{f"grpo.{n}": ("0.28.0", None) for n in ("old_logps", "loss_old_logps")},
    "log_probs.selected": ("0.18.0", "1.14.0"),
    "log_probs.entropies": ("0.20.0", "1.14.0"),
    "grpo.temperature": ("0.18.0", "1.14.0"),
    "rloo.temperature": ("0.22.0", "1.14.0"),
    "grpo.chat_template": ("0.25.0", "0.26.0"),
    "rloo.chat_template": ("0.25.0", "0.27.0"),
    "rloo.text_prompts": ("0.25.0", "0.27.0"),
    "gold.completion_length": ("0.25.0", "0.26.0"),
    **{f"online_dpo.{n}": ("0.18.0", None) for n in ("configure", "build", "publish", "lora_request")},
    **{f"online_dpo.{n}": ("0.23.0", None) for n in ("trainer_mode", "sampling_overrides", "config_field")},
    "online_dpo.load_model": ("0.20.0", None),
    "online_dpo.config_json": ("0.29.1", None),
    "gold.configure": ("0.25.0", None),
    "gold.sampling_overrides": ("0.25.0", "0.27.0"),
    "gold.generation_mode": ("1.0.0", None),
    **{f"gold.{n}": ("0.25.0", "1.0.0") for n in ("trainer_mode", "build", "publish", "lora_request")},
    **{f"distillation.{n}": ("1.1.0", None) for n in ("configure", "load_model", "generation_mode")},
    **{f"distillation.{n}": ("1.10.0", None) for n in ("sampling_overrides", "config_field", "config_json")},
    "distillation.trainer_mode": ("1.11.0", None),
    **{f"iw_opd.{n}": ("1.9.0", None) for n in ("configure", "load_model", "generation_mode")},
    **{
        f"{trainer}.{n}": span
        for trainer, span in {"sdft": ("1.6.0", None), "sdpo": ("1.0.0", None), "ssd": ("1.2.0", "1.16.0")}.items()
        for n in ("configure", "load_model", "generation_mode", "sampling_overrides", "config_field", "config_json")
    },
    **{f"gkd.{n}": ("0.18.0", None) for n in ("configure", "build", "generate")},
    **{f"a2po.{n}": ("1.6.0", None) for n in ("configure", "build", "generate")},
    **{f"openenv.{n}": ("0.26.0", "1.9.0") for n in ("lora_request", "reload", "sampling_overrides")},
    **{f"ppo.{n}": ("0.18.0", "1.13.0") for n in ("configure", "build", "generate")},
    **{f"old_rloo.{n}": ("0.18.0", "0.22.0") for n in ("configure", "build")},  # it samples through PPO's function
    **{f"old_sdft.{n}": ("1.0.0", "1.6.0") for n in ("configure", "build", "generate")},
    **{
        f"{trainer}.{n}": ("0.18.0", "1.14.0")
        for trainer in ("nash_md", "xpo")
        for n in ("configure", "build", "generate")
    },
    "async_grpo.elsewhere": ("1.0.0", None),
    "async_distillation.elsewhere": ("1.11.0", None),
}


@pytest.mark.parametrize("release", [Version(release) for release in RELEASES], ids=str)
def test_one_variant_per_release(release: Version) -> None:
    by_name = variants(install._seams())
    assert by_name.keys() == SPANS.keys()
    for name, candidates in by_name.items():
        first, end = SPANS[name]
        seam = choose(candidates, lambda _: release)
        assert (seam is not None) == (Version(first) <= release and (end is None or release < Version(end))), name
        assert seam is None or [other for other in candidates if other.holds_for(release)] == [seam]


def test_absent_is_declared_too() -> None:
    (seam,) = variants(install._seams())["rloo.configure"]
    assert choose([seam], lambda _: Version("0.21.0")) is None
    with pytest.raises(SeamError, match="was not written for trl 0.21.0"):
        choose([dataclasses.replace(seam, absent=())], lambda _: Version("0.21.0"))


@pytest.mark.parametrize("release", ["0.17.0", "1.17.0", "1.17.0.dev0"])
def test_no_seam_is_silently_absent_from_an_unknown_release(release: str) -> None:
    for candidates in variants(install._seams()).values():
        with pytest.raises(SeamError):
            choose(candidates, lambda _: Version(release))


@pytest.mark.parametrize("release", ["0.17.0", "0.9", "1.17.0", "1.17.0.dev0", "2.0"])
def test_unknown_releases_are_refused(release: str) -> None:
    with pytest.raises(SeamError) as caught:
        choose([SEAMS["engine.build"]], lambda _: Version(release))
    error = caught.value
    assert (error.seam, error.found, error.expected) == ("engine.build", release, "trl>=0.28,<1.17")
    assert f"found trl {release}, expected trl>=0.28,<1.17" in str(error)
    assert "Nothing was changed" in str(error)


@pytest.mark.parametrize("release", ["1.16.0+mine", "1.16.0.post1", "1.15.0rc1", "1.16.1"])
def test_builds_of_known_releases_pass_by_shape(release: str) -> None:
    choose([SEAMS["engine.build"]], lambda _: Version(release))


def test_a_missing_trl_is_named() -> None:
    with pytest.raises(SeamError, match=r"trl is not installed.*pip install") as caught:
        choose([SEAMS["engine.build"]], lambda _: None)
    assert caught.value.found is None


INIT = "create_model_from_path(model, **model_init_kwargs)"
# For every kind of seam: the anchor in TRL's text, then the text with it deleted, renamed and duplicated.
MUTATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "configure": (
        "        if args is None:\n",
        {
            "deleted": "        if True:\n",
            "renamed": "        if arguments is None:\n",
            "duplicated": "        if args is None:\n            pass\n        if args is None:\n",
        },
    ),
    "load_model": (
        f"            model = {INIT}\n",
        {
            "deleted": "            pass\n",
            "renamed": "            model = load_from_path(model, **model_init_kwargs)\n",
            "duplicated": f"            model = {INIT}\n            model = {INIT}\n",
        },
    ),
    "trainer_mode": (
        "        self.vllm_mode = args.vllm_mode\n",
        {
            "deleted": "\n",
            "renamed": "        self.vllm_mode = args.engine_mode\n",
            "duplicated": "        self.vllm_mode = args.vllm_mode\n        self.vllm_mode = args.vllm_mode\n",
        },
    ),
    "generation_mode": (
        " mode=args.vllm_mode,\n",
        {
            "deleted": "\n",
            "renamed": " mode=args.engine_mode,\n",
            "duplicated": " mode=args.vllm_mode, mode=args.vllm_mode,\n",
        },
    ),
    "sampling_overrides": (
        " generation_kwargs=args.generation_kwargs,\n",
        {
            "deleted": "\n",
            "renamed": " generation_kwargs=self.generation_kwargs,\n",
            "duplicated": " generation_kwargs=args.generation_kwargs, generation_kwargs=args.generation_kwargs,\n",
        },
    ),
    "config_field": (
        "    vllm_gpu_memory_utilization: ",
        {
            "deleted": "    _: ",
            "renamed": "    vllm_gpu_memory_share: ",
            "duplicated": "    vllm_gpu_memory_utilization: float = 0.3\n    vllm_gpu_memory_utilization: ",
        },
    ),
    "config_json": (
        "    _VALID_DICT_FIELDS = ",
        {
            "deleted": "    _ = ",
            "renamed": "    _DICT_FIELDS = ",
            "duplicated": "    _VALID_DICT_FIELDS = []\n    _VALID_DICT_FIELDS = ",
        },
    ),
    "build": (
        " = LLM(\n",
        {"deleted": " = dict(\n", "renamed": " = AsyncLLM(\n", "duplicated": " = LLM(\n                x=LLM(),\n"},
    ),
    "publish": (
        "    def sync_weights(self):\n",
        {
            "deleted": "    def _(self):\n",
            "renamed": "    def push_weights(self):\n",
            "duplicated": "    def sync_weights(self): ...\n\n    def sync_weights(self):\n",
        },
    ),
    "lora_request": (
        " = self.llm.generate(vllm_prompts,",
        {
            "deleted": " = list(vllm_prompts,",
            "renamed": " = self.engine.generate(vllm_prompts,",
            "duplicated": " = self.llm.generate(self.llm.generate(vllm_prompts),",
        },
    ),
}


def _class(name: str) -> tuple[str, dict[str, str]]:
    """For what goes to the start of `__init__`: the class that has it."""
    duplicated = f"class {name}(dict):\n    def __init__(self): ...\n\n\nclass {name}("
    return f"class {name}(", {"deleted": "class _(", "renamed": f"class My{name}(", "duplicated": duplicated}


def _call(anchor: str, name: str) -> tuple[str, dict[str, str]]:
    """An anchor that calls `name` once, and has its opening parenthesis at the end."""
    return anchor, {
        "deleted": anchor.replace(name, "list"),
        "renamed": anchor.replace(name, f"new_{name.replace('.', '_')}"),
        "duplicated": f"{anchor}{name}(), ",
    }


def _line(anchor: str, name: str) -> tuple[str, dict[str, str]]:
    """A whole line, of which `name` makes the difference."""
    return anchor, {"deleted": "\n", "renamed": anchor.replace(name, f"{name}_new"), "duplicated": anchor + anchor}


MUTATIONS |= {
    "token_ids": _line("            sampling_params = SamplingParams(**generation_kwargs)\n", "SamplingParams"),
    "token_log_probs": _line(
        "            all_logprobs, all_logprob_token_ids = extract_logprobs(all_outputs)\n", "extract_logprobs"
    ),
    "old_logps": _line(
        "        if self.use_vllm and self.vllm_importance_sampling_correction:\n"
        '            output["importance_sampling_ratio"] = vllm_importance_sampling_ratio\n',
        "importance_sampling_ratio",
    ),
    "loss_old_logps": _line('        old_per_token_logps = inputs.get("old_per_token_logps")\n', "inputs.get"),
}

# Where one trainer's text is another than GRPO's.
OWN_MUTATIONS = {
    **{
        f"{key}.{part}": _class(f"{name}Trainer")
        for key, part, name in (
            ("gold", "configure", "GOLD"),
            ("gkd", "configure", "GKD"),
            ("sdft", "configure", "SDFT"),
            ("sdpo", "configure", "SDPO"),
            ("async_grpo", "elsewhere", "AsyncGRPO"),
            ("async_distillation", "elsewhere", "AsyncDistillation"),
        )
    },
    "online_dpo.load_model": _line(
        "            model = AutoModelForCausalLM.from_pretrained(model_id, **model_init_kwargs)\n", "from_pretrained"
    ),
    "online_dpo.trainer_mode": _line(
        "        self.vllm_mode = args.vllm_mode if args.use_vllm else None\n", "args.vllm_mode"
    ),
    "online_dpo.sampling_overrides": _line(
        "            self.generation_config = SamplingParams(**generation_kwargs)\n", "SamplingParams"
    ),
    "online_dpo.build": _line("                self.llm = LLM(**vllm_kwargs)\n", "LLM"),
    "online_dpo.publish": (
        "    def _move_model_to_vllm(self):\n",
        {
            "deleted": "    def _(self):\n",
            "renamed": "    def _push_model(self):\n",
            "duplicated": "    def _move_model_to_vllm(self): ...\n\n    def _move_model_to_vllm(self):\n",
        },
    ),
    "online_dpo.lora_request": _call(" = self.llm.generate(", "self.llm.generate"),
    "gkd.build": _line("        self.lmbda = args.lmbda\n", "args.lmbda"),
    "gkd.generate": _call(" = model.generate(", "model.generate"),
    "a2po.build": _line(
        "        self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)\n",
        "prepare_model",
    ),
    "a2po.generate": _call(" = unwrapped_model.generate(", "unwrapped_model.generate"),
}

# Runs in a process whose first TRL is the copy in argv[1]. Reads a list of (file, text) from standard input; for each,
# puts the text there, calls PatchFastRL, reports, and puts the file back.
PROBE = """
import json, os, sys, warnings
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from patchfastrl import PatchFastRL
from patchfastrl.errors import SeamError
answers = []
for name, text in json.load(sys.stdin):
    path = Path(sys.argv[1], name)
    stock = path.read_text()
    path.write_text(text)
    state = (list(sys.meta_path), sorted(os.listdir(os.environ["TMPDIR"])))
    try:
        PatchFastRL()
        answers.append(None)
    except SeamError as error:
        answers.append([error.seam, error.found, error.expected, str(error)])
    if len(answers) < 3:  # it goes the same way whatever the reason
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PatchFastRL(strict=False)
        assert [w.category for w in caught] == [RuntimeWarning], caught
    assert state == (list(sys.meta_path), sorted(os.listdir(os.environ["TMPDIR"]))), name
    path.write_text(stock)
assert not [name for name in sys.modules if name.split(".")[0] == "trl"]
PatchFastRL()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the installed TRL."""
    folder = tmp_path_factory.mktemp("site")
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, folder / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    information = Path(str(metadata.distribution("trl")._path))  # type: ignore[attr-defined]
    shutil.copytree(information, folder / information.name)
    return folder


def _mutations() -> list[tuple[str, str]]:
    """All three for each rewriting; where a trainer only repeats another's, that its target is looked at."""
    repeated = ("gold", "distillation", "iw_opd", "sdft", "sdpo", "async_grpo", "async_distillation")
    return [
        (name, kind)
        for name in SEAMS
        for kind in (("renamed",) if name.partition(".")[0] in repeated else ("deleted", "renamed", "duplicated"))
    ]


@pytest.fixture(scope="module")
def refusals(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[object] | None]:
    texts = []
    for name, kind in _mutations():
        file = SEAMS[name].module.replace(".", "/") + ".py"
        text = (copy / file).read_text(encoding="utf-8")
        anchor, replacements = OWN_MUTATIONS.get(name) or MUTATIONS[name.partition(".")[2]]
        assert text.count(anchor) == 1, f"{anchor!r} in {file}"
        texts.append((file, text.replace(anchor, replacements[kind])))
    answers = _probe(copy, texts, tmp_path_factory.mktemp("tmp"))
    return dict(zip(_mutations(), answers, strict=True))


def _probe(copy: Path, texts: list[tuple[str, str]], tmp: Path) -> list[list[object] | None]:
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(copy)],
        input=json.dumps(texts),
        env={**os.environ, "TMPDIR": str(tmp)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(("name", "kind"), _mutations())
def test_a_changed_anchor_stops_everything(
    name: str, kind: str, refusals: dict[tuple[str, str], list[object] | None]
) -> None:
    refusal = refusals[name, kind]
    assert refusal is not None, "PatchFastRL went on"
    seam, found, expected, message = refusal
    assert seam == name
    assert expected == SEAMS[name].count
    assert found == SEAMS[name].count + (1 if kind == "duplicated" else -1)
    assert f"expected {expected} match(es) in {SEAMS[name].target}, found {found}" in str(message)
    assert str(metadata.version("trl")) in str(message)
    assert "Nothing was changed" in str(message)


def test_files_that_are_not_python_or_not_there(copy: Path, tmp_path: Path) -> None:
    file = "trl/generation/vllm_generation.py"
    (answer,) = _probe(copy, [(file, "def (:\n")], tmp_path)
    assert answer is not None
    assert "cannot be read as Python" in str(answer[3])
    moved = copy / "moved"
    (copy / file).rename(moved)
    code = f"import sys; sys.path.insert(0, {str(copy)!r}); import patchfastrl; patchfastrl.PatchFastRL()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    moved.rename(copy / file)
    assert "SeamError" in run.stderr
    assert "generation/vllm_generation.py was not found" in run.stderr


def test_several_broken_seams_are_one_error(copy: Path, tmp_path: Path) -> None:
    file = "trl/trainer/rloo_trainer.py"
    text = (copy / file).read_text(encoding="utf-8").replace("args.vllm_mode", "args.engine_mode")
    (answer,) = _probe(copy, [(file, text)], tmp_path)
    assert answer is not None
    assert answer[0] == "rloo.trainer_mode"
    assert "'rloo.generation_mode'" in str(answer[3])


def test_a_file_that_changes_after_the_call_is_refused_at_import(copy: Path) -> None:
    code = f"""
import sys, warnings; sys.path.insert(0, {str(copy)!r})
from pathlib import Path
from patchfastrl import PatchFastRL, UnpatchFastRL
path = Path({str(copy / "trl/trainer/grpo_config.py")!r})
stock = path.read_text()
PatchFastRL()
path.write_text(stock + "\\n# touched\\n")
try:
    import trl.trainer.grpo_config
except Exception as error:
    assert "has changed since" in str(error), error
else:
    raise AssertionError("imported a file that was not matched")
UnpatchFastRL()
path.write_text(stock)
PatchFastRL(strict=False)
path.write_text(stock + "\\n# touched\\n")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import trl.trainer.grpo_config
assert "stock TRL" in "".join(str(w.message) for w in caught if w.category is RuntimeWarning), caught
assert not hasattr(trl.trainer.grpo_config.GRPOConfig, "vllm_sampling_params")
import trl.trainer.rloo_config
assert not hasattr(trl.trainer.rloo_config.RLOOConfig, "vllm_sampling_params")
path.write_text(stock)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
