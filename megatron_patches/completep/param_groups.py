"""Roles to optimizer param groups: one group per role, with the learning rate, weight decay and eps of Table 1."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_patches.completep import rules
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
) -> list[dict[str, Any]]:
    """Groups for any torch-style optimizer: ``params, role, lr, weight_decay, eps``, in the order of `Role`.

    The embeddings come first: their multipliers are 1, so the first group's learning rate, which hosts log, is the base
    model's. Parameters that do not require gradients are left out; roles without parameters make no group.
    """
    groups = []
    for role in Role:
        params = [p for name, p in model.named_parameters() if roles[name] is role and p.requires_grad]
        if params:
            m = rules.multipliers(role, ratios, eps_scope=section.eps_scope)
            groups.append(
                {
                    "params": params,
                    "role": role.value,
                    "lr": lr * m.lr,
                    "weight_decay": weight_decay * m.weight_decay,
                    "eps": eps * m.eps,
                }
            )
    return groups
