"""The command `patchfastrl`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import builtins
import os
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import __version__
from .errors import PatchFastRLError

Command = Callable[[argparse.Namespace], int]
ExceptHook = Callable[[type[BaseException], BaseException, "TracebackType | None"], Any]

_DESCRIPTION = """\
TRL trainers sample from one vLLM engine in their own process, and that engine and the model in
training hold one copy of the weights. The same as these two lines at the top of a script:

    from patchfastrl import PatchFastRL
    PatchFastRL()
"""

_EXAMPLES = """\
examples:
  patchfastrl doctor                       is everything here that a run needs?
  patchfastrl run train.py --max_steps 10  run an unchanged TRL script, patched
  patchfastrl show --list                  what is changed in TRL, and why
"""

_RUN = """\
Calls PatchFastRL(), then runs the script as `python script.py args...` would: same sys.argv, same
sys.path, same exit code, the script is __main__. The script itself needs no change.

Everything after the script's name belongs to the script; options for `run` come before it.
"""

_RUN_EXAMPLES = """\
examples:
  patchfastrl run train.py --learning_rate 1e-5
  patchfastrl run -m my_package.train --learning_rate 1e-5
  patchfastrl run --use-vllm keep train.py         a script that sets use_vllm=False keeps it
  UNSLOTH_VLLM_STANDBY=1 patchfastrl run train.py  give the KV cache's memory back while training
  accelerate launch --num_processes 1 -m patchfastrl run train.py
"""

_DOCTOR = """\
Prints what is installed, the row of the support table it belongs to, whether each seam matches the
installed TRL, the GPU, the settings that matter, and what would be refused. The block can be pasted
into an issue as it is. Imports neither TRL nor vLLM, and touches no GPU.

exit code: 0 when nothing would be refused, 1 otherwise.
"""

_SHOW = """\
Prints what PatchFastRL changes in TRL's source, as a diff against the installed files. Without a
seam's name, all of it.

exit code: 0, 1 when a seam cannot be shown on this installation, 2 for a name that does not exist.
"""


_PLAN = """\
Prints what a run will have in the device's memory while it samples and while it trains, before it
starts: weights, adapter, gradients, optimizer, KV cache, activations. Of MODEL (a folder, or a name
on the hub) only the configuration is read. Activations are estimated; of the memory that is free
besides, layers keep theirs instead of computing them twice.

exit code: 0 when it fits; 1 when it does not, with the settings that would.
"""

_PLAN_EXAMPLES = """\
examples:
  patchfastrl plan Qwen/Qwen2.5-7B-Instruct --tokens 4096 --standby
  patchfastrl plan ./model --method qlora --rank 64 --share 0.95 --standby --memory 80
"""

_CHECK_SOURCE = """\
Rewrites and compiles TRL's source as PatchFastRL() would, and counts what each seam matches. TRL is
not imported and need not be installed: a VERSION is fetched with `pip download`, a WHEEL or a
CHECKOUT (a folder with trl/ in it) is read where it lies. With nothing named, the newest release
that pip finds. For a seam that no longer fits, prints how the function differs from the last release
in which it did.

exit code: 0 when all of it fits; 1 when a seam does not, or when no seam was declared for a release.
"""

_CHECK_SOURCE_EXAMPLES = """\
examples:
  patchfastrl check-source                          the newest release
  patchfastrl check-source 1.16.0 ../trl            a release, and a checkout of TRL
  patchfastrl check-source --all --wheels ~/wheels  every release that the seams are declared for

