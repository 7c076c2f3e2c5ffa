"""CompleteP on DeepSpeed: `set_up` runs before the engine is built, `CompleteP` is what stays on it.

In DeepSpeed's pipeline both work on one stage of the model, a `PipelineGPT`.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import describe, finished_roles, ratios_of
from ds_plugin.completep.param_groups import build_param_groups, check_rates
from ds_plugin.completep.rules import Role
from ds_plugin.completep.supported import bare_model, gpt_of
from ds_plugin.core.errors import CheckpointError, ConfigError, StateError
from ds_plugin.core.replaced import replaced
from ds_plugin.deepspeed_engine import compat
from ds_plugin.deepspeed_engine.gradient_norm import refuse_folded_pipeline, rescaled
from ds_plugin.deepspeed_engine.group_lr import check_peak, expand_scheduler, refuse_flattened
from ds_plugin.deepspeed_engine.ranks import gathered

#: Adams that say by ``adam_w_mode`` whether their decay is decoupled (DeepSpeed, apex, TransformerEngine), and by name
_BY_MODE, _BY_NAME = ("FusedAdam", "DeepSpeedCPUAdam"), ("AdamW", "AdamW8bit")
_FUNCTION = "give a function of the param groups: optimizer=lambda groups: MyAdam(groups)"
_DECOUPLED = "the rules hold for decoupled weight decay"
_SCHEDULER = "describe it in the JSON or give a function: lr_scheduler=lambda optimizer: MyScheduler(optimizer)"


def set_up(
    model: Any,
    section: CompletePConfig,
    deepspeed_config: dict[str, Any],
    optimizer: Any,
    model_parameters: Any,
    lr_scheduler: Any,
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Build a finished model's param groups.

    The base hyperparameters are those of the JSON or, where a built optimizer is given, its own: its groups are
    replaced in place by one for each role.

    Returns what to give to ``deepspeed.initialize``: the groups (None with a built optimizer), the optimizer or a
    checked function, the scheduler as a checked function, and the config with the scheduler's scalars expanded.

    Raises:
        ConfigError: the model was not prepared, the optimizer is no AdamW or not over the model's parameters, or the
            scheduler would flatten the groups.
    """
    whole = bare_model(gpt_of(model))
    _check_model_parameters(model, model_parameters)
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise ConfigError(f"completep: lr_scheduler is built already, on other param groups; {_SCHEDULER}")
    built = isinstance(optimizer, torch.optim.Optimizer)
    base = _base_of(optimizer, model) if built else _base_of_json(deepspeed_config, optimizer)
    groups = build_param_groups(
        whole, finished_roles(whole, section), ratios_of(whole.config, section), section, **base
    )
    if gpt_of(model) is not model:
        groups = divided(groups, max(gathered(len(groups))))
    if scheduler := deepspeed_config.get("scheduler"):
        check_peak(scheduler, base["lr"])
        ratios = [group["lr"] / base["lr"] for group in groups]
        deepspeed_config = {**deepspeed_config, "scheduler": expand_scheduler(scheduler, ratios)}
    if lr_scheduler is not None:
        lr_scheduler = functools.partial(_built_scheduler, lr_scheduler)
    if built:
        kept = {key: value for key, value in optimizer.param_groups[0].items() if key != "param_names"}
        optimizer.param_groups[:] = [{**kept, **group} for group in groups]
        return None, optimizer, lr_scheduler, deepspeed_config
    if optimizer is not None:
        optimizer = functools.partial(_built_optimizer, optimizer)
    return groups, optimizer, lr_scheduler, deepspeed_config


