"""Where DeepSpeed keeps this rank's fp32 master weights, and how it refreshes the copies the model computes with.

One small class per optimizer wrapper; `find_shards` picks it. The attribute names are in `ds_plugin.compat`.
"""

from typing import Any, Protocol

import torch

from ds_plugin import compat
from ds_plugin.errors import ConfigError


class MasterShards(Protocol):
    """What the averager needs of a host.

    ``layout`` says how the weights are divided: ``"replicated"`` (every data-parallel rank holds all) or ``"sharded"``.
    """

    layout: str

    def tensors(self) -> list[torch.Tensor]:
        """This rank's fp32 masters, the live tensors (never copies), in a fixed order; some may be empty."""

    def refresh(self) -> None:
        """Make the model compute with the masters' present values. May hold collectives: every rank calls it."""


class PlainShards:
    """Stage 0 in fp32: the parameters are the masters."""

    layout = "replicated"

    def __init__(self, optimizer: Any):
        compat.need(optimizer, "param_groups")
        self.optimizer = optimizer

    def tensors(self) -> list[torch.Tensor]:
        return [p.data for group in self.optimizer.param_groups for p in group["params"]]

    def refresh(self) -> None:
        pass


class Stage0Shards:
    """Stage 0 in 16 bits: whole fp32 copies (FP16_UnfusedOptimizer, FP16_Optimizer) beside the model's parameters."""

    layout = "replicated"

    def __init__(self, optimizer: Any, masters: str, low_precision: str):
        compat.need(optimizer, masters, low_precision)
        self.optimizer, self.masters, self.low_precision = optimizer, masters, low_precision

    def _flat(self, name: str) -> list[torch.Tensor]:
        groups = getattr(self.optimizer, name)
        return [t.data for group in groups for t in (group if isinstance(group, (list, tuple)) else [group])]

    def tensors(self) -> list[torch.Tensor]:
        return self._flat(self.masters)

    def refresh(self) -> None:
        for low, master in zip(self._flat(self.low_precision), self.tensors(), strict=True):
            low.copy_(master)


class PartitionedShards:
    """ZeRO 1/2 and BF16_Optimizer: one flat partition per param group; one ordinary parameter all-gather to refresh."""

    layout = "sharded"

    def __init__(self, optimizer: Any, masters: str):
        compat.need(optimizer, masters, compat.REFRESH)
        self.optimizer, self.masters = optimizer, masters

    def tensors(self) -> list[torch.Tensor]:
        return [t.data for t in getattr(self.optimizer, self.masters)]

    def refresh(self) -> None:
        getattr(self.optimizer, compat.REFRESH)()


class Zero3Shards:
    """ZeRO 3: one flat partition per sub-group; parameters are gathered by the forward pass itself.

    `refresh` does what the host's own step does after the optimizer, small persistent parameters included.
    """

    layout = "sharded"

    def __init__(self, optimizer: Any):
        compat.need(optimizer, compat.ZERO3_MASTERS, compat.ZERO3_RELEASE, compat.ZERO3_REASSIGN)
        compat.need(optimizer, compat.ZERO3_PERSISTENT, compat.ZERO3_INVALIDATE)
        self.optimizer = optimizer

    def tensors(self) -> list[torch.Tensor]:
        return [t.data for t in getattr(self.optimizer, compat.ZERO3_MASTERS)]

    def refresh(self) -> None:
        getattr(self.optimizer, compat.ZERO3_RELEASE)()
        for sub_group in range(len(self.tensors())):
            getattr(self.optimizer, compat.ZERO3_REASSIGN)(sub_group)
        persistent = getattr(self.optimizer, compat.ZERO3_PERSISTENT)
        if persistent:
            persistent[0].all_gather(persistent)
        getattr(self.optimizer, compat.ZERO3_INVALIDATE)()


def find_shards(engine: Any) -> MasterShards:
    """The `MasterShards` of a DeepSpeed engine.

    Raises:
        ConfigError: the engine has no optimizer, offloads its masters to NVMe, or wraps its optimizer in a way not
            known.
    """
    optimizer = engine.optimizer
    if optimizer is None:
        raise ConfigError('weight_averaging: the engine has no optimizer; give "optimizer" in the JSON or optimizer=')
    if compat.is_nvme_offloaded(engine):
        raise ConfigError(
            "weight_averaging: zero_optimization.offload_optimizer.device is 'nvme', whose master weights are not in "
            "memory; write 'cpu' or 'none'"
        )
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

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Zero3Shards(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return PartitionedShards(optimizer, compat.ZERO12_MASTERS)
    if isinstance(optimizer, BF16_Optimizer):
        return PartitionedShards(optimizer, compat.BF16_MASTERS)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return Stage0Shards(optimizer, compat.UNFUSED_MASTERS, compat.UNFUSED_LOW_PRECISION)
    if isinstance(optimizer, FP16_Optimizer):
        return Stage0Shards(optimizer, compat.FUSED_MASTERS, compat.FUSED_LOW_PRECISION)
    if isinstance(optimizer, torch.optim.Optimizer):
        return PlainShards(optimizer)
    raise ConfigError(
        f"weight_averaging: the optimizer wrapper {type(optimizer).__module__}.{type(optimizer).__name__} is not "
        "supported; use ZeRO 0, 1, 2 or 3 with a torch or DeepSpeed optimizer"
    )
