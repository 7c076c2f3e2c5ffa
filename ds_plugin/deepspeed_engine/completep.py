"""CompleteP on DeepSpeed: the optimizer's param groups, schedulers that keep them apart, and the built engine's part.

The method itself is in `megatron_patches.completep`. `set_up` runs before DeepSpeed builds the engine, `CompleteP` is
what stays on it. In DeepSpeed's pipeline both work on one stage of the model, a `PipelineGPT`.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import describe, finished_roles, ratios_of
from ds_plugin.completep.param_groups import build_param_groups, check_rates
from ds_plugin.completep.rules import Role
from ds_plugin.completep.supported import bare_model, gpt_of
from ds_plugin.core.errors import CheckpointError, ConfigError, StateError
from ds_plugin.core.replaced import replaced
from ds_plugin.deepspeed_engine import compat
from ds_plugin.deepspeed_engine.gradient_norm import RescaledGradNorm
from ds_plugin.deepspeed_engine.group_lr import check_peak, expand_scheduler, refuse_flattened

#: Adams that say by ``adam_w_mode`` whether their decay is decoupled (DeepSpeed, apex, TransformerEngine), and by name
_BY_MODE, _BY_NAME = ("FusedAdam", "DeepSpeedCPUAdam"), ("AdamW", "AdamW8bit")
_FUNCTION = "give a function of the param groups: optimizer=lambda groups: MyAdam(groups)"


def set_up(
    model: Any,
    section: CompletePConfig,
    host_config: dict[str, Any],
    optimizer: Any,
    model_parameters: Any,
    lr_scheduler: Any,
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Finish the model and build its param groups.

    The base hyperparameters are those of the JSON or, where an optimizer is given that is built already, its own: its
    groups are replaced in place by one for each role.

    Returns what to give to ``deepspeed.initialize``: the groups (None with a built optimizer), the optimizer or a
    checked function, the scheduler as a checked function, and the config with the scheduler's scalars expanded.

    Raises:
        ConfigError: the model was not prepared, the optimizer is no AdamW or not over the model's parameters, or the
            scheduler would flatten the groups.
    """
    whole = bare_model(gpt_of(model))
    _check_model_parameters(model, model_parameters)
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise ConfigError(
            "completep: lr_scheduler is built already, on other param groups; describe it in the JSON or give a "
            "function of the optimizer: lr_scheduler=lambda optimizer: MyScheduler(optimizer)"
        )
    built = isinstance(optimizer, torch.optim.Optimizer)
    base = _base_of(optimizer, model) if built else _base_of_json(host_config, optimizer)
    groups = build_param_groups(
        whole, finished_roles(whole, section), ratios_of(whole.config, section), section, **base
    )
    if gpt_of(model) is not model:
        groups = divided(groups, max(_everywhere(len(groups))))
    if host_config.get("scheduler"):
        check_peak(host_config["scheduler"], base["lr"])
        ratios = [group["lr"] / base["lr"] for group in groups]
        host_config = {**host_config, "scheduler": expand_scheduler(host_config["scheduler"], ratios)}
    if built:
        kept = {key: value for key, value in optimizer.param_groups[0].items() if key != "param_names"}
        optimizer.param_groups[:] = [{**kept, **group} for group in groups]
        return None, optimizer, _checked_scheduler(lr_scheduler), host_config
    return groups, _checked_optimizer(optimizer), _checked_scheduler(lr_scheduler), host_config


