"""CompleteP on DeepSpeed: the param groups of any optimizer it builds, and schedulers that keep them apart.

The method itself is in `megatron_patches.completep`.
"""

from typing import Any

import torch

from ds_plugin.errors import ConfigError
from ds_plugin.group_lr import expand_scheduler
from megatron_patches.completep import build_param_groups, finished_roles, ratios_of
from megatron_patches.completep.config import CompletePConfig


def set_up(
    model: Any,
    section: CompletePConfig,
    host_config: dict[str, Any],
    optimizer: Any,
    model_parameters: Any,
    lr_scheduler: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Finish the model and build its param groups; returns them, and the config with the scheduler's scalars expanded.

    Raises:
        ConfigError: the model was not prepared, the optimizer is no AdamW or has groups already, or the scheduler would
            flatten them.
    """
    if model_parameters is not None:
        raise ConfigError("completep: builds the optimizer's param groups itself; do not give model_parameters=")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"completep: the optimizer {type(optimizer).__name__} is built already, with param groups of its own; "
            'describe it in the JSON ("optimizer") or give a function of the param groups: optimizer=lambda groups: '
            "MyAdam(groups)"
        )
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise ConfigError(
            "completep: lr_scheduler is built already, on other param groups; describe it in the JSON or give a "
            "function"
        )
    described = host_config.get("optimizer") or {}
    params = described.get("params") or {}
    if optimizer is None and str(described.get("type")).lower() not in ("adam", "adamw"):
        raise ConfigError(
            f'completep: optimizer.type is {described.get("type")!r}; the rules hold for AdamW, write "AdamW"'
        )
    if params.get("adam_w_mode") is False:
        raise ConfigError(
            "completep: optimizer.params.adam_w_mode is False, which adds weight decay to the gradient; the rules "
            "hold for decoupled weight decay, remove it"
        )
    for name, example in (("lr", 0.001), ("weight_decay", 0.1)):  # implementations differ in their default decay
        value = params.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (name == "lr" and value == 0):
            found = "missing" if name not in params else f"{value!r}, which is not a usable number"
            raise ConfigError(f"completep: optimizer.params.{name} is {found}; write the base model's, e.g. {example}")
    base_lr = params["lr"]
    roles = finished_roles(model, section)
    groups = build_param_groups(
        model,
        roles,
        ratios_of(model.config, section),
        section,
        lr=base_lr,
        weight_decay=params["weight_decay"],
        eps=params.get("eps", 1e-8),
        betas=params.get("betas", (0.9, 0.999)),
    )
    if host_config.get("scheduler"):
        ratios = [group["lr"] / base_lr for group in groups]
        host_config = {**host_config, "scheduler": expand_scheduler(host_config["scheduler"], ratios)}
    return groups, host_config
