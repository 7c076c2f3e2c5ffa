"""Everything private this package touches in DeepSpeed (read in 0.19.8), named once and probed before training: `need`
raises one clear error when a name is missing, so that a new DeepSpeed fails at start and not in the middle of a run."""

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ds_plugin.core.errors import StateError, this_rank
from ds_plugin.core.patch import Patch, replaced

ZERO3_MASTERS = "fp32_partitioned_groups_flat"
#: by the class that wraps an optimizer (for bf16 those of FP16 too): its kind; where it keeps this rank's fp32 masters;
#: the parameters they are of, [group][parameter]; in stage 0 the low-precision copies beside them
WRAPPERS = {
    "DeepSpeedZeroOptimizer_Stage3": ("zero3", ZERO3_MASTERS, "fp16_groups"),  # flat, of sub-groups
    "DeepSpeedZeroOptimizer": ("zero12", "single_partition_of_fp32_groups", "bit16_groups"),  # flat partitions
    "BF16_Optimizer": ("bf16", "fp32_groups_flat_partition", "bf16_groups"),  # flat partitions
    "FP16_UnfusedOptimizer": ("unfused", "fp32_groups", "fp16_groups", "fp16_groups"),  # whole tensors
    "FP16_Optimizer": ("fused", "fp32_groups_flat", "fp16_groups", "fp16_groups_flat"),  # one flat tensor per group
}
FRAGMENT = "_hp_mapping"  # of a parameter, ZeRO 1/2 and BF16_Optimizer: its part in this rank's partition, or None
ZERO3_PARTITION_RANK = "ds_zero_partition_rank"  # of a parameter: which of its parts this rank holds
REFRESH = "update_lp_params"  # the low-precision copies from them, ZeRO 1/2 and BF16_Optimizer; the next three: ZeRO 3
ZERO3_RELEASE = "_partition_all_parameters"  # drop gathered parameters, or they would keep their old values
ZERO3_REASSIGN = "_reassign_or_swap_out_partitioned_parameters"  # per sub-group: masters -> low-precision partition
ZERO3_INVALIDATE = "invalidate_secondary_tensor"  # ZeRO++ secondary shards
OPTIMIZER_STATE = "state"  # of a wrapper: forwards the wrapped optimizer's, keyed by its flat or whole parameters
ADAM_VARIANCE = "exp_avg_sq"  # torch's Adam(W), FusedAdam, DeepSpeedCPUAdam
ZERO3_SECOND_OPTIMIZER = "backup_optimizer"  # with an offload ratio below 1: steps the sub-groups left on the device
ZERO3_PART = "ds_tensor"  # of a parameter: this rank's part of it, flat, the last ones padded
ZERO3_QUANTIZED = "ds_quant_scale"  # of that part, where weights that are not trained are kept quantized

# -- the gradient norm that clipping uses ----------------------------------------------------------------------------
ZERO12_NORM = "get_grad_norm_direct"  # (gradients, params): once for each param group
ZERO12_OFFLOAD_NORM = "complete_grad_norm_calculation_for_cpu_offload"  # (params): the same with optimizer offload
ZERO12_NORM_PARAMS = "params_in_partition"  # the very lists that are given to them as params
ZERO12_PADDING = "_zero_padding"  # on a gradient: it stands for no parameter
ZERO3_NORMS = "_get_norm_groups"  # (): one norm for each sub-group, with and without offload
ZERO3_GROUP_OF_SUB_GROUP = "sub_group_to_group_id"
BF16_NORM_GRADIENTS = "get_grads_for_norm"  # (for_clipping): the tensors whose norm is taken, or that are clipped
BF16_GRADIENTS = "fp32_groups_gradients"  # [group][parameter], the same tensors
FP32_CLIP = "clip_fp32_gradients"  # of the engine, stage 0 in fp32: takes the norm of the parameters' own gradients