class CompleteP:
    """The method on a built engine: the look at the groups before each step, what checkpoints hold of them, and the
    gradient norm in folded mode."""

    def __init__(self, engine: Any, section: CompletePConfig):
        """Nothing changes on the engine before `install`. Raises as `rescaled` and `refuse_folded_pipeline` do."""
        self.engine, self.section = engine, section
        pipeline = compat.is_pipeline(engine)
        if pipeline and section.residual == "folded":
            refuse_folded_pipeline(engine)
        self._mine = [group["role"] for group in self._groups]  # kept: a universal load may write over them
        # a pipeline's stages have different roles, and some more than one group of one
        found = {role for stage in gathered(self._mine) for role in stage} if pipeline else ()
        self._roles = [role.value for role in Role if role.value in found] if pipeline else self._mine
        ratios = ratios_of(engine.module.config, section)
        factors = [section.fold_factor(Role(role), ratios) for role in self._mine]
        self._rows = {role: section.multipliers(Role(role), ratios) for role in self._mine}
        self._norm = list(rescaled(engine, factors)) if any(factor != 1.0 for factor in factors) else []
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
        for method in self._norm:
            undo.enter_context(replaced(*method))

    def _checked_step(self, take_step: Any, *args: Any, **kwargs: Any) -> Any:
        """The engine's step, refused before it changes anything where the groups are not in their roles' ratios."""
        groups = self._groups
        if len(groups) != len(self._mine):
            found = f"the optimizer has {len(groups)} param groups, and {len(self._mine)} were built"
            raise StateError(f"completep: {found}; parameters added later have no role, build the model with them")
        scheduler = getattr(self.engine.lr_scheduler, "scheduler", self.engine.lr_scheduler)  # inside a TokenScheduler
        by = "the training loop" if scheduler is None else f"the scheduler {type(scheduler).__name__}"
        check_rates(groups, self._mine, self._rows, written_by=f"{by}, or what else writes them,")
        return take_step(*args, **kwargs)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> list[dict[str, Any]]:
        """Every group's settings in JSON types, which a universal checkpoint loses under ZeRO 3; in a pipeline of all
        stages' roles, and every rank calls it."""
        names = ("lr", "lr_scale", "initial_lr", "weight_decay", "eps")
        settings = [{"role": g["role"], **{k: float(g[k]) for k in names if k in g}} for g in self._groups]
        for kept, group in zip(settings, self._groups, strict=True):
            kept["betas"] = [float(beta) for beta in group["betas"]]
        if compat.is_pipeline(self.engine):
            of_role = {kept["role"]: kept for stage in gathered(settings) for kept in stage}
            settings = [of_role[role] for role in self._roles]
        return settings

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Stamp saved settings on the groups, after DeepSpeed has loaded a universal checkpoint: ZeRO 3 gives every
        group the first one's there; and one step counter to all, which each would advance. Raises CheckpointError."""
        of_role = {settings["role"]: settings for settings in state}
        if list(of_role) != self._roles:
            saved, here = ", ".join(of_role), ", ".join(self._roles)
            what = f"the checkpoint has param groups for the roles {saved}, this run for {here}"
            raise CheckpointError(f"completep: {what}; freeze the same parameters")
        for group, role in zip(self._groups, self._mine, strict=True):
            group.update({**of_role[role], "betas": tuple(of_role[role]["betas"])})
        for moments in self.engine.basic_optimizer.state.values():
            if torch.is_tensor(moments.get("step")):
                moments["step"] = moments["step"].clone()


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


# -- what the caller of initialize() gives ---------------------------------------------------------------------------


def _check_model_parameters(model: Any, given: Any) -> None:
    """All of the model's parameters (with or without its frozen ones) say nothing new; anything else is refused."""
    if given is None:
        return
    listed = list(given)
    every = {id(p) for p in model.parameters()}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not trainable <= {id(p) for p in listed} <= every:
        what = "param groups" if any(isinstance(p, Mapping) for p in listed) else "other than all of the model's"
        remedy = "leave model_parameters= out, or give model.parameters()"
        raise ConfigError(f"completep: model_parameters= are {what}, and the method builds the groups itself; {remedy}")


