"""Where DeepSpeed keeps this rank's fp32 master weights, and how it refreshes the copies the model computes with. One
small class per kind of optimizer wrapper; `find_shards` picks it. The attribute names are in `compat`."""

from collections.abc import Iterable, Mapping
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


def refuse_nvme(config: Mapping[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed's (checked) JSON has the optimizer's masters in files."""
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        raise ConfigError(NVME_REFUSED)


class _Shards:
    """Masters, and the parameters they are of, in lists of lists on the optimizer; here ZeRO 1/2 and BF16_Optimizer:
    one flat partition per param group; one ordinary parameter all-gather to refresh."""

    layout = "sharded"
    needed: tuple[str, ...] = (compat.REFRESH,)

    def __init__(self, engine: Any, masters: str, parameters: str, low_precision: str | None = None):
        compat.need(engine.optimizer, masters, parameters, *filter(None, [low_precision]), *self.needed)
        self.optimizer, self.masters, self.parameters = engine.optimizer, masters, parameters
        self.models, self.names, self.low_precision = [engine.module], plain_names(engine.module), low_precision

    def tensors(self) -> list[torch.Tensor]:
        return _flat(getattr(self.optimizer, self.masters))

    def refresh(self) -> None:
        getattr(self.optimizer, compat.REFRESH)()

    def fragments(self) -> list[Fragment]:
        found = []
        for shard, p in self._parameters():
            compat.need(p, compat.FRAGMENT)
            if (link := getattr(p, compat.FRAGMENT)) is not None:  # None: all of it lies on other ranks
                here, there = link.lp_fragment_address, link.hp_fragment_address
                found.append(Fragment(self.names[id(p)], tuple(p.shape), here.start, here.numel, shard, there.start))
        return found

    def _parameters(self) -> Iterable[tuple[int, Any]]:
        """Each with the number of its group."""
        for i, group in enumerate(getattr(self.optimizer, self.parameters)):
            yield from ((i, p) for p in (group["params"] if isinstance(group, dict) else group))


class WholeShards(_Shards):
    """Stage 0: whole fp32 copies (FP16_UnfusedOptimizer, FP16_Optimizer) beside the model's parameters; in fp32 the
    parameters themselves, of which there is no ``low_precision``."""

    layout, needed = "replicated", ()

    def tensors(self) -> list[torch.Tensor]:
        return super().tensors() if self.low_precision is not None else [p.data for _, p in self._parameters()]

    def refresh(self) -> None:
        if self.low_precision is not None:
            for low, master in zip(_flat(getattr(self.optimizer, self.low_precision)), self.tensors(), strict=True):
                low.copy_(master)

    def fragments(self) -> list[Fragment]:
        found, shard, offset, sizes = [], 0, 0, [t.numel() for t in self.tensors()]
        for _, parameter in self._parameters():
            # a shard is one parameter, or a group's parameters end to end
            while parameter.numel() and offset == sizes[shard]:
                shard, offset = shard + 1, 0
            found.append((self.names[id(parameter)], parameter.shape, shard, offset))
            offset += parameter.numel()
        return whole(found)


class Zero3Shards(_Shards):
    """ZeRO 3: one flat partition per sub-group. `refresh` does what DeepSpeed's own step does after the optimizer, but
    leaves the small parameters that stay gathered to the next forward pass, so that a swap makes no collective."""

    needed = (compat.ZERO3_RELEASE, compat.ZERO3_REASSIGN, compat.ZERO3_INVALIDATE)

    def refresh(self) -> None:
        getattr(self.optimizer, compat.ZERO3_RELEASE)()
        for sub_group in range(len(self.tensors())):
            getattr(self.optimizer, compat.ZERO3_REASSIGN)(sub_group)
        getattr(self.optimizer, compat.ZERO3_INVALIDATE)()

    def fragments(self) -> list[Fragment]:
        found, ends = [], [0] * len(self.tensors())
        for shard, p in self._parameters():
            (start, count), shape = zero3_part(p), tuple(compat.global_shape(p))
            if count > 0:
                found.append(Fragment(self.names[id(p)], shape, start, count, shard, ends[shard]))
            ends[shard] += p.partition_numel()
        return found


def zero3_part(parameter: Any) -> tuple[int, int]:
    """This rank's part of a parameter under ZeRO 3: its first element and how many; the last ranks' may be padding."""
    part = parameter.partition_numel()
    start = part * getattr(parameter, compat.ZERO3_PARTITION_RANK)
    return start, max(0, min(part, parameter.ds_numel - start))


def _flat(groups: Iterable[Any]) -> list[torch.Tensor]:
    return [t.data for group in groups for t in (group if isinstance(group, (list, tuple)) else [group])]


_KINDS: dict[str, type[_Shards]] = {"zero3": Zero3Shards, "unfused": WholeShards, "fused": WholeShards}


def find_shards(engine: Any) -> MasterShards:
    """The `MasterShards` of a DeepSpeed engine. Raises ConfigError: it has no optimizer, offloads its masters to NVMe,
    or wraps its optimizer in a way not known."""
    optimizer, kind = engine.optimizer, compat.wrapper_of(engine)
    if optimizer is None:
        raise ConfigError('weight_averaging: the engine has no optimizer; give "optimizer" in the JSON or optimizer=')
    if engine.zero_nvme_offload_optimizer():
        raise ConfigError(NVME_REFUSED)
    for name in compat.UPDATES_OUTSIDE_STEP:
        if compat.is_on(engine, name):
            what = f"{name} updates the master weights outside the optimizer step, so a snapshot could be torn"
            raise ConfigError(f"weight_averaging: {what}; switch one of the two off")
    names = {known: names for known, *names in compat.WRAPPERS.values()}
    if kind in names:
        return _KINDS.get(kind, _Shards)(engine, *names[kind])
    if isinstance(optimizer, torch.optim.Optimizer):
        return WholeShards(engine, "param_groups", "param_groups")
    what = f"the optimizer wrapper {type(optimizer).__module__}.{type(optimizer).__name__} is not supported"
    raise ConfigError(f"weight_averaging: {what}; use ZeRO 0, 1, 2 or 3 with a torch or DeepSpeed optimizer")
