"""Megatron-LM's own unit tests, alone and with the plugin's patches: are the results the same?

    pip install pytest-mock mock                      # what its tests import
    python -m tests.megatron_own_tests --megatron CHECKOUT [--out FILE.json] [FILE ...]

Test files of the checkout's tests/unit_tests (`FILES`, or those given) run once for each variant, in a process with one
rank on the CPU over gloo. Each test's outcome is compared, and for a failure the exception and its first line:

alone      Megatron-LM, made to run without a GPU as `megatron_patches` does it (`script.prepare_megatron`)
off        also ``megatron_patches.apply(FILE)``, where FILE has all three sections with ``"enabled": false``
reverted   also every wrapper put in place, and taken away again once the test files are imported: where they kept a
           wrapper it has to do what Megatron-LM's own does
on         every wrapper stays and has nothing to do: CompleteP at ratios of 1, whatever the model; a warmup that starts
           at the full length; an average that is never taken. A test may be refused here, by an error of the plugin's
           own; which tests called a wrapper is counted, since the equality of the others proves nothing.

For all of them NCCL is gloo, TransformerEngine's layer specs are the local ones, and nothing is downloaded. A test that
needs more than that, or more ranks, fails, and has to fail alike.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.util
import inspect
import json
import os
import platform
import re
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("alone", "off", "reverted", "on")
#: of tests/unit_tests, for what the plugin touches; a checkout may lack some of them
FILES = (
    "transformer/test_transformer_layer.py", "transformer/test_transformer_block.py", "transformer/test_mlp.py",
    "transformer/test_attention.py", "transformer/test_core_attention.py", "transformer/test_module.py",
    "transformer/test_spec_customization.py", "transformer/test_utils.py",
    "transformer/test_multi_token_prediction.py", "models/test_gpt_model.py", "models/test_base_embedding.py",
    "fusions/test_bias_dropout_fusion.py", "fusions/test_torch_softmax.py", "test_optimizer.py",
    "test_optimizer_param_scheduler.py", "optimizer/test_optimizer_config.py", "test_num_microbatches_calculator.py",
    "pipeline_parallel/test_schedules.py", "pipeline_parallel/test_pipeline_layout.py",
    "tensor_parallel/test_layers.py", "tensor_parallel/test_tensor_parallel_utils.py",
    "distributed/test_distributed_data_parallel.py", "distributed/test_finalize_model_grads.py",
    "distributed/test_param_and_grad_buffer.py", "test_training.py", "test_utils.py", "test_argument_utils.py",
    "test_frozen_ckpt_resume.py", "test_start_eval_at_iter.py", "test_eval_batch_size.py", "test_sequence_packing.py",
    "test_lion_optimizer.py", "test_layer_wise_optimizer.py", "test_optimizer_cpu_offloading.py",
    "test_local_multi_tensor_fns.py", "test_activation_logging.py",
)  # fmt: skip
FLOOR = 150  # of FILES, tests that pass alone
SECONDS = 60  # for a test
MINUTES = 25  # for a variant

SECTIONS: dict[str, dict[str, Any]] = {
    "sequence_length_warmup": {"start_length": 4096, "end_length": 4096, "duration": {"steps": 5}},
    "completep": {"base_width": 1, "base_depth": 1},
    "weight_averaging": {"interval": 1, "start_step": 1_000_000},
}
#: what test files import of TransformerEngine without asking whether it is there
ENGINE = {
    "transformer_engine": (),
    "transformer_engine.pytorch": (),
    "transformer_engine.pytorch.fp8": ("check_fp8_support", "fp8_autocast"),
}
DOWNLOAD = "tests.test_utils.python_scripts.download_unit_tests_dataset"

Results = Mapping[str, Mapping[str, Any]]


def sections(*, enabled: bool) -> dict[str, dict[str, Any]]:
    """The plugin's file."""
    return {name: {"enabled": enabled, **section} for name, section in SECTIONS.items()}


# -- comparing ---------------------------------------------------------------------------------------------------------


