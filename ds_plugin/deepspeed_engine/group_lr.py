"""Keep per-group learning rates through DeepSpeed's LR schedulers, some of which give one scalar to every param group.
Scalars are expanded to one value per group before DeepSpeed builds the scheduler, or it is refused; what is not seen
here, at its step (`check_rates`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_plugin.completep.param_groups import off_ratio
from ds_plugin.core.errors import ConfigError

#: DeepSpeed's and torch's schedulers that scale each group's own learning rate
_PROPORTIONAL = "WarmupCosineLR ConstantLR ExponentialLR LambdaLR LinearLR MultiStepLR PolynomialLR StepLR".split()
#: DeepSpeed's schedulers with absolute learning rates, and the defaults they would use
_ABSOLUTE: Mapping[str, Mapping[str, float | None]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": None},  # None: the groups' own
    "WarmupDecayLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001},
}


def expand_scheduler(scheduler: Mapping[str, Any], ratios: Sequence[float]) -> dict[str, Any]:
    """The JSON's ``scheduler`` section with every scalar learning rate expanded to one per group. ``ratios``: each
    group's learning rate over the base model's. Raises ConfigError: it would flatten the groups, or has other lists."""
    kind, params = str(scheduler.get("type")), dict(scheduler.get("params") or {})
    if kind in _PROPORTIONAL or (kind == "CosineAnnealingLR" and not params.get("eta_min")):
        return dict(scheduler)
    if kind not in _ABSOLUTE:
        what = f'{kind!r} sets the learning rate of all param groups alike and would undo "completep"'
        allowed = ", ".join(sorted([*_PROPORTIONAL, *_ABSOLUTE]))
        raise ConfigError(f"scheduler.type: {what}; write one of {allowed} (or CosineAnnealingLR without eta_min)")
    for key, default in _ABSOLUTE[kind].items():
        value = params.get(key, default)
        if isinstance(value, (int, float)):
            params[key] = [value * ratio for ratio in ratios]
        elif value is not None and len(value) != len(ratios):
            what = f'{len(value)} values for the {len(ratios)} param groups of "completep"'
            raise ConfigError(f"scheduler.params.{key}: {what}; write one number, which is scaled for each group")
    return {**scheduler, "params": params}


def check_peak(scheduler: Mapping[str, Any], lr: float) -> None:
    """Raise ConfigError for a scheduler whose own largest learning rate, which would win, is not the optimizer's."""
    kind, params = str(scheduler.get("type")), scheduler.get("params") or {}
    peak = {**_ABSOLUTE[kind], **params}["warmup_max_lr"] if kind in _ABSOLUTE else None
    if isinstance(peak, (int, float)) and peak != lr:
        said = "" if "warmup_max_lr" in params else ", DeepSpeed's default"
        what = f"{peak}{said}, and optimizer.params.lr is {lr}; the scheduler would train with its own"
        raise ConfigError(f"scheduler.params.warmup_max_lr: {what}, write the base model's in both")


def build_scheduler(function: Callable[[Any], Any], optimizer: Any) -> Any:
    """What a user's function of the optimizer returns. Raises ConfigError where it shows at once that it flattens the
    groups' learning rates."""
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = function(optimizer)
    seen: dict[str, Any] = {"lr": [group["lr"] for group in optimizer.param_groups]}
    seen |= {name: getattr(scheduler, name, None) or 0.0 for name in ("eta_min", "min_lrs", "max_lrs")}
    for name, value in seen.items():
        values = value if isinstance(value, list) else [value] * len(before)
        if off_ratio(values, before) is not None:
            what = f"{type(scheduler).__name__} has {name} {value!r} for param groups with learning rates {before}"
            raise ConfigError(f'lr_scheduler: {what}, and undoes "completep"; use LambdaLR, or describe it in the JSON')
    return scheduler
