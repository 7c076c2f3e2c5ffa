"""Keep per-group learning rates through DeepSpeed's LR schedulers.

Some take one scalar learning rate and give it to every param group, which would undo CompleteP. Scalars are expanded to
one value per group before DeepSpeed builds the scheduler; one that offers no such setting is refused. Whatever is not
seen here is refused at the step that it would flatten (`param_groups.check_rates`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ds_plugin.completep.param_groups import off_ratio
from ds_plugin.core.errors import ConfigError

#: DeepSpeed's and torch's schedulers that scale each group's own learning rate
_PROPORTIONAL = (
    "WarmupCosineLR", "ConstantLR", "ExponentialLR", "LambdaLR", "LinearLR", "MultiStepLR", "PolynomialLR", "StepLR",
)  # fmt: skip
#: DeepSpeed's schedulers with absolute learning rates, and the defaults they would use
_ABSOLUTE: Mapping[str, Mapping[str, float | None]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": None},  # None: the groups' own
    "WarmupDecayLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001},
}


def expand_scheduler(scheduler: Mapping[str, Any], ratios: Sequence[float]) -> dict[str, Any]:
    """The JSON's ``scheduler`` section with every scalar learning rate expanded to one per group.

    ``ratios``: each group's learning rate over the base model's.

    Raises:
        ConfigError: the scheduler would flatten the groups, or a given list has another number of groups.
    """
    kind, params = str(scheduler.get("type")), dict(scheduler.get("params") or {})
    if kind in _PROPORTIONAL or (kind == "CosineAnnealingLR" and not params.get("eta_min")):
        return dict(scheduler)
    if kind not in _ABSOLUTE:
        allowed = ", ".join(sorted([*_PROPORTIONAL, *_ABSOLUTE]))
        raise ConfigError(
            f'scheduler.type: {kind!r} sets the learning rate of all param groups alike and would undo "completep"; '
            f"write one of {allowed} (CosineAnnealingLR without eta_min also keeps the groups apart)"
        )
    for key, default in _ABSOLUTE[kind].items():
        value = params.get(key, default)
        if isinstance(value, (list, tuple)):
            if len(value) != len(ratios):
                what = f'{len(value)} values for the {len(ratios)} param groups of "completep"'
                raise ConfigError(f"scheduler.params.{key}: {what}; write one number, which is scaled for each group")
        elif value is not None:
            params[key] = [value * ratio for ratio in ratios]
    return {**scheduler, "params": params}


def check_peak(scheduler: Mapping[str, Any], lr: float) -> None:
    """Raise ConfigError for a scheduler whose own largest learning rate, which would win, is not the optimizer's."""
    kind, params = str(scheduler.get("type")), scheduler.get("params") or {}
    peak = {**_ABSOLUTE[kind], **params}["warmup_max_lr"] if kind in _ABSOLUTE else None
    if isinstance(peak, (int, float)) and peak != lr:
        said = "" if "warmup_max_lr" in params else ", DeepSpeed's default"
        raise ConfigError(
            f"scheduler.params.warmup_max_lr: {peak}{said}, and optimizer.params.lr is {lr}; the scheduler would train "
            "with its own, write the base model's learning rate in both"
        )


def refuse_flattened(scheduler: Any, before: Sequence[float], after: Sequence[float]) -> None:
    """Raise ConfigError for what shows of a flattening scheduler as soon as a user's function has built it.

    ``before``, ``after``: each group's learning rate. Its ``eta_min``, ``min_lrs`` and ``max_lrs`` are looked at too.
    """
    settings = {name: getattr(scheduler, name, None) or 0.0 for name in ("eta_min", "min_lrs", "max_lrs")}
    for name, value in {"lr": list(after), **settings}.items():
        values = value if isinstance(value, list) else [value] * len(before)
        if off_ratio(values, before) is not None:
            raise ConfigError(
                f'lr_scheduler: {type(scheduler).__name__} has {name} {value!r} for param groups of "completep" with '
                f"learning rates {list(before)}, which undoes their ratios; use one that scales each group's own, such "
                "as LambdaLR, or describe it in the JSON"
            )