def differences(alone: Results, other: Results, *, refusals: bool = False, calls: bool = False) -> list[str]:
    """One line for each test that did not end as it did alone.

    refusals: a test may have been refused by the plugin. calls: a test may have called a wrapper.
    """
    lines = []
    for name in sorted({*alone, *other}):
        expected, found = (_said(results.get(name)) for results in (alone, other))
        test = other.get(name, {})
        if expected != found and not (refusals and test.get("refused")):
            lines.append(f"{name}: alone {expected}, here {found}")
        if test.get("called") and not calls:
            lines.append(f"{name}: called {', '.join(test['called'])}")
    return lines


def _said(test: Mapping[str, Any] | None) -> str:
    return "not run" if test is None else f"{test['outcome']} {test['error']}".strip()


def summary(results: Results) -> dict[str, int]:
    """How many tests ended how; "ran" leaves out what was skipped, "unreadable" are files that cannot be imported."""
    tests = [test for name, test in results.items() if "::" in name]
    outcomes = Counter(test["outcome"] for test in tests)
    return {
        "ran": len(tests) - outcomes["skipped"],
        **{outcome: outcomes[outcome] for outcome in ("passed", "failed", "error", "skipped")},
        "refused": sum(test["refused"] for test in tests),
        "called a wrapper": sum(bool(test["called"]) for test in tests),
        "called one and passed": sum(bool(test["called"]) and test["outcome"] == "passed" for test in tests),
        "unreadable": len(results) - len(tests),
    }


# -- in the process of a variant ---------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin: one line of JSON for a test that has ended, so that a run that is killed leaves the others'."""

    def __init__(self, out: Path, checkout: Path, called: list[str]):
        self._out, self._checkout, self._called = out, checkout, called
        self._outcomes: dict[str, str] = {}
        self._errors: dict[str, tuple[str, bool]] = {}

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        from ds_plugin.core.errors import PluginError

        error = call.excinfo.value
        first = next(iter(str(error).strip().splitlines()), "")
        said = re.sub(r"0x[0-9a-f]+", "0x", first).replace(str(self._checkout), "")
        refused, link = False, error
        while link is not None:  # a test that expects another error has the plugin's for a context
            refused, link = refused or isinstance(link, PluginError), link.__cause__ or link.__context__
        self._errors.setdefault(node.nodeid, (f"{type(error).__qualname__}: {said}", refused))

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self._write(report.nodeid, "error" if report.failed else "skipped")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self._outcomes[report.nodeid] = outcome
        if report.when == "teardown":
            self._write(report.nodeid, self._outcomes[report.nodeid])

    def _write(self, name: str, outcome: str) -> None:
        error, refused = self._errors.get(name, ("", False)) if outcome in ("failed", "error") else ("", False)
        test = {"outcome": outcome, "error": error, "refused": refused, "called": sorted(set(self._called))}
        self._called.clear()
        with self._out.open("a") as out:
            out.write(json.dumps({"name": name, **test}) + "\n")


class Collected:
    """A pytest plugin that does something between the import of the test files and the first test."""

    def __init__(self, then: Callable[[], None]):
        self._then = then

    def pytest_collection_finish(self, session: Any) -> None:
        self._then()


def run_tests(variant: str, checkout: Path, out: Path, files: Sequence[str]) -> int:
    """Prepare Megatron-LM, apply the variant's patches and let pytest run the files; pytest's exit code."""
    from megatron_patches.training_loop import script

    script.prepare_megatron(checkout / "pretrain_gpt.py")
    stand_in()
    called: list[str] = []
    plugins: list[Any] = [Recorder(out, checkout, called)]
    if variant == "off":
        install_off()
    elif variant != "alone":
        revert = install_idle(called)
        if variant == "reverted":
            plugins.append(Collected(revert))
    options = f"-q --tb=short -p no:cacheprovider --continue-on-collection-errors --timeout={SECONDS}".split()
    options += ["-o", "addopts=", "-c", str(checkout / "pyproject.toml"), "--rootdir", str(checkout)]
    paths = [str(checkout / "tests" / "unit_tests" / file) for file in files]
    return int(pytest.main([*options, *paths], plugins))