# -- its Muon ----------------------------------------------------------------------------------------------------------
MUON_GROUPS = "_muon_param_groups"  # static, of the engine's class: (groups, the JSON's settings) -> Muon's and Adam's
USE_MUON = "use_muon"  # of a group and of a parameter: which of the two
NORM_OF_UPDATES = ("zero12", "zero3")  # wrappers that take the gradient norm of Muon's updates, and clip those

# -- the engine's passes and steps -------------------------------------------------------------------------------------
MODULE_HOOKS = ("module_forward_pre_hook", "module_forward_post_hook")  # the handles of its own hooks on its module
BACKWARD_PROLOGUE = "_backward_prologue"  # (), from a hook on its outputs: before any gradient of the module, however
SCALE = "scale"  # (loss): what a user calls before `loss.backward()` in fp16
TAKE_STEP = "_take_model_step"  # a pipeline's too: before clipping, once for each accumulation step
UPDATES_OUTSIDE_STEP = ("zenflow", "super_offload")  # settings (attribute, method) under which masters change elsewhere

# -- the pipeline engine ---------------------------------------------------------------------------------------------
PIPELINE_BATCHES = ("batch_fn", "data_iterator")  # what each micro-batch goes through, where it is read
PIPELINE_RUN = "_exec_schedule"  # (schedule): one stage's part of a step
PIPELINE_INSTRUCTIONS = "_INSTRUCTION_MAP"  # which method is called for each instruction of a schedule
PIPELINE_BUFFERS = "pipe_buffers"  # name -> one slot for each micro-batch in flight
PIPELINE_MICRO_OFFSET = "micro_offset"  # of the module: micro-batches so far, of which layers' seeds are made
PIPELINE_COMPUTE_LOSS = "_compute_loss"
PIPELINE_LOSSES = "fwd_outputs"  # of the schedule that ran last: each micro-batch's loss; empty but on the last stage
PIPELINE_RANK = ("get_pipeline_model_parallel_rank", "get_pipe_parallel_rank")  # of an mpu: the first that it has
EXPERT_RANK = ("_get_expert_parallel_rank", "_get_max_expert_size_name")  # of deepspeed.utils.groups
EXPERT_COPIES = "_get_expert_data_parallel_world_size"  # of the same
EXPERT_GROUP = "group_name"  # of an expert's parameter, for these
PIPELINE_TIED = "tied_modules."  # how the names of what several stages have begin; all others name their layer


def muon_groups_as_given(params: Any) -> contextlib.AbstractContextManager[None]:
    """In the block DeepSpeed's Muon trains groups that say ``use_muon`` as they are. DeepSpeed itself goes by the
    parameters' names, of which it knows an output layer by few; and it drops what it does not know of a group."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    if not any(USE_MUON in group for group in params or ()):
        return contextlib.nullcontext()
    need(DeepSpeedEngine, MUON_GROUPS)

    def groups(given: Any, settings: Any) -> list[dict[str, Any]]:
        for group in given:
            for parameter in group["params"]:
                setattr(parameter, USE_MUON, group[USE_MUON])
        return list(given)

    return replaced(DeepSpeedEngine, MUON_GROUPS, staticmethod(groups))


def before_steps(engine: Any, call: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """In the block, ``call()`` comes before each optimizer step, which does not begin if it raises."""
    own = getattr(engine, TAKE_STEP)

    def take_step(*args: Any, **kwargs: Any) -> Any:
        call()
        return own(*args, **kwargs)

    return replaced(engine, TAKE_STEP, take_step)


def is_on(engine: Any, name: str) -> bool:
    """Whether a setting is on that this DeepSpeed may not know: an attribute or method of the engine."""
    value = getattr(engine, name, False)
    return bool(value() if callable(value) else value)


def need(owner: Any, *names: str) -> None:
    """Raise `StateError` naming the first attribute that ``owner`` lacks: this DeepSpeed is not laid out as known."""
    for name in names:
        if not hasattr(owner, name):
            what = f"{type(owner).__name__} has no attribute {name!r}, which this package needs (read in 0.19.8)"
            version = importlib.metadata.version("deepspeed")
            raise StateError(f"deepspeed {version}: {what}; install a tested version of DeepSpeed")


def is_engine(thing: Any) -> bool:
    """Whether ``thing`` is a DeepSpeed engine, of a pipeline or not."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    return isinstance(thing, DeepSpeedEngine)


