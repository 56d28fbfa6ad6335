"""Every order of import, patch and unpatch. Each function runs in a process of its own, in which TRL is not imported.

Cases run in the order in which they are written; `tmp` is one folder for all of them.
"""

from __future__ import annotations

import bdb
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import linecache
import logging
import os
import pdb
import pickle
import re
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest

from patchfastrl import PatchFastRL, UnpatchFastRL, install
from patchfastrl.errors import PatchFastRLError, SeamError, UnsupportedError

from .snapshot import TARGETS, by_identity, by_value, differences

FIELD = "vllm_sampling_params"
CALLS = {
    "GRPOTrainer.__init__": ["configure", "load_model", "sampling_overrides"],
    "RLOOTrainer.__init__": ["configure", "load_model", "sampling_overrides"],
    "VLLMGeneration._init_vllm": ["build_engine"],
    "VLLMGeneration.sync_weights": ["publish"],
    "VLLMGeneration.generate": ["lora_request", "token_params"],
}


def bind() -> dict[str, Any]:
    """What a script binds."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.generation.vllm_generation import VLLMGeneration

    return {cls.__name__: cls for cls in (GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, VLLMGeneration)}


def calls(names: dict[str, Any]) -> dict[str, list[str]]:
    """Which of the runtime's functions the live code calls, read off the code objects."""
    found = {}
    for qualname in CALLS:
        cls, _, method = qualname.partition(".")
        code = inspect.unwrap(vars(names[cls])[method]).__code__
        known = {name for targets in CALLS.values() for name in targets}
        if "patchfastrl_runtime" in code.co_names:
            found[qualname] = sorted(known.intersection(code.co_names))
    return found


def assert_patched(names: dict[str, Any]) -> None:
    assert calls(names) == CALLS, calls(names)
    for name in ("GRPOConfig", "RLOOConfig"):
        config = names[name]
        assert FIELD in {field.name for field in dataclasses.fields(config)}
        parameter = inspect.signature(config).parameters[FIELD]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is None
        assert FIELD in config.__annotations__
        assert FIELD in config._VALID_DICT_FIELDS
        assert config("x", use_cpu=True, bf16=False, vllm_sampling_params={"top_k": 3}).vllm_sampling_params == {
            "top_k": 3
        }
    for module in TARGETS:
        shown = inspect.getsource(sys.modules[module])
        assert "patchfastrl_runtime" in shown or FIELD in shown, module
        assert sys.modules[module].__spec__.origin.endswith("/" + module.replace(".", "/") + ".py")
    assert sys.modules["patchfastrl.runtime"] is sys.modules["trl.trainer.grpo_trainer"].patchfastrl_runtime


def assert_stock(names: dict[str, Any]) -> None:
    assert calls(names) == {}, calls(names)
    for name in ("GRPOConfig", "RLOOConfig"):
        config = names[name]
        assert FIELD not in {field.name for field in dataclasses.fields(config)}
        assert FIELD not in inspect.signature(config).parameters
        assert not hasattr(config, FIELD)
        assert FIELD not in config._VALID_DICT_FIELDS
        config("x", use_cpu=True, bf16=False)
    for module in TARGETS:
        assert not hasattr(sys.modules[module], "patchfastrl_runtime")
        assert "patchfastrl" not in inspect.getsource(sys.modules[module])
    assert not any(type(finder).__module__.startswith("patchfastrl") for finder in sys.meta_path)


# Orders -------------------------------------------------------------------------------------------------------------


def stock_import(tmp: Path) -> None:
    names = bind()
    assert_stock(names)
    (tmp / "stock.json").write_text(json.dumps(by_value()))


def patch_import(tmp: Path) -> None:
    PatchFastRL()
    assert not [name for name in sys.modules if name == "trl" or name.startswith("trl.")], "PatchFastRL imported TRL"
    assert_patched(bind())


def import_patch(tmp: Path) -> None:
    names = bind()
    functions = {name: vars(names[name.partition(".")[0]])[name.partition(".")[2]] for name in CALLS}
    PatchFastRL()
    assert_patched(names)
    again = bind()
    assert all(again[name] is cls for name, cls in names.items())
    for name, function in functions.items():
        assert vars(names[name.partition(".")[0]])[name.partition(".")[2]] is function