class CompleteP:
    """The method on a built engine: the look at the groups before each step, what checkpoints hold of them, and the
    gradient norm in folded mode."""

    def __init__(self, engine: Any, section: CompletePConfig):
        """Nothing changes on the engine before `install`. Raises as `RescaledGradNorm` does; in a pipeline also where
        DeepSpeed would clip by another norm."""
        self.engine, self.section = engine, section
        pipeline = compat.is_pipeline(engine)
        if pipeline and section.residual == "folded":
            _refuse_folded(engine)
        self._mine = [group["role"] for group in self._groups]  # kept: a universal load may write over them
        # a pipeline's stages have different roles, and some more than one group of one
        self._roles = _in_order(_everywhere(self._mine)) if pipeline else self._mine
        ratios = ratios_of(engine.module.config, section)
        factors = [section.fold_factor(Role(role), ratios) for role in self._mine]
        norm = _StageNorm if pipeline else RescaledGradNorm
        self._rows = {role: section.multipliers(Role(role), ratios) for role in self._mine}
        self._norm = norm(engine, factors) if any(factor != 1.0 for factor in factors) else None
        compat.need(engine, compat.TAKE_STEP)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.engine.basic_optimizer.param_groups
        return groups

    def describe(self) -> str:
        """The ratios and multipliers in one line."""
        return describe(self.engine.module, self.section)

    def install(self, undo: contextlib.ExitStack) -> None:
        """Look at the groups before each step, and have the engine clip by the forward mode's gradient norm; ``undo``
        gives its own step and norm back."""
        take_step = functools.partial(self._checked_step, getattr(self.engine, compat.TAKE_STEP))
        undo.enter_context(replaced(self.engine, compat.TAKE_STEP, take_step))
        if self._norm is not None:
            self._norm.install(undo)

    def _checked_step(self, take_step: Any, *args: Any, **kwargs: Any) -> Any:
        """The engine's step, refused before it changes anything where the groups are not in their roles' ratios."""
        groups = self._groups
        if len(groups) != len(self._mine):
            raise StateError(
                f"completep: the optimizer has {len(groups)} param groups, and {len(self._mine)} were built, one for "
                "each role; parameters that are added later have no role, build the model with them"
            )
        scheduler = getattr(self.engine.lr_scheduler, "scheduler", self.engine.lr_scheduler)  # inside a TokenScheduler
        by = "the training loop" if scheduler is None else f"the scheduler {type(scheduler).__name__}"
        check_rates(groups, self._mine, self._rows, written_by=f"{by}, or what else writes them,")
        return take_step(*args, **kwargs)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> list[dict[str, Any]]:
        """Every group's settings in JSON types; in a pipeline, of all stages' roles, and every rank calls it.

        The host's own checkpoints hold them too; loading one that was converted to a universal checkpoint loses them
        under ZeRO 3."""
        names = ("lr", "lr_scale", "initial_lr", "weight_decay", "eps")
        settings = [{"role": g["role"], **{k: float(g[k]) for k in names if k in g}} for g in self._groups]
        for kept, group in zip(settings, self._groups, strict=True):
            kept["betas"] = [float(beta) for beta in group["betas"]]
        if compat.is_pipeline(self.engine):
            of_role = {kept["role"]: kept for stage in _everywhere(settings) for kept in stage}
            settings = [of_role[role] for role in self._roles]
        return settings

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Stamp saved settings on the groups, after the host has loaded a universal checkpoint.

        ZeRO 3 gives every group the first one's there; and one step counter to all, which each group would advance.

        Raises:
            CheckpointError: the groups are not those that were saved.
        """
        saved = [group["role"] for group in state]
        if saved != self._roles:
            raise CheckpointError(
                f"completep: the checkpoint has param groups for the roles {', '.join(saved)}, this run for "
                f"{', '.join(self._roles)}; freeze the same parameters"
            )
        of_role = {settings["role"]: settings for settings in state}
        for group, role in zip(self._groups, self._mine, strict=True):
            settings = of_role[role]
            group.update({**settings, "betas": tuple(settings["betas"])})
        for moments in self.engine.basic_optimizer.state.values():
            if torch.is_tensor(moments.get("step")):
                moments["step"] = moments["step"].clone()


# -- a pipeline's stages -----------------------------------------------------------------------------------------------


def divided(groups: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The same groups as ``count`` of them: the one of the most parameters is halved until there are as many.

    DeepSpeed's ZeRO takes the gradient norm group by group, with one all-reduce over all stages for each, so all stages
    need the same number. Which of them meet there does not matter: the squares of all are added up.
    """
    groups = list(groups)
    while len(groups) < count:
        at = max(range(len(groups)), key=lambda i: len(groups[i]["params"]))
        params = groups[at]["params"]
        assert len(params) > 1, "a stage has at least a layer, which has more parameters than there are roles"
        half = len(params) // 2
        groups[at : at + 1] = [{**groups[at], "params": part} for part in (params[:half], params[half:])]
    return groups


