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
from ds_plugin.weight_averaging.averager import WeightAverager
from megatron_patches.weight_averaging.masters import MegatronShards

# Private in megatron-core's writer, read in 0.16.1 and 0.19.2: where the queue for a save's results is kept.
RESULTS_QUEUE = "_results_queue"


def publish_torch_dist(
    folder: Path | str, averager: WeightAverager, model_chunks: Sequence[Any], horizon: int | None = None
) -> Path:
    """Write the average as a torch_dist checkpoint into ``folder``, in the precision of the model's parameters.

    Every rank calls it, between two optimizer steps, with the same folder on storage that all see. The average is
    swapped in for the time of the save, and out again: training goes on bit for bit as without it. It appears under
    its name only when it is complete and on disk; what an interrupted attempt left, ``.<name>.partial``, is replaced.

    Contents: ``model`` (``model0``, ``model1``, ... with virtual pipeline stages), the host's own sharded state dict,
    which `dist_checkpointing.load` reads at any tensor- and pipeline-parallel size; ``weight_averaging``, the steps
    that were averaged; ``iteration``, the latest of them; ``checkpoint_version`` 3.0. No optimizer state.

    horizon: which of the averages, in mode ema.

    Returns the folder.

    Raises:
        StateError: there is no snapshot yet, no such horizon, the average is already swapped in, or the averager is
            another model's.
        CheckpointError: the folder exists, or cannot be written.

    Whatever is raised, the training weights are back.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    with raise_on_all_ranks():
        models = _models_of(averager, model_chunks)
        if dist.get_rank() == 0:
            _make(folder, partial)
    try:
        with averager.averaged_weights(horizon):
            _save(models, averager, horizon, partial)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            _put_in_place(partial, folder)
    return folder


def _models_of(averager: WeightAverager, model_chunks: Sequence[Any]) -> list[Any]:
    from megatron.core.utils import unwrap_model

    models = unwrap_model(list(model_chunks))
    shards = averager.shards
    if not isinstance(shards, MegatronShards) or [id(m) for m in models] != [id(m) for m in shards.models]:
        raise StateError(
            "weight_averaging: the averager is not that of these model chunks; give publish_torch_dist the chunks that "
            "find_megatron_shards was given"
        )
    return models


def _save(models: list[Any], averager: WeightAverager, horizon: int | None, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException

    names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    steps = list(averager.steps)
    state: dict[str, Any] = {name: model.sharded_state_dict() for name, model in zip(names, models, strict=True)}
    state["weight_averaging"] = {"mode": averager.config.mode, "steps": steps, "horizon": horizon}
    state["iteration"], state["checkpoint_version"] = steps[-1], 3.0
    with _results_in_this_process():
        try:
            dist_checkpointing.save(state, str(folder))
        except (OSError, CheckpointException) as error:
            raise CheckpointError(
                f"weight_averaging: the average cannot be written into {folder} ({error}); make room, or publish it to "
                "another folder"
            ) from error


@contextlib.contextmanager
def _results_in_this_process() -> Iterator[None]:
    """Have a save hand its results over in this process's memory.

    The host makes a queue for them that other processes can reach, which its asynchronous saves need. That starts a
    server process which imports the main script again, so a script without ``if __name__ == "__main__"`` never comes
    back. This save is synchronous: the results are put and taken by the same thread.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not hasattr(filesystem_async, RESULTS_QUEUE):
        raise StateError(
            f"megatron-core: {filesystem_async.__name__} has no {RESULTS_QUEUE!r} (read in 0.16.1 and 0.19.2); install "
            "a megatron-core version from this package's tested range"
        )
    before = getattr(filesystem_async, RESULTS_QUEUE)
    setattr(filesystem_async, RESULTS_QUEUE, queue.Queue())
    try:
        yield
    finally:
        setattr(filesystem_async, RESULTS_QUEUE, before)


def _make(folder: Path, partial: Path) -> None:
    if folder.exists():
        raise CheckpointError(
            f"weight_averaging: {folder} exists; publish the average to another folder, or remove that one"
        )
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"weight_averaging: cannot make {partial} ({error}); give a folder to write to") from None


def _put_in_place(partial: Path, folder: Path) -> None:
    """Flush every file, then give the folder its name; after a crash there is all of it, or nothing of that name."""
    try:
        for path in partial.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(partial)
        os.rename(partial, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"weight_averaging: {partial} could not be put in place as {folder} ({error}); rename it by hand, it is "
            "complete"
        ) from None
