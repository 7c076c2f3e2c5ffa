"""Run megatron-core on a machine without a GPU, over gloo: for tests and small experiments, not for speed.

megatron-core writes "cuda" where it means "my device". `enable()` turns those places into the CPU: a torch function
mode rewrites devices in tensor calls, and patches replace the parts of `torch.cuda` that training reaches.
One generator serves both the CPU and the "CUDA" random stream: use dropout 0 when two runs must draw the same numbers
in spite of different draws on the CPU (a resumed run, another data order).
"""

import contextlib
import importlib
import itertools
import logging
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from ds_plugin.core.errors import ConfigError, PluginError, StateError, raise_on_all_ranks
from ds_plugin.core.patch import Change, Patch, replaced

# Private names of torch and megatron, here only. `_lazy_call` queues a callback until CUDA is initialised, that is for
# ever on such a machine; megatron's tracker sets generator states through it: a fork would silently do nothing.
_LAZY_CALL: dict[str, Any] = {"_lazy_call": lambda callback, **_: callback()}
_RUN_BACKWARD = "torch.autograd.graph._engine_run_backward"
_MODE_STACK = ("_pop_mode", "_push_mode", "_get_current_function_mode_stack")
_GRAPH_HEALTH_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
_TRACKER = logging.getLogger("megatron.core.tensor_parallel.random")
_TRACKER_WARNING = "CPU RNG state changed"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_LAYER_WISE = "megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer"
_ROUTER, _KERNEL = "megatron.core.transformer.moe.moe_utils", "te_general_gemm"
_TORCH_NORM = "megatron.core.transformer.torch_norm.WrappedTorchNorm"
_SPLITS = {"output_split_sizes", "input_split_sizes"}
_LATENT, _HAS_TE, _TE_LINEAR = "megatron.core.transformer.multi_latent_attention", "HAVE_TE", "TELinear"
_ATTENTION = "megatron.core.transformer.dot_product_attention.DotProductAttention"
_OF_VALUES = "hidden_size_per_partition"  # of an attention: what it returns for a token
_CPU = torch.device("cpu")
_without_te = contextlib.ExitStack()  # takes back what `_know_no_te` has set


def enable(*, pretend_cuda: bool = False) -> None:
    """Make megatron-core run on the CPU in this process; again is a no-op. ``pretend_cuda``: also answer "yes, one
    GPU", as Megatron-LM's own scripts demand; not under DeepSpeed, whose detection would be fooled. Raises ConfigError
    when there is a usable GPU; PluginError, with nothing changed, when a symbol is missing that has to be replaced."""
    if not enabled() and torch.cuda.is_available():
        count = torch.cuda.device_count()
        raise ConfigError(f'megatron_on_cpu.enable(): {count} GPU(s) found; remove it, or set CUDA_VISIBLE_DEVICES=""')
    try:
        for change in [*_CHANGES, *(_PRETEND if pretend_cuda else ()), *_MEGATRON.values()]:
            change.apply()
    except PluginError:
        disable()
        raise


def disable() -> None:
    """Undo `enable`, newest change first."""
    for change in reversed([*_CHANGES, *_PRETEND, *_MEGATRON.values()]):
        change.revert()


def enabled() -> bool:
    """Whether a GPU is pretended in this process now."""
    return _CHANGES[0].applied


def on_cpu() -> bool:
    """Whether a model lies in CPU memory: there is no GPU, or one is pretended."""
    return enabled() or not torch.cuda.is_available()