class _StageNorm(RescaledGradNorm):
    """The same where stages' groups meet that have different factors: gradients are weighed before they are added."""

    def _scale_zero12(self, wrapper: Any, factors: Sequence[float]) -> None:
        compat.need(wrapper, compat.ZERO12_NORM_PARAMS)
        lists = getattr(wrapper, compat.ZERO12_NORM_PARAMS)
        factor_of = {id(params): factor for params, factor in zip(lists, factors, strict=True)}

        def wrap(host_norm: Any) -> Any:
            def norm(gradients: Sequence[torch.Tensor], params: Any) -> Any:
                factor = factor_of[id(params)]
                # a tensor's weighed norm stands in for it, as the norm of norms is the norm; padding has none
                weighed = gradients if factor == 1.0 else [_weighed(gradient, factor) for gradient in gradients]
                return host_norm(weighed, params)

            return norm

        self._shadow(wrapper, compat.ZERO12_NORM, wrap)


def _weighed(gradient: torch.Tensor, factor: float) -> torch.Tensor:
    if getattr(gradient, compat.ZERO12_PADDING, False):
        return gradient
    return torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32) * factor


def _refuse_folded(engine: Any) -> None:
    """Where the norm of gradients over all stages would be another than the forward mode's."""
    offloaded = engine.zero_cpu_offload() or engine.zero_nvme_offload_optimizer()
    if engine.gradient_clipping() and (engine.zero_optimization_stage() == 0 or offloaded):
        what = "zero_optimization.offload_optimizer" if offloaded else "zero_optimization.stage 0"
        raise ConfigError(
            f'completep.residual: "folded" with gradient_clipping {engine.gradient_clipping()} and {what} is not '
            'supported in DeepSpeed\'s pipeline; write zero_optimization.stage 1 without offload, or "residual": '
            '"forward"'
        )


def _in_order(stages: Sequence[Sequence[str]]) -> list[str]:
    """The roles of all stages, each once, in the order of `Role`."""
    found = {role for stage in stages for role in stage}
    return [role.value for role in Role if role.value in found]


def _everywhere(mine: Any) -> list[Any]:
    """``mine`` of every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


# -- what the caller of initialize() gives ---------------------------------------------------------------------------


def _check_model_parameters(model: Any, given: Any) -> None:
    """All of the model's parameters (with or without its frozen ones) say nothing new; anything else is refused."""
    if given is None:
        return
    listed = list(given)
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not ({id(p) for p in listed} <= names.keys() and trainable <= {id(p) for p in listed}):
        what = "param groups" if any(isinstance(p, Mapping) for p in listed) else "other than all of the model's"
        raise ConfigError(
            f"completep: model_parameters= are {what}, and the method builds the optimizer's param groups itself; do "
            "not give model_parameters=, or give model.parameters()"
        )


