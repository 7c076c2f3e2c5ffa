"""Where megatron-core's optimizers keep this rank's fp32 master weights, and how the model is refreshed from them."""

import importlib.metadata
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ds_plugin.core.errors import ConfigError, StateError, raise_on_all_ranks
from ds_plugin.weight_averaging.state.fragments import Fragment, plain_name

# -- every private name of megatron-core that is used here, read in 0.16.1 and 0.19.2 ---------------------------------
CHAIN = "chained_optimizers"
STUB = "is_stub_optimizer"  # nothing to train on this rank
COPY = "_copy_main_params_to_model_params"  # masters -> the model's parameters (sharded: into this rank's part)
# lists of [group][parameter], parameters and their masters: Float16OptimizerWithFloat16Params, whole;
WHOLE = (("float16_groups", "fp32_from_float16_groups"), ("fp32_from_fp32_groups", "fp32_from_fp32_groups"))
# DistributedOptimizer, the masters of this rank's run of each: of fp32 parameters they are views
RUNS_16 = "shard_float16_groups"  # views of the 16-bit ones
SHARDED_32 = ("model_fp32_groups", "shard_fp32_groups")
SHARDED = (("model_float16_groups", "shard_fp32_from_float16_groups"), SHARDED_32)
RANGE = "_get_model_param_range_map"  # (parameter) -> {"param": Range within the parameter, ...}
PRECISION_AWARE = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"  # of its config: the masters are FusedAdam's state
# LayerWiseDistributedOptimizer: a chain whose members hold whole parameters, on each rank others
LAYER_WISE_GATHER = "allgather_params"
LAYER_WISE_BUFFER = "use_buffer_param_sync"  # later than 0.16: they are gathered in DistributedDataParallel's buffers,
LAYER_WISE_OVERLAP = "overlap_param_gather"  # or while the forward pass runs
# Transformer Engine's FusedAdam, where it holds the masters
FUSED_MASTER, FUSED_REMAINDERS = "master_param", "store_param_remainders"
FUSED_INITIALIZE = "initialize_state"  # (parameter[, store_param_remainders])
# DistributedDataParallel
BUCKET_GROUPS = ("bucket_groups", "expert_parallel_bucket_groups")
IN_FLIGHT = "param_gather_handle"  # of a bucket group: an all-gather under way, or None
SYNC = "start_param_sync"


class Master(NamedTuple):
    """A run of a parameter's elements from ``start`` on (seen flat), and the live fp32 tensor that trains it."""

    parameter: torch.nn.Parameter
    tensor: torch.Tensor
    start: int


class Part:
    """The masters of one optimizer. ``lists``: names of its lists of parameters, and of their masters; not a
    DistributedOptimizer's model_param_group_index_map, which confuses parameters of 16 and of 32 bits in a group."""

    def __init__(self, optimizer: Any, lists: Sequence[tuple[str, str]]):
        self.optimizer, self.lists = optimizer, lists
        self.cut = SHARDED_32 in lists  # its masters are runs of parameters
        self.layout = "sharded" if self.cut else "replicated"  # a layer-wise optimizer's members are sharded, too
        need(optimizer, *itertools.chain(*lists), COPY if lists else "param_groups", *([RANGE] if self.cut else []))

    def masters(self) -> Iterator[Master]:
        if not self.lists:  # FP32Optimizer: the parameters are the masters
            yield from (Master(p, p, 0) for group in self.optimizer.param_groups for p in group["params"])
        for pair in self.lists:
            for p, master in self._pairs(*pair):
                start = getattr(self.optimizer, RANGE)(p)["param"].start if self.cut else 0
                yield Master(p, master, start)

    def copy(self) -> None:
        """Write the masters into the model's parameters, sharded: into this rank's part of them."""
        if self.lists:
            getattr(self.optimizer, COPY)()

    def _pairs(self, left: str, right: str) -> Iterator[tuple[Any, Any]]:
        for group, other in zip(getattr(self.optimizer, left), getattr(self.optimizer, right), strict=True):
            yield from zip(group, other, strict=True)


