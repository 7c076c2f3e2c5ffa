"""Where megatron-core's own optimizers keep this rank's fp32 master weights, and how the model is refreshed from them.

`find_megatron_shards` picks, for each optimizer of a chain, the function below that knows its kind.
"""

import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ds_plugin.core.errors import ConfigError, StateError, raise_on_all_ranks
from ds_plugin.weight_averaging.state.fragments import Fragment, plain_name

# -- every private name of megatron-core that is used here, read in 0.16.1 and 0.19.2 ---------------------------------
CHAIN = "chained_optimizers"
STUB = "is_stub_optimizer"  # nothing to train on this rank
COPY = "_copy_main_params_to_model_params"  # masters -> the model's parameters (sharded: into this rank's part)
# Float16OptimizerWithFloat16Params, whole tensors: [group][parameter]; 16-bit parameters beside their masters
WHOLE_16, WHOLE_MASTERS, WHOLE_32 = "float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups"
# DistributedOptimizer, [group][parameter]: whole parameters, this rank's run of each, and the masters of those runs
SHARDED_16, SHARDED_32 = "model_float16_groups", "model_fp32_groups"
RUNS_16, RUNS_32 = "shard_float16_groups", "shard_fp32_groups"  # views of the parameters; the fp32 ones are masters
SHARDED_MASTERS = "shard_fp32_from_float16_groups"
RANGE = "_get_model_param_range_map"  # (parameter) -> {"param": Range within the parameter, ...}
PRECISION_AWARE = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"  # of its config: the masters are FusedAdam's state
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


class Part(NamedTuple):
    """One optimizer's masters as they are now, and what writes them into the model's parameters, as `COPY` does."""

    layout: str
    masters: Callable[[], Iterator[Master]]
    copy: Callable[[], object]


def _fp32(optimizer: Any) -> Part:
    """FP32Optimizer: the parameters are the masters."""
    need(optimizer, "param_groups")

    def masters() -> Iterator[Master]:
        return (Master(p, p, 0) for group in optimizer.param_groups for p in group["params"])

    return Part("replicated", masters, lambda: None)


def _float16(optimizer: Any) -> Part:
    """Float16OptimizerWithFloat16Params: whole fp32 copies beside 16-bit parameters; fp32 ones are their own."""
    need(optimizer, COPY, WHOLE_16, WHOLE_MASTERS, WHOLE_32)

    def masters() -> Iterator[Master]:
        for left, right in ((WHOLE_16, WHOLE_MASTERS), (WHOLE_32, WHOLE_32)):
            yield from (Master(p, master, 0) for p, master in _pairs(optimizer, left, right))

    return Part("replicated", masters, getattr(optimizer, COPY))


def _sharded(optimizer: Any) -> Part:
    """DistributedOptimizer: this rank's runs of the parameters that megatron-core's bucket layout cuts for it.

    Found by its lists, not by its model_param_group_index_map: where a group holds parameters of 16 and of 32 bits,
    that one confuses them.
    """
    need(optimizer, COPY, RANGE, SHARDED_16, SHARDED_32, RUNS_16, RUNS_32, SHARDED_MASTERS)
    need(optimizer.config, PRECISION_AWARE)
    fused, copy = getattr(optimizer.config, PRECISION_AWARE), getattr(optimizer, COPY)
    if fused:
        _prepare_fused(optimizer)

    def masters_16() -> Iterator[tuple[Any, torch.Tensor]]:
        if not fused:
            return _pairs(optimizer, SHARDED_16, SHARDED_MASTERS)
        state = optimizer.optimizer.state
        return ((p, state[run][FUSED_MASTER]) for p, run in _pairs(optimizer, SHARDED_16, RUNS_16))

    def masters() -> Iterator[Master]:
        for pairs in (masters_16(), _pairs(optimizer, SHARDED_32, RUNS_32)):
            for p, master in pairs:
                yield Master(p, master, getattr(optimizer, RANGE)(p)["param"].start)

    def copy_fused() -> None:  # FusedAdam writes the parameters itself in its step; megatron-core's copy does nothing
        for _, run in _pairs(optimizer, SHARDED_16, RUNS_16):
            run.data.copy_(optimizer.optimizer.state[run][FUSED_MASTER])

    return Part("sharded", masters, copy_fused if fused else copy)


