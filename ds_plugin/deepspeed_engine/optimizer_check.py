"""The JSON's ``optimizer`` and ``scheduler``: DeepSpeed looks at them only when it builds them, so they are built once:
on one parameter on the CPU, by the class that DeepSpeed would take; for one that needs a kernel of its own (FusedAdam,
Lamb, Lion), its signature tells the names, and torch's class of that kind the values."""

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import optim

from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import MOST_RATE, nearest

_ONE = torch.nn.Parameter(torch.zeros(1, 1, device="cpu"))


def check(config: Mapping[str, Any], *, auto: bool) -> None:
    """Raises ConfigError: an unknown name, an unknown or missing parameter, or a value that the class refuses.
    ``auto``: ``total_num_steps`` may be "auto" yet."""
    zero = config.get("zero_optimization") or {}
    offloaded = (zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme")
    for section, usual in (("optimizer", "AdamW"), ("scheduler", "WarmupCosineLR")):
        if (found := config.get(section)) and not found.get("type"):
            raise ConfigError(f'{section}.type: missing, DeepSpeed ignores the section then; write e.g. "{usual}"')
    described, schedule = config.get("optimizer") or {}, config.get("scheduler") or {}
    name, params = described.get("type"), dict(described.get("params") or {})
    optimizer = _optimizer(name, params, offloaded) if name else optim.AdamW([_ONE])
    if schedule:
        _check_scheduler(schedule["type"], schedule.get("params"), optimizer, auto)


def _optimizer(name: str, params: dict[str, Any], offloaded: bool) -> optim.Optimizer:
    from deepspeed.ops import adagrad, adam, lamb, lion
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    where, own = f"optimizer.params of {name}", None
    kind: Any = optim.AdamW
    if (lower := name.lower()) not in DEEPSPEED_OPTIMIZERS:
        known = _classes(vars(optim), "zero_grad")
        _check_known("optimizer.type", name, "AdamW", known)
        kind = known[name]
    elif lower in ("adam", "adamw"):  # DeepSpeed takes these three out, too
        torchs, decoupled = params.pop("torch_adam", False), params.pop("adam_w_mode", True)
        params.pop("fp32_optimizer_states", None)
        kind = optim.AdamW if lower == "adamw" or decoupled else optim.Adam
        own = None if torchs else adam.DeepSpeedCPUAdam if offloaded else adam.FusedAdam
    elif lower == "adagrad":
        own, kind = adagrad.DeepSpeedCPUAdagrad if offloaded else None, optim.Adagrad
    elif lower in ("lamb", "lion"):
        own = lamb.FusedLamb if lower == "lamb" else lion.DeepSpeedCPULion if offloaded else lion.FusedLion
    if own is not None:
        for key in params:
            _check_known(where, key, "lr", {*_parameters(own)} - {"max_grad_norm"})  # which DeepSpeed refuses itself
    if own is not None or lower.startswith("mu"):  # Muon's and mup's own settings are theirs to look at
        params = {key: value for key, value in params.items() if key in _parameters(kind)}
    try:
        return kind([_ONE], **params)
    except Exception as error:  # whatever a value of the wrong type ends in
        raise ConfigError(f"{where}: {params!r} is refused by {kind.__name__}: {line_of(error)}") from None


def _check_scheduler(name: str, params: dict[str, Any] | None, optimizer: optim.Optimizer, auto: bool) -> None:
    from deepspeed.runtime import lr_schedules

    schedulers = _classes({**vars(optim.lr_scheduler), **vars(lr_schedules)}, "get_last_lr")  # DeepSpeed's come first
    _check_known("scheduler.type", name, "WarmupCosineLR", schedulers)
    if params is None:  # of an optimizer DeepSpeed does without
        raise ConfigError(f"scheduler.params: missing; write {{}} for the defaults of {name}")
    params = dict(params)
    where, known = f"scheduler.params of {name}", _parameters(schedulers[name])
    for key, value in params.items():
        _check_known(where, key, next(iter(known)), known)
        least, most = -1 if key.startswith("last_") else 0, MOST_RATE if "lr" in key.split("_") else 1e15
        groups = isinstance(value, (list, tuple)) and ("lr" in key or "mom" in key)  # one for each param group
        for number in value if groups else [value]:
            wanted = _is_number(known[key].default) or _is_number(number)
            if wanted and not (_is_number(number) and least <= number <= most):
                raise ConfigError(f"scheduler.params.{key}: {value!r}; write a number from {least} to {most:g}")
    types = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
    _check_known("scheduler.params.warmup_type", params.get("warmup_type", types[0]), types[0], types)
    total: Any = params.get("total_num_steps")
    if _is_number(total) and (total < 1 or total != int(total)):
        raise ConfigError(f"scheduler.params.total_num_steps: {total!r}; write a whole number of steps")
    if auto and total == "auto":
        params["total_num_steps"] = 10**9
    # a learning rate for each param group: here is one group
    one = {key: v[0] if isinstance(v, (list, tuple)) and v and "lr" in key else v for key, v in params.items()}
    before = logging.root.manager.disable
    logging.disable()  # DeepSpeed's constructors warn of themselves
    try:
        schedulers[name](optimizer, **one)
    except Exception as error:
        raise ConfigError(f"{where}: {params!r} is refused: {line_of(error)}") from None
    finally:
        logging.disable(before)


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """Of the class, but the first: what it is built on."""
    return dict(list(inspect.signature(kind).parameters.items())[1:])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _classes(names: Mapping[str, Any], method: str) -> dict[str, Any]:
    bases = (optim.Optimizer, optim.lr_scheduler.LRScheduler)
    return {n: k for n, k in names.items() if inspect.isclass(k) and hasattr(k, method) and k not in bases}


def _check_known(field: str, name: Any, usual: str, known: Iterable[str]) -> None:
    if name not in list(known):
        guess = nearest(str(name), known)
        hint = f'did you mean "{guess}"?' if guess else f'write "{usual}", or another of {", ".join(sorted(known))}'
        raise ConfigError(f"{field}: {name!r} is not known; {hint}")


def line_of(error: Exception) -> str:
    """An exception's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
