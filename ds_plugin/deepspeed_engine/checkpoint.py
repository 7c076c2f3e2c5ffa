"""The methods' state beside DeepSpeed's checkpoints, in the same tag folder.

``ds_plugin.json`` is the manifest: what the checkpoint was trained with, and the small state that is equal on all
ranks. The averaging window is in files of its own. All carry the id of the save they belong to, and are on disk before
DeepSpeed's ``latest`` names the tag. ``plugin``: an `engine.Plugin`."""

import argparse
import functools
import json
import os
import shutil
import socket
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ds_plugin.core.errors import CheckpointError, from_rank_0, gathered, raise_on_all_ranks, warn
from ds_plugin.core.files import atomic_write, write_text
from ds_plugin.core.json_files import MANIFEST, Manifest, parse_json, read_json, read_tag
from ds_plugin.core.seals import Sealer
from ds_plugin.core.settings_model import Ranks
from ds_plugin.deepspeed_engine import compat
from ds_plugin.weight_averaging.state import files as window_files
from ds_plugin.weight_averaging.state.fragments import plain_name

FORMAT = 2
_ANOTHER = "restore it, or resume from another checkpoint"
_CONVERT = "ds-plugin to-universal FOLDER TARGET"


def save(plugin: Any, folder: Path) -> str:
    """Write the state of every enabled method into the tag folder; the save's id. Every rank calls it; all succeed or
    all raise."""
    engine, averager = plugin.engine, plugin.averager
    save_id = gathered(uuid.uuid4().hex)[0]
    state: dict[str, Any] = {}
    if plugin.warmup is not None:
        state["sequence_length_warmup"] = plugin.warmup.state()
    if averager is not None:
        spikes = {"spikes": plugin.spikes.state()} if plugin.spikes is not None else {}
        state["weight_averaging"] = {"steps": averager.steps, **spikes}
    if plugin.completep is not None:
        state["completep"] = plugin.completep.state()
    manifest = {
        "format": FORMAT,
        "save_id": save_id,
        "global_steps": engine.global_steps,
        "world_size": dist.get_world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "sections": plugin.config.to_dict(),
        "model": _shapes(engine),
        "state": state,  # the small one, equal on all ranks
    }
    with raise_on_all_ranks():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            plugin.sealer.open(folder)
            if averager is not None:
                window_files.save(folder, averager, save_id=save_id, **_place(engine))
            if compat.is_first_at(engine):
                write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
        except (OSError, SafetensorError) as error:  # nothing is half-written (`core.files`)
            what = f"{folder}: the methods' state cannot be written ({error}); earlier checkpoints are as they were"
            raise CheckpointError(f"{what}, make room or give another folder, and save again") from error
    return save_id


def sealer(engine: Any) -> Sealer:
    """For the checkpoints that this rank sees. Every rank calls it."""
    if engine.use_node_local_storage():
        here, nodes = socket.gethostname(), gathered(socket.gethostname())
        return Sealer(nodes[: dist.get_rank()].count(here), nodes.count(here))
    return Sealer(dist.get_rank(), dist.get_world_size())


def seal(plugin: Any, folder: Path, save_id: str) -> None:
    """Begin to seal the tag folder, which all ranks have written; where DeepSpeed still writes, our own files alone."""
    ours = [folder / MANIFEST, *folder.glob(window_files.shard_name(0).replace("00000", "*"))]
    plugin.sealer.close(folder, ours if plugin.engine.checkpoint_engine.is_decoupled() else [folder], save_id)


def check(
    plugin: Any, folder: Path, *, same_model: bool = True, same_run: bool = True, same_optimizer: bool = True
) -> dict[str, Any] | None:
    """Read the manifest and compare it with this run, before DeepSpeed loads anything. None: there is no manifest.

    ``same_model=False`` leaves the parameters' shapes to DeepSpeed (a custom or lenient load); ``same_run=False``
    leaves out what only a resume needs, ``same_optimizer=False`` what only the optimizer's state needs.

    Raises CheckpointError: the folder does not exist, or the manifest is damaged or of another model, layout or recipe;
    or it is missing and needed: for CompleteP, or the param groups' settings, which a universal one lacks."""
    path, universal = folder / MANIFEST, plugin.engine.load_universal_checkpoint()
    exists, data = from_rank_0(lambda: (folder.is_dir(), path.read_bytes() if path.is_file() else None))
    here, missing = _shapes(plugin.engine), f"{folder} holds no {MANIFEST}: a checkpoint of a run without this plugin"
    with raise_on_all_ranks():
        if not exists:
            raise CheckpointError(f"there is no checkpoint in {folder}; give the tag of one that exists")
        if data is not None:
            try:
                manifest: dict[str, Any] = parse_json(data, path, Manifest, remedy=_ANOTHER)
                _compare(plugin, manifest, path, here if same_model else None)
                if same_run:
                    _compare_runs(plugin, manifest, path)
                if universal or (same_run and same_optimizer):
                    _compare_layouts(plugin.engine, manifest, path)
            except (ValueError, KeyError, TypeError) as error:  # it does not hold what it should
                raise CheckpointError(f"{path} is damaged ({error}); {_ANOTHER}") from None
            return manifest
        if universal:
            what = f"{path} is missing, which DeepSpeed's converter leaves behind"
            raise CheckpointError(f"{what}; convert with {_CONVERT}, or copy it and the window's files beside it")
        if plugin.completep is not None:
            what = f"{missing}, whose weights belong to another parametrization"
            raise CheckpointError(f'{what}; resume without "completep", or start a new run')
    warn("%s. Its steps count as steps at full length, and the averaging window starts empty.", missing)
    return None


