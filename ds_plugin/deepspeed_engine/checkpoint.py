"""The methods' state beside DeepSpeed's checkpoints, in the same tag folder.

``ds_plugin.json`` is the manifest: what the checkpoint was trained with, and the small state that is equal on all
ranks. The averaging window is in files of its own. All carry the id of the save they belong to, and are on disk before
DeepSpeed's ``latest`` names the tag.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.utils import logger
from safetensors import SafetensorError

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import CheckpointError, raise_on_all_ranks
from ds_plugin.core.files import atomic_write, parse_json, read_json, read_tag, write_text
from ds_plugin.core.manifest import MANIFEST, Manifest
from ds_plugin.deepspeed_engine import compat
from ds_plugin.deepspeed_engine.completep import CompleteP
from ds_plugin.deepspeed_engine.ranks import from_rank_0, gathered
from ds_plugin.deepspeed_engine.warmup import SequenceLengthWarmup
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.spike import SpikeWatch
from ds_plugin.weight_averaging.state import files as window_files
from ds_plugin.weight_averaging.state.fragments import plain_name

FORMAT = 2
_ANOTHER = "restore it, or resume from another checkpoint"
_CONVERT = "ds-plugin to-universal FOLDER TARGET"
_FILES_OF_STAGE = {0: 0, 1: 1, 2: 1, 3: 3}  # of ZeRO: stages 1 and 2 write the same


class Methods(Protocol):
    """The methods on one engine; None: off."""

    engine: Any
    config: PluginConfig
    warmup: SequenceLengthWarmup | None
    averager: WeightAverager | None
    spikes: SpikeWatch | None
    completep: CompleteP | None


def save(plugin: Methods, folder: Path) -> None:
    """Write the state of every enabled method into the tag folder. Every rank calls it; all succeed or all raise."""
    engine = plugin.engine
    save_id = from_rank_0(lambda: uuid.uuid4().hex)
    manifest = {
        "format": FORMAT,
        "save_id": save_id,
        "global_steps": engine.global_steps,
        "world_size": dist.get_world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "sections": plugin.config.to_dict(),
        "model": _shapes(plugin),
        "state": _state(plugin),
    }
    with raise_on_all_ranks(), _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if plugin.averager is not None:
            window_files.save(folder, plugin.averager, save_id=save_id, **_place(plugin))
        if (engine.local_rank if engine.use_node_local_storage() else dist.get_rank()) == 0:
            write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What the file system refuses, as our own error. Nothing is half-written then (`core.files`)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the methods' state cannot be written ({error}); make room or give another folder, and save "
            "again: training can go on, and earlier checkpoints are as they were"
        ) from error


@contextlib.contextmanager
def _readable(path: Path, remedy: str) -> Iterator[None]:
    """A manifest that does not hold what it should, as our own error."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or {remedy} another checkpoint") from None


def check(
    plugin: Methods,
    folder: Path,
    *,
    same_model: bool = True,
    same_run: bool = True,
    same_optimizer: bool = True,
    universal: bool = False,
) -> dict[str, Any] | None:
    """Read the manifest and compare it with this run, before DeepSpeed loads anything. None: there is no manifest.

    ``same_model=False`` leaves the parameters' shapes to DeepSpeed (a custom or lenient load); ``same_run=False``
    leaves out what only a resume needs, ``same_optimizer=False`` what only the optimizer's state needs. ``universal``:
    DeepSpeed's converter leaves the manifest behind, and without it the param groups' settings are lost, so there must
    be one. Rank 0 reads, so that all ranks see the same.

    Raises:
        CheckpointError: the folder does not exist, or the manifest is damaged or of another model, layout or recipe.
    """
    path = folder / MANIFEST
    exists, data = from_rank_0(lambda: (folder.is_dir(), path.read_bytes() if path.is_file() else None))
    here, missing = _shapes(plugin), f"{folder} holds no {MANIFEST}: a checkpoint of a run without this plugin"
    with raise_on_all_ranks():
        if not exists:
            raise CheckpointError(f"there is no checkpoint in {folder}; give the tag of one that exists")
        if data is not None:
            with _readable(path, "resume from"):
                manifest: dict[str, Any] = parse_json(data, path, Manifest, remedy=_ANOTHER)
                _compare(plugin, manifest, path, here if same_model else None)
                if same_run:
                    _compare_runs(plugin, manifest, path)
                if universal or (same_run and same_optimizer):
                    _compare_layouts(plugin, manifest, path, universal=universal)
            return manifest
        if universal:
            raise CheckpointError(
                f"{path} is missing: DeepSpeed's converter leaves it behind; copy it (and the window's files) from the "
                f"folder that was converted, or convert with {_CONVERT}"
            )
        if plugin.completep is not None:
            what = f"{missing}, whose weights belong to another parametrization"
            raise CheckpointError(f'{what}; resume without "completep", or start a new run')
    if dist.get_rank() == 0:
        logger.warning(f"{missing}. Its steps count as steps at full length, and the averaging window starts empty.")
    return None


