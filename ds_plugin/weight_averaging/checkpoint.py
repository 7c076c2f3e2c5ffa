"""The averaging window on disk: one safetensors file per rank, beside the host's checkpoint. Never a pickle."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ds_plugin.atomic import atomic_write
from ds_plugin.errors import CheckpointError
from ds_plugin.weight_averaging.averager import WeightAverager, as_tensors

FORMAT = "1"


def shard_name(rank: int) -> str:
    """File name of one rank's window; must not end as DeepSpeed's own files do, which its tools glob for."""
    return f"weight_averaging_rank_{rank:05d}.safetensors"


def save(folder: Path, averager: WeightAverager, *, rank: int, world_size: int, save_id: str) -> None:
    """Write this rank's window into the checkpoint folder, atomically. ``save_id`` marks the files of one save."""
    metadata = {
        "format": FORMAT,
        "rank": str(rank),
        "world_size": str(world_size),
        "save_id": save_id,
        "steps": json.dumps(averager.steps),
        "tensors": str(len(averager.shards.tensors())),
    }
    tensors = dict(as_tensors(averager))
    atomic_write(folder / shard_name(rank), lambda path: save_file(tensors, path, metadata=metadata))


def load(folder: Path, averager: WeightAverager, *, rank: int, world_size: int, save_id: str) -> None:
    """Read this rank's window back.

    Raises:
        CheckpointError: the file is missing, unreadable, or belongs to another rank, layout or save.
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
            steps, count = json.loads(found["steps"]), int(found["tensors"])
            snapshots = [[file.get_tensor(f"snapshot.{i}.{j}") for j in range(count)] for i in range(len(steps))]
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"weight_averaging: {path} is damaged ({error}); {remedy}") from None
    if count != len(averager.shards.tensors()):
        raise CheckpointError(
            f"weight_averaging: {path} holds {count} shards per snapshot, this optimizer has "
            f"{len(averager.shards.tensors())}; resume with the settings it was saved with"
        )
    averager.load(steps, snapshots)