def _prepare_fused(optimizer: Any) -> None:
    """use_precision_aware_optimizer: the masters of 16-bit parameters are FusedAdam's state, made here if need be.

    What it keeps under that name for an fp32 parameter is never updated: that one is its own master, as ever.
    """
    adam, dtype = optimizer.optimizer, optimizer.config.main_params_dtype
    if dtype is not torch.float32:
        raise ConfigError(f"weight_averaging: main_params_dtype is {dtype}; give --main-params-dtype fp32")
    if getattr(adam, FUSED_REMAINDERS, False):
        raise ConfigError(
            "weight_averaging: store_param_remainders keeps only the low 16 bits of each master; set it to False"
        )
    need(adam, FUSED_INITIALIZE)
    initialize = getattr(adam, FUSED_INITIALIZE)
    # The first step would make the state, with these very values; the averager needs the masters before.
    arguments = (False,) if FUSED_REMAINDERS in inspect.signature(initialize).parameters else ()
    for run in (run for group in adam.param_groups for run in group["params"] if not adam.state[run]):
        initialize(run, *arguments)
    for _, run in _pairs(optimizer, SHARDED_16, RUNS_16):
        if FUSED_MASTER not in adam.state[run]:
            raise _other_layout(f"{type(adam).__name__}'s state has no {FUSED_MASTER!r}")


def _pairs(optimizer: Any, left: str, right: str) -> Iterator[tuple[Any, Any]]:
    """Two lists of [group][parameter] side by side."""
    for group, other in zip(getattr(optimizer, left), getattr(optimizer, right), strict=True):
        yield from zip(group, other, strict=True)


