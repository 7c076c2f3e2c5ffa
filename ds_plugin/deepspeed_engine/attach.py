"""How the methods come onto a DeepSpeed engine and off it again, and what is refused on the way."""

import contextlib
import contextvars
import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ds_plugin.completep.supported import is_foreign_pipeline
from ds_plugin.config import PluginConfig, split_config
from ds_plugin.core.errors import ConfigError, StateError, warn
from ds_plugin.deepspeed_engine import compat, completep, json_check
from ds_plugin.deepspeed_engine.engine import Plugin
from ds_plugin.deepspeed_engine.masters import refuse_nvme
from ds_plugin.sequence_length_warmup.slicing import Shorten

_ATTRIBUTE = "_ds_plugin"  # where an engine holds its Plugin
ONE_CONFIG = "initialize() takes one DeepSpeed config (config=, config_params= or args.deepspeed_config); %s were given"
#: DeepSpeed's, bound before ours can take its place by ``deepspeed.initialize = ds_plugin.initialize``
_deepspeed_initialize = deepspeed.initialize
_running = contextvars.ContextVar("ds_plugin.initialize", default=False)


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Mapping[str, Any] | None = None,
    *,
    shorten: Shorten | None = None,
) -> tuple[Any, Any, Any, Any]:
    """A drop-in for ``deepspeed.initialize``: the same arguments, the same ``(engine, optimizer, dataloader,
    lr_scheduler)``.

    Reads the sections of the methods from the same JSON, strips them before DeepSpeed sees it, and wires the enabled
    methods to the engine; with none, it is exactly DeepSpeed's. With ``completep``, ``optimizer`` is absent (the JSON's
    AdamW or Muon), a function of the param groups, or an Adam over the model's parameters, which gives the base model's
    hyperparameters and gets the roles' groups; ``lr_scheduler`` is absent or a function of the optimizer. ``shorten``:
    for sequence length warmup of a model whose arguments are not recognised; see `slicing.Shorten`.

    Raises ConfigError: a wrong setting, or a combination that cannot work: before anything is built, or else the engine
    is destroyed, and an optimizer that was given has its own param groups again."""
    given = {name: value for name, value in locals().items() if name != "shorten"}
    configs = [c for c in (getattr(args, "deepspeed_config", None), config, config_params) if c is not None]
    if len(configs) != 1:
        raise ConfigError(ONE_CONFIG % (len(configs) or "none"))
    given["config"], sections = split_config(configs[0])
    json_check.check(given["config"], _ranks(given["config"], model, mpu, mesh_param))
    if sections.weight_averaging is not None:
        refuse_nvme(given["config"])
    _refuse_conflicts(sections, model, mpu)
    given["args"] = copy.copy(args)
    if getattr(args, "deepspeed_config", None) is not None:
        given["args"].deepspeed_config = None
    del given["config_params"]
    if distributed_port is None:
        del given["distributed_port"]
    with contextlib.ExitStack() as refused:
        if isinstance(optimizer, torch.optim.Optimizer):
            refused.callback(_kept(optimizer))
        if sections.completep is not None:
            given |= completep.set_up(sections.completep, given)
        groups = given["model_parameters"] if sections.completep is not None else None
        with compat.muon_groups_as_given(groups):
            engine, *rest = _build(**given)
        refused.callback(_destroy, engine)
        _register(engine, sections, shorten)
        refused.pop_all()
    if hasattr(args, "local_rank"):
        args.local_rank = engine.local_rank  # as DeepSpeed does to the arguments it is given
    return (engine, *rest[:-1], engine.lr_scheduler)  # type: ignore[return-value]


def _ranks(config: Mapping[str, Any], model: Any, mpu: Any, mesh_param: Any) -> int | None:
    """Data-parallel ranks as DeepSpeed will count them; None where it makes groups of its own."""
    if mesh_param is not None or {"sequence_parallel_size", "data_parallel_size", "tensor_parallel"} & config.keys():
        return None
    mpu = model.mpu() if isinstance(model, deepspeed.PipelineModule) else mpu
    if mpu is not None:
        return mpu.get_data_parallel_world_size() if hasattr(mpu, "get_data_parallel_world_size") else None
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    world = os.environ.get("WORLD_SIZE", "")  # as launchers say it
    return int(world) if world.isdecimal() else None


def attach(
    engine: Any,
    config: str | Path | Mapping[str, Any] | PluginConfig,
    *,
    shorten: Shorten | None = None,
    resume_from: str | Path | None = None,
    tag: str | None = None,
) -> Plugin:
    """Wire sequence length warmup and weight averaging to an engine that already exists. Every rank calls it.

    ``config``: the JSON (other sections are ignored) or a validated `PluginConfig`. ``resume_from``: for an engine that
    has loaded a checkpoint already, as a trainer's has before its callbacks run: the folder that
    ``engine.load_checkpoint`` was given, and ``tag`` if it was given one; the methods' state is restored from there.

    Raises ConfigError: a wrong setting, ``completep`` enabled (its param groups must exist before the engine does), or
    ``engine`` is no engine. StateError: it already has a plugin. CheckpointError: ``resume_from`` is not the checkpoint
    that was loaded, or does not fit this run."""
    if tag is not None and resume_from is None:
        raise ConfigError(f"attach: tag={tag!r} without resume_from=, the folder that it is in; give both")
    _refuse_no_engine(engine, "attach")
    sections = config if isinstance(config, PluginConfig) else split_config(config)[1]
    if sections.completep is not None:
        what = "completep: the engine's param groups are built already"
        raise ConfigError(f'{what}; use ds_plugin.initialize(), or write "enabled": false')
    if sections.sequence_length_warmup is not None and compat.is_on(engine, "curriculum_learning_enabled"):
        what = "data_efficiency.data_sampling.curriculum_learning is on, and both set the length"
        raise ConfigError(f"sequence_length_warmup: {what}; remove one of the two")
    _refuse_conflicts(sections, engine.module, engine.mpu)
    plugin = _register(engine, sections, shorten, resume_from=resume_from, tag=tag)
    if resume_from is None and engine.global_steps > 0 and (plugin.warmup or plugin.averager) is not None:
        said = "attach: the %d steps that the engine has made count as steps at full length, and are in no average"
        remedy = "If it has loaded a checkpoint of a run with this plugin, give attach(..., resume_from=FOLDER)"
        warn(f"{said}. {remedy}", engine.global_steps)
    return plugin