def is_pipeline(engine: Any) -> bool:
    """Whether ``engine`` is DeepSpeed's pipeline engine, whose step is `train_batch`."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    return isinstance(engine, PipelineEngine)


def wrapper_of(engine: Any) -> str:
    """What steps the optimizer, of `WRAPPERS`; ``none`` where it steps itself or there is none, else ``other``."""
    names = [cls.__name__ for cls in type(engine.optimizer).__mro__]
    other = "none" if engine.optimizer is engine.basic_optimizer else "other"
    return next((WRAPPERS[name][0] for name in names if name in WRAPPERS), other)


def has_experts(engine: Any) -> bool:
    """Whether the model has layers of deepspeed.moe, of which ranks that share all else may hold different ones."""
    need(engine, "has_moe_layers")
    return bool(engine.has_moe_layers)


def ranks_of_experts(engine: Any) -> dict[int, int]:
    """By the `id` of what the optimizer has in its param groups, on how many ranks an expert's lies, without ZeRO."""
    from deepspeed.utils import groups

    need(groups, EXPERT_COPIES)
    found: dict[int, int] = {}
    for group in engine.optimizer.param_groups if has_experts(engine) else []:
        for parameter in group["params"]:
            # 16 bits have flat masters, by groups; in fp32 experts may share a group with all else
            name = group["name"] if group.get("moe") else getattr(parameter, EXPERT_GROUP, None)
            if name is not None:
                found[id(parameter)] = int(getattr(groups, EXPERT_COPIES)(name))
    return found


def global_shape(parameter: torch.nn.Parameter) -> list[int]:
    """The shape of a parameter before ZeRO-3 partitioned it."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def sequence_parallel_size(engine: Any) -> int:
    """Over how many ranks DeepSpeed cuts each sample (Ulysses); 1 without sequence parallelism."""
    need(engine, "seq_dp_world_size", "dp_world_size")
    return int(engine.seq_dp_world_size) // int(engine.dp_world_size)


# -- what DeepSpeed compiles when communication starts on a CPU: half a minute, a C++ compiler, and a lock -------------
_WHY = "the kernel serves inference only; compiling it needs a C++ compiler"
_INFERENCE_KERNEL = Patch("deepspeed.comm.torch.build_shm_op", lambda: None, reason=_WHY, prefixes=("deepspeed",))


def skip_inference_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPUs, and from waiting for the lock that a killed
    compile leaves, for ever: for scripts that start communication before `ds_plugin.initialize`, which does this
    itself. ``megatron_patches.active()`` shows it, ``megatron_patches.revert()`` undoes it."""
    _INFERENCE_KERNEL.apply()


# -- passes that are no step of the run -----------------------------------------------------------------------------
BOUNDARY = "_is_gradient_accumulation_boundary"  # of the engine: whether this micro-batch is a step's last; None: count
_MICRO_BATCHES = "_unmanaged_backward_count"  # of the engine, where the caller says when to step
_ZERO12_SKIP = ("check_grad_overflow", "check_overflow", "_update_scale")  # by which a step is found to overflow
_ZERO3_SKIP = "_overflow_clean_up"  # (loss scale): what is done then
_ZERO3_GRADIENTS = "grad_partitions_flat_buffer"  # without a new gradient a part keeps the old one
_ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")  # other Adams keep less (8 bits), or more (1-bit's errors)
_MARKS = ("overflow", "_global_grad_norm")  # what a step leaves on a wrapper


@contextlib.contextmanager
def plain_backward(engine: Any) -> Iterator[None]:
    """``engine.backward`` is the class's own in the block, with nothing around it that takes it for a step's."""
    with contextlib.ExitStack() as stack:
        for name in ("backward", BACKWARD_PROLOGUE):
            stack.enter_context(replaced(engine, name, functools.partial(getattr(type(engine), name), engine)))
        yield