class MegatronShards:
    """The `MasterShards` of a megatron-core optimizer. Made by `find_megatron_shards`.

    ``models``: the chunks without their wrappers. A refresh is megatron-core's copy from the masters and, where a
    DistributedOptimizer shards them, one `start_param_sync` of each chunk: the parameter all-gather of one step.
    """

    def __init__(self, optimizer: Any, chunks: list[Any]):
        from megatron.core.optimizer.optimizer import ChainedOptimizer
        from megatron.core.utils import unwrap_model

        self.models = unwrap_model(chunks)
        for chunk, model in zip(chunks, self.models, strict=True):
            _refuse_chunk(getattr(chunk, "ddp_config", None), model)
        # By the exact type: a subclass (LayerWiseDistributedOptimizer) may keep and gather its weights in another way.
        if chained := type(optimizer) is ChainedOptimizer:
            need(optimizer, CHAIN)
        members = getattr(optimizer, CHAIN) if chained else [optimizer]
        self.parts = [_part(member) for member in members if not getattr(member, STUB, False)]
        self.layout, *others = {part.layout for part in self.parts} or {"replicated"}
        if others:
            raise ConfigError(
                "weight_averaging: the ChainedOptimizer joins a DistributedOptimizer and one that is not; use one kind"
            )
        self._gathered = chunks if self.layout == "sharded" else []
        for chunk in self._gathered:
            need(chunk, SYNC, *BUCKET_GROUPS)
        for group in self._bucket_groups():
            need(group, SYNC, IN_FLIGHT)
        self._names = _names(self.models)
        if strange := [tuple(m.parameter.shape) for m in self._masters() if id(m.parameter) not in self._names]:
            raise ConfigError(
                f"weight_averaging: the optimizer trains a parameter of shape {strange[0]} that is in none of the "
                "model chunks; give all that it was made for"
            )

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

    def _bucket_groups(self) -> Iterator[Any]:
        return (group for chunk in self._gathered for groups in BUCKET_GROUPS for group in getattr(chunk, groups))

    def _finish_gathers(self) -> None:
        """Wait for all-gathers under way (overlap_param_gather), which carry the weights of before: a sync that is
        asked for meanwhile would wait for them and gather nothing. As a rule there is none between two steps."""
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
    each in its DistributedDataParallel wrapper. Every rank calls it, before training.

    Raises, on every rank alike:
        ConfigError: the optimizer is of another kind, or keeps no fp32 masters in this process's device memory.
        StateError: this megatron-core lays out its optimizers in another way than the tested ones.
    """
    with raise_on_all_ranks():
        return MegatronShards(optimizer, list(model_chunks))


def _part(optimizer: Any) -> Part:
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    kinds = {FP32Optimizer: _fp32, Float16OptimizerWithFloat16Params: _float16, DistributedOptimizer: _sharded}
    if (kind := kinds.get(type(optimizer))) is None:
        raise ConfigError(
            f"weight_averaging: {type(optimizer).__module__}.{type(optimizer).__name__} is not supported; use one of "
            f"{', '.join(k.__name__ for k in kinds)}, or a ChainedOptimizer of them"
        )
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        raise ConfigError(
            "weight_averaging: with optimizer_cpu_offload masters lie on two devices; leave out --optimizer-cpu-offload"
        )
    return kind(optimizer)


def _refuse_chunk(ddp_config: Any, model: torch.nn.Module) -> None:
    if getattr(ddp_config, "use_megatron_fsdp", False):
        raise ConfigError("weight_averaging: use_megatron_fsdp is on; use the distributed optimizer in its place")
    if (instances := getattr(ddp_config, "num_distributed_optimizer_instances", 1)) != 1:
        raise ConfigError(
            f"weight_averaging: num_distributed_optimizer_instances is {instances}, which is not tested; set it to 1"
        )
    for name, p in model.named_parameters():
        if type(p.data) is not torch.Tensor:  # of which an exchange could not bring back the bits
            raise ConfigError(
                f"weight_averaging: parameter {name!r} is a {type(p.data).__name__}, no plain tensor; leave out "
                "fp8_param_gather, fp4_param_gather and torch's FSDP2"
            )


def _names(models: Sequence[torch.nn.Module]) -> dict[int, str]:
    """A parameter's id -> its name, unique on all ranks of one tensor- and pipeline-parallel rank: it begins with the
    chunk where there are several (virtual pipeline stages), and with the rank where that has experts of its own."""
    found = {}
    for chunk, model in enumerate(models):
        prefix = f"model{chunk}." if len(models) > 1 else ""
        for name, p in model.named_parameters():
            expert = "" if getattr(p, "allreduce", True) else _expert_prefix()  # megatron-core's own mark
            found[id(p)] = expert + prefix + plain_name(name)
    return found


def _expert_prefix() -> str:
    from megatron.core import parallel_state

    experts = parallel_state.get_expert_tensor_parallel_world_size()
    if experts != (dense := parallel_state.get_tensor_model_parallel_world_size()):
        raise ConfigError(
            f"weight_averaging: expert_tensor_parallel_size is {experts}; write tensor_model_parallel_size, {dense}"
        )
    alone = parallel_state.get_expert_model_parallel_world_size() == 1
    return "" if alone else f"expert_rank{parallel_state.get_expert_model_parallel_rank()}."


def need(owner: Any, *names: str) -> None:
    """Raise StateError if an object or a module of megatron-core's lacks an attribute."""
    for name in names:
        if not hasattr(owner, name):
            raise _other_layout(f"{getattr(owner, '__name__', type(owner).__name__)} has no attribute {name!r}")


def _other_layout(what: str) -> StateError:
    return StateError(
        f"megatron-core {importlib.metadata.version('megatron-core')}: {what}, which is needed; use a tested version"
    )