def load(plugin: Any, folder: Path, manifest: dict[str, Any] | None) -> None:
    """Restore every enabled method from the tag folder, after DeepSpeed has restored the engine. ``manifest``: as
    `check` returned it; without one, the methods start at the engine's step."""
    state, averager = manifest["state"] if manifest else {}, plugin.averager
    averaging = state.get("weight_averaging")
    try:
        with raise_on_all_ranks():
            here = plugin.engine.global_steps
            if manifest is not None and manifest["global_steps"] != here:
                what = f"was saved at step {manifest['global_steps']}, the engine is at step {here}"
                why = "two saves are mixed in the folder, or attach() came after another load"
                raise CheckpointError(f"{folder / MANIFEST} {what}: {why}; give the checkpoint that was loaded")
            if plugin.warmup is not None:
                plugin.warmup.load_state(state.get("sequence_length_warmup"))
            if averager is not None and manifest is not None and averaging is not None:
                of = {"save_id": manifest["save_id"], "saved_ranks": manifest["world_size"]}
                window_files.load(folder, averager, **of, **_place(plugin.engine))
            elif averager is not None:
                averager.reset()
            if plugin.spikes is not None:
                plugin.spikes.load_state((averaging or {}).get("spikes"))
    except Exception:
        if averager is not None:  # on some ranks it may have been read already
            averager.reset()
        raise


def resume(plugin: Any, folder: Path, tag: str | None) -> None:
    """Restore every enabled method from a checkpoint that DeepSpeed has loaded into the engine already, which shows in
    the step. ``folder``, ``tag``: as ``engine.load_checkpoint`` was given them. Raises as `check` and `load` do."""
    tag = tag if tag is not None else latest_tag(plugin.engine, folder)
    if tag is None:
        raise CheckpointError(f"resume_from: {folder} names no latest checkpoint; give what was loaded, or tag=")
    manifest = check(plugin, folder / tag, same_optimizer=False)
    if manifest is not None:
        plugin.sealer.check(folder / tag)
    load(plugin, folder / tag, manifest)


def latest_tag(engine: Any, folder: Path) -> str | None:
    """The tag DeepSpeed would load from ``folder``, or None when there is none. Every rank calls it, rank 0 reads."""
    path = folder / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
    return from_rank_0(lambda: read_tag(path, remedy=_ANOTHER) if path.is_file() else None)


def to_universal(folder: str | Path, target: str | Path, *, workers: int = 1) -> None:
    """Convert the checkpoint in a tag folder with DeepSpeed's ``ds_to_universal``, and take our files along; the
    averaging window's are resharded when they are read. Raises CheckpointError: no manifest in ``folder``, or a damaged
    one; a file is missing, or ``target`` exists.

    megatron-core's layers save an extra state that is None, on which the converter fails under ZeRO 1/2. It passes over
    what is there already, so an empty file stands in for each of them meanwhile."""
    from deepspeed.checkpoint import ds_to_universal

    folder, target = Path(folder), Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already; give a new folder for the universal checkpoint")
    if not (path := folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} holds no {MANIFEST}; give a checkpoint's tag folder, saved with a method on")
    manifest = read_json(path, {"world_size": Ranks, "state": dict[str, Any]}, remedy="restore it, or convert another")
    ranks = manifest["world_size"] if "weight_averaging" in manifest["state"] else 0
    windows = [folder / window_files.shard_name(rank) for rank in range(ranks)]
    if missing := [window for window in windows if not window.is_file()]:
        raise CheckpointError(f"{missing[0]} is missing, a rank's averaging window; restore it, or convert another")
    target.mkdir(parents=True)
    for window in windows:  # before the converter, which publishes its result
        try:
            os.link(window, target / window.name)
        except OSError:  # a file system that has no hard links
            atomic_write(target / window.name, functools.partial(shutil.copy2, window))
    write_text(target / MANIFEST, path.read_text("utf-8"))
    empty = set()
    for saved in folder.glob("mp_rank_*_model_states.pt"):
        state = torch.load(saved, map_location="cpu", mmap=True, weights_only=False)["module"]  # None: a pipeline's
        empty |= {target / "zero" / name for name, value in (state or {}).items() if value is None}
    for stand_in in empty:
        stand_in.mkdir(parents=True)
        (stand_in / "fp32.pt").touch()
    options = {"num_extract_workers": workers, "num_merge_workers": workers, "keep_temp_folder": False, "strict": True}
    options |= {"inject_missing_state": True}  # what it asks for describes tensor parallelism only
    ds_to_universal.main(argparse.Namespace(input_folder=str(folder), output_folder=str(target), **options))
    for stand_in in empty:
        shutil.rmtree(stand_in)
    own = Sealer(0, 1)
    own.close(target, [target], uuid.uuid4().hex)
    own.wait()