def load(plugin: Methods, folder: Path, manifest: dict[str, Any] | None) -> None:
    """Restore every enabled method from the tag folder, after DeepSpeed has restored the engine."""
    state = manifest["state"] if manifest else {}
    try:
        with raise_on_all_ranks():
            here = plugin.engine.global_steps
            if (step := manifest["global_steps"] if manifest is not None else here) != here:
                saved = f"{folder / MANIFEST} was saved at step {step}, the engine is at step {here}"
                why = "two saves are mixed in the folder, or attach() came after another load"
                raise CheckpointError(f"{saved}: {why}; give the checkpoint that was loaded, or another")
            if plugin.warmup is not None:
                plugin.warmup.load_state(state.get("sequence_length_warmup"))
            if plugin.averager is not None and manifest is not None and "weight_averaging" in state:
                of = {"save_id": manifest["save_id"], "saved_ranks": manifest["world_size"]}
                window_files.load(folder, plugin.averager, **of, **_place(plugin))
            elif plugin.averager is not None:
                plugin.averager.reset()
            if plugin.spikes is not None:
                plugin.spikes.load_state(state.get("weight_averaging", {}).get("spikes"))
    except Exception:
        if plugin.averager is not None:  # on some ranks it may have been read already
            plugin.averager.reset()
        raise


def resume(plugin: Methods, folder: Path, tag: str | None) -> None:
    """Restore every enabled method from a checkpoint that DeepSpeed has loaded into the engine already.

    ``folder``, ``tag``: as they were given to ``engine.load_checkpoint``. What DeepSpeed could load is not judged
    again; that it is this checkpoint shows in the step.

    Raises:
        CheckpointError: as `check` and `load` do, or the engine is at another step; it is as it was.
    """
    universal = bool(plugin.engine.load_universal_checkpoint())
    tag = tag if tag is not None else latest_tag(folder, universal=universal)
    if tag is None:
        remedy = "give the folder that engine.load_checkpoint() was given, or tag= beside it"
        raise CheckpointError(f"resume_from: {folder} names no latest checkpoint; {remedy}")
    load(plugin, folder / tag, check(plugin, folder / tag, same_optimizer=False, universal=universal))


def to_universal(folder: str | Path, target: str | Path, *, workers: int = 1) -> None:
    """Convert the checkpoint in a tag folder with DeepSpeed's ``ds_to_universal``, and take our files along; the
    averaging window's are resharded when they are read.

    megatron-core's layers save an extra state that is None, on which the converter fails under ZeRO 1/2. It passes over
    what is there already, so an empty file stands in for each of them meanwhile.

    Raises:
        CheckpointError: no manifest in ``folder``, or a damaged one, or a file is missing; or ``target`` exists.
    """
    from deepspeed.checkpoint import ds_to_universal

    folder, target = Path(folder), Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already; give a new folder for the universal checkpoint")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} holds no {MANIFEST}; give a checkpoint's tag folder, saved with a method on")
    windows = _windows(folder)
    target.mkdir(parents=True)
    for path in windows:  # before the converter, which publishes its result
        try:
            os.link(path, target / path.name)
        except OSError:  # a file system that has no hard links
            atomic_write(target / path.name, functools.partial(shutil.copy2, path))
    write_text(target / MANIFEST, (folder / MANIFEST).read_text("utf-8"))
    states = (
        torch.load(path, map_location="cpu", mmap=True, weights_only=False)["module"]
        for path in folder.glob("mp_rank_*_model_states.pt")
    )
    empty = {name for state in states for name, value in (state or {}).items() if value is None}  # None in a pipeline's
    for name in empty:
        (target / "zero" / name).mkdir(parents=True)
        (target / "zero" / name / "fp32.pt").touch()
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder),
            output_folder=str(target),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # what it asks for describes tensor parallelism only
        )
    )
    for name in empty:
        shutil.rmtree(target / "zero" / name)


def _windows(folder: Path) -> list[Path]:
    """The averaging window's files in ``folder`` that belong to its manifest: not those of an earlier, larger save."""
    path = folder / MANIFEST
    with _readable(path, "convert"):
        manifest = read_json(path, Manifest)
        ranks = manifest["world_size"] if "weight_averaging" in manifest["state"] else 0
        found = [folder / window_files.shard_name(rank) for rank in range(ranks)]
    for path in found:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, a rank's averaging window; restore it, or convert another")
    return found


def latest_tag(load_dir: str | Path, *, universal: bool = False) -> str | None:
    """The tag DeepSpeed would load from ``load_dir``, or None when there is none. Every rank calls it, rank 0 reads."""
    path = Path(load_dir) / ("latest_universal" if universal else "latest")
    return from_rank_0(lambda: read_tag(path, remedy=_ANOTHER) if path.is_file() else None)


