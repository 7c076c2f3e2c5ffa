"""Run megatron-core on a machine without a GPU, over gloo.

megatron-core writes "cuda" where it means "my device". `enable()` turns those places into the CPU: a torch function
mode rewrites devices in tensor calls, and patches replace the parts of `torch.cuda` that training reaches. Nothing here
is for speed; it exists so that tests and small experiments run megatron-core's real code.

One generator serves both the CPU and the "CUDA" random stream. The random number tracker forks and restores it like the
real one, but a draw on the CPU also advances the other stream: use dropout 0 when two runs must draw the same numbers
in spite of different draws on the CPU (a resumed run, another data order).
"""

import contextlib
import importlib.abc
import importlib.machinery
import itertools
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from ds_plugin.core.errors import ConfigError, PluginError, StateError, raise_on_all_ranks
from ds_plugin.core.patch import Change, Patch, Switch

# Private names of torch and megatron, here only. `_lazy_call` queues a callback until CUDA is initialised, that is for
# ever on such a machine; megatron's tracker sets generator states through it, so a fork would silently do nothing.
_LAZY_CALL = "torch.cuda._lazy_call"
_RUN_BACKWARD = "torch.autograd.graph._engine_run_backward"
_MODE_STACK = ("_pop_mode", "_push_mode", "_get_current_function_mode_stack")
_GRAPH_HEALTH_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
_TRACKER_LOGGER = "megatron.core.tensor_parallel.random"
_TRACKER_WARNING = "CPU RNG state changed"
_OPTIMIZER_MODULE = "megatron.core.optimizer.distrib_optimizer"

_CPU = torch.device("cpu")
_COPIES = ("torch.cuda", "megatron")


def enable(*, pretend_cuda: bool = False) -> None:
    """Make megatron-core run on the CPU in this process, whether or not it has been imported; again is a no-op.

    pretend_cuda: also answer "yes, one GPU" to `torch.cuda.is_available()` and `device_count()`, as Megatron-LM's own
        scripts demand. Under DeepSpeed leave it False: its accelerator detection would be fooled.

    Raises ConfigError when the machine has a usable GPU, and PluginError, leaving nothing changed, when torch lacks a
    symbol that has to be replaced.
    """
    if not enabled() and torch.cuda.is_available():
        raise ConfigError(
            f"megatron_on_cpu.enable() was called on a machine with {torch.cuda.device_count()} CUDA device(s); "
            'remove the call to train on them, or set CUDA_VISIBLE_DEVICES="" to run on the CPU'
        )
    try:
        for change in _CHANGES + (_PRETEND if pretend_cuda else []):
            change.apply()
    except PluginError:
        disable()
        raise


def disable() -> None:
    """Put everything back; when it is not enabled, do nothing."""
    for change in reversed(_CHANGES + _PRETEND):
        change.revert()


def enabled() -> bool:
    """Whether `enable()` is in force."""
    return _CHANGES[0].applied


