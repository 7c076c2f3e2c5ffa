"""Where DeepSpeed keeps this rank's fp32 master weights, and how it refreshes the copies the model computes with.

One small class per optimizer wrapper; `find_shards` picks it. The attribute names are in `compat`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.deepspeed_engine import compat
from ds_plugin.weight_averaging.averager import MasterShards
from ds_plugin.weight_averaging.state.fragments import Fragment, plain_names, whole

NVME_REFUSED = (
    "weight_averaging: zero_optimization.offload_optimizer.device is 'nvme', whose master weights are not in memory; "
    "write 'cpu' or 'none'"
)

Names = Mapping[int, str]  # a parameter's id -> its name in the model


def refuse_nvme(config: Mapping[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed's JSON has the optimizer's masters in files, before anything is built by it."""
    zero = config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    if isinstance(offload, Mapping) and offload.get("device") == "nvme":
        raise ConfigError(NVME_REFUSED)


class _Shards:
    """Of a DeepSpeed engine; `find_shards` names the model."""

    models: Sequence[torch.nn.Module] = ()


class PlainShards(_Shards):
    """Stage 0 in fp32: the parameters are the masters."""

    layout = "replicated"

    def __init__(self, optimizer: Any, names: Names):
        compat.need(optimizer, "param_groups")
        self.optimizer, self.names = optimizer, names

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def tensors(self) -> list[torch.Tensor]:
        return [p.data for p in self._parameters()]

    def refresh(self) -> None:
        pass

    def fragments(self) -> list[Fragment]:
        return whole((self.names[id(p)], p.shape, shard, 0) for shard, p in enumerate(self._parameters()))


class Stage0Shards(_Shards):
    """Stage 0 in 16 bits: whole fp32 copies (FP16_UnfusedOptimizer, FP16_Optimizer) beside the model's parameters."""

    layout = "replicated"

    def __init__(self, optimizer: Any, masters: str, low_precision: str, names: Names):
        compat.need(optimizer, masters, low_precision, compat.STAGE0_PARAMETERS)
        self.optimizer, self.masters, self.low_precision = optimizer, masters, low_precision
        self.names = names

    def _flat(self, name: str) -> list[torch.Tensor]:
        groups = getattr(self.optimizer, name)
        return [t.data for group in groups for t in (group if isinstance(group, (list, tuple)) else [group])]

    def tensors(self) -> list[torch.Tensor]:
        return self._flat(self.masters)

    def refresh(self) -> None:
        for low, master in zip(self._flat(self.low_precision), self.tensors(), strict=True):
            low.copy_(master)

    def fragments(self) -> list[Fragment]:
        groups = getattr(self.optimizer, compat.STAGE0_PARAMETERS)
        found, shard, offset, sizes = [], 0, 0, [t.numel() for t in self.tensors()]
        for parameter in (p for group in groups for p in group):
            if offset == sizes[shard]:  # a shard is one parameter, or a group's parameters end to end
                shard, offset = shard + 1, 0
            found.append((self.names[id(parameter)], parameter.shape, shard, offset))
            offset += parameter.numel()
        return whole(found)


class PartitionedShards(_Shards):
    """ZeRO 1/2 and BF16_Optimizer: one flat partition per param group; one ordinary parameter all-gather to refresh."""

    layout = "sharded"

    def __init__(self, optimizer: Any, masters: str, parameters: str, names: Names):
        compat.need(optimizer, masters, parameters, compat.REFRESH)
        self.optimizer, self.masters, self.parameters, self.names = optimizer, masters, parameters, names

    def tensors(self) -> list[torch.Tensor]:
        return [t.data for t in getattr(self.optimizer, self.masters)]

    def refresh(self) -> None:
        getattr(self.optimizer, compat.REFRESH)()

    def fragments(self) -> list[Fragment]:
        found = []
        for shard, group in enumerate(getattr(self.optimizer, self.parameters)):
            for p in group:
                compat.need(p, compat.FRAGMENT)
                if (link := getattr(p, compat.FRAGMENT)) is not None:  # None: all of it lies on other ranks
                    here, there = link.lp_fragment_address, link.hp_fragment_address
                    found.append(
                        Fragment(self.names[id(p)], tuple(p.shape), here.start, here.numel, shard, there.start)
                    )
        return found