def stand_in() -> None:
    """What the unit tests ask for beyond a training script, on a machine without a GPU."""
    import torch
    from packaging.version import Version

    from ds_plugin.core.patch import Patch

    importlib.import_module("megatron.training.training")  # what of megatron asks for TransformerEngine finds none
    utils, specs = (importlib.import_module(f"megatron.core.{m}") for m in ("utils", "models.gpt.gpt_layer_specs"))
    init = torch.distributed.init_process_group
    replaced: dict[str, Callable[..., Any]] = {
        "torch.distributed.init_process_group": lambda backend=None, **kwargs: init("gloo", **kwargs),
        "torch.distributed.new_group": one_group(torch.distributed.new_group),
        "torch.cuda.nvtx.range_push": lambda message: 0,
        "torch.cuda.nvtx.range_pop": lambda: 0,
    }
    for name in ("get_te_version", "get_fa_version"):  # compared with numbers, though there is none
        replaced[f"{utils.__name__}.{name}"] = lambda: Version("0")
    for name, engine in list(vars(specs).items()):
        local = getattr(specs, name.replace("_with_transformer_engine_", "_local_"), engine)
        if local is not engine and "args" not in inspect.signature(engine).parameters:  # it hands on to another of them
            replaced[f"{specs.__name__}.{name}"] = instead(engine, local)
    for target, replacement in replaced.items():
        Patch(target, replacement, reason="Megatron-LM's unit tests on the CPU").apply()
    for name, words in {**ENGINE, DOWNLOAD: ("download_and_extract_asset",)}.items():
        sys.modules[name] = module = ModuleType(name)
        vars(module).update({word: lambda *args, **kwargs: (False, "not here") for word in words})