def check_replicas(model: nn.Module) -> int:
    """Prove that parameters which tensor parallelism does not cut (norms, position embeddings) are bitwise equal across
    the group, on GPUs too, by one all-reduce of each; partitions of ZeRO-3 are gathered one at a time. Every rank of
    the job calls it. Returns how many were compared. Raises StateError on every rank of the job, with one message."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        raise StateError("check_replicas needs megatron's process groups; call gpt.initialize_parallel first")
    group = parallel_state.get_tensor_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return 0
    remedy = f"on tensor-parallel ranks {ranks}; check the seeds, the random number tracker and mpu=DeepSpeedMPU()"
    replicas = [(n, p) for n, p in model.named_parameters() if not getattr(p, "tensor_model_parallel", False)]
    layouts: list[Any] = [None] * len(ranks)
    mine = [(name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype)) for name, p in replicas]
    dist.all_gather_object(layouts, mine, group=group)
    # ZeRO-3 gathers run across groups: one whose layouts differ must not leave the others waiting in the comparison
    with raise_on_all_ranks():
        if off := next((each for each in itertools.zip_longest(*layouts) if len(set(each)) > 1), None):
            raise StateError(f"the replicated parameters are not the same, {off}, {remedy}")
    drifted = [name for name, parameter in replicas if not _same_bytes(parameter, group)]
    with raise_on_all_ranks():
        if drifted:
            raise StateError(f"parameter {drifted[0]!r} is not bitwise identical {remedy}")
    return len(replicas)


def _same_bytes(parameter: nn.Parameter, group: Any) -> bool:
    whole: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters([parameter])
    with whole:
        data = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
        # max(b) and max(255 - b) are complements exactly where every rank holds the same byte.
        both = torch.stack((data, 255 - data))
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        return bool((both[0] == 255 - both[1]).all())


class _CudaToCpu(TorchFunctionMode):
    """Rewrites "cuda" to "cpu" in every tensor call of the thread that entered it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _to_cpu(kwargs["device"])}
        for name in _SPLITS & kwargs.keys():  # of an exchange; megatron makes them numbers where it copies off a GPU
            if torch.is_tensor(kwargs[name]):
                kwargs = {**kwargs, name: kwargs[name].tolist()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _to_cpu(args[1]), *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # by this string megatron sorts parameters
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _to_cpu(device: Any) -> Any:
    if isinstance(device, torch.device | str):
        return _CPU if str(device).split(":")[0] == "cuda" else device
    return _CPU if isinstance(device, int) and not isinstance(device, bool) else device


_mode = _CudaToCpu()


def _enter_mode() -> None:
    for name in _MODE_STACK:
        if not hasattr(torch.overrides, name):
            raise PluginError(f"torch {torch.__version__} has no torch.overrides.{name}; use a tested torch version")
    _mode.__enter__()


def _leave_mode() -> None:
    pop, push, stack = (getattr(torch.overrides, name) for name in _MODE_STACK)
    if _mode not in stack():
        raise StateError("megatron_on_cpu.disable() must run on the thread that called enable()")
    above = []
    while (top := pop()) is not _mode:
        above.append(top)
    for mode in reversed(above):
        push(mode)


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    # torch turns a mode off in a call of Tensor's, as backward is: layers recomputed in it would see "cuda" again
    with contextlib.nullcontext() if _mode in getattr(torch.overrides, _MODE_STACK[2])() else _mode:
        return _backward_patch.original(*args, **kwargs)


def _quiet_fork(record: logging.LogRecord) -> bool:
    return _TRACKER_WARNING not in record.getMessage()


def _always(value: Any) -> Any:  # a new function, as `Patch` wants one of its own
    return lambda *args, **kwargs: value


class _Event:
    """A CUDA event that has always happened, or a stream whose work is always done."""

    __init__ = record = wait = synchronize = wait_stream = wait_event = _always(None)
    query, elapsed_time = _always(True), _always(0.0)

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Stream(_Event): ...


def _has_torch_adam(optimizer: Any) -> bool:  # megatron's choice without Transformer Engine and apex
    return isinstance(optimizer.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _optimizer_state_dict(self: Any) -> Any:
    """megatron reads the step count off the state, which torch's Adam only creates in its first step."""
    if _has_torch_adam(self):
        for p in (p for group in self.optimizer.param_groups for p in group["params"] if not self.optimizer.state[p]):
            zeros = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
    return _MEGATRON["state_dict"].original(self)


def _load_optimizer_state_dict(self: Any, state_dict: Any) -> None:
    """megatron gives all parameters one tensor for their step count, which each of them would advance."""
    _MEGATRON["load_state_dict"].original(self, state_dict)
    if _has_torch_adam(self):
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


@torch.no_grad()  # megatron copies into views of parameters that require gradients
def _set_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
    """The step count is part of torch's state, but not of most checkpoint formats; it has been set already."""
    if _has_torch_adam(self):
        group, position = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][position]]
        tensors = {**tensors, "step": state["step"]}
    _MEGATRON["_set_main_param_and_optimizer_states"].original(self, model_param, tensors)


def _know_no_te() -> None:
    """Without TransformerEngine some versions leave the name of its matrix product undefined that a router looks at,
    and take it to be there in latent attention, where its names are mocks."""
    router, latent = importlib.import_module(_ROUTER), importlib.import_module(_LATENT)
    if not hasattr(router, _KERNEL):
        _without_te.enter_context(replaced(router, _KERNEL, None))
    if not isinstance(getattr(latent, _TE_LINEAR, None), type):
        _without_te.enter_context(replaced(latent, _HAS_TE, False))