def check_replicas(model: nn.Module) -> int:
    """Prove that parameters which tensor parallelism does not cut are bitwise equal across the tensor-parallel group.

    Compares every parameter whose attribute `tensor_model_parallel` is false or absent (norms, position embeddings,
    biases added after a reduction) with one all-reduce of its bytes, twice its size; partitions of ZeRO-3 are gathered
    one at a time. Collective, over every rank of the job, on GPUs too.

    Returns the number of parameters compared, 0 when tensor_parallel is 1. Raises StateError on every rank of the job,
    with the same message, naming the first parameter that differs on any tensor-parallel group.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        raise StateError("check_replicas needs megatron's process groups; call gpt.initialize_parallel first")
    group = parallel_state.get_tensor_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return 0
    replicas = [(n, p) for n, p in model.named_parameters() if not getattr(p, "tensor_model_parallel", False)]
    layout = [(name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype)) for name, p in replicas]
    layouts: list[Any] = [None] * len(ranks)
    dist.all_gather_object(layouts, layout, group=group)
    # A group whose layouts differ must not start comparing, and the others must not wait for it below (ZeRO-3 gathers
    # run across groups): agree before and after.
    with raise_on_all_ranks():
        if off := next((each for each in itertools.zip_longest(*layouts) if each.count(each[0]) < len(each)), None):
            raise StateError(f"tensor-parallel ranks {ranks} hold different replicated parameters, {off}; {_REMEDY}")
    drifted = [name for name, parameter in replicas if not _same_bytes(parameter, group)]
    with raise_on_all_ranks():
        if drifted:
            raise StateError(
                f"parameter {drifted[0]!r} is not bitwise identical on tensor-parallel ranks {ranks}; {_REMEDY}"
            )
    return len(replicas)


_REMEDY = (
    "ranks of one group must draw the same numbers outside tensor-parallel regions and reduce the same gradients "
    "(check the seeds, the random number tracker and mpu=DeepSpeedMPU())"
)


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
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _to_cpu(args[1]), *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron's optimizers sort parameters by this string and accept only "torch.cuda.*Tensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _to_cpu(device: Any) -> Any:
    """The CPU for whatever names a CUDA device (a device, a string, an index); anything else unchanged."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.split(":")[0] == "cuda" else device
    return _CPU if isinstance(device, int) and not isinstance(device, bool) else device


_mode = _CudaToCpu()


def _enter_mode() -> None:
    for name in _MODE_STACK:
        if not hasattr(torch.overrides, name):
            raise PluginError(f"torch {torch.__version__} has no torch.overrides.{name}; use a tested torch version")
    _mode.__enter__()


def _leave_mode() -> None:
    """Remove our mode from this thread's stack, keeping modes that others entered after it."""
    pop, push, stack = (getattr(torch.overrides, name) for name in _MODE_STACK)
    if _mode not in stack():
        raise StateError("megatron_on_cpu.disable() must run on the thread that called enable()")
    above = []
    while (top := pop()) is not _mode:
        above.append(top)
    for mode in reversed(above):
        push(mode)


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    # torch turns a mode off while it handles a call, and Tensor.backward is one call: without this, layers recomputed
    # in the backward pass would see megatron's "cuda" again.
    stack = getattr(torch.overrides, _MODE_STACK[2])
    with contextlib.nullcontext() if _mode in stack() else _mode:
        return _backward_patch.original(*args, **kwargs)


def _quiet_fork(record: logging.LogRecord) -> bool:
    """Drops the tracker's warning that a fork moved the CPU stream: here that stream is the one being forked."""
    return _TRACKER_WARNING not in record.getMessage()


class _Done:
    """A CUDA stream whose work is always done, or an event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def _nothing(self, *_: Any, **__: Any) -> None: ...

    record = wait = synchronize = wait_stream = wait_event = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Stream(_Done): ...


class _Event(_Done): ...


class _Generators:
    """`torch.cuda.default_generators`: whatever the index, the CPU generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _always(value: Any) -> Callable[..., Any]:
    """A new function that returns ``value`` whatever it is given; new, as `Patch` wants one of its own."""
    return lambda *args, **kwargs: value