def import_trl_patch_bind(tmp: Path) -> None:
    import trl  # noqa: F401  (lazy: none of the targets is imported by this)

    assert not set(TARGETS) & set(sys.modules)
    PatchFastRL()
    assert_patched(bind())


def import_submodule_patch_bind(tmp: Path) -> None:
    import trl.trainer.rloo_config

    config = trl.trainer.rloo_config.RLOOConfig
    PatchFastRL()
    names = bind()
    assert names["RLOOConfig"] is config
    assert_patched(names)


def patch_patch_import(tmp: Path) -> None:
    from patchfastrl.install import settings

    PatchFastRL("GRPO")
    before = list(sys.meta_path)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("patchfastrl").addHandler(handler)
    logging.getLogger("patchfastrl").setLevel(logging.INFO)
    PatchFastRL("rloo")
    assert records == []
    PatchFastRL("grpo", use_vllm="keep")
    assert len(records) == 1
    assert settings().use_vllm == "keep"
    assert sys.meta_path == before
    assert_patched(bind())


def import_patch_patch(tmp: Path) -> None:
    names = bind()
    PatchFastRL()
    patched = by_identity()
    PatchFastRL()
    assert differences(patched, by_identity()) == []
    assert_patched(names)


def import_patch_unpatch(tmp: Path) -> None:
    names = bind()
    before = by_identity()
    PatchFastRL()
    assert len(differences(before, by_identity())) > 20  # the comparison sees a patch
    UnpatchFastRL()
    assert differences(before, by_identity()) == []
    assert_stock(names)


def patch_import_unpatch(tmp: Path) -> None:
    PatchFastRL()
    names = bind()
    UnpatchFastRL()
    assert_stock(names)
    stock, now = json.loads((tmp / "stock.json").read_text()), by_value()
    assert {
        key: (stock.get(key), now.get(key)) for key in stock.keys() | now.keys() if stock.get(key) != now.get(key)
    } == {}


def patch_unpatch_import(tmp: Path) -> None:
    before = list(sys.meta_path)
    PatchFastRL()
    UnpatchFastRL()
    assert sys.meta_path == before
    assert_stock(bind())


def patch_import_unpatch_patch(tmp: Path) -> None:
    PatchFastRL()
    names = bind()
    UnpatchFastRL()
    PatchFastRL()
    assert_patched(names)


def patch_unpatch_patch_import(tmp: Path) -> None:
    PatchFastRL()
    UnpatchFastRL()
    PatchFastRL()
    assert_patched(bind())


def half_before_half_after(tmp: Path) -> None:
    from trl.trainer.grpo_config import GRPOConfig

    before = by_identity(("trl.trainer.grpo_config",))
    PatchFastRL()
    assert FIELD in inspect.signature(GRPOConfig).parameters
    names = bind()
    assert names["GRPOConfig"] is GRPOConfig
    assert_patched(names)
    UnpatchFastRL()
    assert differences(before, by_identity(("trl.trainer.grpo_config",))) == []
    assert_stock(names)


def many_cycles(tmp: Path) -> None:
    names = bind()
    before = by_identity()
    for _ in range(3):
        PatchFastRL()
        assert_patched(names)
        UnpatchFastRL()
        assert differences(before, by_identity()) == []


def unpatch_alone(tmp: Path) -> None:
    before = list(sys.meta_path)
    UnpatchFastRL()
    assert sys.meta_path == before
    assert_stock(bind())


def reload_while_patched(tmp: Path) -> None:
    names = bind()
    before = by_identity(("trl.trainer.grpo_config",))
    PatchFastRL()
    module = importlib.reload(sys.modules["trl.trainer.grpo_config"])
    assert module.GRPOConfig is not names["GRPOConfig"]
    for config in (module.GRPOConfig, names["GRPOConfig"]):
        assert FIELD in inspect.signature(config).parameters
    UnpatchFastRL()
    for config in (module.GRPOConfig, names["GRPOConfig"]):
        assert FIELD not in inspect.signature(config).parameters
    assert module.__file__ == before["trl.trainer.grpo_config.__file__"]


# Threads ------------------------------------------------------------------------------------------------------------


