"""Every TRL release's own source: each seam fits, and `patchfastrl check-source` tells when one does not."""

from __future__ import annotations

import difflib
import re
import subprocess
import symtable
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from patchfastrl import sources
from patchfastrl.cli import main
from patchfastrl.compat import support
from patchfastrl.errors import PatchFastRLError
from patchfastrl.rewrite import Source, rewrite
from patchfastrl.wheels import Package, Wheels, find, published

GRPO, RLOO = "trl/trainer/grpo_trainer.py", "trl/trainer/rloo_trainer.py"
CONFIG, ENGINE = "trl/trainer/grpo_config.py", "trl/generation/vllm_generation.py"
OPENENV, GOLD = "trl/experimental/openenv/utils.py", "trl/experimental/gold/gold_trainer.py"


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Wheels are fetched once, and stay in pytest's cache."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("trl-wheels")


@pytest.fixture(scope="module")
def wheels(folder: Path) -> Iterator[Wheels]:
    with Wheels(folder) as opened:
        yield opened


@pytest.mark.parametrize("release", sources.RELEASES)
def test_every_seam_fits(release: str, wheels: Wheels) -> None:
    checked = sources.check(published(release, wheels))
    assert sources.explain(checked, wheels) == f"trl {release}: ok, {len(checked.seams)} seams"