def _has_torch_adam(optimizer: Any) -> bool:
    # megatron's choice where neither Transformer Engine nor apex is installed.
    return isinstance(optimizer.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _optimizer_state_dict(self: Any) -> Any:
    """megatron reads the step count off the state, which torch's Adam only creates in its first step."""
    if _has_torch_adam(self):
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.optimizer.state[p]:
                    zeros = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
    return _RESUME["state_dict"].original(self)


def _load_optimizer_state_dict(self: Any, state_dict: Any) -> None:
    """megatron gives all parameters one tensor for their step count, which every one of them would then advance."""
    _RESUME["load_state_dict"].original(self, state_dict)
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
    _RESUME["_set_main_param_and_optimizer_states"].original(self, model_param, tensors)


_RESUME = {
    name: Patch(
        f"{_OPTIMIZER_MODULE}.DistributedOptimizer.{name}", mended, reason="resume with torch's Adam", prefixes=()
    )
    for name, mended in (
        ("state_dict", _optimizer_state_dict),
        ("load_state_dict", _load_optimizer_state_dict),
        ("_set_main_param_and_optimizer_states", _set_optimizer_states),
    )
}


class _OnImport(importlib.abc.MetaPathFinder):
    """Mends the optimizer's module when it is first imported: `enable()` itself does not import megatron."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == _OPTIMIZER_MODULE else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_mend(module: Any) -> None:
                execute(module)
                _mend()

            spec.loader.exec_module = execute_and_mend  # type: ignore[method-assign]
        return spec


_on_import = _OnImport()


def _mend() -> None:
    for patch in _RESUME.values():
        patch.apply()


def _mend_resuming() -> None:
    sys.meta_path.insert(0, _on_import)
    if _OPTIMIZER_MODULE in sys.modules:
        _mend()


def _leave_resuming() -> None:
    for patch in reversed(_RESUME.values()):
        patch.revert()
    sys.meta_path.remove(_on_import)


def _cuda(name: str, replacement: Any, prefixes: tuple[str, ...] = _COPIES) -> Patch:
    return Patch(f"torch.cuda.{name}", replacement, reason="run megatron-core on the CPU", prefixes=prefixes)


_backward_patch = Patch(
    _RUN_BACKWARD, _run_backward, reason="keep the function mode on in the backward pass", prefixes=("torch.autograd",)
)

_CHANGES: list[Change] = [
    Switch("torch function mode", _enter_mode, _leave_mode, reason='send device "cuda" to the CPU'),
    _backward_patch,
    Switch(
        _TRACKER_LOGGER,
        lambda: logging.getLogger(_TRACKER_LOGGER).addFilter(_quiet_fork),
        lambda: logging.getLogger(_TRACKER_LOGGER).removeFilter(_quiet_fork),
        reason="the CPU stream is the one that the tracker forks",
    ),
    Patch(_LAZY_CALL, lambda callback, **_: callback(), reason="the tracker sets states through it", prefixes=_COPIES),
    *(_cuda(name, _always(None)) for name in ("synchronize", "set_device", "empty_cache", "set_stream")),
    *(_cuda(name, _always(_Stream())) for name in ("current_stream", "default_stream")),
    _cuda("manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed))),
    _cuda("manual_seed_all", lambda seed: torch.default_generator.manual_seed(int(seed))),
    _cuda("current_device", _always(_CPU)),
    _cuda("Stream", _Stream),
    _cuda("Event", _Event),
    _cuda("stream", lambda stream: contextlib.nullcontext()),
    _cuda("default_generators", _Generators()),
    _cuda("get_rng_state", lambda device=None: torch.default_generator.get_state()),
    _cuda("set_rng_state", lambda new_state, device=None: torch.default_generator.set_state(new_state)),
    # torch's own classes: copies are left alone, because reverting would rebind every name for torch.FloatTensor.
    _cuda("FloatTensor", torch.FloatTensor, prefixes=()),
    _cuda("IntTensor", torch.IntTensor, prefixes=()),
    _cuda("LongTensor", torch.LongTensor, prefixes=()),
    Switch(_OPTIMIZER_MODULE, _mend_resuming, _leave_resuming, reason="resume with torch's Adam"),
]

_PRETEND: list[Change] = [
    _cuda("is_available", _always(True)),
    _cuda("device_count", _always(1)),
    _cuda(
        "get_device_properties",
        _always(SimpleNamespace(name="cpu", major=0, minor=0, total_memory=1 << 30, multi_processor_count=1)),
    ),
    _cuda("get_device_capability", _always((0, 0))),
    Patch("torch.Tensor.pin_memory", lambda tensor, device=None: tensor, reason="there is no pinned memory"),
    # A torch that was built with CUDA asks torch.cuda here, and then the driver for the device.
    Patch("torch.accelerator.is_available", _always(False), reason="loaders' processes pin memory where there is one"),
    *(
        Patch(f"torch.optim.Optimizer.{name}", _always(None), reason="it asks CUDA once is_available() says yes")
        for name in _GRAPH_HEALTH_CHECKS
        if hasattr(torch.optim.Optimizer, name)
    ),
]
