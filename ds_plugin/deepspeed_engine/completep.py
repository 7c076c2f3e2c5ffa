"""CompleteP on DeepSpeed: `set_up` runs before the engine is built, `CompleteP` is what stays on it. In DeepSpeed's
pipeline both work on one stage of the model, a `PipelineGPT`."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import describe, finished_roles, in_force, ratios_of
from ds_plugin.completep.muon import with_muon
from ds_plugin.completep.param_groups import build_param_groups, check_rates, refuse_unused
from ds_plugin.completep.rules import Ratios, Role
from ds_plugin.completep.supported import bare_model, gpt_of, is_a
from ds_plugin.core.errors import CheckpointError, ConfigError, StateError, gathered
from ds_plugin.core.patch import replaced
from ds_plugin.deepspeed_engine import compat
from ds_plugin.deepspeed_engine.gradient_norm import rescaled
from ds_plugin.deepspeed_engine.group_lr import build_scheduler, check_peak, expand_scheduler

#: Adams that say by ``adam_w_mode`` whether their decay is decoupled (DeepSpeed, apex, TransformerEngine), and by name
_BY_MODE, _BY_NAME = ("FusedAdam", "DeepSpeedCPUAdam"), ("AdamW", "AdamW8bit")
_FUNCTION = "give a function of the param groups: optimizer=lambda groups: MyAdam(groups)"
_RATES = ("adam_lr", "muon_lr")  # of what DeepSpeed's Muon leaves to Adam, and of what it trains; in place of lr
_DECOUPLED = "the rules hold for decoupled weight decay"
_SCHEDULER = "describe it in the JSON or give a function: lr_scheduler=lambda optimizer: MyScheduler(optimizer)"


def set_up(section: CompletePConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Build a finished model's param groups, from the hyperparameters in the JSON or of a built optimizer, whose groups
    are replaced in place.

    ``given``: the arguments of ``deepspeed.initialize``, ``config`` a dict. Returns those to give in their place: the
    groups (None with a built optimizer), an optimizer's or a scheduler's function checked, and the config with the
    scheduler's scalars expanded. Raises ConfigError: the model was not prepared, the optimizer is no AdamW or Muon, or
    not over the model's parameters, or the scheduler would flatten the groups."""
    model, optimizer, lr_scheduler, config = (given[key] for key in ("model", "optimizer", "lr_scheduler", "config"))
    whole = bare_model(gpt_of(model))
    section = in_force(whole, section)
    if given["model_parameters"] is not None and _stray(model, given["model_parameters"]):
        what = "model_parameters= are not all of the model's, and the method builds the param groups itself"
        raise ConfigError(f"completep: {what}; leave it out, or give model.parameters()")
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise ConfigError(f"completep: lr_scheduler is built already, on other param groups; {_SCHEDULER}")
    described = config.get("optimizer") or {}
    built = isinstance(optimizer, torch.optim.Optimizer)
    kind = None if optimizer is not None else str(described.get("type")).lower()
    base = _base_of(optimizer, model) if built else _base_of_json(described, kind)
    roles = finished_roles(whole, section)
    refuse_unused(section, roles.values())
    ratios = _ratios(whole.config, section, described["params"] if kind == "muon" else None)
    groups = build_param_groups(whole, roles, ratios, section, **base)
    for group in groups if kind == "muon" else ():
        group[compat.USE_MUON] = muon = Role(group["role"]) in ratios.muon.rates
        defaults = {"momentum": 0.95, "ns_method": "gram"} if muon else {"betas": tuple(base["betas"])}
        group |= {name: described["params"].get(name, value) for name, value in defaults.items()}
    if gpt_of(model) is not model:
        groups = divided(groups, max(gathered(len(groups))))
    changed: dict[str, Any] = {"model_parameters": None if built else groups}
    if scheduler := config.get("scheduler"):
        check_peak(scheduler, base["lr"])
        changed["config"] = {**config, "scheduler": expand_scheduler(scheduler, [g["lr"] / base["lr"] for g in groups])}
    if lr_scheduler is not None:
        changed["lr_scheduler"] = functools.partial(build_scheduler, lr_scheduler)
    if built:
        kept = {key: value for key, value in optimizer.param_groups[0].items() if key != "param_names"}
        optimizer.param_groups[:] = [{**kept, **group} for group in groups]
    elif optimizer is not None:
        changed["optimizer"] = functools.partial(_built_optimizer, optimizer)
    return changed


