"""Roles to optimizer param groups: one group per role, with the learning rate, weight decay and eps of Table 1; and
whether a step's groups still stand in those ratios."""

import functools
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.rules import Multipliers, Ratios, Role, kind_of
from ds_plugin.completep.supported import unwrapped
from ds_plugin.core.errors import ConfigError, StateError, gathered

_UNREAD = "completep: the param groups hold %s in tensors on a device: that it keeps the roles' ratios is not checked"
_warn_once = functools.cache(logging.getLogger("ds_plugin").warning)
_NOTHING = 1e-14  # a learning rate or decay this small moves no weight
#: finished models that no optimizer knows the roles of, and what ends their watch
_awaited: "weakref.WeakKeyDictionary[torch.nn.Module, weakref.finalize[Any, Any]]" = weakref.WeakKeyDictionary()


def build_param_groups(
    model: torch.nn.Module,
    roles: Mapping[str, Role],
    ratios: Ratios,
    section: CompletePConfig,
    *,
    lr: float,
    weight_decay: float,
    eps: float,
    betas: Sequence[float] = (0.9, 0.999),
) -> list[dict[str, Any]]:
    """Groups for any torch-style optimizer: ``params``, ``role`` and `group_settings`, in the order of `Role`: the
    embeddings come first, since their multipliers are 1, and frameworks log the first group's learning rate. Parameters
    that do not require gradients are left out; roles without parameters make no group."""
    groups, model = [], unwrapped(model)
    for role in Role:
        if params := [p for name, p in model.named_parameters() if roles[name] is role and p.requires_grad]:
            row = section.multipliers(role, ratios)
            settings = group_settings(row, lr=lr, weight_decay=weight_decay, eps=eps, betas=betas)
            groups.append({"params": params, "role": role.value, **settings})
    groups_built(model)
    return groups


def refuse_unused(section: CompletePConfig, roles: Iterable[Role]) -> None:
    """Raises ConfigError, on every rank: ``lr_multipliers`` names a role that no parameter of the model has, ``roles``
    being those of this rank's part. Every rank calls it."""
    found = {name.value for role in roles for name in (role, kind_of(role))}
    found = set().union(*gathered(found)) if section.lr_multipliers else found
    if unused := sorted(section.lr_multipliers.keys() - found):
        what = f"no parameter of the model has the role {unused[0]!r}; it has {', '.join(sorted(found))}"
        raise ConfigError(f"completep.lr_multipliers: {what}")


def group_settings(
    row: Multipliers, *, lr: float, weight_decay: float, eps: float, betas: Sequence[float]
) -> dict[str, Any]:
    """From the base model's values: ``lr, lr_scale, weight_decay, eps``, and ``betas`` where the recipe changes them,
    which raises as `scaled_betas` does. ``lr_scale``: for loops that write the rate themselves: ``lr * lr_scale``."""
    settings: dict[str, Any] = {"lr": lr * row.lr, "lr_scale": row.lr}
    settings |= {"weight_decay": weight_decay * row.weight_decay, "eps": eps * row.eps}
    if row.one_minus_beta != 1.0:
        settings["betas"] = scaled_betas(betas, row.one_minus_beta)
    return settings


def scaled_betas(betas: Sequence[float], one_minus_beta: float) -> tuple[float, ...]:
    """AdamW's betas with 1 - beta multiplied. Raises ConfigError: one is above 1, where a moment would not average."""
    scaled = tuple(1 - (1 - beta) * one_minus_beta for beta in betas)
    if min(scaled) < 0:
        what = f"batch_ratio / token_ratio = {one_minus_beta:g} times 1 - beta of betas {list(betas)} is above 1"
        raise ConfigError(f"completep: {what}; write larger betas, or check the two ratios")
    return scaled


def await_groups(model: torch.nn.Module) -> None:
    """Until `groups_built`, refuse an optimizer's step once gradients have reached the model: it has not been told the
    roles. One that holds only other models' own parameters, as of a probe on this one, may step."""
    watching: list[Any] = []  # the hook on every optimizer's step, once there is a gradient

    def gradient_came(gradient: torch.Tensor) -> None:
        if not watching:
            watching.append(register_optimizer_step_pre_hook(_refuse_step))

    handles = [p.register_hook(gradient_came) for p in model.parameters() if p.requires_grad]

    def remove() -> None:
        for handle in (*handles, *watching):
            handle.remove()

    _awaited[model] = weakref.finalize(model, remove)


def groups_built(model: torch.nn.Module) -> None:
    """A model's optimizer has been told its roles: `await_groups` is over, and nothing of it is left."""
    if (end := _awaited.pop(model, None)) is not None:
        end()


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # a framework's optimizer steps copies and parts of some model's parameters, plain tensors: of which is not to tell
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    awaited = {id(p) for model in _awaited for p in model.parameters()}
    if all(type(p) is torch.nn.Parameter and id(p) not in awaited for p in stepped) and stepped:
        return
    raise StateError(
        f"completep: {type(optimizer).__name__} steps, and a model that finish() or prepare_decoder() has scaled has "
        "gradients, while no optimizer was built with its roles' param groups; build it by megatron_patches.completep."
        "optimizer.build_optimizer or ds_plugin.initialize, or on the groups of ds_plugin.completep.optimizer_groups"
    )


def check_rates(
    groups: Sequence[Mapping[str, Any]], roles: Sequence[str], rows: Mapping[str, Multipliers], *, written_by: str
) -> None:
    """Raises ConfigError for a step whose groups' learning rates or weight decays are not in the ratios of their roles.
    ``roles``: each group's; ``rows``: each role's multipliers; ``written_by``: who has written them. What all groups
    share is the schedule's to set, zero too. Those on a device cannot be read without waiting: said once, unchecked."""
    for name in ("lr", "weight_decay"):
        found = [group[name] for group in groups]
        if any(isinstance(value, torch.Tensor) and value.device.type != "cpu" for value in found):
            _warn_once(_UNREAD, name)
        elif off := off_ratio(values := [float(value) for value in found], [getattr(rows[r], name) for r in roles]):
            at, expected = off
            have, want = (", ".join(map("{} {:g}".format, roles, each)) for each in (values, expected))
            remedy = ', such as lr * group["lr_scale"]' if name == "lr" else ""
            raise ConfigError(
                f"completep: at this step the role {roles[at]} has {name} {values[at]:g}, expected {expected[at]:g}: "
                f"the param groups have {have}, their roles' ratios ask for {want}; {written_by} must give each group "
                f"its own, scaled by one factor for all{remedy}"
            )


def off_ratio(found: Sequence[float], multipliers: Sequence[float]) -> tuple[int, list[float]] | None:
    """Which value is not its multiplier times what all share (told by the first that is not zero), and what all should
    be; None where each is, to 1e-6."""
    shared = next((value / m for value, m in zip(found, multipliers, strict=True) if value and m), 0.0)
    expected = [shared * m for m in multipliers]
    for at, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        if not abs(value - wanted) <= 1e-6 * abs(wanted) + _NOTHING:  # a rate that is no number is not in it either
            return at, expected
    return None