class FusedPart(Part):
    """With use_precision_aware_optimizer: 16-bit parameters' masters are FusedAdam's state, and megatron-core's own
    copy does nothing. What is kept for an fp32 parameter is never updated: it is its own master, as without it."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer, ((SHARDED[0][0], RUNS_16), SHARDED_32))
        self.adam, dtype = optimizer.optimizer, optimizer.config.main_params_dtype
        if dtype is not torch.float32:
            raise ConfigError(f"weight_averaging: main_params_dtype is {dtype}; give --main-params-dtype fp32")
        if getattr(self.adam, FUSED_REMAINDERS, False):
            raise ConfigError("weight_averaging: store_param_remainders keeps half of each master; set it to False")
        need(self.adam, FUSED_INITIALIZE)
        initialize = getattr(self.adam, FUSED_INITIALIZE)
        # the first step would make the state, with these very values; the averager needs the masters before
        arguments = (False,) if FUSED_REMAINDERS in inspect.signature(initialize).parameters else ()
        for run in (run for group in self.adam.param_groups for run in group["params"] if not self.adam.state[run]):
            initialize(run, *arguments)
        for run in itertools.chain.from_iterable(getattr(optimizer, RUNS_16)):
            if FUSED_MASTER not in self.adam.state[run]:
                raise _other_layout(f"{type(self.adam).__name__}'s state has no {FUSED_MASTER!r}")

    def _pairs(self, left: str, right: str) -> Iterator[tuple[Any, Any]]:
        for p, run in super()._pairs(left, right):
            yield p, self.adam.state[run][FUSED_MASTER] if right == RUNS_16 else run

    def copy(self) -> None:
        for run in itertools.chain.from_iterable(getattr(self.optimizer, RUNS_16)):
            run.data.copy_(self.adam.state[run][FUSED_MASTER])


class MegatronShards:
    """The `MasterShards` of a megatron-core optimizer: a refresh is its copy and, where sharded, its gather."""

    def __init__(self, optimizer: Any, chunks: list[Any]):
        from megatron.core.utils import unwrap_model

        self.models = unwrap_model(chunks)
        for chunk, model in zip(chunks, self.models, strict=True):
            _refuse_chunk(getattr(chunk, "ddp_config", None), model)
        self.parts: list[Part] = []
        self._layer_wise: list[Any] = []
        self._join(optimizer)
        self.layout, *others = {part.layout for part in self.parts} or {"replicated"}
        if others:
            raise ConfigError("weight_averaging: the chain joins a DistributedOptimizer and one that is not; use one")
        in_buffers = any(getattr(each, LAYER_WISE_BUFFER, False) for each in self._layer_wise)
        self._gathered = chunks if in_buffers or any(part.cut for part in self.parts) else []
        for chunk in self._gathered:
            need(chunk, SYNC, *BUCKET_GROUPS)
        for group in self._bucket_groups():
            need(group, SYNC, IN_FLIGHT)
        self._names = _names(self.models)
        for master in self._masters():
            if id(master.parameter) not in self._names:
                strange = f"one of shape {tuple(master.parameter.shape)} that is in none of the model chunks"
                raise ConfigError(f"weight_averaging: the optimizer trains {strange}; give all of them")

    def _join(self, optimizer: Any, layer_wise: bool = False) -> None:
        """Take the members of a chain, of one in it too."""
        from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
        from megatron.core.optimizer.optimizer import ChainedOptimizer

        if type(optimizer) is LayerWiseDistributedOptimizer:
            need(optimizer, LAYER_WISE_GATHER)
            if getattr(optimizer, LAYER_WISE_OVERLAP, False) and not getattr(optimizer, LAYER_WISE_BUFFER):
                what = "overlap_param_gather is on with a layer-wise optimizer"
                raise ConfigError(f"weight_averaging: {what}; leave out --overlap-param-gather")
            self._layer_wise.append(optimizer)
            layer_wise = True
        elif type(optimizer) is not ChainedOptimizer:  # no subclass: it may keep and gather its weights in another way
            if not getattr(optimizer, STUB, False):
                self.parts.append(part := _part(optimizer))
                part.layout = "sharded" if layer_wise else part.layout
            return
        need(optimizer, CHAIN)
        for member in getattr(optimizer, CHAIN):
            self._join(member, layer_wise)

    def _masters(self) -> Iterator[Master]:
        return (master for part in self.parts for master in part.masters())

    def tensors(self) -> list[torch.Tensor]:
        masters = list(self._masters())
        if any(m.parameter.dtype is torch.float32 for m in masters):  # those lie in the very buffers that are gathered
            self._finish_gathers()
        return [m.tensor.data for m in masters]

    def refresh(self) -> None:
        self._finish_gathers()
        for part in self.parts:
            part.copy()
        for chunk in self._gathered:
            getattr(chunk, SYNC)(force_sync=True)
        for optimizer in self._layer_wise:
            if not getattr(optimizer, LAYER_WISE_BUFFER, False):
                getattr(optimizer, LAYER_WISE_GATHER)()

    def _bucket_groups(self) -> Iterator[Any]:
        return (group for chunk in self._gathered for groups in BUCKET_GROUPS for group in getattr(chunk, groups))

    def _finish_gathers(self) -> None:
        """Wait for all-gathers under way (overlap_param_gather), which carry the weights of before: a sync that is
        asked for meanwhile would wait for them and gather nothing."""
        for group in self._bucket_groups():
            if getattr(group, IN_FLIGHT) is not None:
                getattr(group, SYNC)(force_sync=True)

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(self._names[id(p)], tuple(p.shape), start, tensor.numel(), shard, 0)
            for shard, (p, tensor, start) in enumerate(self._masters())
        ]


def find_megatron_shards(optimizer: Any, model_chunks: Sequence[Any]) -> MegatronShards:
    """The `MasterShards` of an optimizer that `get_megatron_optimizer` made for these ``model_chunks``, in this order,
    each in its DistributedDataParallel wrapper. Every rank calls it, before training. Raises, on every rank alike,
    ConfigError: the optimizer keeps no fp32 masters in device memory; StateError: it does so in an unknown way."""
    with raise_on_all_ranks():
        return MegatronShards(optimizer, list(model_chunks))


def _part(optimizer: Any) -> Part:
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    kinds = {FP32Optimizer: (), Float16OptimizerWithFloat16Params: WHOLE, DistributedOptimizer: SHARDED}
    if (lists := kinds.get(type(optimizer))) is None:
        known = ", ".join(k.__name__ for k in kinds)
        raise ConfigError(f"weight_averaging: {type(optimizer).__name__} is not supported; use one of {known}")
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        raise ConfigError("weight_averaging: masters must not lie on two devices; leave out --optimizer-cpu-offload")
    if lists is SHARDED:
        need(optimizer.config, PRECISION_AWARE)
        if getattr(optimizer.config, PRECISION_AWARE):
            return FusedPart(optimizer)
    return Part(optimizer, lists)


def _refuse_chunk(ddp_config: Any, model: torch.nn.Module) -> None:
    if getattr(ddp_config, "use_megatron_fsdp", False):
        raise ConfigError("weight_averaging: use_megatron_fsdp is on; use the distributed optimizer in its place")
    if (instances := getattr(ddp_config, "num_distributed_optimizer_instances", 1)) != 1:
        raise ConfigError(f"weight_averaging: num_distributed_optimizer_instances is {instances}; set it to 1")
    for name, p in model.named_parameters():
        if type(p.data) is not torch.Tensor:  # of which an exchange could not bring back the bits
            kind = type(p.data).__name__
            raise ConfigError(f"weight_averaging: parameter {name!r} is a {kind}; leave out FSDP2, fp8, fp4 gather")


def _names(models: Sequence[torch.nn.Module]) -> dict[int, str]:
    """A parameter's id -> its name, unique on all ranks of one tensor- and pipeline-parallel rank: it begins with the
    chunk where there are several (virtual pipeline stages), and with the rank where that has experts of its own."""
    from megatron.core import parallel_state as at

    found = {}
    for chunk, model in enumerate(models):
        prefix = f"model{chunk}." if len(models) > 1 else ""
        for name, p in model.named_parameters():
            found[id(p)] = prefix + plain_name(name)
            if not getattr(p, "allreduce", True):  # megatron-core's own mark of an expert
                size, dense = at.get_expert_tensor_parallel_world_size(), at.get_tensor_model_parallel_world_size()
                if size != dense:
                    raise ConfigError(f"weight_averaging: expert_tensor_parallel_size is {size}; make it {dense}")
                if at.get_expert_model_parallel_world_size() > 1:
                    found[id(p)] = f"expert_rank{at.get_expert_model_parallel_rank()}.{found[id(p)]}"
    return found


def need(owner: Any, *names: str) -> None:
    """Raise StateError if an object or a module of megatron-core's lacks an attribute."""
    for name in names:
        if not hasattr(owner, name):
            raise _other_layout(f"{getattr(owner, '__name__', type(owner).__name__)} has no attribute {name!r}")


def _other_layout(what: str) -> StateError:
    return StateError(
        f"megatron-core {importlib.metadata.version('megatron-core')}: {what}, which is needed; use a tested version"
    )
