"""The average as the run's one file of whole weights."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_plugin.completep.supported import gpt_of
from ds_plugin.core.errors import CheckpointError, raise_on_all_ranks
from ds_plugin.core.files import sync_folder
from ds_plugin.deepspeed_engine import compat
from megatron_patches.models.pipeline_gpt import PipelineGPT, gpt_name

if TYPE_CHECKING:
    from ds_plugin.deepspeed_engine.engine import Plugin


def export_average(plugin: "Plugin", path: Path) -> Path:
    """Publish the average as the single file ``path``, in place of what an earlier end of the run wrote there.

    Every parameter is whole under its name in the GPTModel and in the model's dtype, whatever the parallelism; every
    rank writes its share (see `Plugin.publish`). Every rank calls it.
    """
    folder = path.with_name(f".{path.stem}")
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            for left in (folder, *path.parent.glob(f".{folder.name}.*.tmp")):  # by a run that was killed as it wrote
                shutil.rmtree(left, ignore_errors=True)
    (written,) = plugin.publish(folder, max_shard_bytes=sys.maxsize)
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            try:
                if isinstance(plugin.engine.module, PipelineGPT):
                    _rename(written)
                os.replace(written, path)
                folder.rmdir()
                sync_folder(path.parent)
            except OSError as error:
                raise CheckpointError(
                    f"'{path}' cannot be written ({error}); make room, and start again with --resume to write it"
                ) from error
    return path


def parameter_sizes(model: torch.nn.Module) -> dict[str, int]:
    """Elements of every parameter of the whole model by its name in a GPTModel: no parallelism makes it smaller.

    Every rank of a pipeline calls it: what the other stages have is asked of them.
    """
    ranks = getattr(getattr(model, "config", None), "tensor_model_parallel_size", 1)
    sizes = {
        name: math.prod(compat.global_shape(p)) * (ranks if getattr(p, "tensor_model_parallel", False) else 1)
        for name, p in gpt_of(model).named_parameters()
    }
    if isinstance(model, PipelineGPT):
        stages: list[dict[str, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(stages, sizes)
        sizes = {name: size for stage in stages for name, size in stage.items()}  # a tied weight once, by its name
    return sizes


def _rename(path: Path) -> None:
    """Give the tensors of a pipeline's safetensors file the names of a GPTModel, which are the shorter ones.

    The header keeps its size, padded with spaces as the format allows, so nothing behind it moves.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps({gpt_name(name): entry for name, entry in header.items()}, separators=(",", ":")).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))
        file.flush()
        os.fsync(file.fileno())