a scheduled job (crontab) that writes a mail on the day that TRL moves away:
  MAILTO=team@example.com
  0 6 * * * patchfastrl check-source > /tmp/trl.txt 2>&1 || cat /tmp/trl.txt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    if command is _run:
        return _run(arguments)  # what the script raises is the script's
    try:
        return command(arguments)
    except PatchFastRLError as error:
        print(f"patchfastrl: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `patchfastrl show | head`: the reader has had enough. Python would complain once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patchfastrl",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"patchfastrl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="{run,doctor,show,plan,check-source}", required=True)

    def command(name: str, run: Command, help: str, **texts: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
        sub.set_defaults(command=run)
        return sub

    run = command(
        "run",
        _run,
        "patch TRL, then run a script",
        description=_RUN,
        epilog=_RUN_EXAMPLES,
        usage="patchfastrl run [-h] [--use-vllm {force,keep}] (script.py | -m module) [args ...]",
    )
    run.add_argument(
        "--use-vllm",
        choices=["force", "keep"],
        default="force",
        help="force (default): trainers sample with vLLM whatever the script says; keep: as the script says",
    )
    run.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as `python -m` does")
    run.add_argument("script", nargs="?", help="the script to run")
    run.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")

    doctor = command("doctor", _doctor, "check this machine and this environment", description=_DOCTOR)
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")

    show = command("show", _show, "print the changes to TRL's source as a diff", description=_SHOW)
    show.add_argument("seam", nargs="?", help="only this one; --list prints the names")
    show.add_argument("--list", action="store_true", help="each seam's name, its target and why it exists")

    plan = command(
        "plan",
        _plan,
        "print the memory that a run will need",
        description=_PLAN,
        epilog=_PLAN_EXAMPLES,
    )
    plan.add_argument("model", metavar="MODEL", help="a folder with a config.json, or a name on the hub")
    plan.add_argument("--method", choices=["lora", "qlora", "full"], default="lora", help="default: lora")
    plan.add_argument("--rank", type=int, default=32, help="of the adapter, on all linear layers (default: 32)")
    plan.add_argument("--tokens", type=int, default=2048, help="of a prompt and its completion (default: 2048)")
    plan.add_argument("--completion", type=int, help="max_completion_length, of these tokens (default: all of them)")
    plan.add_argument("--micro-batch", type=int, default=8, help="per_device_train_batch_size (default: 8)")
    plan.add_argument("--share", type=float, default=0.3, help="vllm_gpu_memory_utilization (default: 0.3)")
    plan.add_argument("--standby", action="store_true", help="with UNSLOTH_VLLM_STANDBY=1")
    plan.add_argument("--adapter", action="store_true", help="rollouts='adapter': nothing is merged into a copy")
    plan.add_argument("--no-checkpointing", action="store_true", help="without gradient checkpointing")
    plan.add_argument("--recompute", choices=["least", "needed", "always"], default="least", help="default: least")
    plan.add_argument("--float8-kv-cache", action="store_true", help="KV cache in 8 bits")
    plan.add_argument("--memory", type=float, metavar="GIB", help="of the device (default: what this machine's has)")

    check = command(
        "check-source",
        _check_source,
        "check TRL releases against the seams, without installing them",
        description=_CHECK_SOURCE,
        epilog=_CHECK_SOURCE_EXAMPLES,
    )
    check.add_argument("what", nargs="*", metavar="VERSION|WHEEL|CHECKOUT", help="what to check")
    check.add_argument("--all", action="store_true", help="every release that the seams are declared for")
    check.add_argument("--wheels", metavar="FOLDER", help="keep fetched wheels here, and use those that lie here")
    return parser


def _plan(arguments: argparse.Namespace) -> int:
    from . import memory, plan

    run = plan.Run(
        method=arguments.method,
        tokens=arguments.tokens,
        micro_batch=arguments.micro_batch,
        share=arguments.share,
        standby=arguments.standby,
        merged=not arguments.adapter,
        checkpointing=not arguments.no_checkpointing,
        completion=arguments.completion,
        recompute=arguments.recompute,
        float8_kv_cache=arguments.float8_kv_cache,
    )
    shape = plan.shape_of_name(arguments.model, arguments.rank)
    device = int(arguments.memory * 2**30) if arguments.memory else memory.device_bytes()
    run = plan.beside_the_trainer(shape, run, device)
    print(f"{arguments.model}: {shape.parameters / 1e9:.2f} billion parameters, {arguments.method}")
    if run.share < arguments.share:
        print(f"The engine gets {run.share:g} of the device: the trainer needs the rest while it samples.")
    print("\n".join(plan.budget(shape, run, device).lines()))
    wrong = plan.problem(shape, run, device)
    print(wrong or "It fits.")
    return 1 if wrong else 0


def _run(arguments: argparse.Namespace) -> int:
    name, *rest = arguments.module or [arguments.script, *arguments.args]
    if not name:
        print("patchfastrl run: expected a script or -m module; see `patchfastrl run --help`", file=sys.stderr)
        return 2
    if not arguments.module and not os.path.exists(name):
        print(f"patchfastrl run: there is no file {name!r}", file=sys.stderr)
        return 2
    from . import PatchFastRL

    try:
        PatchFastRL(use_vllm=arguments.use_vllm)
    except PatchFastRLError as error:
        print(f"patchfastrl: {error}", file=sys.stderr)
        return 1
    sys.argv = [name, *rest]
    sys.excepthook = _without_our_frames(sys.excepthook)
    if arguments.module:
        _set_first_path(os.getcwd())
        # Kept: without a reference, the module's top-level objects would be gone before atexit handlers run.
        _kept.append(runpy.run_module(name, run_name="__main__", alter_sys=True))
    elif os.path.isfile(name):
        _set_first_path(os.path.dirname(os.path.realpath(name)))
        _run_file(name)
    else:
        _kept.append(runpy.run_path(name, run_name="__main__"))
    return 0


_kept: list[Any] = []


def _run_file(name: str) -> None:
    """As `python name`: unlike with `runpy.run_path`, the script stays __main__ until the interpreter ends."""
    path = os.path.abspath(name)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins, __annotations__={}, __cached__=None)
    _kept.append(sys.modules["__main__"])
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), main.__dict__)


