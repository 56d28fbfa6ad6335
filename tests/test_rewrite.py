# ruff: noqa: E501  (the lines of a before and an after are as long as upstream's)
"""Before and after of every seam, on the installed TRL; and the pieces that make one."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import libcst as cst
import pytest

from patchfastrl import install, report
from patchfastrl.errors import PatchFastRLError
from patchfastrl.rewrite import Rewrite, Source, class_lines, expression, extract, locate, reads, rewrite
from patchfastrl.seam import Seam

IMPORT = "+import patchfastrl.runtime as patchfastrl_runtime"
FIELD = [
    "+    vllm_sampling_params: dict | str | None = field(",
    "+        default=None,",
    "+        kw_only=True,",
    '+        metadata={"help": "Sampling parameters for vLLM, on top of `generation_kwargs`; see `vLLMSamplingParams`."},',
    "+    )",
]
TRAINER = {
    "configure": [IMPORT, "+        args = patchfastrl_runtime.configure(self, args, model, peft_config)"],
    "load_model": [
        IMPORT,
        "-            model = create_model_from_path(model, **model_init_kwargs)",
        '+            model = patchfastrl_runtime.load_model(create_model_from_path, model, args, peft_config, model_init_kwargs, "dtype")',
    ],
    "trainer_mode": [IMPORT, "-        self.vllm_mode = args.vllm_mode", '+        self.vllm_mode = "colocate"'],
    "generation_mode": [IMPORT, "-                mode=args.vllm_mode,", '+                mode="colocate",'],
    "sampling_overrides": [
        IMPORT,
        "-                generation_kwargs=args.generation_kwargs,",
        "+                generation_kwargs=patchfastrl_runtime.sampling_overrides(args),",
    ],
    "config_field": FIELD,
    "config_json": ['+        "vllm_sampling_params",'],
}
ENGINE = {
    "engine.build": [
        IMPORT,
        "-            self.llm = LLM(",
        "+            self.llm = patchfastrl_runtime.build_engine(",
        "+                LLM,",
        "+                self,",
    ],
    "engine.publish": [IMPORT, "+        return patchfastrl_runtime.publish(self)"],
    "engine.lora_request": [
        IMPORT,
        "-                all_outputs = self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False)",
        "+                all_outputs = self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False, "
        "lora_request=patchfastrl_runtime.lora_request(self.llm))",
    ],
    "engine.token_ids": [
        IMPORT,
        "-            sampling_params = SamplingParams(**generation_kwargs)",
        "+            sampling_params = patchfastrl_runtime.token_params(SamplingParams, **generation_kwargs)",
    ],
    "engine.token_log_probs": [
        IMPORT,
        "-            all_logprobs, all_logprob_token_ids = extract_logprobs(all_outputs)",
        "+            all_logprobs, all_logprob_token_ids = patchfastrl_runtime.token_log_probs("
        "extract_logprobs, all_outputs)",
    ],
}
EXPECTED = {f"{trainer}.{name}": lines for trainer in ("grpo", "rloo") for name, lines in TRAINER.items()} | ENGINE
# The same changes in the other trainers.
EXPECTED |= json.loads(Path(__file__).with_name("before_and_after.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("seam", EXPECTED)
def test_before_and_after(seam: str) -> None:
    changed = [line for line in report.diff(seam).splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == EXPECTED[seam]


def test_every_seam_has_a_before_and_after() -> None:
    assert {seam.name for seam in install._chosen()} == set(EXPECTED)


def test_the_rest_of_a_file_is_untouched() -> None:
    for file in install._rewritten(install._chosen()):
        kept = file.text.split("\n")
        for line in file.source.text.split("\n"):
            if line in kept:
                kept.remove(line)
        added = [line[1:] for seam in file.found for line in EXPECTED[seam] if line[0] == "+" and line != IMPORT]
        assert sorted(kept) == sorted([IMPORT[1:], *added] if file.functions else added), file.source.module
        compile(file.text, file.source.module, "exec")


def test_diff_knows_its_seams() -> None:
    with pytest.raises(PatchFastRLError, match=r"no seam 'nonsense'.*engine\.build"):
        report.diff("nonsense")
    text = report.diff()
    assert text.count("--- a/trl/") == len({seam.module for seam in install._chosen()})
    assert "+++ b/trl/generation/vllm_generation.py" in text


def test_looking_imports_nothing_of_trl() -> None:
    code = (
        "import sys, patchfastrl.report as i; i.diff(); r = i.seams(); "
        "assert {x.status for x in r} == {'ok', 'not for this version'}, r; "
        "assert all(x.found == x.expected for x in r if x.status == 'ok'); "
        "assert not [n for n in sys.modules if n.split('.')[0] in ('trl', 'torch', 'vllm', 'transformers')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Double(Rewrite):
    """``f(x)`` becomes ``g(f(x))``."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if not reads(original_node.func, "f"):
            return updated_node
        self.found += 1
        return cst.Call(expression("@g"), [cst.Arg(updated_node)])


