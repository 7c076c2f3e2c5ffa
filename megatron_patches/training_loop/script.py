"""``python -m megatron_patches SCRIPT.py ... --ds-plugin-config FILE``: a Megatron-LM script, with the methods in it.

The script is executed as it is. One that may be changed needs ``megatron_patches.apply(FILE)`` instead.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_plugin.config import PluginConfig, load_json
from ds_plugin.core.errors import ConfigError, PluginError, say
from ds_plugin.core.patch import Change, Patch
from megatron_patches.apply_completep import all_or_none, apply_completep, in_force, of_megatron
from megatron_patches.training_loop.core import Core, no_step
from megatron_patches.training_loop.loop import TRAINING, Loop

FLAG = "--ds-plugin-config"
NO_VERIFY = "--ds-plugin-no-verify"
#: what the loop calls by name in its own module
WRAPPED = tuple(
    name
    for name, value in vars(Loop).items()
    if callable(value) and not name.startswith("_") and not hasattr(Core, name)
)
#: training loops of their own over megatron-core, each by a module that is there where it runs
OTHER_LOOPS = {
    "megatron.bridge.training.train": "Megatron-Bridge",
    "nemo.lightning": "NeMo",
    "nemo.collections.nlp.parts.nlp_overrides": "NeMo",
    "nemo_rl": "NeMo RL",
    "verl.workers": "verl",
    "primus.modules.trainer": "Primus",
}

_REMEDY = (
    "a file, or all its sections, work in the loop of a Megatron-LM checkout (megatron.training), and by "
    "megatron_patches.bridge.attach in Megatron-Bridge; in any other give "
    "the completep section alone, megatron_patches.apply(section)"
)
_installed: tuple[PluginConfig, Sequence[Change]] | None = None


def run(arguments: Sequence[str], into: Callable[..., object] | None = None) -> int:
    """Run a script with its own arguments; the exit code. ``into``: the `install` of the loop that it calls, where that
    is not Megatron-LM's."""
    try:
        script, given, sections, verify = read_arguments(arguments)
        prepare_megatron(script)
        (into or install)(sections, verify=verify)
    except PluginError as error:  # before there are process groups: every rank has found the same
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv = [str(script), *given]
    try:
        execute(script)
    except PluginError as error:
        return say(error)
    return 0


def read_arguments(arguments: Sequence[str]) -> tuple[Path, list[str], PluginConfig, bool]:
    """The script, its own arguments, the sections of the plugin's file, and whether checkpoints are verified."""
    script = Path(arguments[0])
    if not script.is_file():
        raise ConfigError(f"{script} does not exist; give a training script, as Megatron-LM/pretrain_gpt.py")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(FLAG, dest="files", action="append", nargs="?", default=[])
    parser.add_argument(NO_VERIFY, dest="verify", action="store_false")
    found, rest = parser.parse_known_args(arguments[1:])
    if len(found.files) != 1 or not found.files[0]:
        raise ConfigError(f"{FLAG}: given {len(found.files)} time(s); give it once, with a JSON file")
    return script.resolve(), rest, PluginConfig.from_dict(load_json(found.files[0])), found.verify


def prepare_megatron(script: Path) -> None:
    """Make a checkout's modules importable and, without a GPU, megatron-core run on the CPU."""
    if (folder := str(script.parent)) not in sys.path:
        sys.path.insert(0, folder)
    if not torch.cuda.is_available():
        from megatron_patches.training_loop import cpu

        if os.environ.get("RANK", "0") == "0":
            logging.getLogger("ds_plugin").warning("no GPU: Megatron runs on the CPU, over gloo")
        cpu.enable()


def install(sections: PluginConfig, *, verify: bool = True) -> None:
    """Wrap what the training loop calls, and give the models that will be built the section's recipe; again: a no-op.
    ``verify``: compare a checkpoint's files with what was saved before it is loaded. `megatron_patches.revert()` undoes
    it. The first step of any optimizer is refused as long as Megatron-LM's loop has not been set up: another loop calls
    nothing that is wrapped. Raises, with nothing changed, StateError: other sections are in force; ConfigError: another
    loop is imported, or Megatron-LM's is not there; PluginError: it lacks one of the names."""
    global _installed
    if sections == PluginConfig():
        return
    sections = of_megatron(sections)
    if in_force(_installed, sections):
        return
    for module, name in OTHER_LOOPS.items():
        if module in sys.modules:
            raise ConfigError(f"megatron_patches.apply: {name} ({module}) is imported and trains by itself; {_REMEDY}")
    try:
        training = importlib.import_module(TRAINING)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{TRAINING}: {error}; give the script of a Megatron-LM checkout and its needs") from None
    if lacking := [name for name in ("get_args", *WRAPPED) if not callable(getattr(training, name, None))]:
        version = importlib.import_module("megatron.core").__version__
        raise PluginError(f"{training.__file__} of core {version} has no {', '.join(lacking)}; use core 0.16 to 0.20")
    loop = Loop(sections, lambda: training.get_args(), verify=verify)  # a script may replace it
    guard = no_step(f"{TRAINING}.setup_model_and_optimizer was not called; {_REMEDY}")
    patches: list[Change] = [guard, *(_wrapped(name, getattr(loop, name), guard) for name in WRAPPED)]
    with all_or_none(patches):
        if sections.completep is not None:
            apply_completep(sections.completep)
    _installed = sections, patches


def _wrapped(name: str, method: Callable[..., Any], guard: Change) -> Patch:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not patch.applied:  # a module imported in the meantime may have kept this function
            return getattr(importlib.import_module(TRAINING), name)(*args, **kwargs)
        if name == "setup_model_and_optimizer":
            guard.revert()  # it is Megatron-LM's loop that trains
        return method(patch.original, *args, **kwargs)

    patch = Patch(f"{TRAINING}.{name}", call, reason="the methods in the training loop")
    return patch


def execute(script: Path) -> None:
    """Run the file as ``__main__``; the module stays: a spawned process finds this package's, guarded."""
    names = vars(sys.modules["__main__"])
    names["__file__"] = str(script)
    exec(compile(script.read_bytes(), str(script), "exec"), names)
