"""Roles to optimizer param groups: one group per role, with the learning rate, weight decay and eps of Table 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_plugin.errors import ConfigError
from megatron_patches.completep.config import CompletePConfig
from megatron_patches.completep.rules import Ratios, Role


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
    """Groups for any torch-style optimizer: ``params, role, lr, weight_decay, eps``, in the order of `Role`; and
    ``betas`` where the recipe changes them.

    The embeddings come first: their multipliers are 1, so the first group's learning rate, which hosts log, is the base
    model's. Parameters that do not require gradients are left out; roles without parameters make no group.
    """
    groups = []
    for role in Role:
        params = [p for name, p in model.named_parameters() if roles[name] is role and p.requires_grad]
        if params:
            m = section.multipliers(role, ratios)
            group: dict[str, Any] = {
                "params": params,
                "role": role.value,
                "lr": lr * m.lr,
                "weight_decay": weight_decay * m.weight_decay,
                "eps": eps * m.eps,
            }
            if m.one_minus_beta != 1.0:
                group["betas"] = scaled_betas(betas, m.one_minus_beta)
            groups.append(group)
    return groups


def scaled_betas(betas: Sequence[float], one_minus_beta: float) -> tuple[float, ...]:
    """AdamW's betas with 1 - beta multiplied.

    Raises:
        ConfigError: the multiplied value is above 1, where a moment would not average at all.
    """
    scaled = tuple(1 - (1 - beta) * one_minus_beta for beta in betas)
    if min(scaled) < 0:
        raise ConfigError(
            f"completep: batch_ratio / token_ratio = {one_minus_beta:g} times 1 - beta of betas {list(betas)} is above "
            "1; write larger betas, or check the two ratios"
        )
    return scaled