def seam(target: str, count: int = 1) -> Seam:
    return Seam("test", f"m:{target}", "trl>=0", count, "a test", "https://example.org", "never", Double)


def source(text: str, tmp_path: Path) -> Source:
    path = tmp_path / "m.py"
    path.write_text(text, encoding="utf-8")
    return Source.read("m", path, seam("any"))


@pytest.mark.parametrize(
    ("before", "target", "after"),
    [
        pytest.param(
            '"""Doc."""\nfrom __future__ import annotations\n\nx = f(1)\n\n\ndef a():\n    return f( 2 )  # kept\n',
            "a",
            '"""Doc."""\nfrom __future__ import annotations\nimport patchfastrl.runtime as patchfastrl_runtime\n\nx = f(1)'
            "\n\n\ndef a():\n    return patchfastrl_runtime.g(f( 2 ))  # kept\n",
            id="function, after docstring and __future__",
        ),
        pytest.param(
            "# comment\n@f\nclass A:\n  class B:\n    @f(1)\n    def c(self): return 1\n\n    def d(self):\n      # here\n"
            "      return (f\n        (1))\n  x = f(2)",
            "A.B.d",
            "# comment\nimport patchfastrl.runtime as patchfastrl_runtime\n@f\nclass A:\n  class B:\n    @f(1)\n"
            "    def c(self): return 1\n\n    def d(self):\n      # here\n      return patchfastrl_runtime.g((f\n"
            "        (1)))\n  x = f(2)",
            id="nested method, odd indentation, no newline at the end",
        ),
        pytest.param(
            "import f\nif f:\n    try:\n        def a():\n            'é\x0c'\n            return f(1)\n    except f: pass\n",
            "a",
            "import patchfastrl.runtime as patchfastrl_runtime\nimport f\nif f:\n    try:\n        def a():\n"
            "            'é\x0c'\n            return patchfastrl_runtime.g(f(1))\n    except f: pass\n",
            id="conditional definition, form feed, not ASCII",
        ),
    ],
)
def test_rewriting(before: str, target: str, after: str, tmp_path: Path) -> None:
    rewritten = rewrite(source(before, tmp_path), [seam(target)])
    assert rewritten.text == after
    assert rewritten.found == {"test": 1}
    compile(after, "m", "exec")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def b():\n    f(1)\n", 0),
        ("def a():\n    pass\n", 0),
        ("def a():\n    f(f(1))\n", 2),
        ("def a():\n    f(1)\ndef a():\n    f(1)\n", 2),
        ("class a:\n    f(1)\n", 0),
    ],
)
def test_counting(text: str, found: int, tmp_path: Path) -> None:
    assert rewrite(source(text, tmp_path), [seam("a")]).found == {"test": found}


def test_windows_line_ends_and_encodings(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_bytes("# coding: latin-1\r\ndef a():\r\n    return f('é')\r\n".encode("latin-1"))
    rewritten = rewrite(Source.read("m", path, seam("a")), [seam("a")])
    assert "patchfastrl_runtime.g(f('é'))\n" in rewritten.text
    assert "\r" not in rewritten.text


@pytest.mark.parametrize("code", ["args.x", "(args . x)", "( args.x\n)"])
def test_reads_ignores_layout(code: str) -> None:
    assert reads(cst.parse_expression(code), "args.x")


@pytest.mark.parametrize("code", ["args.y", "arg.x", "args", "args.x()", "args.x.y", "'args.x'"])
def test_reads_ignores_nothing_else(code: str) -> None:
    assert not reads(cst.parse_expression(code), "args.x")


def test_reads_calls() -> None:
    assert reads(cst.parse_expression("c(m,\n  **k,)"), "c(m, **k)")
    assert not reads(cst.parse_expression("c(m, *k)"), "c(m, **k)")
    assert not reads(cst.parse_expression("c(m=m, **k)"), "c(m, **k)")
    assert not reads(None, "c")


def test_extracted_functions_compile_to_what_the_whole_file_does() -> None:
    from patchfastrl.hook import _code, _compile
    from patchfastrl.live import same_code

    for file in install._rewritten(install._chosen()):
        for text in (file.source.text, file.text):
            tree = ast.parse(text)
            alone, whole = _compile(extract(tree, file.functions), "m"), compile(text, "m", "exec", dont_inherit=True)
            for name in file.functions:
                assert same_code(_code(alone, name), _code(whole, name)), name


def test_class_lines_count_decorators() -> None:
    tree = ast.parse("x = 1\n@d\n@e\nclass A:\n    class B: pass\nif x:\n    class C: pass\n")
    assert class_lines(tree) == {"A": 2, "A.B": 5, "C": 7}
    assert [target.first for target in locate(tree, "A.B")] == []
