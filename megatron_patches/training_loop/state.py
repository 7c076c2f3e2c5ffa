"""The methods' state beside Megatron-LM's checkpoints, whose loaders read all of theirs: ``SAVE/ds_plugin/``.

``ds_plugin.json`` holds the sections and the small state, equal on all ranks; each rank's averaging window is a file.
"""

import functools
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.supported import unwrapped
from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import CheckpointError, from_rank_0, gathered, raise_on_all_ranks, warn
from ds_plugin.core.files import write_text
from ds_plugin.core.json_files import MANIFEST, Manifest, read_json, read_tag
from ds_plugin.core.seals import Sealer
from ds_plugin.core.settings_model import parse_section
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.spike import SpikeWatch
from ds_plugin.weight_averaging.state import files as window_files
from megatron_patches.completep.layers import forward_multipliers
from megatron_patches.training_loop.lengths import Lengths

FORMAT = 4
AVERAGED = "averaged"  # where averages are saved, for ``--load`` with ``--finetune``
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's
_WITHOUT = "%s is missing: its iterations count as iterations at full length, and the averaging window starts empty"


@dataclass(eq=False)
class Methods:
    """The methods in one training loop; None: off."""

    sections: PluginConfig
    options: Callable[[], Any]  # Megatron-LM's ``get_args``: there are none before the script has read them
    lengths: Lengths | None = None
    averager: WeightAverager | None = None
    spikes: SpikeWatch | None = None
    verify: bool = True  # compare a checkpoint's files with what was saved, before Megatron-LM loads them

    def to_load(self) -> tuple[Path, int, bool] | None:
        """Where the loop will find which (persistent) iteration, and whether it takes the weights alone."""
        options = self.options()
        finetune = options.finetune or getattr(options, "freeze_all_layers", False)
        step, pretrained = getattr(options, "ckpt_step", None), getattr(options, "pretrained_checkpoint", None)
        root = options.load
        if pretrained is not None and (root is None or not Path(root, TRACKER).is_file()):
            root, finetune = pretrained, True
        if root is None:
            return None
        tracker = Path(root, TRACKER)
        text = read_tag(tracker, remedy="restore it, or give --ckpt-step") if tracker.is_file() else ""
        if text == "release":  # weights alone, of no iteration
            return Path(root), 0, True
        if not step and not (text.isdecimal() and len(text) < 19):  # nothing, or what Megatron-LM refuses
            return None
        return Path(root), step or int(text), finetune

    @functools.cached_property
    def sealer(self) -> Sealer:
        """For the checkpoints, which all ranks see; there are no ranks before the script has started."""
        sealer = Sealer(dist.get_rank(), dist.get_world_size())
        sealer.verify = self.verify
        return sealer


def folder_of(root: Path, iteration: int) -> Path:
    """Where the methods' files of a checkpoint lie, beside Megatron-LM's own."""
    return root / "ds_plugin" / f"iter_{iteration:07d}"


def save(loop: Methods, root: Path, iteration: int) -> str:
    """Write the state of every method that is on; the save's id. Every rank calls it; all succeed or all raise."""
    save_id = gathered(uuid.uuid4().hex)[0]
    folder = folder_of(root, iteration)
    with raise_on_all_ranks():
        folder.mkdir(parents=True, exist_ok=True)
        loop.sealer.open(folder)
        if loop.averager is not None:
            window_files.save(folder, loop.averager, save_id=save_id, **_place())
    lengths = loop.lengths.state() if loop.lengths is not None else None  # the ranks' instruments meet there
    spikes = loop.spikes.state() if loop.spikes is not None else None
    with raise_on_all_ranks():  # the manifest last: it says that the rest is there
        if dist.get_rank() == 0:
            place = {"world_size": dist.get_world_size(), "model_parallel": _sizes()}
            _write(loop, folder, iteration, save_id=save_id, lengths=lengths, spikes=spikes, **place)
            if getattr(loop.options(), "save_retain_interval", None) is not None:
                forget_retired(root, iteration)
    return save_id


def seal(loop: Methods, root: Path, iteration: int, save_id: str) -> None:
    """Begin to seal our files and Megatron-LM's; with ``--async-save`` it still writes: ours alone."""
    folder, theirs = folder_of(root, iteration), root / f"iter_{iteration:07d}"
    with raise_on_all_ranks():  # all have written
        pass
    loop.sealer.close(folder, [folder] if loop.options().async_save else [folder, theirs], save_id)


def _write(loop: Methods, folder: Path, iteration: int, **entries: Any) -> None:
    manifest = {"format": FORMAT, "iteration": iteration, "sections": loop.sections.to_dict(), **entries}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    remedy = "restore it, or load another iteration"
    manifest: dict[str, Any] = read_json(path, Manifest, remedy=remedy)
    if lacking := {"format", "iteration", "sections"} - manifest.keys():
        raise CheckpointError(f"{path} is damaged (it has no {min(lacking)}); {remedy}")
    if (found := manifest["format"]) != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}, this version reads {FORMAT}; use the one that wrote it")
    return manifest


def mark_average(loop: Methods, root: Path, iteration: int) -> None:
    """Say of a checkpoint in ``root`` that it is an average, so that no run is resumed from it."""
    with raise_on_all_ranks():
        loop.sealer.open(folder_of(root, iteration))
        if dist.get_rank() == 0 and loop.averager is not None:
            _write(loop, folder_of(root, iteration), iteration, average_of=loop.averager.steps)