def _state(plugin: Methods) -> dict[str, Any]:
    """The small state, equal on all ranks. Every rank calls it: some of it is brought together first."""
    state: dict[str, Any] = {}
    if plugin.warmup is not None:
        state["sequence_length_warmup"] = plugin.warmup.state()
    if plugin.averager is not None:
        state["weight_averaging"] = {"steps": plugin.averager.steps}
    if plugin.spikes is not None:
        state["weight_averaging"]["spikes"] = plugin.spikes.state()
    if plugin.completep is not None:
        state["completep"] = plugin.completep.state()
    return state


def _place(plugin: Methods) -> dict[str, Any]:
    """Where this rank stands, as the averaging window's files ask for it."""
    coordinate = compat.model_coordinate(plugin.engine)
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "coordinate": coordinate}


def _shapes(plugin: Methods) -> dict[str, list[int]]:
    """Every parameter's shape, before ZeRO and after tensor parallelism. Every rank of a pipeline calls it."""
    shapes = {name: compat.global_shape(p) for name, p in plugin.engine.module.named_parameters()}
    if compat.is_pipeline(plugin.engine):  # each rank has its stage's
        shapes = {name: shape for stage in gathered(shapes) for name, shape in stage.items()}
    return shapes


def _compare(plugin: Methods, manifest: dict[str, Any], path: Path, here: dict[str, list[int]] | None) -> None:
    """What the weights need. ``here``: the model's shapes; None leaves them to DeepSpeed."""
    if manifest.get("averaged"):
        what = f"the folder holds the average of steps {manifest['steps']} for zero_to_fp32, and no run to resume"
        raise CheckpointError(f"{path}: {what}; give the tag of another checkpoint")
    if manifest["format"] != FORMAT:
        what = f"{path} has format {manifest['format']!r}, this version reads {FORMAT}"
        raise CheckpointError(f"{what}; use the version it is from")
    saved = manifest["model"]
    here = saved if here is None else here
    for name in [*saved, *here]:
        if saved.get(name) == here.get(name):
            continue
        if _plain(saved) == _plain(here):
            raise CheckpointError(
                f"{path}: the checkpoint's parameters are named {next(iter(saved))} and so on, this model's "
                f"{next(iter(here))}: one was wrapped, as by torch.compile, and DeepSpeed loads by name; wrap it as it "
                "was then (model.compile() in place of torch.compile(model) changes no name)"
            )
        raise CheckpointError(
            f"{path}: parameter {name} is {saved.get(name, 'absent')} in the checkpoint and {here.get(name, 'absent')} "
            "in this model; build the model the checkpoint was trained with, or start a new run"
        )
    recipe, ours = manifest["sections"].get("completep"), plugin.config.to_dict().get("completep")
    section = plugin.config.completep
    same = recipe == ours if recipe is None or section is None else not section.differences(recipe)
    if not same:
        what = f"trained with completep {json.dumps(recipe)}, this run asks for {json.dumps(ours)}"
        raise CheckpointError(f"{path}: {what}; give the same section")


def _plain(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Without what wrappers put into the names."""
    return {plain_name(name).removeprefix("module."): shape for name, shape in shapes.items()}


def _compare_runs(plugin: Methods, manifest: dict[str, Any], path: Path) -> None:
    """What the methods' state needs."""
    state = manifest["state"].get("sequence_length_warmup") or {}
    if plugin.warmup is not None and state:
        plugin.warmup.check_state(state)
    elif plugin.warmup is None and (left := (state.get("order") or {"open": []})["open"]):
        raise CheckpointError(
            f"{path}: the checkpoint carries tokens of {len(left)} batches that were read and not trained yet, and "
            "this run has no sequence_length_warmup to train them; give the same section"
        )
    if plugin.averager is not None:
        saved = manifest["sections"].get("weight_averaging", {})
        window_files.compare(saved, plugin.averager.config, path.parent)


def _compare_layouts(plugin: Methods, manifest: dict[str, Any], path: Path, *, universal: bool) -> None:
    """What DeepSpeed's files need. Ordinary ones hold the optimizer's state as it was divided, in other files for each
    stage; universal ones of ZeRO 1/2 and of ZeRO 3 hold different things under the same names."""
    saved, stage = manifest["zero_stage"], int(plugin.engine.zero_optimization_stage())
    ranks, here = manifest["world_size"], dist.get_world_size()
    if universal:
        if (saved == 3) != (stage == 3):
            what = f"a universal checkpoint of zero_optimization.stage {saved} cannot be resumed with stage {stage}"
            raise CheckpointError(f"{path}: {what}; write stage {saved}")
    elif _FILES_OF_STAGE[saved] != _FILES_OF_STAGE[stage]:
        raise CheckpointError(
            f"{path}: saved with zero_stage {saved}, this run has {stage}, and DeepSpeed cannot load one as the other; "
            f"write zero_optimization.stage {saved}"
        )
    elif stage > 0 and ranks != here:
        raise CheckpointError(
            f"{path}: saved with world_size {ranks}, this run has {here}, and ZeRO's ordinary checkpoints fit one "
            f'number; resume on as many, or convert it ({_CONVERT}) and write "checkpoint": {{"load_universal": true}}'
        )