def _init_attention(self: Any, *args: Any, k_channels: Any = None, v_channels: int | None = None, **kw: Any) -> None:
    """megatron's own attention computes with heads of any size, and only TransformerEngine's is told them."""
    _MEGATRON["__init__"].original(self, *args, **kw)
    if v_channels is not None:
        setattr(self, _OF_VALUES, v_channels * self.num_attention_heads_per_partition)


def _norm(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """megatron refuses torch's norms under sequence parallelism, which asks of them only that their gradients are added
    up over the ranks; so their parameters are marked, as those of other norms are."""
    with replaced(config, "sequence_parallel", False):
        norm = _MEGATRON["__new__"].original(cls, config, *args, **kwargs)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def _cuda(prefixes: tuple[str, ...] = ("torch.cuda", "megatron"), **replacements: Any) -> list[Change]:
    reason = "run megatron-core on the CPU"
    return [Patch(f"torch.cuda.{name}", new, reason=reason, prefixes=prefixes) for name, new in replacements.items()]


_backward_patch = Patch(
    _RUN_BACKWARD, _run_backward, reason="keep the function mode in the backward pass", prefixes=("torch.autograd",)
)

_CHANGES: list[Change] = [
    Change("torch function mode", _enter_mode, _leave_mode, reason='send device "cuda" to the CPU'),
    _backward_patch,
    Change(
        "megatron's random number tracker's log",
        lambda: _TRACKER.addFilter(_quiet_fork),
        lambda: _TRACKER.removeFilter(_quiet_fork),
        reason="the CPU stream is the one that the tracker forks",
    ),
    *_cuda(
        **_LAZY_CALL,
        **{name: _always(None) for name in ("synchronize", "set_device", "empty_cache", "set_stream")},
        **{name: _always(_Stream()) for name in ("current_stream", "default_stream")},
        manual_seed=lambda seed: torch.default_generator.manual_seed(int(seed)),
        manual_seed_all=lambda seed: torch.default_generator.manual_seed(int(seed)),
        current_device=_always(_CPU),
        Stream=_Stream,
        Event=_Event,
        stream=lambda stream: contextlib.nullcontext(),
        default_generators=defaultdict(lambda: torch.default_generator),
        get_rng_state=lambda device=None: torch.default_generator.get_state(),
        set_rng_state=lambda new_state, device=None: torch.default_generator.set_state(new_state),
    ),
    # torch's own classes: copies are left alone, because reverting would rebind every name for torch.FloatTensor.
    *_cuda((), FloatTensor=torch.FloatTensor, IntTensor=torch.IntTensor, LongTensor=torch.LongTensor),
]

_SIZE = {"total_memory": 1 << 30, "multi_processor_count": 1}
_PRETEND: list[Change] = [
    *_cuda(
        is_available=_always(True),
        device_count=_always(1),
        get_device_properties=_always(SimpleNamespace(name="cpu", major=0, minor=0, **_SIZE)),
        get_device_capability=_always((0, 0)),
    ),
    Patch("torch.Tensor.pin_memory", lambda tensor, device=None: tensor, reason="there is no pinned memory"),
    # a torch that was built with CUDA asks torch.cuda, and then the driver for the device
    Patch("torch.accelerator.is_available", _always(False), reason="loaders' processes pin memory where there is one"),
    *(
        Patch(f"torch.optim.Optimizer.{name}", _always(None), reason="it asks CUDA once is_available() says yes")
        for name in _GRAPH_HEALTH_CHECKS
        if hasattr(torch.optim.Optimizer, name)
    ),
]

# The last: applying them imports megatron, as on a CPU. By their methods' names.
_ADAM = "resume with torch's Adam"
_MEGATRON: dict[str, Any] = {
    target.rpartition(".")[2]: Patch(target, mended, reason=reason)
    for target, mended, reason in (
        (f"{_OPTIMIZER}.state_dict", _optimizer_state_dict, _ADAM),
        (f"{_OPTIMIZER}.load_state_dict", _load_optimizer_state_dict, _ADAM),
        (f"{_OPTIMIZER}._set_main_param_and_optimizer_states", _set_optimizer_states, _ADAM),
        (f"{_TORCH_NORM}.__new__", staticmethod(_norm), "norms under sequence parallelism"),
        (f"{_LAYER_WISE}.allgather_params", lambda self: self.broadcast_params(), "gloo gathers equal parts only"),
        (f"{_ATTENTION}.__init__", _init_attention, "latent attention"),
    )
}
_MEGATRON["te"] = Change(
    "megatron's view of TransformerEngine", _know_no_te, _without_te.close, reason="it is not there on the CPU"
)