def _base_of_json(deepspeed_config: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The base model's hyperparameters from the JSON's ``optimizer``."""
    described = deepspeed_config.get("optimizer") or {}
    params = described.get("params") or {}
    kind, decoupled = described.get("type"), params.get("adam_w_mode", True)
    if optimizer is None and str(kind).lower() not in ("adam", "adamw"):
        raise ConfigError(f'completep: optimizer.type is {kind!r}; the rules hold for AdamW, write "AdamW"')
    if not decoupled:
        what = f"optimizer.params.adam_w_mode is {decoupled!r}, which adds weight decay to the gradient"
        raise ConfigError(f"completep: {what}; {_DECOUPLED}, remove it")
    for name, example in (("lr", 0.001), ("weight_decay", 0.1)):  # implementations differ in their default decay
        found = "missing" if name not in params else _not_usable(params[name], zero=name != "lr")
        if found:
            raise ConfigError(f"completep: optimizer.params.{name} is {found}; write the base model's, e.g. {example}")
    return {"eps": 1e-8, "betas": (0.9, 0.999)} | {
        name: params[name] for name in ("lr", "weight_decay", "eps", "betas") if name in params
    }


def _base_of(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, Any]:
    """The base model's hyperparameters from an optimizer that is built already and has done nothing yet.

    Weight decay may be zero on some of its groups: which parameters decay is Table 1's to say.
    """
    groups = optimizer.param_groups
    if not _is_adam(optimizer):
        what = "is built already and is no Adam, whose param groups could be replaced"
        _refuse(optimizer, f'{what}; describe AdamW in the JSON ("optimizer"), or {_FUNCTION}')
    if optimizer.state:
        remedy = "give one that has not stepped or loaded anything, and load checkpoints through the engine"
        _refuse(optimizer, f"has state for {len(optimizer.state)} parameters; {remedy}")
    if any("initial_lr" in group for group in groups):
        _refuse(optimizer, f"has a learning rate scheduler already, for other param groups; {_SCHEDULER}")
    _check_covers(optimizer, model)
    for name in sorted({key for group in groups for key in group} - {"params", "param_names", "weight_decay"}):
        first, *others = [group.get(name) for group in groups]
        for other in others:
            if other != first:
                what = f"has groups with {name} {first!r} and {other!r}"
                _refuse(optimizer, f"{what}; give all the base model's, the method sets the roles'")
    decays = sorted({group["weight_decay"] for group in groups if group["weight_decay"] != 0})
    if len(decays) > 1:
        what = f"has groups with weight_decay {decays[0]!r} and {decays[1]!r}; give all the base model's (or 0)"
        _refuse(optimizer, f"{what}: Table 1 decides which parameters decay")
    if decays and not _decoupled(optimizer):
        _refuse(optimizer, f"adds weight_decay {decays[0]!r} to the gradient; {_DECOUPLED}, give AdamW")
    base = {name: groups[0][name] for name in ("lr", "eps", "betas")} | {"weight_decay": decays[0] if decays else 0.0}
    for name in ("lr", "weight_decay"):
        if found := _not_usable(base[name], zero=name != "lr"):
            what = f"{name} of the optimizer {type(optimizer).__name__} is {found}"
            raise ConfigError(f"completep: {what}; give the base model's")
    return base


def _check_covers(optimizer: torch.optim.Optimizer, model: Any) -> None:
    """Every trainable parameter of the model is in the optimizer, and nothing else but frozen ones."""
    every, remedy = set(model.parameters()), "build it from model.parameters()"
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p not in every:
                what = f"has a parameter of shape {list(p.shape)} in group {i} that is not the model's"
                _refuse(optimizer, f"{what}; {remedy}")
    given = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and p not in given:
            _refuse(optimizer, f"lacks the parameter {name}; {remedy}, or freeze the parameter")


def _refuse(optimizer: Any, what: str) -> NoReturn:
    raise ConfigError(f"completep: the optimizer {type(optimizer).__name__} {what}")


def _not_usable(value: Any, *, zero: bool) -> str | None:
    """What is wrong with a number of the base model's, which may be ``zero``; or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (value == 0 and not zero):
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
    key, groups = "decoupled_weight_decay", optimizer.param_groups
    by_name = bool(_names(optimizer) & {*_BY_NAME})
    in_groups = all(group.get(key) for group in groups) if any(key in group for group in groups) else by_name
    return bool(getattr(optimizer, "adam_w_mode", in_groups))


# -- functions that the caller gives, checked when DeepSpeed calls them ----------------------------------------------


def _built_optimizer(function: Callable[..., Any], groups: list[dict[str, Any]]) -> Any:
    expected = [group["role"] for group in groups]
    optimizer = function(groups)
    if (found := [group.get("role") for group in optimizer.param_groups]) != expected:
        what = f"that the given function returned has {len(found)} param groups that are not the {len(expected)} given"
        _refuse(optimizer, f"{what}; {_FUNCTION}")
    decays = any(group.get("weight_decay") for group in optimizer.param_groups)
    if not (_is_adam(optimizer) and (_decoupled(optimizer) or not decays)):
        what = f"{_DECOUPLED} in Adam, the given function returned {type(optimizer).__name__}"
        raise ConfigError(f"completep: {what}; return AdamW")
    return optimizer


def _built_scheduler(function: Callable[..., Any], optimizer: Any) -> Any:
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = function(optimizer)
    refuse_flattened(scheduler, before, [group["lr"] for group in optimizer.param_groups])
    return scheduler
