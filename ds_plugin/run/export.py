"""Write the weights the engine computes with now as safetensors: one file per tensor-parallel rank."""

import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ds_plugin.atomic import atomic_write
from ds_plugin.errors import together


def export_weights(engine: Any, path: Path) -> list[Path]:
    """Write every parameter under its name in the model, in the model's dtype; returns the files of all ranks.

    Without tensor parallelism the file is ``path``; with it, ``<stem>-tp<rank>-of-<size><suffix>``, each rank's
    shard of the sharded parameters. Under ZeRO 3 one parameter is gathered at a time. Every rank calls it.
    """
    mpu = engine.mpu
    rank, size = (mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()) if mpu else (0, 1)
    names = [path if size == 1 else path.with_name(f"{path.stem}-tp{r}-of-{size}{path.suffix}") for r in range(size)]
    writes = (mpu.get_data_parallel_rank() if mpu else dist.get_rank()) == 0
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned):
            if writes:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    with together():
        if writes:
            metadata = {"format": "pt", "tensor_parallel_rank": str(rank), "tensor_parallel_size": str(size)}
            atomic_write(names[rank], lambda p: save_file(tensors, p, metadata=metadata))
    return names


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of the whole model: neither ZeRO 3 nor tensor parallelism makes it smaller."""
    size = getattr(getattr(model, "config", None), "tensor_model_parallel_size", 1)
    return sum(
        math.prod(getattr(p, "ds_shape", p.shape)) * (size if getattr(p, "tensor_model_parallel", False) else 1)
        for p in model.parameters()
    )
