"""The command `patchfastrl`, run as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from patchfastrl.compat import support

COMMAND = Path(sys.executable).with_name("patchfastrl")
FORMS = [pytest.param([str(COMMAND)], id="patchfastrl"), pytest.param([sys.executable, "-m", "patchfastrl"], id="-m")]
SEEN_BY_A_SCRIPT = "print([__name__, __file__, sys.argv, sys.path[0], sys.modules['__main__'].__dict__ is globals()])"


def _run(*arguments: str, cwd: Path, form: list[str] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*(form or [str(COMMAND)]), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False
    )


def _script(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


# Help and version ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["run"], ["doctor"], ["show"]], ids=lambda c: "".join(c) or "patchfastrl")
def test_help(command: list[str], tmp_path: Path) -> None:
    done = _run(*command, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: patchfastrl")
    assert len(done.stdout.splitlines()) > 8


def test_help_and_version_import_nothing_heavy(tmp_path: Path) -> None:
    code = """
        import sys
        from patchfastrl.cli import main
        for arguments in (["--help"], ["run", "--help"], ["--version"]):
            try:
                main(arguments)
            except SystemExit as end:
                assert end.code == 0
        heavy = {"torch", "vllm", "trl", "libcst", "transformers", "rich", "patchfastrl.install"} & sys.modules.keys()
        assert not heavy, heavy
    """
    done = _run(str(_script(tmp_path, code)), cwd=tmp_path, form=[sys.executable])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_version(form: list[str], tmp_path: Path) -> None:
    import patchfastrl

    assert _run("--version", cwd=tmp_path, form=form).stdout == f"patchfastrl {patchfastrl.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["doctor", "--fast"], ["run"], ["run", "no-such-file.py"]])
def test_what_cannot_be_understood_exits_with_2(arguments: list[str], tmp_path: Path) -> None:
    done = _run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "patchfastrl" in done.stderr
    assert "Traceback" not in done.stderr


# run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_run_is_like_python(form: list[str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    script = _script(tmp_path / "elsewhere", f"import sys\n{SEEN_BY_A_SCRIPT}\n")
    for name in (str(script), "elsewhere/script.py"):
        arguments = [name, "--help", "-m", "x", "--use-vllm", "keep"]
        plain = _run(*arguments, cwd=tmp_path, form=[sys.executable])
        assert _run("run", *arguments, cwd=tmp_path, form=form).stdout == plain.stdout


def test_run_a_module_is_like_python(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    _script(tmp_path / "package", f"import sys\nfrom . import part\n{SEEN_BY_A_SCRIPT}\n", "__main__.py")
    _script(tmp_path / "package", "", "part.py")
    plain = _run("-m", "package", "--flag", cwd=tmp_path, form=[sys.executable])
    assert plain.returncode == 0
    assert _run("run", "-m", "package", "--flag", cwd=tmp_path).stdout == plain.stdout


def test_run_patches_before_the_script_imports_trl(tmp_path: Path) -> None:
    script = _script(
        tmp_path,
        """
        from patchfastrl import install
        from trl import GRPOConfig
        print("vllm_sampling_params" in GRPOConfig.__dataclass_fields__, install.settings().use_vllm)
        """,
    )
    done = _run("run", "--use-vllm", "keep", str(script), cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "True keep", done.stderr


def test_run_keeps_main_what_pickle_and_inspect_expect(tmp_path: Path) -> None:
    script = _script(
        tmp_path,
        """
        import atexit, dataclasses, inspect, multiprocessing, pickle, typing

        @dataclasses.dataclass
        class Options:
            size: "Size" = None

        class Size: ...

        def reward(number):
            return number + 1

        def at_exit():
            assert pickle.loads(pickle.dumps(reward)) is reward
            print("at exit")

        if __name__ == "__main__":
            atexit.register(at_exit)
            assert pickle.loads(pickle.dumps(Options(3))) == Options(3)
            assert typing.get_type_hints(Options)["size"] is Size
            assert "number + 1" in inspect.getsource(reward)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(reward, [1, 2]))
        """,
    )
    done = _run("run", str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2, 3]\nat exit\n"


@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("sys.exit('reason')", 1), ("sys.exit()", 0), ("", 0)])
def test_run_hands_on_the_exit_code(end: str, code: int, tmp_path: Path) -> None:
    done = _run("run", str(_script(tmp_path, f"import sys\n{end}\n")), cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr == ("reason\n" if "reason" in end else "")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "def inner():\n    raise ValueError('x')\n\ninner()\n",
        "import json\njson.loads('{')\n",
        "def broken(:\n",
        "import no_such_module_here\n",
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError('y') from error\n",
        "from patchfastrl.errors import UnsupportedError\nraise UnsupportedError('the script raised this')\n",
        "import sys\nsys.excepthook = lambda *error: print('own hook:', error[1], file=sys.stderr)\n1 / 0\n",
    ],
    ids=["own", "library", "syntax", "import", "chained", "ours", "hook"],
)
def test_run_shows_the_traceback_that_python_shows(form: list[str], text: str, tmp_path: Path) -> None:
    script = str(_script(tmp_path, text))
    plain = _run(script, cwd=tmp_path, form=[sys.executable])
    done = _run("run", script, cwd=tmp_path, form=form)
    assert (done.returncode, done.stderr) == (1, plain.stderr)


def test_run_stops_at_ctrl_c_like_python(tmp_path: Path) -> None:
    script = _script(tmp_path, "import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [str(COMMAND), "run", str(script)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "cli.py" not in errors


@pytest.mark.parametrize("launched", [["-m", "patchfastrl"], [str(COMMAND)]], ids=["module", "file"])
def test_run_under_accelerate_launch(launched: list[str], tmp_path: Path) -> None:
    script = _script(tmp_path, f"import sys\nfrom patchfastrl import install\n{SEEN_BY_A_SCRIPT}\n")
    form = [str(COMMAND.with_name("accelerate")), "launch", "--num_processes", "1", "--cpu", *launched]
    done = _run("run", str(script), "--lr", "1", cwd=tmp_path, form=form)
    assert done.returncode == 0, done.stderr
    assert done.stdout == _run(str(script), "--lr", "1", cwd=tmp_path, form=[sys.executable]).stdout


# doctor -------------------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_here(tmp_path: Path) -> None:
    done = _run("doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("### patchfastrl doctor\n")
    for part in ("| trl | ", "Support table: ", "| engine.build | ", "GPU:", "Would be refused:"):
        assert part in done.stdout
    assert "\x1b" not in done.stdout  # can be pasted as it is


def test_doctor_as_json(tmp_path: Path) -> None:
    done = _run("doctor", "--json", cwd=tmp_path, VLLM_API_KEY="do not print me", OMP_NUM_THREADS="1")
    data = json.loads(done.stdout)
    assert data["ok"] is True
    assert data["refused"] == []
    assert {"trl", "vllm", "torch", "transformers", "peft", "accelerate", "libcst"} <= data["packages"].keys()
    assert data["support"] in ("exact", "nearest")
    assert data["match"]["row"]["trl"] in [row.trl for row in support.rows()]
    assert {"name", "target", "requires", "expected", "found", "status", "detail"} <= data["seams"][0].keys()
    assert data["settings"]["OMP_NUM_THREADS"] == "1"
    assert "do not print me" not in done.stdout
    assert any("4-bit" in note and "vllm-bnb-plugin" in note for note in data["notes"])  # bitsandbytes is installed


def test_doctor_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
        import sys
        from patchfastrl.cli import main
        assert main(["doctor"]) == 0
        assert not {"torch", "vllm", "trl", "transformers"} & sys.modules.keys()
    """
    script = str(_script(tmp_path, code))
    seconds = []
    for _ in range(2):
        # The processor's time: on a busy machine the clock measures the neighbours.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = _run(script, cwd=tmp_path, form=[sys.executable])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 3


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3"),
        ({"UNSLOTH_VLLM_STANDBY": "perhaps"}, "UNSLOTH_VLLM_STANDBY='perhaps'"),
    ],
)
def test_doctor_tells_what_would_be_refused(env: dict[str, str], reason: str, tmp_path: Path) -> None:
    done = _run("doctor", cwd=tmp_path, **env)
    assert done.returncode == 1
    assert reason in done.stdout.partition("Would be refused:")[2].partition("Refused in every script")[0]