class CompleteP:
    """The method on a built engine: the look at the groups before each step, what checkpoints hold of them, and the
    gradient norm in folded mode."""

    def __init__(self, engine: Any, section: CompletePConfig):
        """Nothing changes on the engine before `install`. Raises as `rescaled` does."""
        section = in_force(engine.module, section)
        self.engine, self.section, self._optimizer = engine, section, engine.basic_optimizer
        compat.need(engine, compat.TAKE_STEP)
        self._mine = [group["role"] for group in self._optimizer.param_groups]  # a universal load may write over them
        # stages of a pipeline have different roles, and some more than one group of one
        stages = gathered(self._mine) if compat.is_pipeline(engine) else [self._mine]
        self._roles = [role.value for role in Role if any(role.value in stage for stage in stages)]
        by_muon = [group.get(compat.USE_MUON, False) for group in self._optimizer.param_groups]
        ratios = _ratios(engine.module.config, section, engine.optimizer_params() if any(by_muon) else None)
        self._rows = {role: section.multipliers(Role(role), ratios) for role in self._mine}
        factors = [section.fold_factor(Role(role), ratios) for role in self._mine]
        if any(by_muon) and compat.wrapper_of(engine) in compat.NORM_OF_UPDATES:
            if clipping := engine.gradient_clipping():
                what = f"ZeRO {engine.zero_optimization_stage()} clips what Muon makes of gradients by it, not these"
                raise ConfigError(f"completep: gradient_clipping is {clipping}: {what}; write 0.0")
            factors = [1.0 if updates else factor for updates, factor in zip(by_muon, factors, strict=True)]
        self._norm = list(rescaled(engine, factors)) if section.residual == "folded" else []

    def describe(self) -> str:
        return describe(self.engine.module, self.section)

    def install(self, undo: contextlib.ExitStack) -> None:
        """Look at the groups before each step, and have the engine clip by the forward mode's gradient norm."""
        undo.enter_context(compat.before_steps(self.engine, self._check_groups))
        for method in self._norm:
            undo.enter_context(replaced(*method))

    def _check_groups(self) -> None:
        """Refuse a step, before it changes anything, whose groups are not in their roles' ratios."""
        groups = self._optimizer.param_groups
        if len(groups) != len(self._mine):
            found = f"the optimizer has {len(groups)} param groups, and {len(self._mine)} were built"
            raise StateError(f"completep: {found}; parameters added later have no role, build the model with them")
        scheduler = getattr(self.engine.lr_scheduler, "scheduler", self.engine.lr_scheduler)  # inside a TokenScheduler
        by = "the training loop" if scheduler is None else f"the scheduler {type(scheduler).__name__}"
        check_rates(groups, self._mine, self._rows, written_by=f"{by}, or what else writes them,")

    def state(self) -> list[dict[str, Any]]:
        """Every role's settings in JSON types, which a universal checkpoint loses under ZeRO 3; of all stages of a
        pipeline, where every rank calls it."""
        names = ("lr", "lr_scale", "initial_lr", "weight_decay", "eps")
        settings = []
        for group in self._optimizer.param_groups:
            numbers = {name: float(group[name]) for name in names if name in group}
            betas = {"betas": [float(beta) for beta in group["betas"]]} if "betas" in group else {}
            settings.append({"role": group["role"], **numbers, **betas})
        stages = gathered(settings) if compat.is_pipeline(self.engine) else [settings]
        of_role = {kept["role"]: kept for stage in stages for kept in stage}
        return [of_role[role] for role in self._roles]

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Stamp saved settings on the groups, after DeepSpeed has loaded a universal checkpoint: ZeRO 3 gives every
        group the first one's there; and one step counter to all, which each would advance. Raises CheckpointError."""
        of_role = {settings["role"]: settings for settings in state}
        if list(of_role) != self._roles:
            what = f"param groups for the roles {', '.join(of_role)}, this run for {', '.join(self._roles)}"
            raise CheckpointError(f"completep: the checkpoint has {what}; freeze the same parameters")
        for group, role in zip(self._optimizer.param_groups, self._mine, strict=True):
            group.update(of_role[role])
            group |= {"betas": tuple(group["betas"])} if "betas" in group else {}
        for moments in self._optimizer.state.values():
            if torch.is_tensor(moments.get("step")):
                moments["step"] = moments["step"].clone()