def _set_first_path(folder: str) -> None:
    """Python puts the script's folder first; ours is there now. With `python -P` there is none."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _without_our_frames(hook: ExceptHook) -> ExceptHook:
    """A traceback that begins in the script, as it would without `patchfastrl run`. What lies deeper is left alone."""
    ours = {__file__, str(Path(__file__).with_name("__main__.py"))}

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        inner, passed = traceback, False
        while inner is not None:
            file = inner.tb_frame.f_code.co_filename
            if passed and file not in ours and not file.endswith(("<frozen runpy>", f"{os.sep}runpy.py")):
                break
            passed = passed or file == __file__
            inner = inner.tb_next
        # An error that never left our own frames (a script with a syntax error) has no other frame to show.
        hook(kind, error.with_traceback(inner), inner)

    return excepthook


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    findings = doctor.examine()
    if arguments.json:
        print(doctor.as_json(findings))
    else:
        _print(doctor.as_markdown(findings), colours={r"\brefused\b": "bold red", r"\bok\b": "green"})
    return 1 if findings.refused else 0


def _show(arguments: argparse.Namespace) -> int:
    from . import report

    seams = report.seams()
    names = list(dict.fromkeys(seam.name for seam in seams))
    if arguments.list:
        for seam in seams:
            print(f"{seam.name} ({seam.requires}; {seam.status})")
            print(f"    {seam.target}\n    {seam.reason}\n    {seam.link}")
        return 0
    if arguments.seam is not None and arguments.seam not in names:
        print(f"patchfastrl show: there is no seam {arguments.seam!r}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    colours = {r"(?m)^\+.*$": "green", r"(?m)^-.*$": "red", r"(?m)^@.*$": "cyan"}
    _print(report.diff(arguments.seam).rstrip("\n"), colours)
    return 0


def _check_source(arguments: argparse.Namespace) -> int:
    from . import sources, wheels

    fits = True
    with wheels.Wheels(arguments.wheels) as fetched:
        named = [*(sources.RELEASES if arguments.all else ()), *arguments.what]
        for name in named or [wheels.NEWEST]:
            check = sources.check(wheels.find(name, fetched))
            fits = fits and check.fits
            colours = {r"(?m)^\+.*$": "green", r"(?m)^-.*$": "red", r"(?m)^@.*$": "cyan"}
            _print(sources.explain(check, fetched), colours)
    return 0 if fits else 1


def _print(text: str, colours: dict[str, str]) -> None:
    """Plain text that can be copied as it is; coloured on a terminal."""
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    for pattern, colour in colours.items():
        styled.highlight_regex(pattern, colour)
    Console(highlight=False).print(styled, soft_wrap=True)
