"""Weights of the two residual modes into each other.

A model trained in the forward mode needs its multipliers wherever it is used; `fold` writes them into the weights, and
the result is an ordinary GPT that any code for its architecture runs. A model trained in the folded mode is one
already; `unfold` gives the plain weights of Table 1, as the forward mode would have trained them.

Both keep the attention scale out: where the head size differs from the base's, the model must be run with the
softmax_scale that `prepare` set (`rules.attention_scale`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from ds_plugin.errors import ConfigError
from megatron_patches.completep import rules
from megatron_patches.completep.config import CompletePConfig
from megatron_patches.completep.layers import check_gains, ratios_of
from megatron_patches.completep.roles import role_of


def fold(weights: Mapping[str, Any], config: Any, section: CompletePConfig, *, tied: bool) -> dict[str, Any]:
    """Weights of the forward mode with the multipliers folded in: those of a model without CompleteP.

    ``weights``: a GPTModel's ``state_dict()`` or a part of it (any tensor-parallel shard, any pipeline stage); values
    that are no tensors are passed on. ``config``: its TransformerConfig, from `prepare` or not. ``tied``: whether the
    output layer is the word embedding. Tensors keep their dtypes; those that do not change are not copied.

    Raises:
        ConfigError: the weights are of the folded mode, a name has no role, or the final norm's gains are 1 + weight
            where the multiplier of a tied output layer would go.
    """
    return _scaled(weights, config, section, tied, mode="forward", inverse=False)


def unfold(weights: Mapping[str, Any], config: Any, section: CompletePConfig, *, tied: bool) -> dict[str, Any]:
    """The inverse of `fold`, for weights of the folded mode: those of Table 1, for a model in the forward mode.

    Raises:
        ConfigError: the weights are of the forward mode, or a name has no role.
    """
    return _scaled(weights, config, section, tied, mode="folded", inverse=True)


def _scaled(
    weights: Mapping[str, Any], config: Any, section: CompletePConfig, tied: bool, *, mode: str, inverse: bool
) -> dict[str, Any]:
    if section.residual != mode:
        raise ConfigError(
            f'completep.residual: these weights were trained with "{section.residual}"; '
            f'{"unfold" if inverse else "fold"}() takes those of "{mode}"'
        )
    check_gains(config, tied=tied)
    ratios = ratios_of(config, section)
    scaled: dict[str, Any] = {}
    for name, value in weights.items():
        scale = 1.0
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
            scale = rules.fold_factor(role_of(name, folded=True, tied=tied), ratios, section.recipe)
        scaled[name] = value if scale == 1.0 else value / scale if inverse else value * scale
    return scaled
