"""The methods' state beside DeepSpeed's checkpoints, in the same tag folder.

``ds_plugin.json`` is the manifest: what the checkpoint was trained with, and the small state that is equal on all
ranks. Each method's large state is in files of its own. The manifest and every shard carry the id of the save they
belong to. Everything is on disk before DeepSpeed's ``latest`` names the tag.
"""

import argparse
import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.utils import logger
from safetensors import SafetensorError

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import CheckpointError, raise_on_all_ranks
from ds_plugin.core.files import atomic_write, write_text
from ds_plugin.core.manifest import MANIFEST
from ds_plugin.deepspeed_engine import compat
from ds_plugin.deepspeed_engine.completep import CompleteP
from ds_plugin.deepspeed_engine.warmup import SequenceLengthWarmup
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.spike import SpikeWatch
from ds_plugin.weight_averaging.state import files as window_files
from ds_plugin.weight_averaging.state.fragments import plain_name

FORMAT = 2


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
    save_id = [uuid.uuid4().hex]
    dist.broadcast_object_list(save_id, src=0)
    state, model = _state(plugin), _shapes(plugin)
    with raise_on_all_ranks(), _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if plugin.averager is not None:
            window_files.save(folder, plugin.averager, save_id=save_id[0], **_place(plugin))
        writes = engine.local_rank == 0 if engine.use_node_local_storage() else dist.get_rank() == 0
        if writes:
            write_text(folder / MANIFEST, json.dumps(_manifest(plugin, save_id[0], model, state), indent=1))


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What the file system refuses, as our own error. Nothing is half-written then (`atomic`)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the methods' state cannot be written ({error}); make room or give another folder, and save "
            "again: training can go on, and earlier checkpoints are as they were"
        ) from error


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

    ``same_model=False`` leaves the parameters' shapes to the host (a custom or lenient load); ``same_run=False`` leaves
    out what only a resume needs, ``same_optimizer=False`` what only the optimizer's state needs. ``universal``:
    DeepSpeed's converter leaves the manifest behind, and without it the param groups' settings are lost, so there must
    be one. Rank 0 reads, so that all ranks see the same.

    Raises:
        CheckpointError: the folder does not exist, or the manifest is damaged or of another model, layout or recipe.
    """
    manifest: dict[str, Any] | None = None
    path = folder / MANIFEST
    exists, text = _from_rank_0(lambda: (folder.is_dir(), path.read_text("utf-8") if path.is_file() else None))
    here = _shapes(plugin)
    with raise_on_all_ranks():
        if not exists:
            raise CheckpointError(f"there is no checkpoint in {folder}; give the tag of one that exists")
        if text is None and universal:
            raise CheckpointError(
                f"{path} is missing: DeepSpeed's converter leaves it behind; copy it (and the window's files) from the "
                "folder that was converted, or convert with ds-plugin to-universal FOLDER TARGET"
            )
        if text is None and plugin.completep is not None:
            raise CheckpointError(
                f"{folder} holds no {MANIFEST}: a checkpoint of a run without this plugin, whose weights belong to "
                'another parametrization; resume without "completep", or start a new run'
            )
        if text is not None:
            try:
                manifest = json.loads(text)
                assert manifest is not None
                if manifest.get("averaged"):
                    raise CheckpointError(
                        f"{path}: the folder holds the average of steps {manifest['steps']} for zero_to_fp32, and no "
                        "run to resume; give the tag of another checkpoint"
                    )
                _compare(plugin, manifest, path, here if same_model else None, same_run=same_run)
                if same_run and plugin.averager is not None:
                    saved = manifest["sections"].get("weight_averaging", {})
                    window_files.compare(saved, plugin.averager.config, folder)
                if universal:
                    _compare_universal(plugin, manifest, path)
                elif same_run and same_optimizer:
                    _compare_ordinary(plugin, manifest, path)
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"{path} is damaged ({error}); restore it, or resume from another checkpoint"
                ) from None
    if manifest is None and dist.get_rank() == 0:
        logger.warning(
            f"{folder} holds no {MANIFEST}: a checkpoint of a run without this plugin. Its steps count "
            "as steps at full length, and the averaging window starts empty."
        )
    return manifest


def load(plugin: Methods, folder: Path, manifest: dict[str, Any] | None) -> None:
    """Restore every enabled method from the tag folder, after DeepSpeed has restored the engine."""
    try:
        _load(plugin, folder, manifest)
    except Exception:
        if plugin.averager is not None:  # on some ranks it may have been read already
            plugin.averager.reset()
        raise


def _load(plugin: Methods, folder: Path, manifest: dict[str, Any] | None) -> None:
    with raise_on_all_ranks():
        if manifest is not None and manifest["global_steps"] != plugin.engine.global_steps:
            raise CheckpointError(
                f"{folder / MANIFEST} was saved at step {manifest['global_steps']}, DeepSpeed's files beside it at "
                f"step {plugin.engine.global_steps}: two saves are mixed in this folder; resume from another checkpoint"
            )
        state = manifest["state"] if manifest else {}
        if plugin.warmup is not None:
            plugin.warmup.load_state(state.get("sequence_length_warmup"))
        if plugin.averager is not None:
            if manifest is not None and "weight_averaging" in state:
                window_files.load(
                    folder,
                    plugin.averager,
                    save_id=manifest["save_id"],
                    saved_ranks=manifest["world_size"],
                    **_place(plugin),
                )
            else:
                plugin.averager.reset()
        if plugin.spikes is not None:
            plugin.spikes.load_state(state.get("weight_averaging", {}).get("spikes"))


def resume(plugin: Methods, folder: Path, tag: str | None) -> None:
    """Restore every enabled method from a checkpoint that DeepSpeed has loaded into the engine already.

    ``folder``, ``tag``: as they were given to ``engine.load_checkpoint``. What DeepSpeed could load is not judged
    again; that it is this checkpoint shows in the step.

    Raises:
        CheckpointError: as `check` and `load` do, there is no ``latest`` and no tag was given, or the engine is not at
            the step of the checkpoint. The engine is as it was.
    """
    universal = bool(plugin.engine.load_universal_checkpoint())
    tag = tag if tag is not None else latest_tag(folder, universal=universal)
    if tag is None:
        raise CheckpointError(
            f"resume_from: {folder} names no latest checkpoint; give the folder that engine.load_checkpoint() was "
            "given, or tag= beside it"
        )
    manifest = check(plugin, folder / tag, same_optimizer=False, universal=universal)
    step = plugin.engine.global_steps
    if manifest is not None and manifest["global_steps"] != step:
        raise CheckpointError(
            f"resume_from: {folder / tag} was saved at step {manifest['global_steps']} and the engine is at step "
            f"{step}; load that checkpoint before attach(), or give the folder and tag that were loaded"
        )
    load(plugin, folder / tag, manifest)


def to_universal(folder: str | Path, target: str | Path, *, workers: int = 1) -> None:
    """Convert the checkpoint in a tag folder with DeepSpeed's ``ds_to_universal``, and take our files along.

    The averaging window's files stay as they are: they are resharded when they are read.

    megatron-core's layers save an extra state that is None, on which the converter fails under ZeRO 1/2. It passes over
    what is there already, so an empty file stands in for each of them meanwhile.

    Raises:
        CheckpointError: there is no manifest in ``folder``, it is damaged, or a file of the averaging window is
            missing; or ``target`` exists already.
    """
    from deepspeed.checkpoint import ds_to_universal

    folder, target = Path(folder), Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already; give a new folder for the universal checkpoint")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}; give the tag folder of a checkpoint saved with a method on"
        )
    windows = _windows(folder)
    target.mkdir(parents=True)
    for path in windows:  # before the converter, which publishes its result
        _take_along(path, target)
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
    try:
        manifest = json.loads(path.read_text("utf-8"))
        ranks = manifest["world_size"] if "weight_averaging" in manifest["state"] else 0
        found = [folder / window_files.shard_name(rank) for rank in range(ranks)]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or convert another checkpoint") from None
    for path in found:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, a rank's averaging window; restore it, or convert another")
    return found


def _take_along(path: Path, folder: Path) -> None:
    """Put a file into another folder as well: by a hard link, or a whole copy where the file system has none."""
    try:
        os.link(path, folder / path.name)
    except OSError:
        atomic_write(folder / path.name, lambda temporary: shutil.copy2(path, temporary))


def latest_tag(load_dir: str | Path, *, universal: bool = False) -> str | None:
    """The tag DeepSpeed would load from ``load_dir``, or None when there is none. Every rank calls it, rank 0 reads."""
    path = Path(load_dir) / ("latest_universal" if universal else "latest")
    return _from_rank_0(lambda: path.read_text("utf-8").strip() if path.is_file() else None)


def _from_rank_0(read: Callable[[], Any]) -> Any:
    """What ``read`` returns on rank 0, on every rank: a file that not all ranks see must not divide them."""
    box = [None]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            box = [read()]
    dist.broadcast_object_list(box, src=0)
    return box[0]


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


def _manifest(plugin: Methods, save_id: str, model: dict[str, list[int]], state: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "save_id": save_id,
        "global_steps": plugin.engine.global_steps,
        "world_size": dist.get_world_size(),
        "zero_stage": int(plugin.engine.zero_optimization_stage()),
        "sections": plugin.config.to_dict(),
        "model": model,
        "state": state,
    }


def _place(plugin: Methods) -> dict[str, Any]:
    """Where this rank stands, as the averaging window's files ask for it."""
    coordinate = compat.model_coordinate(plugin.engine)
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "coordinate": coordinate}