def _base_of_json(host_config: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The base model's hyperparameters from the JSON's ``optimizer``."""
    described = host_config.get("optimizer") or {}
    params = described.get("params") or {}
    if optimizer is None and str(described.get("type")).lower() not in ("adam", "adamw"):
        raise ConfigError(
            f'completep: optimizer.type is {described.get("type")!r}; the rules hold for AdamW, write "AdamW"'
        )
    if not params.get("adam_w_mode", True):
        raise ConfigError(
            f"completep: optimizer.params.adam_w_mode is {params['adam_w_mode']!r}, which adds weight decay to the "
            "gradient; the rules hold for decoupled weight decay, remove it"
        )
    for name, example in (("lr", 0.001), ("weight_decay", 0.1)):  # implementations differ in their default decay
        found = "missing" if name not in params else _not_usable(name, params[name])
        if found:
            raise ConfigError(f"completep: optimizer.params.{name} is {found}; write the base model's, e.g. {example}")
    return {
        "lr": params["lr"],
        "weight_decay": params["weight_decay"],
        "eps": params.get("eps", 1e-8),
        "betas": params.get("betas", (0.9, 0.999)),
    }


def _base_of(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, Any]:
    """The base model's hyperparameters from an optimizer that is built already and has done nothing yet.

    Weight decay may be zero on some of its groups: which parameters decay is Table 1's to say.
    """
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    if not _is_adam(optimizer):
        raise ConfigError(
            f"completep: the optimizer {kind} is built already and is no Adam, whose param groups could be replaced; "
            f'describe AdamW in the JSON ("optimizer"), or {_FUNCTION}'
        )
    if optimizer.state:
        raise ConfigError(
            f"completep: the optimizer {kind} has state for {len(optimizer.state)} parameters; give one that has not "
            "stepped or loaded anything, and load checkpoints through the engine"
        )
    if any("initial_lr" in group for group in groups):
        raise ConfigError(
            f"completep: a learning rate scheduler is built on the optimizer {kind} already, for other param groups; "
            "describe it in the JSON or give a function: lr_scheduler=lambda optimizer: MyScheduler(optimizer)"
        )
    _check_covers(optimizer, model)
    for name in sorted({key for group in groups for key in group} - {"params", "param_names", "weight_decay"}):
        values = [group.get(name) for group in groups]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"completep: the optimizer {kind} has groups with {name} {values[0]!r} and "
                f"{next(v for v in values if v != values[0])!r}; give all the base model's, the method sets the roles'"
            )
    decays = sorted({group["weight_decay"] for group in groups if group["weight_decay"] != 0})
    if len(decays) > 1:
        raise ConfigError(
            f"completep: the optimizer {kind} has groups with weight_decay {decays[0]!r} and {decays[1]!r}; give all "
            "the base model's (or 0): Table 1 decides which parameters decay"
        )
    if decays and not _decoupled(optimizer):
        raise ConfigError(
            f"completep: the optimizer {kind} adds weight_decay {decays[0]!r} to the gradient; the rules hold for "
            "decoupled weight decay, give AdamW"
        )
    base = {name: groups[0][name] for name in ("lr", "eps", "betas")} | {"weight_decay": decays[0] if decays else 0.0}
    for name in ("lr", "weight_decay"):
        if found := _not_usable(name, base[name]):
            raise ConfigError(f"completep: {name} of the optimizer {kind} is {found}; give the base model's")
    return base


def _check_covers(optimizer: torch.optim.Optimizer, model: Any) -> None:
    """Every trainable parameter of the model is in the optimizer, and nothing else but frozen ones."""
    names = {id(p): name for name, p in model.named_parameters()}
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    remedy = "build it from model.parameters()"
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise ConfigError(
                    f"completep: the optimizer {type(optimizer).__name__} has a parameter of shape {list(p.shape)} in "
                    f"group {i} that is not the model's; {remedy}"
                )
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in given:
            raise ConfigError(
                f"completep: the optimizer {type(optimizer).__name__} lacks the parameter {name}; {remedy}, or freeze "
                "the parameter"
            )


def _not_usable(name: str, value: Any) -> str | None:
    """What is wrong with a learning rate or weight decay, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (name == "lr" and value == 0):
        return f"{value!r}, which is not a usable number"
    return None


def _names(optimizer: Any) -> set[str]:
    return {cls.__name__ for cls in type(optimizer).__mro__}


def _is_adam(optimizer: Any) -> bool:
    """torch's Adam and AdamW; other libraries' by name, so that none is imported here."""
    return isinstance(optimizer, torch.optim.Adam) or bool(_names(optimizer) & {*_BY_MODE, *_BY_NAME})


def _decoupled(optimizer: Any) -> bool:
    """Whether an Adam decays weights apart from the gradient: some say so on themselves, torch in its groups, others by
    their name."""
    groups = optimizer.param_groups
    if any("decoupled_weight_decay" in g for g in groups):
        in_groups = all(g.get("decoupled_weight_decay") for g in groups)
    else:
        in_groups = bool(_names(optimizer) & {*_BY_NAME})
    return bool(getattr(optimizer, "adam_w_mode", in_groups))


# -- functions that the caller gives, checked when DeepSpeed calls them ----------------------------------------------


def _checked_optimizer(function: Any) -> Any:
    if function is None:
        return None

    def build(groups: list[dict[str, Any]]) -> Any:
        expected = [group["role"] for group in groups]
        optimizer = function(groups)
        kind, found = type(optimizer).__name__, [group.get("role") for group in optimizer.param_groups]
        if found != expected:
            raise ConfigError(
                f"completep: the optimizer {kind} that the given function returned has {len(found)} param groups that "
                f"are not the {len(expected)} it was given; {_FUNCTION}"
            )
        decays = any(group.get("weight_decay") for group in optimizer.param_groups)
        if not (_is_adam(optimizer) and (_decoupled(optimizer) or not decays)):
            raise ConfigError(
                f"completep: the rules hold for Adam with decoupled weight decay, the given function returned {kind}; "
                "return AdamW"
            )
        return optimizer

    return build


def _checked_scheduler(function: Any) -> Any:
    if function is None:
        return None

    def build(optimizer: Any) -> Any:
        before = [group["lr"] for group in optimizer.param_groups]
        scheduler = function(optimizer)
        refuse_flattened(scheduler, before, [group["lr"] for group in optimizer.param_groups])
        return scheduler

    return build