def get_plugin(engine: Any) -> Plugin:
    """The `Plugin` of an engine. Raises StateError: there is none; ConfigError: ``engine`` is no engine."""
    plugin = getattr(engine, "__dict__", {}).get(_ATTRIBUTE)
    if plugin is None:
        _refuse_no_engine(engine, "get_plugin")
        raise StateError("this engine has no plugin; make it with ds_plugin.initialize() or call ds_plugin.attach()")
    return plugin


def detach(engine: Any) -> None:
    """Undo `attach`: the engine is again as DeepSpeed made it. The averaging window is dropped."""
    get_plugin(engine).detach()
    del engine.__dict__[_ATTRIBUTE]


def _build(**given: Any) -> Any:
    """DeepSpeed's own ``initialize``; on a CPU it is spared what it would compile for inference."""
    if _running.get():
        found = f"{_deepspeed_initialize.__module__}.{_deepspeed_initialize.__qualname__}"
        what = f"{found}, in deepspeed.initialize's place before ds_plugin was first used, calls ds_plugin in turn"
        raise StateError(f"initialize: {what}; write deepspeed.initialize = ds_plugin.initialize")
    if get_accelerator().device_name() == "cpu" and not deepspeed.comm.is_initialized():
        compat.skip_inference_kernel()
    token = _running.set(True)
    try:
        return _deepspeed_initialize(**given)
    except AssertionError as error:  # DeepSpeed's way to refuse settings
        raise ConfigError(f"deepspeed.initialize refuses the settings: {error}") from error
    finally:
        _running.reset(token)


def _refuse_no_engine(thing: Any, call: str) -> None:
    if compat.is_engine(thing):
        return
    hint = " (its .engine is one)" if compat.is_engine(getattr(thing, "engine", None)) else ""
    if isinstance(thing, tuple) and any(map(compat.is_engine, thing)):
        hint = " (the first of the tuple is one)"
    given = f"{type(thing).__module__}.{type(thing).__qualname__}{hint}"
    raise ConfigError(f"{call}: given a {given}; give the engine that initialize() returns")


def _register(engine: Any, sections: PluginConfig, *given: Any, **resume: Any) -> Plugin:
    """Make the engine's `Plugin`; what follows the sections is `Plugin`'s."""
    if _ATTRIBUTE in engine.__dict__:
        raise StateError("this engine already has a plugin; call ds_plugin.detach(engine) first")
    if sections != PluginConfig() and engine.load_universal_checkpoint() and engine.zero_optimization_stage() == 0:
        what = "DeepSpeed loads no weights with zero_optimization.stage 0; write stage 1, 2 or 3"
        raise ConfigError(f"checkpoint.load_universal: {what}")
    engine.__dict__[_ATTRIBUTE] = plugin = Plugin(engine, sections, *given, **resume)
    return plugin


def _kept(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What gives an optimizer its param groups and state back, as they are now: DeepSpeed and CompleteP change both."""
    groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
    state = set(optimizer.state)

    def restore() -> None:
        for group, settings, params in groups:
            group.clear()
            group.update(settings, params=params)
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for parameter in optimizer.state.keys() - state:
            del optimizer.state[parameter]

    return restore


def _destroy(engine: Any) -> None:
    """Take DeepSpeed's hooks off the model of an engine that nobody gets, so that another can be built of it."""
    for name in compat.MODULE_HOOKS:  # destroy() leaves them
        if (handle := getattr(engine, name, None)) is not None:
            handle.remove()
    with contextlib.suppress(Exception):  # the error that is under way says more
        engine.destroy()


def _refuse_conflicts(sections: PluginConfig, model: Any, mpu: Any) -> None:
    if sections.completep is not None and is_foreign_pipeline(model):  # its stages' parameters have no names
        what = f"DeepSpeed's pipeline engine with a {type(model).__name__}, whose parameters' roles are not known"
        raise ConfigError(f"completep: {what}; build it with megatron_patches.models.pipeline_gpt.build_pipeline")
    ranks = mpu.get_tensor_model_parallel_world_size() if hasattr(mpu, "get_tensor_model_parallel_world_size") else 1
    if ranks > 1 and getattr(getattr(model, "config", None), "qk_layernorm", False):
        what = "DeepSpeed does not sum its gradients over the heads' ranks; use 1, or Megatron-LM's loop"
        raise ConfigError(f"qk_layernorm with tensor parallelism {ranks}: {what}")