def check(loop: Methods, model: Any) -> tuple[Path, int, bool] | None:
    """Look at what Megatron-LM is about to load into ``model``, its chunks; `Methods.to_load`. Raises
    CheckpointError, on every rank alike: a run would be resumed from an average, from damaged files or with another
    ``completep``; or, with ``--finetune``, weights would get another forward pass than they were trained in."""
    found = from_rank_0(loop.to_load)
    if found is None:
        return None
    root, iteration, weights_alone = found
    path = folder_of(root, iteration) / MANIFEST

    def looked_at() -> bool:
        if weights_alone:
            _check_weights(loop, path, model[0])
            return path.is_file()
        return _resumable(loop, path, iteration) is not None

    if from_rank_0(looked_at):
        loop.sealer.check(path.parent)
    return found


def _resumable(loop: Methods, path: Path, iteration: int) -> dict[str, Any] | None:
    """What ``path`` holds. Raises CheckpointError for what no run like this is resumed from."""
    manifest, section = _read(path), loop.sections.completep
    if manifest is None:
        if section is not None:
            stock = "a checkpoint of a run without this plugin"
            raise CheckpointError(f'{path} is missing: {stock}; leave out "completep", or start anew')
        return None
    if steps := manifest.get("average_of"):
        what = f"{path} is the average of steps {steps[0]} to {steps[-1]}, which has no optimizer state"
        raise CheckpointError(f"{what}; give --finetune")
    recipe, asked = (sections.get("completep") for sections in (manifest["sections"], loop.sections.to_dict()))
    values = f"completep {json.dumps(recipe)} there, {json.dumps(asked)} here" if recipe != asked else ""
    if section is not None and recipe is not None:
        values = section.differences(recipe)
    if values:
        raise CheckpointError(f"{path}: trained with another completep: {values}; give the same section")
    if manifest["iteration"] != iteration:
        raise CheckpointError(f"{path} is of iteration {manifest['iteration']}, not {iteration}; restore the file")
    saved = manifest["sections"]
    watched = (saved.get("weight_averaging") or {}).get("restart")
    for name, key, on in (
        ("sequence_length_warmup", "lengths", "sequence_length_warmup" in saved),
        ("weight_averaging.restart", "spikes", watched),
    ):
        if on and not manifest.get(key):
            raise CheckpointError(f"{path} is damaged (no state of {name}, which was on); restore the file")
    averages = loop.averager is not None and "weight_averaging" in manifest["sections"]
    if averages and (sizes := manifest["model_parallel"]) != _sizes():
        what = f"{path}: the window is of tensor and pipeline sizes {sizes}, this run has {_sizes()}"
        raise CheckpointError(f'{what}; load with the same, or write "enabled": false in weight_averaging')
    return manifest


def _check_weights(loop: Methods, path: Path, chunk: Any) -> None:
    manifest = _read(path)
    recipe = manifest["sections"].get("completep") if manifest is not None else None
    section = parse_section(CompletePConfig, f"{path}: completep", recipe) if recipe is not None else None
    there, here = (forward_multipliers(unwrapped(chunk), each) for each in (section, loop.sections.completep))
    if there != here:
        values = ", ".join(f"{n} x {was:g} there, x {here[n]:g} here" for n, was in there.items() if was != here[n])
        stock = " (the file is missing: weights of a run without this plugin)" if manifest is None else ""
        remedy = f'give the same completep section, or fold() the weights and write "residual": "folded"{stock}'
        raise CheckpointError(f"{path}: --finetune would take weights into another forward pass: {values}; {remedy}")


def load(loop: Methods, root: Path, iteration: int) -> None:
    """Take over the state of the iteration that was loaded from ``root``. Every rank calls it."""
    folder = folder_of(root, iteration)
    manifest = from_rank_0(lambda: _resumable(loop, folder / MANIFEST, iteration))
    if manifest is None:
        warn(_WITHOUT, folder / MANIFEST)
    with raise_on_all_ranks():
        if loop.lengths is not None:
            saved, options = manifest and manifest["lengths"], loop.options()
            loop.lengths.load_state(saved, iteration=options.iteration, samples=options.consumed_train_samples)
        if loop.averager is not None and manifest is not None and "weight_averaging" in manifest["sections"]:
            save_id, ranks = manifest["save_id"], manifest["world_size"]
            window_files.load(folder, loop.averager, save_id=save_id, saved_ranks=ranks, **_place())
    if loop.spikes is not None:
        loop.spikes.load_state(manifest and manifest.get("spikes"))
    if loop.averager is not None and (again := loop.options().iteration) < iteration:  # --override-ckpt-iteration
        warn("weight averaging: iterations are counted from %d again; the window starts empty", again)
        loop.averager.reset()


def forget_retired(root: Path, iteration: int) -> None:
    """Remove what is of iterations that Megatron-LM has removed, for ``--save-retain-interval``."""
    averages = root / AVERAGED
    for parent in (root / "ds_plugin", averages, *averages.glob("horizon_*"), *averages.glob("**/ds_plugin")):
        for folder in parent.glob("iter_*"):
            number = folder.name.removeprefix("iter_")
            if number.isdigit() and int(number) < iteration and not (root / folder.name).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _place() -> dict[str, Any]:
    from megatron.core import parallel_state as at

    coordinate = (at.get_tensor_model_parallel_rank(), at.get_pipeline_model_parallel_rank())
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "coordinate": coordinate}


def _sizes() -> list[int]:
    from megatron.core import parallel_state as at

    return [at.get_tensor_model_parallel_world_size(), at.get_pipeline_model_parallel_world_size()]
