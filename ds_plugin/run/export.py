"""The average as the run's one file of whole weights."""

import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_plugin.atomic import sync_folder
from ds_plugin.errors import together

if TYPE_CHECKING:
    from ds_plugin.engine import Plugin


def export_average(plugin: "Plugin", path: Path) -> Path:
    """Publish the average as the single file ``path``, in place of what an earlier end of the run wrote there.

    Every parameter is whole under its name in the model and in the model's dtype, whatever the parallelism; every rank
    writes its share (see `Plugin.publish`). Every rank calls it.
    """
    folder = path.with_name(f".{path.stem}")
    with together():
        if dist.get_rank() == 0:
            for left in (folder, *path.parent.glob(f".{folder.name}.*.tmp")):  # by a run that was killed as it wrote
                shutil.rmtree(left, ignore_errors=True)
    (written,) = plugin.publish(folder, max_shard_bytes=sys.maxsize)
    with together():
        if dist.get_rank() == 0:
            os.replace(written, path)
            folder.rmdir()
            sync_folder(path.parent)
    return path


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of the whole model: neither ZeRO 3 nor tensor parallelism makes it smaller."""
    size = getattr(getattr(model, "config", None), "tensor_model_parallel_size", 1)
    return sum(
        math.prod(getattr(p, "ds_shape", p.shape)) * (size if getattr(p, "tensor_model_parallel", False) else 1)
        for p in model.parameters()
    )