def _shapes(plugin: Methods) -> dict[str, list[int]]:
    """Every parameter's shape, before ZeRO and after tensor parallelism. Every rank of a pipeline calls it."""
    shapes = {name: compat.global_shape(p) for name, p in plugin.engine.module.named_parameters()}
    if compat.is_pipeline(plugin.engine):  # each rank has its stage's
        stages: list[dict[str, list[int]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(stages, shapes)
        shapes = {name: shape for stage in stages for name, shape in stage.items()}
    return shapes


def _compare(
    plugin: Methods, manifest: dict[str, Any], path: Path, here: dict[str, list[int]] | None, *, same_run: bool
) -> None:
    """``here``: the model's shapes; None leaves them to the host."""
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']!r}, this version reads {FORMAT}; use the version it is from"
        )
    saved = manifest["model"]
    here = saved if here is None else here
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            if _plain(saved) == _plain(here):
                raise CheckpointError(
                    f"{path}: the checkpoint's parameters are named {next(iter(saved))} and so on, this model's "
                    f"{next(iter(here))}: one of the two was wrapped, as by torch.compile, and DeepSpeed loads by "
                    "name; wrap it as it was then (model.compile() in place of torch.compile(model) changes no name)"
                )
            raise CheckpointError(
                f"{path}: parameter {name} is {saved.get(name, 'absent')} in the checkpoint and "
                f"{here.get(name, 'absent')} in this model; build the model the checkpoint was trained with, or start "
                "a new run"
            )
    recipe, ours = manifest["sections"].get("completep"), plugin.config.to_dict().get("completep")
    section = plugin.config.completep
    same = recipe == ours if recipe is None or section is None else not section.differences(recipe)
    if not same:
        raise CheckpointError(
            f"{path}: trained with completep {json.dumps(recipe)}, this run asks for {json.dumps(ours)}; give the "
            "same section"
        )
    left = (manifest["state"].get("sequence_length_warmup") or {}).get("order") or {"open": []}
    if same_run and plugin.warmup is None and left["open"]:
        raise CheckpointError(
            f"{path}: the checkpoint carries tokens of {len(left['open'])} batches that were read and not trained yet, "
            "and this run has no sequence_length_warmup to train them; give the same section"
        )
    if same_run and plugin.warmup is not None and "sequence_length_warmup" in manifest["state"]:
        plugin.warmup.check_state(manifest["state"]["sequence_length_warmup"])


def _plain(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Without what wrappers put into the names."""
    return {plain_name(name).removeprefix("module."): shape for name, shape in shapes.items()}


def _layout(plugin: Methods) -> dict[str, int]:
    return {"world_size": dist.get_world_size(), "zero_stage": int(plugin.engine.zero_optimization_stage())}


def _compare_ordinary(plugin: Methods, manifest: dict[str, Any], path: Path) -> None:
    """DeepSpeed's ordinary checkpoints hold the optimizer's state as it was divided, in other files for each stage."""
    here, universal = _layout(plugin), "ds-plugin to-universal FOLDER TARGET"
    if _kind(manifest["zero_stage"]) != _kind(here["zero_stage"]):
        raise CheckpointError(
            f"{path}: saved with zero_stage {manifest['zero_stage']}, this run has {here['zero_stage']}, and DeepSpeed "
            f"cannot load one as the other; write zero_optimization.stage {manifest['zero_stage']}"
        )
    if here["zero_stage"] > 0 and manifest["world_size"] != here["world_size"]:
        raise CheckpointError(
            f"{path}: saved with world_size {manifest['world_size']}, this run has {here['world_size']}: DeepSpeed's "
            f"ordinary checkpoints of ZeRO fit one number of ranks; convert it ({universal}) and resume with "
            '"checkpoint": {"load_universal": true}, or on the same number of ranks'
        )


def _kind(stage: int) -> int:
    """Stages 1 and 2 write the same files."""
    return min(stage, 1) if stage < 3 else stage


def _compare_universal(plugin: Methods, manifest: dict[str, Any], path: Path) -> None:
    """DeepSpeed's universal checkpoints of ZeRO 1/2 and of ZeRO 3 hold different things under the same names."""
    saved, here = manifest["zero_stage"], int(plugin.engine.zero_optimization_stage())
    if (saved == 3) != (here == 3):
        raise CheckpointError(
            f"{path}: a universal checkpoint of zero_optimization.stage {saved} cannot be resumed with stage {here}; "
            f"write stage {saved}"
        )