def divided(groups: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The same groups as ``count`` of them: the largest is halved until there are as many. ZeRO takes the gradient norm
    by one all-reduce over all stages for each group, so all stages need the same number; which of them meet does not
    matter, as the squares of all are added up."""
    groups = list(groups)
    while len(groups) < count:
        at = max(range(len(groups)), key=lambda i: len(groups[i]["params"]))
        params = groups[at]["params"]
        assert len(params) > 1, "a stage has at least a layer, which has more parameters than there are roles"
        half = len(params) // 2
        groups[at : at + 1] = [{**groups[at], "params": part} for part in (params[:half], params[half:])]
    return groups


def _stray(model: Any, given: Iterable[Any]) -> str:
    """Which trainable parameter of the model these lack, or which is not the model's; empty: neither."""
    listed, every = {id(p): p for p in given}, {id(p) for p in model.parameters()}
    if others := [p for p in listed.values() if id(p) not in every]:
        return f"has a parameter of shape {list(getattr(others[0], 'shape', ()))} that is not the model's"
    lacks = (name for name, p in model.named_parameters() if p.requires_grad and id(p) not in listed)
    return next((f"lacks the parameter {name}" for name in lacks), "")


def _base_of_json(described: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """The base model's hyperparameters from the JSON's ``optimizer``. ``kind``: its type; None: a function is given."""
    params, muon = described.get("params") or {}, kind == "muon"
    if kind not in (None, "adam", "adamw", "muon"):
        what = 'the rules hold for AdamW and Muon, write "AdamW" or "Muon"'
        raise ConfigError(f"completep: optimizer.type is {described.get('type')!r}; {what}")
    if not (decoupled := params.get("adam_w_mode", True)):
        what = f"optimizer.params.adam_w_mode is {decoupled!r}, which adds weight decay to the gradient"
        raise ConfigError(f"completep: {what}; {_DECOUPLED}, remove it")
    halves = [{**params, "lr": params[rate]} if rate in params else params for rate in (_RATES if muon else ("lr",))]
    for half in halves:
        _check_numbers(half, "optimizer.params.{}")  # implementations differ in their default decay
    if muon and params.get("per_head_muon"):
        raise ConfigError("completep: optimizer.params.per_head_muon is true: no rule covers it; remove it")
    defaults = {"eps": 1e-10, "betas": (0.9, 0.95)} if muon else {"eps": 1e-8, "betas": (0.9, 0.999)}
    return defaults | {name: halves[0][name] for name in ("lr", "weight_decay", "eps", "betas") if name in halves[0]}


def _ratios(config: Any, section: CompletePConfig, muon: Mapping[str, Any] | None) -> Ratios:
    """A model's. ``muon``: the JSON's params of DeepSpeed's Muon, None without it. Raises as `with_muon` does."""
    ratios = ratios_of(config, section)
    if muon is None:
        return ratios
    adams, muons = (muon.get(rate, muon.get("lr")) for rate in _RATES)
    return with_muon(ratios, config, section, "shape_scaling", lr=muons / adams)


def _base_of(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, Any]:
    """The base model's hyperparameters from an optimizer that is built already and has done nothing yet."""
    groups = optimizer.param_groups
    if not _is_adam(optimizer):
        what = "is built already and is no Adam, whose param groups could be replaced"
        _refuse(optimizer, f'{what}; describe AdamW in the JSON ("optimizer"), or {_FUNCTION}')
    if optimizer.state:
        remedy = "give one that has not stepped or loaded anything, and load checkpoints through the engine"
        _refuse(optimizer, f"has state for {len(optimizer.state)} parameters; {remedy}")
    if any("initial_lr" in group for group in groups):
        _refuse(optimizer, f"has a learning rate scheduler already, for other param groups; {_SCHEDULER}")
    if stray := _stray(model, (p for group in groups for p in group["params"])):
        _refuse(optimizer, f"{stray}; build it from model.parameters(), or freeze what it shall not train")
    decay = next((group["weight_decay"] for group in groups if group["weight_decay"] != 0), 0.0)
    for name in sorted({key for group in groups for key in group} - {"params", "param_names"}):
        values = [group.get(name) for group in groups if name != "weight_decay" or group[name] != 0]  # some have none
        if others := [value for value in values if value != values[0]]:
            remedy = "give all the base model's: what each role gets, and which decay, is Table 1's to say"
            _refuse(optimizer, f"has groups with {name} {values[0]!r} and {others[0]!r}; {remedy}")
    if decay != 0 and not _decoupled(optimizer):
        _refuse(optimizer, f"adds weight_decay {decay!r} to the gradient; {_DECOUPLED}, give AdamW")
    base = {**{name: groups[0][name] for name in ("lr", "eps", "betas")}, "weight_decay": decay}
    _check_numbers(base, f"{{}} of the optimizer {type(optimizer).__name__}")
    return base


def _refuse(optimizer: Any, what: str) -> NoReturn:
    raise ConfigError(f"completep: the optimizer {type(optimizer).__name__} {what}")


def _check_numbers(params: Mapping[str, Any], what: str) -> None:
    """The learning rate and weight decay that all roles' are multiples of. ``what``: around their names."""
    for name, example in (("lr", 0.001), ("weight_decay", 0.1)):
        value: Any = params.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or value < 0 or (value == 0 and name == "lr"):
            found = f"{value!r}, which is not a usable number" if name in params else "missing"
            raise ConfigError(f"completep: {what.format(name)} is {found}; write the base model's, e.g. {example}")


def _is_adam(optimizer: Any) -> bool:
    """torch's Adam and AdamW; other libraries' by name, so that none is imported here."""
    return isinstance(optimizer, torch.optim.Adam) or is_a(optimizer, *_BY_MODE, *_BY_NAME)


def _decoupled(optimizer: Any) -> bool:
    """Whether an Adam decays weights apart from the gradient: some say so on themselves, torch in its groups, others by
    their name."""
    if hasattr(optimizer, "adam_w_mode"):
        return bool(optimizer.adam_w_mode)
    said = [group["decoupled_weight_decay"] for group in optimizer.param_groups if "decoupled_weight_decay" in group]
    return all(said) if said else is_a(optimizer, *_BY_NAME)


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
