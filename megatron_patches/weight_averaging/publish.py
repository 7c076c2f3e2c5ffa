"""Publish the average from a megatron-core run: an ordinary torch_dist checkpoint of the model, for any TP and PP."""

import contextlib
import os
import queue
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_plugin.core.errors import CheckpointError, StateError, raise_on_all_ranks
from ds_plugin.core.files import sync_folder
from ds_plugin.core.patch import replaced
from ds_plugin.weight_averaging.averager import WeightAverager
from megatron_patches.weight_averaging.masters import MegatronShards, need

# Private in megatron-core's writer, read in 0.16.1 and 0.19.2: where the queue for a save's results is kept.
RESULTS_QUEUE = "_results_queue"


def publish_torch_dist(
    folder: Path | str, averager: WeightAverager, model_chunks: Sequence[Any], horizon: int | None = None
) -> Path:
    """Write the average as a torch_dist checkpoint into ``folder``, in the precision of the model's parameters.

    Every rank calls it, between two optimizer steps, with the same folder on storage that all see. The folder has its
    name only when it is complete and on disk. It holds ``model`` (``model0``, ... with virtual pipeline stages),
    megatron-core's own sharded state dict, for any parallelism; ``weight_averaging``, the steps that were averaged;
    ``iteration``, the latest of them; ``checkpoint_version`` 3.0. ``horizon``: which of the averages, in mode ema.
    Raises StateError as `WeightAverager.read`, and for another model's averager; CheckpointError: the folder exists, or
    cannot be written."""
    from megatron.core.utils import unwrap_model

    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    with raise_on_all_ranks(), _writing(partial):
        models, shards = unwrap_model(list(model_chunks)), averager.shards
        if not isinstance(shards, MegatronShards) or [id(m) for m in models] != [id(m) for m in shards.models]:
            raise StateError("weight_averaging: the averager is not that of these model chunks; give its own")
        if dist.get_rank() == 0:
            if folder.exists():
                raise CheckpointError(f"weight_averaging: {folder} exists; publish to another one, or remove it")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    try:
        with averager.averaged_weights(horizon), _writing(partial):
            _save(models, averager, horizon, partial)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    with raise_on_all_ranks(), _writing(folder):
        if dist.get_rank() == 0:  # after a crash there is all of it, or nothing of that name
            for path in [*partial.iterdir(), partial]:
                sync_folder(path)  # files as well
            os.rename(partial, folder)
            sync_folder(folder.parent)
    return folder


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"weight_averaging: {folder} cannot be written ({error}); make room there") from error


def _save(models: list[Any], averager: WeightAverager, horizon: int | None, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    steps = list(averager.steps)
    state: dict[str, Any] = {name: model.sharded_state_dict() for name, model in zip(names, models, strict=True)}
    state["weight_averaging"] = {"mode": averager.config.mode, "steps": steps, "horizon": horizon}
    state["iteration"], state["checkpoint_version"] = steps[-1], 3.0
    need(filesystem_async, RESULTS_QUEUE)
    # This save is synchronous: its results can stay here. megatron-core's own queue is of a server process that imports
    # the main script again: one without ``if __name__ == "__main__"`` would never come back.
    with replaced(filesystem_async, RESULTS_QUEUE, queue.Queue()):
        dist_checkpointing.save(state, str(folder))