@pytest.mark.parametrize("row", support.rows(), ids=lambda row: f"{row.trl}-{row.vllm}-{row.platform}")
def test_the_table_says_which_pairs_are_of_trl(row: support.Row, wheels: Wheels) -> None:
    """By what the release's own metadata asks for in its extra `vllm`."""
    with zipfile.ZipFile(wheels.release(row.trl)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    wanted = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    (vllm,) = (
        requirement.specifier
        for requirement in wanted
        if requirement.name == "vllm"
        and requirement.marker is not None
        and requirement.marker.evaluate({"extra": "vllm", "python_version": row.python[0]})
    )
    assert vllm.contains(row.vllm) == (row.pair == "trl"), vllm


def changes(release: str, file: str, wheels: Wheels) -> list[str]:
    """What the seams change in one file: lines that go, and lines that come."""
    root = published(release, wheels).root
    seams = [seam for seam in sources._declared(Version(release)) or [] if seam.file == file]
    rewritten = rewrite(Source.read(seams[0].module, root / file, seams[0]), seams)
    compared = difflib.ndiff(rewritten.source.text.split("\n"), rewritten.text.split("\n"))
    return [f"{line[0]} {line[2:].strip()}" for line in compared if line[0] in "+-" and "#" not in line]


UTILS, PPO = "trl/trainer/utils.py", "trl/experimental/ppo/ppo_trainer.py"
SDFT, XPO = "trl/experimental/sdft/sdft_trainer.py", "trl/experimental/xpo/xpo_trainer.py"
NASH_MD, BESIDE = "trl/experimental/nash_md/nash_md_trainer.py", "loads_later=True, beside=True"
CREATE = "args, peft_config, model_init_kwargs"
DIVIDED, IN_PLACE = "logits / self.temperature", "logits.div_(self.temperature)"
AT_1 = "self.temperature == 1"


@pytest.mark.parametrize(
    ("release", "file", "before", "after"),
    [
        (
            "0.18.2",
            GRPO,
            "model = AutoModelForCausalLM.from_pretrained(model, **model_init_kwargs)",
            f'model = @load_model(AutoModelForCausalLM.from_pretrained, model, {CREATE}, "torch_dtype")',
        ),
        (
            "0.22.2",
            RLOO,
            "model = architecture.from_pretrained(model_id, **model_init_kwargs)",
            f'model = @load_model(architecture.from_pretrained, model_id, {CREATE}, "torch_dtype")',
        ),
        (
            "0.26.2",
            RLOO,
            "model = architecture.from_pretrained(model_id, **model_init_kwargs)",
            f'model = @load_model(architecture.from_pretrained, model_id, {CREATE}, "dtype")',
        ),
        (
            "0.27.2",
            RLOO,
            "model = create_model_from_path(model, **model_init_kwargs)",
            f'model = @load_model(create_model_from_path, model, {CREATE}, "dtype")',
        ),
        ("0.18.2", GRPO, "sampling_params = SamplingParams(", "sampling_params = @sampling_params("),
        (
            "0.24.0",
            GRPO,
            "sampling_params = SamplingParams(**generation_kwargs)",
            "sampling_params = @sampling_params(SamplingParams, self.args, **generation_kwargs)",
        ),
        ("0.23.1", RLOO, "self.llm = LLM(", "self.llm = @build_engine("),
        ("0.23.1", RLOO, None, "return @publish(self)"),
        (
            "0.25.1",
            GRPO,
            "all_outputs = self.llm.chat(all_prompts, sampling_params=sampling_params, use_tqdm=False)",
            "all_outputs = self.llm.chat(all_prompts, sampling_params=sampling_params, use_tqdm=False, "
            "lora_request=@lora_request(self.llm), chat_template_kwargs=self.chat_template_kwargs)",
        ),
        ("0.25.1", GRPO, None, "args = @configure(self, args, model, peft_config, server_only=rollout_func)"),
        ("0.26.0", GRPO, None, "args = @configure(self, args, model, peft_config)"),
        (
            "0.26.2",
            RLOO,
            "all_outputs = self.llm.chat(all_prompts, sampling_params=sampling_params, use_tqdm=False)",
            "all_outputs = self.llm.chat(all_prompts, sampling_params=sampling_params, use_tqdm=False, "
            "lora_request=@lora_request(self.llm), chat_template_kwargs=self.chat_template_kwargs)",
        ),
        ("0.27.2", GRPO, 'self.llm.collective_rpc("reload_weights")', None),
        ("0.28.0", ENGINE, 'self.llm.collective_rpc("reload_weights")', None),
        ("1.9.2", ENGINE, "except NotImplementedError:", None),
        (
            "0.26.2",
            RLOO,
            "prompts = [prepare_multimodal_messages_vllm(prompt) for prompt in prompts]",
            "prompts = [prepare_multimodal_messages_vllm(prompt) for prompt in prompts] "
            'if is_conversational({"prompt": prompts[0]}) else prompts',
        ),
        (
            "0.25.0",
            GOLD,
            "max_completion_length = generation_config.max_completion_length",
            "max_completion_length = generation_config.max_new_tokens",
        ),
        ("0.26.0", OPENENV, 'trainer.llm.collective_rpc("reload_weights")', None),
        ("1.8.0", OPENENV, 'trainer.vllm_generation.llm.collective_rpc("reload_weights")', None),
        (
            "0.27.2",
            OPENENV,
            "vllm_outputs = trainer.llm.chat(prompts_for_generation, sampling_params=sampling_params, use_tqdm=False)",
            "vllm_outputs = trainer.llm.chat(prompts_for_generation, sampling_params=sampling_params, use_tqdm=False, "
            "lora_request=@lora_request(trainer.llm))",
        ),
        ("0.28.0", OPENENV, None, "lora_request=@lora_request(trainer.vllm_generation.llm))"),
        (
            "1.8.0",
            OPENENV,
            "generation_kwargs.update(trainer.args.generation_kwargs)",
            "generation_kwargs.update(@sampling_overrides(trainer.args))",
        ),
        ("0.18.2", UTILS, "output = lm_backbone.generate(", "output = @generate("),
        ("0.26.2", UTILS, None, "lm_backbone,"),
        ("0.27.0", PPO, "output = lm_backbone.generate(", "output = @generate("),
        ("0.21.0", RLOO, None, "config = @configure(self, config, policy, None, beside=True)"),
        ("0.21.0", RLOO, None, "@build_beside(self, args, self.model)"),
        ("0.18.2", GRPO, f"logits = {DIVIDED}", f"logits = logits if {AT_1} else {DIVIDED}"),
        ("0.29.1", RLOO, f"logits = {DIVIDED}", f"logits = logits if {AT_1} else {DIVIDED}"),
        ("1.9.2", GRPO, IN_PLACE, f"logits if {AT_1} else {IN_PLACE}"),
        ("1.0.0", RLOO, IN_PLACE, f"logits if {AT_1} else {IN_PLACE}"),
        ("1.13.0", GRPO, f"logits = {DIVIDED}", f"logits = logits if {AT_1} else {DIVIDED}"),
        ("0.18.2", UTILS, None, "if (selected := @selected_log_probs(logits, index)) is not None:"),
        ("1.13.0", UTILS, None, "if (entropies := @entropies(logits)) is not None:"),
        ("1.12.0", PPO, None, "args = @configure(self, args, model, peft_config, beside=True)"),
        ("1.12.0", PPO, None, "@build_beside(self, args, self.policy_model)"),
        ("1.5.1", SDFT, None, "@build_beside(self, args, self.model)"),
        (
            "1.5.1",
            SDFT,
            "prompt_completion_ids = unwrapped_model.generate(",
            "prompt_completion_ids = @generate(",
        ),
        ("1.13.0", NASH_MD, None, f"args = @configure(self, args, model, peft_config, {BESIDE})"),
        ("1.13.0", NASH_MD, None, "@build_beside(self, args, self.model)"),
        ("1.13.0", NASH_MD, "model_output = unwrapped_policy_for_gen_ctx.generate(", "model_output = @generate("),
        ("1.13.0", XPO, None, f"args = @configure(self, args, model, peft_config, {BESIDE})"),
        ("1.13.0", XPO, None, "@build_beside(self, args, self.model)"),
        ("1.13.0", XPO, "model_output = unwrapped_policy_model_for_gen.generate(", "model_output = @generate("),
        (
            "0.18.2",
            CONFIG,
            '_VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]',
            '_VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["vllm_sampling_params", "model_init_kwargs"]',
        ),
    ],
)
def test_before_and_after(release: str, file: str, before: str | None, after: str | None, wheels: Wheels) -> None:
    changed = changes(release, file, wheels)
    assert before is None or f"- {before}" in changed
    assert after is None or f"+ {after.replace('@', 'patchfastrl_runtime.')}" in changed


@pytest.mark.parametrize("release", ["0.26.0", "0.27.2", "0.28.0", "0.29.0", "1.9.2"])
def test_nothing_reloads_a_checkpoint(release: str, wheels: Wheels) -> None:
    root = published(release, wheels).root
    for file in (GRPO, RLOO, ENGINE, OPENENV):
        seams = [seam for seam in sources._declared(Version(release)) or [] if seam.file == file]
        if seams:
            text = rewrite(Source.read(seams[0].module, root / file, seams[0]), seams).text
            assert '"reload_weights"' not in text


# Sources that changed -----------------------------------------------------------------------------------------------


def checkout(release: str, folder: Path, to: Path) -> Path:
    """A checkout of TRL, as far as seams look at it."""
    with Wheels(folder) as wheels, zipfile.ZipFile(wheels.release(release)) as archive:
        archive.extractall(
            to, [name for name in archive.namelist() if name.startswith(("trl/trainer", "trl/gen", "trl/exp"))]
        )
    (to / "VERSION").write_text(f"{release}\n", encoding="utf-8")
    return to


LLM = "                self.llm = LLM(\n"
RPC = '                self.llm.collective_rpc("reload_weights")\n'
ROLLOUT = '        trainer.vllm_generation.llm.collective_rpc("reload_weights")\n'
SYNC = "    def _move_model_to_vllm(self):\n"
TRY = "            except NotImplementedError:\n"
REWARD = "            self.reward_model = self.reward_model.to(self.accelerator.device)\n"
DRAW = "    output = lm_backbone.generate(\n"
MIX = "            model_output = unwrapped_policy_for_gen_ctx.generate(\n"
# A seam of a release, its anchor in TRL's text, and the text with it deleted, renamed and duplicated.
MUTATIONS = [
    (
        ("0.18.2", "grpo.load_model", GRPO, "            model = AutoModelForCausalLM.from_pretrained(model,"),
        ("            model = dict(model,", "            model = AutoModel.from_pretrained(model,"),
        "            model = AutoModelForCausalLM.from_pretrained(model, **model_init_kwargs)\n",
    ),
    (
        ("0.18.2", "grpo.sampling_overrides", GRPO, "                sampling_params = SamplingParams(\n"),
        ("                sampling_params = dict(\n", "                sampling_params = Params(\n"),
        "                sampling_params = SamplingParams()\n",
    ),
    (
        ("0.22.2", "rloo.configure", RLOO, "        # Args\n        if args is None:\n"),
        ("        if True:\n", "        if arguments is None:\n"),
        "        if args is None:\n            pass\n",
    ),
    (
        ("0.22.2", "rloo.build", RLOO, LLM),
        (LLM.replace("LLM", "dict"), LLM.replace("LLM", "AsyncLLM")),
        LLM.replace("(", "()"),
    ),
    (
        ("0.23.1", "rloo.publish", RLOO, SYNC),
        (SYNC.replace("_move_model_to_vllm", "_"), SYNC.replace("_move_model", "_push_model")),
        f"{SYNC}        pass\n\n",
    ),
    (
        ("0.25.1", "grpo.lora_request", GRPO, "                        all_outputs = self.llm.chat("),
        ("                        all_outputs = dict(", "                        all_outputs = self.engine.chat("),
        "                        self.llm.chat()\n",
    ),
    (("0.27.2", "grpo.reload", GRPO, RPC), ("", RPC.replace("reload", "restore")), RPC),
    (("1.8.0", "openenv.reload", OPENENV, ROLLOUT), ("", ROLLOUT.replace("reload", "restore")), ROLLOUT),
    (
        ("0.26.0", "openenv.lora_request", OPENENV, "            vllm_outputs = trainer.llm.chat("),
        ("            vllm_outputs = list(", "            vllm_outputs = trainer.engine.chat("),
        "            trainer.llm.chat()\n",
    ),
    (
        ("1.9.2", "engine.reload", ENGINE, TRY),
        ("            finally:\n", TRY.replace("Not", "Un")),
        f"{TRY}                0\n",
    ),
    *(
        (
            (release, "ppo.generate", file, DRAW),
            (DRAW.replace("lm_backbone.generate", "dict"), DRAW.replace("lm_backbone", "policy")),
            "    lm_backbone.generate()\n",
        )
        for release, file in (("0.26.2", UTILS), ("1.12.0", PPO))
    ),
    (
        ("1.12.0", "ppo.build", PPO, REWARD),
        (REWARD.replace("self.reward_model.to", "dict"), REWARD.replace("accelerator", "args")),
        REWARD,
    ),
    (
        ("1.13.0", "nash_md.generate", NASH_MD, MIX),
        (MIX.replace("unwrapped_policy_for_gen_ctx.generate", "dict"), MIX.replace("_for_gen_ctx", "")),
        "            unwrapped_policy_for_gen_ctx.generate()\n",
    ),
    (
        ("1.16.0", "grpo.config_field", CONFIG, "    vllm_gpu_memory_utilization: float = field(\n"),
        ("    _: float = field(\n", "    vllm_memory: float = field(\n"),
        "    vllm_gpu_memory_utilization: float = 0.3\n",
    ),
]
CASES = [
    pytest.param(*where, text, id=f"{where[0]} {where[1]} {kind}")
    for where, (deleted, renamed), more in MUTATIONS
    for kind, text in (("deleted", deleted), ("renamed", renamed), ("duplicated", more + where[3]))
]


@pytest.mark.parametrize(("release", "seam", "file", "anchor", "text"), CASES)
def test_a_changed_source_is_reported(
    release: str,
    seam: str,
    file: str,
    anchor: str,
    text: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = checkout(release, folder, tmp_path)
    upstream = (root / file).read_text(encoding="utf-8")
    assert upstream.count(anchor) == 1
    (root / file).write_text(upstream.replace(anchor, text), encoding="utf-8")
    assert main(["check-source", str(root), "--wheels", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"trl {release}: BROKEN\n")
    told = re.search(rf"  {seam} in (\S+)\n    expected (\d) match\(es\), found (\d)\n", printed)
    assert told is not None
    assert told[2] != told[3]
    assert f"--- {release} {told[1]}\n" in printed
    changed = {line for line in printed.split("\n") if line[:1] in "+-"}
    expected = {f"-{line}" for line in upstream.split("\n")} | {f"+{line}" for line in text.split("\n")}
    assert any(line in expected for line in changed)


def test_a_release_that_nobody_declared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = checkout("1.16.0", folder, tmp_path)
    (root / "VERSION").write_text("1.17.0.dev0\n", encoding="utf-8")
    assert main(["check-source", str(root), "--wheels", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("trl 1.17.0.dev0: NOT DECLARED\n")
    assert "tried were the 62 of 1.16.0" in printed
    assert "all of them fit" in printed
    (root / ENGINE).unlink()
    assert main(["check-source", str(root), "--wheels", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "trl 1.17.0.dev0: BROKEN" in printed
    assert f"{ENGINE}'" in printed
    assert "-    def sync_weights(self):" in printed


def test_a_source_that_is_not_python_or_does_not_compile(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkout("1.16.0", folder, tmp_path)
    text = (root / GRPO).read_text(encoding="utf-8")
    (root / GRPO).write_text(f"{text}\nreturn\ndef (:\n", encoding="utf-8")
    assert main(["check-source", str(root), "--wheels", str(folder)]) == 1
    assert "found invalid syntax" in capsys.readouterr().out


def test_wheels_are_kept_and_named_wheels_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (wheel,) = folder.glob("trl-0.24.0-*.whl")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched once more"))
    assert main(["check-source", "0.24.0", str(wheel), "--wheels", str(folder)]) == 0
    assert capsys.readouterr().out == "trl 0.24.0: ok, 42 seams\n" * 2


@pytest.mark.parametrize(
    ("name", "message"), [("trl", "Invalid version"), ("x.whl", "Invalid version"), ("1.16.99", "pip could not fetch")]
)
def test_what_stands_for_nothing(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Wheels() as opened, pytest.raises(PatchFastRLError, match=message):
        find(name, opened)


def test_a_folder_without_a_release(tmp_path: Path) -> None:
    with Wheels() as opened, pytest.raises(PatchFastRLError, match="does not say which release"):
        find(str(tmp_path), opened)
    for name, text in (
        ("trl/__init__.py", '__version__ = "0.21.0"\n'),
        ("trl/VERSION", "0.22.0\n"),
        ("VERSION", "1.16.0"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        with Wheels() as opened:
            assert find(str(tmp_path), opened) == Package(
                tmp_path, Version(text.split('"')[-2] if '"' in text else text), False
            )


def test_checking_imports_nothing_of_trl(folder: Path) -> None:
    code = (
        "import sys; from patchfastrl.cli import main; "
        f"assert main(['check-source', '1.16.0', '--wheels', {str(folder)!r}]) == 0; "
        "assert not [n for n in sys.modules if n.split('.')[0] in ('trl', 'torch', 'vllm', 'transformers')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check-source", "--help"])
    printed = capsys.readouterr().out
    assert "exit code: 0" in printed
    assert "0 6 * * * patchfastrl check-source" in printed


@pytest.mark.parametrize("release", [r for r in sources.RELEASES if Version(r) >= Version("0.28")])
def test_statements_in_functions_of_their_own_see_what_they_need(release: str, wheels: Wheels) -> None:
    """TRL's statements for the importance-sampling ratio: given their tensors, and not read by anything after them."""
    root = published(release, wheels).root
    seams = [seam for seam in sources._declared(Version(release)) or [] if seam.name == "grpo.old_logps"]
    text = rewrite(Source.read(seams[0].module, root / GRPO, seams[0]), seams).text
    (trainer,) = [t for t in symtable.symtable(text, GRPO, "exec").get_children() if t.get_name() == "GRPOTrainer"]
    (method,) = [t for t in trainer.get_children() if t.get_name() == "_generate_and_score_completions"]
    moved = {t.get_name(): t for t in method.get_children() if t.get_name().startswith("patchfastrl_")}
    assert moved.keys() == {"patchfastrl_ratio", "patchfastrl_metrics"}
    unbound = {s.get_name() for s in method.get_symbols() if s.is_global()}
    for function in moved.values():
        symbols = function.get_symbols()
        assert {s.get_name() for s in symbols if s.is_free()} <= {"self", "mode", "device"}
        assert not unbound & {s.get_name() for s in symbols if s.is_assigned()}
        assert {s.get_name() for s in symbols if s.is_global()} <= {"torch", "math", "nanmin", "nanmax", "ValueError"}