class Zero3Shards(_Shards):
    """ZeRO 3: one flat partition per sub-group; parameters are gathered by the forward pass itself.

    `refresh` does what the host's own step does after the optimizer, but for one thing: the small parameters that stay
    gathered are left to the next forward pass, which gathers what is not there; so a swap makes no collective.
    """

    layout = "sharded"

    def __init__(self, optimizer: Any, names: Names):
        compat.need(optimizer, compat.ZERO3_MASTERS, compat.ZERO3_RELEASE, compat.ZERO3_REASSIGN)
        compat.need(optimizer, compat.ZERO3_INVALIDATE, compat.ZERO3_SUB_GROUPS)
        self.optimizer, self.names = optimizer, names

    def tensors(self) -> list[torch.Tensor]:
        return [t.data for t in getattr(self.optimizer, compat.ZERO3_MASTERS)]

    def refresh(self) -> None:
        getattr(self.optimizer, compat.ZERO3_RELEASE)()
        for sub_group in range(len(self.tensors())):
            getattr(self.optimizer, compat.ZERO3_REASSIGN)(sub_group)
        getattr(self.optimizer, compat.ZERO3_INVALIDATE)()

    def fragments(self) -> list[Fragment]:
        found = []
        for shard, group in enumerate(getattr(self.optimizer, compat.ZERO3_SUB_GROUPS)):
            offset = 0
            for p in group:
                part, shape = p.partition_numel(), tuple(compat.global_shape(p))
                start = part * getattr(p, compat.ZERO3_PARTITION_RANK)
                count = min(part, p.ds_numel - start)  # the last ranks' parts are padded, or padding altogether
                if count > 0:
                    found.append(Fragment(self.names[id(p)], shape, start, count, shard, offset))
                offset += part
        return found


def find_shards(engine: Any) -> MasterShards:
    """The `MasterShards` of a DeepSpeed engine.

    Raises:
        ConfigError: the engine has no optimizer, offloads its masters to NVMe, or wraps its optimizer in a way not
            known.
    """
    shards = _shards_of(engine)
    shards.models = [engine.module]
    return shards


def _shards_of(engine: Any) -> PlainShards | Stage0Shards | PartitionedShards | Zero3Shards:
    optimizer = engine.optimizer
    if optimizer is None:
        raise ConfigError('weight_averaging: the engine has no optimizer; give "optimizer" in the JSON or optimizer=')
    if compat.is_nvme_offloaded(engine):
        raise ConfigError(NVME_REFUSED)
    for name in compat.UPDATES_OUTSIDE_STEP:
        if compat.is_on(engine, name):
            raise ConfigError(
                f"weight_averaging: {name} updates the master weights outside the optimizer step, so a snapshot could "
                "be torn; switch one of the two off"
            )
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    names = plain_names(engine.module)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Zero3Shards(optimizer, names)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return PartitionedShards(optimizer, compat.ZERO12_MASTERS, compat.ZERO12_PARAMETERS, names)
    if isinstance(optimizer, BF16_Optimizer):
        return PartitionedShards(optimizer, compat.BF16_MASTERS, compat.BF16_PARAMETERS, names)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return Stage0Shards(optimizer, compat.UNFUSED_MASTERS, compat.UNFUSED_LOW_PRECISION, names)
    if isinstance(optimizer, FP16_Optimizer):
        return Stage0Shards(optimizer, compat.FUSED_MASTERS, compat.FUSED_LOW_PRECISION, names)
    if isinstance(optimizer, torch.optim.Optimizer):
        return PlainShards(optimizer, names)
    raise ConfigError(
        f"weight_averaging: the optimizer wrapper {type(optimizer).__module__}.{type(optimizer).__name__} is not "
        "supported; use ZeRO 0, 1, 2 or 3 with a torch or DeepSpeed optimizer"
    )