@contextlib.contextmanager
def dropped_gradients(engine: Any) -> Iterator[None]:
    """The gradients that backward passes in the block leave are let go of, as in a step that the engine skips."""
    marks = [(engine, _MICRO_BATCHES), *((engine.optimizer, name) for name in _MARKS)]
    kept = [(owner, name, vars(owner)[name]) for owner, name in marks if name in vars(owner)]
    try:
        yield
        _drop_gradients(engine)
    except BaseException:
        with contextlib.suppress(Exception):  # the error that is under way says more
            engine.module.zero_grad()
        raise
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def _drop_gradients(engine: Any) -> None:
    """Let go of all that has been accumulated, through DeepSpeed's own ways for a step that overflows."""
    optimizer, kind = engine.optimizer, wrapper_of(engine)
    if kind == "zero3":
        need(optimizer, _ZERO3_SKIP, _ZERO3_GRADIENTS, ZERO3_MASTERS)
        getattr(optimizer, _ZERO3_SKIP)(optimizer.loss_scale)
        getattr(optimizer, _ZERO3_GRADIENTS).zero_()
    elif kind == "zero12":
        need(optimizer, *_ZERO12_SKIP)
        ways = (True, lambda **_: setattr(optimizer, "overflow", True), lambda *_: None)
        with contextlib.ExitStack() as stack:
            for name, value in zip(_ZERO12_SKIP, ways, strict=True):
                stack.enter_context(replaced(optimizer, name, value))
            optimizer.step()
    else:
        (engine.module if kind == "none" else optimizer).zero_grad()
    held = [master for group in engine.basic_optimizer.param_groups for master in group["params"]]
    for master in getattr(optimizer, ZERO3_MASTERS, held):  # no group has those of ZeRO 3 between two steps
        if master.grad is not None:  # where gradients are offloaded to, they stay between two steps
            master.grad.zero_()


def kept_by(optimizer: Any) -> int | None:
    """How many tensors an optimizer keeps for each master, of its size and dtype; None: it is not known."""
    settings = {**getattr(optimizer, "defaults", {}), **(optimizer.param_groups[0] if optimizer.param_groups else {})}
    if type(optimizer).__name__ in _ADAMS:
        return 3 if settings.get("amsgrad") else 2
    return int(bool(settings.get("momentum"))) if isinstance(optimizer, torch.optim.SGD) else None


def model_coordinate(engine: Any) -> tuple[int, ...]:
    """Tensor-parallel rank and pipeline stage, 0 without; with experts the expert-parallel rank as a third. Ranks of
    one coordinate hold the same weights, whole or in parts; others may hold others under the same names."""
    from deepspeed.utils import bwc, groups

    stage = next((getattr(engine.mpu, name)() for name in PIPELINE_RANK if hasattr(engine.mpu, name)), 0)
    coordinate = (int(bwc.bwc_tensor_model_parallel_rank(engine.mpu)), int(stage))
    if not has_experts(engine):
        return coordinate
    need(groups, *EXPERT_RANK)
    rank_of, largest = (getattr(groups, name) for name in EXPERT_RANK)
    return (*coordinate, int(rank_of(largest())))


def run_steps(engine: Any) -> int | None:
    """Optimizer steps of the whole run, as the JSON's learning-rate scheduler is told; None where it is told none."""
    steps = (engine.scheduler_params() or {}).get("total_num_steps")
    return int(steps) if isinstance(steps, (int, float)) and steps > 0 else None  # JSON's 1e5 is a float


def is_first_at(engine: Any) -> bool:
    """Whether this rank writes what a checkpoint's folder holds once: rank 0; with local storage one on each node."""
    return bool((engine.local_rank if engine.use_node_local_storage() else this_rank()) == 0)


def tensor_parallel_size(engine: Any) -> int:
    """Over how many ranks the model's layers are cut."""
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

    return int(bwc_tensor_model_parallel_world_size(engine.mpu))