def one_group(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """``new_group`` for a world of one rank, made once: a group keeps gloo's threads, and tests leave many behind."""
    from torch.distributed.distributed_c10d import _world

    made: dict[tuple[int, ...], Any] = {}

    def group(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        key = (0,) if ranks is None else tuple(ranks)
        if made.get(key) not in _world.pg_map:  # never made, or destroyed
            made[key] = new_group(ranks, *args, **kwargs)
        return made[key]

    return group


def instead(engine: Callable[..., Any], local: Callable[..., Any]) -> Callable[..., Any]:
    """``local``, given what it knows of ``engine``'s arguments."""
    known = inspect.signature(local).parameters

    @functools.wraps(engine)
    def build(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(engine).bind(*args, **kwargs).arguments
        return local(**{name: value for name, value in given.items() if name in known})

    return build


def install_off() -> None:
    """What a user has whose file turns every method off."""
    import megatron_patches

    file = Path("methods.json")
    file.write_text(json.dumps(sections(enabled=False)))
    before = megatron_patches.active()
    megatron_patches.apply(str(file))
    assert megatron_patches.active() == before


def install_idle(called: list[str]) -> Callable[[], None]:
    """Every wrapper with nothing for it to do; ``called`` gets the names of those that are called. Returns the undoing.

    ``megatron_patches.revert()`` alone would undo megatron-core's stand-ins for a GPU as well.
    """
    import megatron_patches
    from ds_plugin.completep.config import CompletePConfig
    from ds_plugin.config import PluginConfig
    from megatron_patches import apply_completep
    from megatron_patches.completep import build
    from megatron_patches.training_loop import script
    from megatron_patches.training_loop.loop import Loop

    class AnyModelIsTheBase(CompletePConfig):
        def ratios(self, width: int, depth: int) -> Any:
            return super().ratios(self.base_width, self.base_depth)

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return call

    ours_of = {Loop: script.WRAPPED, build: ("prepared",), apply_completep: ("build_optimizer", "check_scheduler")}
    for owner, names in ours_of.items():
        for name in names:
            setattr(owner, name, noted(name, getattr(owner, name)))
    given = sections(enabled=True)
    recipe = AnyModelIsTheBase.model_validate(given["completep"])
    before = len(megatron_patches.active())
    megatron_patches.apply(dataclasses.replace(PluginConfig.from_dict(given), completep=recipe))
    assert len(megatron_patches.active()) == before + len(script.WRAPPED) + 6
    return functools.partial(megatron_patches.revert, keep=before)


# -- the command -------------------------------------------------------------------------------------------------------


def run_variant(variant: str, checkout: Path, files: Sequence[str]) -> tuple[Results, str]:
    """Each test's outcome by its name, and the end of what pytest printed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results.jsonl")
        environment = {
            **os.environ, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        command = [sys.executable, __file__, "--variant", variant, "--megatron", str(checkout), "--out", str(out)]
        log = Path(folder, "log")
        with log.open("w") as told:
            try:
                subprocess.run(
                    [*command, *files], cwd=folder, env=environment, stdout=told, stderr=told, timeout=60 * MINUTES
                )
            except subprocess.TimeoutExpired:
                told.write(f"\nkilled after {MINUTES} minutes")
        tests = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return {test.pop("name"): test for test in tests}, log.read_text()[-2000:]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when a test ended in another way than alone, or too few passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="of the checkout's tests/unit_tests")
    parser.add_argument("--megatron", required=True, type=Path, metavar="CHECKOUT", help="a checkout of Megatron-LM")
    parser.add_argument("--out", type=Path, help="write all outcomes here")
    parser.add_argument("--floor", type=int, help=f"fail if fewer pass alone ({FLOOR}; with FILEs 1)")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # this process is a variant's
    options = parser.parse_args(arguments)
    checkout = options.megatron.resolve()
    if options.variant is not None:
        return run_tests(options.variant, checkout, options.out, options.files)
    folder = checkout / "tests" / "unit_tests"
    if not folder.is_dir():
        parser.error(f"--megatron {checkout} has no tests/unit_tests; give a checkout of Megatron-LM")
    if lacking := [name for name in ("pytest_mock", "mock") if importlib.util.find_spec(name) is None]:
        parser.error(f"Megatron-LM's tests import {', '.join(lacking)}; pip install pytest-mock mock")
    if unknown := [file for file in options.files if not (folder / file).is_file()]:
        parser.error(f"{folder} has no {', '.join(unknown)}; name files below that folder")
    files = options.files or [file for file in FILES if (folder / file).is_file()]
    floor = options.floor if options.floor is not None else 1 if options.files else FLOOR
    core = runpy.run_path(str(checkout / "megatron" / "core" / "package_info.py"))["__shortversion__"]
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {"megatron-core": core, "python": platform.python_version(), "torch": version("torch")},
        "files": len(files),
        "counts": {},
    }
    print(json.dumps(report), flush=True)
    results: dict[str, Results] = {}
    wrong = []
    for variant in VARIANTS:
        results[variant], log = run_variant(variant, checkout, files)
        report["counts"][variant] = counts = summary(results[variant])
        on = variant == "on"
        different = differences(results["alone"], results[variant], refusals=on, calls=on)
        print(f"{variant}: {', '.join(f'{n} {what}' for what, n in counts.items() if n)}", flush=True)
        if different or not counts["ran"]:
            print("\n".join([*different, log]), flush=True)
        wrong += [f"{variant}: {line}" for line in different]
    if (passed := report["counts"]["alone"]["passed"]) < floor:
        wrong.append(f"{passed} tests passed alone, at least {floor} were to; is this a tested version of Megatron-LM?")
    if options.out is not None:
        options.out.write_text(json.dumps({**report, "wrong": wrong, "tests": results}, indent=1) + "\n")
    print("\n".join(wrong) or "every test ended as it does alone, or was refused by the methods that were on")
    return 1 if wrong else 0


if __name__ == "__main__":
    if "--variant" in sys.argv:
        sys.path.pop(0)  # this folder, whose modules are no top-level ones
    sys.exit(main())