def _place(engine: Any) -> dict[str, Any]:
    """Where this rank stands, as the averaging window's files ask for it."""
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return {**ranks, "coordinate": compat.model_coordinate(engine)}


def _shapes(engine: Any) -> dict[str, list[int]]:
    """Every parameter's shape, before ZeRO and after tensor parallelism. Every rank of a pipeline calls it."""
    shapes = {name: compat.global_shape(p) for name, p in engine.module.named_parameters()}
    if compat.is_pipeline(engine):  # each rank has its stage's
        shapes = {name: shape for stage in gathered(shapes) for name, shape in stage.items()}
    return shapes


def _compare(plugin: Any, manifest: dict[str, Any], path: Path, here: dict[str, list[int]] | None) -> None:
    """What the weights need. ``here``: the model's shapes; None leaves them to DeepSpeed."""
    if manifest.get("averaged"):
        what = f"the folder holds the average of steps {manifest['steps']} for zero_to_fp32, and no run to resume"
        raise CheckpointError(f"{path}: {what}; give the tag of another checkpoint")
    if manifest["format"] != FORMAT:
        what = f"{path} has format {manifest['format']!r}, this version reads {FORMAT}"
        raise CheckpointError(f"{what}; use the version it is from")
    saved = manifest["model"]
    if here is not None and saved != here:
        if _plain(saved) == _plain(here):
            wrapped = f"named {next(iter(saved))} and so on, this model's {next(iter(here))}: one was wrapped"
            raise CheckpointError(f"{path}: parameters are {wrapped}; wrap it as it was then, or by model.compile()")
        name = next(name for name in [*saved, *here] if saved.get(name) != here.get(name))
        shapes = f"{saved.get(name, 'absent')} in the checkpoint and {here.get(name, 'absent')} in this model"
        raise CheckpointError(f"{path}: parameter {name} is {shapes}; build the model the checkpoint was trained with")
    recipe, section = manifest["sections"].get("completep"), plugin.config.completep
    ours = plugin.config.to_dict().get("completep")
    if recipe != ours if recipe is None or section is None else section.differences(recipe):
        what = f"trained with completep {json.dumps(recipe)}, this run asks for {json.dumps(ours)}"
        raise CheckpointError(f"{path}: {what}; give the same section")


def _plain(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Without what wrappers put into the names."""
    return {plain_name(name).removeprefix("module."): shape for name, shape in shapes.items()}


def _compare_runs(plugin: Any, manifest: dict[str, Any], path: Path) -> None:
    """What the methods' state needs."""
    if lost := manifest["sections"].keys() - manifest["state"].keys():
        raise CheckpointError(f"{path} is damaged (no state of {min(lost)}, which was on); {_ANOTHER}")
    state = manifest["state"].get("sequence_length_warmup") or {}
    if plugin.warmup is not None and state:
        plugin.warmup.check_state(state)
    elif plugin.warmup is None and (order := state.get("order")):
        what = f"the checkpoint carries tokens of {len(order['open'])} batches and has read {order['windows_read']}"
        what += f" in {manifest['global_steps']} steps, which a run without sequence_length_warmup does not go on from"
        raise CheckpointError(f"{path}: {what}; give the same section")
    if plugin.averager is not None:
        saved = manifest["sections"].get("weight_averaging", {})
        window_files.compare(saved, plugin.averager.config, path.parent)


def _compare_layouts(engine: Any, manifest: dict[str, Any], path: Path) -> None:
    """What DeepSpeed's files need. Ordinary ones hold the optimizer's state as it was divided, in other files for each
    stage but 1 and 2; universal ones of ZeRO 1/2 and of ZeRO 3 hold different things under the same names."""
    saved, stage = manifest["zero_stage"], int(engine.zero_optimization_stage())
    ranks, here = manifest["world_size"], dist.get_world_size()
    if engine.load_universal_checkpoint():
        if (saved == 3) != (stage == 3):
            what = f"a universal checkpoint of zero_optimization.stage {saved} cannot be resumed with stage {stage}"
            raise CheckpointError(f"{path}: {what}; write stage {saved}")
    elif saved != stage and {saved, stage} != {1, 2}:
        what = f"saved with zero_stage {saved}, this run has {stage}, and DeepSpeed cannot load one as the other"
        raise CheckpointError(f"{path}: {what}; write zero_optimization.stage {saved}")
    elif stage > 0 and ranks != here:
        what = f"saved with world_size {ranks}, this run has {here}, and ZeRO's ordinary checkpoints fit one number"
        remedy = f'resume on as many, or convert it ({_CONVERT}) and write "checkpoint": {{"load_universal": true}}'
        raise CheckpointError(f"{path}: {what}; {remedy}")
