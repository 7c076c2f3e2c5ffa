"""What averaging holds, on disk: one safetensors file per rank, beside the host's checkpoint. Never a pickle."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ds_plugin.atomic import atomic_write
from ds_plugin.errors import CheckpointError
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig

FORMAT = "2"  # "1" had sliding windows only, and neither mode, state nor hash


def shard_name(rank: int) -> str:
    """File name of one rank's share; must not end as DeepSpeed's own files do, which its tools glob for."""
    return f"weight_averaging_rank_{rank:05d}.safetensors"


def save(folder: Path, averager: WeightAverager, *, rank: int, world_size: int, save_id: str) -> None:
    """Write this rank's share into the checkpoint folder, atomically. ``save_id`` marks the files of one save."""
    tensors = dict(averager.mode.tensors())
    metadata = {
        "format": FORMAT,
        "rank": str(rank),
        "world_size": str(world_size),
        "save_id": save_id,
        "mode": averager.config.mode,
        "state": json.dumps(averager.mode.state()),
        "steps": json.dumps(averager.steps),
        "tensors": str(len(averager.shards.tensors())),
        "sha256": _hash(tensors),
    }
    atomic_write(folder / shard_name(rank), lambda path: save_file(tensors, path, metadata=metadata))


def load(folder: Path, averager: WeightAverager, *, rank: int, world_size: int, save_id: str) -> None:
    """Read this rank's share back.

    Raises:
        CheckpointError: the file is missing, unreadable, altered, or belongs to another rank, layout, save or mode.
    """
    path = folder / shard_name(rank)
    remedy = "restore the file, or resume from another checkpoint (--tag)"
    if not path.is_file():
        raise CheckpointError(f"weight_averaging: {path} is missing, this rank's averaging window; {remedy}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = file.metadata() or {}
            for key, expected in (("rank", rank), ("world_size", world_size), ("save_id", save_id)):
                if found.get(key) != str(expected):
                    raise CheckpointError(
                        f"weight_averaging: {path} has {key} {found.get(key)!r} where this run expects "
                        f"{str(expected)!r}: it belongs to another rank, layout or save; {remedy}"
                    )
            count, tensors = int(found["tensors"]), {name: file.get_tensor(name) for name in file.keys()}
            state = json.loads(found["state"]) if "state" in found else {"steps": json.loads(found["steps"])}
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"weight_averaging: {path} is damaged ({error}); {remedy}") from None
    if "sha256" in found and found["sha256"] != _hash(tensors):
        raise CheckpointError(
            f"weight_averaging: {path} is damaged (its contents are not those that were saved); {remedy}"
        )
    saved = {"mode": found.get("mode", "sliding"), **{k: state[k] for k in ("window", "horizons") if k in state}}
    compare(saved, averager.config, path)
    if count != len(averager.shards.tensors()):
        raise CheckpointError(
            f"weight_averaging: {path} holds {count} shards per snapshot, this optimizer has "
            f"{len(averager.shards.tensors())}; resume with the settings it was saved with"
        )
    try:
        averager.mode.load(state, tensors)
    except KeyError as error:
        raise CheckpointError(f"weight_averaging: {path} is damaged (it has no {error}); {remedy}") from None


def compare(saved: Mapping[str, Any], config: WeightAveragingConfig, path: Path) -> None:
    """Compare a saved section (or as much of it as a rank's file has) with this run's.

    A sliding window may become larger or smaller; a sum of 5 snapshots cannot become one of 3.

    Raises:
        CheckpointError: the mode differs, or what cannot change within it.
    """
    fixed = {"sliding": (), "block": ("window",), "ema": ("horizons",)}[config.mode]
    for key in ("mode", *fixed):
        if key in saved and saved[key] != getattr(config, key):
            raise CheckpointError(
                f"{path}: saved with weight_averaging.{key} {saved[key]!r}, this run has {getattr(config, key)!r}; "
                f"write {json.dumps(saved[key])}, or resume the weights alone (load_module_only)"
            )


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and contents, in the names' order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