def test_doctor_without_trl_and_vllm(tmp_path: Path) -> None:
    """In a folder that holds the plug-in and what it imports, and nothing else."""
    root = Path(__file__).parents[1]
    for source, target in (("patchfastrl", ""), ("patches", "patches"), ("compat", "compat")):
        shutil.copytree(root / source, tmp_path / "patchfastrl" / target, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("libcst", "yaml", "packaging", "rich", "pygments", "markdown_it", "mdurl"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (tmp_path / name).symlink_to(Path(spec.origin).parent)
    code = "import sys; sys.path.insert(0, ''); from patchfastrl.cli import main; sys.exit(main(['doctor']))"
    done = _run("-I", "-S", "-c", code, cwd=tmp_path, form=[sys.executable])
    assert done.returncode == 1, done.stderr
    for name in ("trl", "vllm", "torch", "transformers"):
        assert f"- {name} is not installed" in done.stdout
    assert "The newest: `pip install " in done.stdout


NVIDIA_SMI = """\
#!/bin/sh
echo "NVIDIA H200, 143771 MiB, 143000 MiB, 580.65.06"
"""


def test_doctor_reads_the_gpu_from_nvidia_smi(tmp_path: Path) -> None:
    command = _script(tmp_path, NVIDIA_SMI, "nvidia-smi")
    command.chmod(0o755)
    done = _run("doctor", cwd=tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "NVIDIA H200, 143771 MiB (143000 MiB free), driver 580.65.06" in done.stdout
    assert done.returncode == 0


# show ---------------------------------------------------------------------------------------------------------------


def test_show_prints_a_diff_of_trl(tmp_path: Path) -> None:
    done = _run("show", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--- a/trl/trainer/grpo_trainer.py\n+++ b/trl/trainer/grpo_trainer.py\n" in done.stdout
    assert "\n+" in done.stdout
    assert "patchfastrl_runtime" in done.stdout
    assert "\x1b" not in done.stdout


def test_show_one_seam_and_the_list(tmp_path: Path) -> None:
    listed = _run("show", "--list", cwd=tmp_path)
    assert listed.returncode == 0
    names = [line.partition(" ")[0] for line in listed.stdout.splitlines() if not line.startswith(" ")]
    assert "engine.build" in names
    done = _run("show", "engine.build", cwd=tmp_path)
    assert done.returncode == 0
    assert "+++ b/trl/generation/vllm_generation.py" in done.stdout
    assert "grpo_trainer" not in done.stdout


def test_show_an_unknown_seam_lists_the_names(tmp_path: Path) -> None:
    done = _run("show", "no.such.seam", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no.such.seam" in done.stderr
    assert "engine.build" in done.stderr


def test_show_into_a_closed_pipe(tmp_path: Path) -> None:
    done = _run("-c", f"'{COMMAND}' show | head -n 1", cwd=tmp_path, form=["bash"])
    assert done.stderr == ""
    assert done.stdout.startswith("---")