def eight_threads_and_an_import(tmp: Path) -> None:
    failures: list[str] = []
    names: dict[str, Any] = {}

    def run(action: Any) -> None:
        try:
            action()
        except Exception:  # noqa: BLE001  (whatever it is, the test shows it)
            failures.append(traceback.format_exc())

    def bind_all() -> None:
        names.update(bind())

    threads = [threading.Thread(target=run, args=(bind_all,))]
    threads += [threading.Thread(target=run, args=(PatchFastRL,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert failures == []
    assert_patched(names)
    assert len([finder for finder in sys.meta_path if type(finder).__module__ == "patchfastrl.hook"]) == 1
    UnpatchFastRL()
    assert_stock(names)


def patch_and_unpatch_from_threads(tmp: Path) -> None:
    names = bind()
    before = by_identity()
    threads = [threading.Thread(target=action) for _ in range(3) for action in (PatchFastRL, UnpatchFastRL)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    UnpatchFastRL()
    assert differences(before, by_identity()) == []
    assert_stock(names)


def patch_in_the_middle_of_an_import(tmp: Path) -> None:
    errors: list[SeamError] = []

    class Impatient:
        def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
            if fullname == "trl.generation.vllm_generation" and not errors:
                try:
                    PatchFastRL()
                except SeamError as error:
                    errors.append(error)

    finder = Impatient()
    sys.meta_path.insert(0, finder)
    names = bind()
    assert [error.seam for error in errors] == ["trl.trainer.grpo_trainer"]
    assert "is being imported right now" in str(errors[0])
    sys.meta_path.remove(finder)
    assert_stock(names)
    PatchFastRL()
    assert_patched(names)


# Other libraries ----------------------------------------------------------------------------------------------------


def decorated_by_another_library(tmp: Path) -> None:
    names = bind()
    stock = names["GRPOTrainer"].__init__

    @functools.wraps(stock)
    def logged(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)

    names["GRPOTrainer"].__init__ = logged
    before = by_identity()
    PatchFastRL()
    assert_patched(names)
    assert names["GRPOTrainer"].__init__ is logged
    UnpatchFastRL()
    assert differences(before, by_identity()) == []


def replaced_by_another_library(tmp: Path) -> None:
    names = bind()

    def generate(self: Any, *args: Any, **kwargs: Any) -> None:
        """Somebody else's."""

    names["VLLMGeneration"].generate = generate
    before = by_identity()
    with pytest.raises(SeamError, match="modified by another library") as caught_error:
        PatchFastRL()
    assert caught_error.value.seam == "trl.generation.vllm_generation:VLLMGeneration.generate"
    assert "cases.py" in str(caught_error.value.found)
    assert differences(before, by_identity()) == []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PatchFastRL(strict=False)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert "stock TRL" in str(caught[0].message)
    assert differences(before, by_identity()) == []


# Undo ---------------------------------------------------------------------------------------------------------------


def unpatch_refuses_while_a_trainer_lives(tmp: Path) -> None:
    PatchFastRL(use_vllm="keep")
    names = bind()
    import patchfastrl.runtime

    args = names["GRPOConfig"]("x", use_cpu=True, bf16=False, use_vllm=True)
    trainer = names["GRPOTrainer"].__new__(names["GRPOTrainer"])
    patchfastrl.runtime.configure(trainer, args, "a-model", None)
    before = by_identity()
    with pytest.raises(PatchFastRLError, match=r"GRPOTrainer.*del trainer"):
        UnpatchFastRL()
    assert differences(before, by_identity()) == []
    assert_patched(names)
    trainer.itself = trainer  # type: ignore[attr-defined]  # a cycle, as a real trainer and its callbacks form
    del trainer, args, before
    UnpatchFastRL()
    assert_stock(names)


def temporary_files(tmp: Path) -> None:
    PatchFastRL()
    names = bind()
    home = Path(sys.modules["trl.trainer.grpo_trainer"].__file__).parents[2]  # type: ignore[arg-type]
    assert home.name.startswith("patchfastrl-")
    assert home.stat().st_mode & 0o077 == 0
    child = os.fork()
    if child == 0:
        install._installation._home.remove()  # type: ignore[union-attr]  (what its exit handler does)
        os._exit(0)
    os.waitpid(child, 0)
    assert home.is_dir(), "a forked child removed what its parent made"
    # A frame that still shows rewritten lines keeps their file.
    with pytest.raises(AttributeError) as kept:
        names["GRPOTrainer"](model="m", reward_funcs=[], args=object())
    UnpatchFastRL()
    lines = [frame.line for frame in traceback.extract_tb(kept.tb)]
    assert "args = patchfastrl_runtime.configure(self, args, model, peft_config)" in lines
    del kept
    PatchFastRL()
    second = Path(sys.modules["trl.trainer.grpo_trainer"].__file__).parents[2]  # type: ignore[arg-type]
    UnpatchFastRL()
    assert second != home
    assert not second.exists()


# Source -------------------------------------------------------------------------------------------------------------


def rewritten_lines_are_visible(tmp: Path) -> None:
    PatchFastRL()
    names = bind()
    init = names["GRPOTrainer"].__init__
    line = "args = patchfastrl_runtime.configure(self, args, model, peft_config)"
    for forget in (lambda: None, linecache.checkcache, linecache.clearcache):
        forget()
        assert line in inspect.getsource(init)
        forget()
        assert line in inspect.getsource(names["GRPOTrainer"])
        assert inspect.getsource(names["GRPOTrainer"]).startswith("class GRPOTrainer(")
        forget()
        assert FIELD in inspect.getsource(names["GRPOConfig"])
        forget()
        lines, first = inspect.getsourcelines(init)
        number = first + next(i for i, text in enumerate(lines) if line in text)
        forget()
        assert linecache.getline(init.__code__.co_filename, number).strip() == line
        # A method that no seam rewrites shows upstream's lines.
        assert "def compute_loss" in inspect.getsource(names["GRPOTrainer"].compute_loss)
    with pytest.raises(AttributeError) as caught:
        names["GRPOTrainer"](model="no-such-model", reward_funcs=lambda **_: [0.0], args=object())
    linecache.clearcache()
    shown = "".join(traceback.format_exception(caught.value))
    assert line in shown, shown
    assert "patchfastrl-" in shown
    spec = sys.modules["trl.trainer.grpo_trainer"].__spec__
    assert line in spec.loader.get_source("trl.trainer.grpo_trainer")


def pdb_stops_on_rewritten_lines(tmp: Path) -> None:
    PatchFastRL()
    names = bind()
    code = names["GRPOTrainer"].__init__.__code__
    lines, first = inspect.getsourcelines(code)
    number = first + next(i for i, text in enumerate(lines) if "patchfastrl_runtime.configure" in text)
    linecache.clearcache()
    screen = io.StringIO()
    debugger = pdb.Pdb(stdin=io.StringIO("continue\nlist\nquit\n"), stdout=screen, nosigint=True, readrc=False)
    assert debugger.set_break(code.co_filename, number) is None
    with contextlib.suppress(bdb.BdbQuit):  # raised or not, as the release of Python likes
        debugger.runcall(names["GRPOTrainer"], model="m", reward_funcs=[], args=object())
    assert "patchfastrl_runtime.configure(self, args, model, peft_config)" in screen.getvalue(), screen.getvalue()


def nothing_is_written_elsewhere(tmp: Path) -> None:
    def files(root: Path) -> set[str]:
        return {str(path) for path in root.rglob("*") if not path.name.endswith(".pyc")}

    os.chdir(tmp)
    (tmp / "empty").mkdir()
    os.chdir(tmp / "empty")
    package = Path(importlib.util.find_spec("trl").origin).parent  # type: ignore
    bind()
    before, compiled = files(package), set(package.rglob("*.pyc"))
    PatchFastRL()
    UnpatchFastRL()
    PatchFastRL()
    assert files(package) == before
    assert set(package.rglob("*.pyc")) == compiled
    assert files(tmp / "empty") == set()


# The configuration field --------------------------------------------------------------------------------------------


def field_from_text_and_back(tmp: Path) -> None:
    import torch
    from transformers import HfArgumentParser

    PatchFastRL()
    config = bind()["GRPOConfig"]
    options = ["--output_dir", "x", "--use_cpu", "--bf16", "false", "--vllm_sampling_params", '{"top_k": 5}']
    (args,) = HfArgumentParser(config).parse_args_into_dataclasses(options)
    assert args.vllm_sampling_params == {"top_k": 5}
    assert args.to_dict()[FIELD] == {"top_k": 5}
    assert json.loads(args.to_json_string())[FIELD] == {"top_k": 5}
    assert f"{FIELD}={{'top_k': 5}}" in repr(args)
    assert pickle.loads(pickle.dumps(args)) == args
    assert args != config("x", use_cpu=True, bf16=False)
    torch.save(args, tmp / "training_args.bin")


def saved_arguments_load_without_the_plugin(tmp: Path) -> None:
    import torch

    args = torch.load(tmp / "training_args.bin", weights_only=False)
    assert type(args).__name__ == "GRPOConfig"
    assert args.vllm_sampling_params == {"top_k": 5}
    assert FIELD not in args.to_dict()


def subclasses_bound_earlier(tmp: Path) -> None:
    from trl import GRPOConfig

    @dataclasses.dataclass
    class Mine(GRPOConfig):
        mine: int = 1
        many: list[int] = dataclasses.field(default_factory=list, metadata={"help": "kept"})
        _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "many"]  # noqa: RUF012

    @dataclasses.dataclass(repr=False)
    class ByHand(Mine):
        def __init__(self, text: str) -> None:
            super().__init__("x", use_cpu=True, bf16=False, mine=len(text))

    class Plain(GRPOConfig):
        pass

    before = {cls: dict(vars(cls)) for cls in (GRPOConfig, Mine, ByHand, Plain)}
    old = Mine("x", use_cpu=True, bf16=False)
    PatchFastRL()
    new = Mine("x", use_cpu=True, bf16=False, mine=2, vllm_sampling_params='{"top_k": 4}')
    assert (new.mine, new.many, new.vllm_sampling_params) == (2, [], {"top_k": 4})
    assert Mine._VALID_DICT_FIELDS[-2:] == ["many", FIELD]
    assert Mine.__dataclass_fields__["many"].metadata == {"help": "kept"}  # type: ignore[attr-defined]
    assert old.vllm_sampling_params is None  # type: ignore[attr-defined]
    assert old.to_dict()[FIELD] is None
    assert ByHand("four").mine == 4
    assert Plain("x", use_cpu=True, bf16=False, vllm_sampling_params={}).vllm_sampling_params == {}  # type: ignore
    positional = list(inspect.signature(Mine).parameters)
    assert positional.index("mine") < positional.index(FIELD)

    @dataclasses.dataclass
    class Later(Mine):
        later: int = 3
        _VALID_DICT_FIELDS = [*Mine._VALID_DICT_FIELDS, "later"]  # noqa: RUF012

    assert Later("x", use_cpu=True, bf16=False, vllm_sampling_params={"n": 1}).vllm_sampling_params == {"n": 1}  # type: ignore
    UnpatchFastRL()
    for cls, entries in before.items():
        assert dict(vars(cls)).keys() == entries.keys(), cls
        assert all(vars(cls)[key] is value for key, value in entries.items()), cls
    assert FIELD not in inspect.signature(Later).parameters
    assert Later("x", use_cpu=True, bf16=False).later == 3
    assert FIELD not in Later("x", use_cpu=True, bf16=False).to_dict()


def trls_own_subclasses(tmp: Path) -> None:
    PatchFastRL()
    try:
        from trl.experimental.gmpo import GMPOConfig
    except ImportError:
        return  # this release has no GMPO
    assert FIELD in inspect.signature(GMPOConfig).parameters
    UnpatchFastRL()
    assert FIELD not in inspect.signature(GMPOConfig).parameters
    assert FIELD not in GMPOConfig._VALID_DICT_FIELDS
    GMPOConfig("x", use_cpu=True, bf16=False)


# Arguments ----------------------------------------------------------------------------------------------------------


def arguments(tmp: Path) -> None:
    from patchfastrl.install import settings

    class Loader:
        from_pretrained = None

    for wrong in ({"algorithm": "DPO"}, {"algorithm": 3}, {"FastLanguageModel": object()}, {"use_vllm": "maybe"}):
        with pytest.raises(UnsupportedError, match=re.escape(repr(next(iter(wrong.values()))))):
            PatchFastRL(**wrong)  # type: ignore[arg-type]
    assert settings().use_vllm == "force"
    PatchFastRL("grpo", Loader)
    PatchFastRL(None, None)
    PatchFastRL("RLOO", FastLanguageModel=Loader, use_vllm="keep")
    assert settings().use_vllm == "keep"
    UnpatchFastRL()
    assert settings().use_vllm == "force"
