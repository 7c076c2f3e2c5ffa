"""The table a user wants to see before spending money: what every role gets in this model against its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_plugin.config import PluginConfig, load_json
from ds_plugin.config_model import parse_section
from ds_plugin.errors import ConfigError
from megatron_patches.completep import rules
from megatron_patches.completep.config import CompletePConfig
from megatron_patches.completep.rules import Role
from megatron_patches.gpt import GPTConfig

_WHAT = {
    Role.EMBEDDING: "token and position embeddings",
    Role.HIDDEN: "matrices inside a block",
    Role.BLOCK_NORM: "norms inside a block",
    Role.QK_NORM: "norms on queries and keys",
    Role.BLOCK_BIAS: "biases inside a block",
    Role.FINAL_NORM: "final norm",
    Role.UNEMBEDDING: "output matrix",
}


def rules_table(source: str | Path | Mapping[str, Any]) -> str:
    """The table for the ``model``, ``completep`` and ``optimizer`` sections of a config, as aligned text.

    The minimum learning rate is what the ``scheduler`` section decays to; "-" where it cannot be told.

    Raises:
        ConfigError: a section is missing or wrong.
    """
    config = load_json(source)
    section = PluginConfig.from_dict(config).completep
    if section is None:
        raise ConfigError('completep: not enabled in this file; write "completep": {"enabled": true, ...}')
    if "model" not in config:
        raise ConfigError('model: missing; write {"num_layers": ..., "hidden_size": ..., ...} of the model to train')
    model = parse_section(GPTConfig, "model", config["model"])
    params = (config.get("optimizer") or {}).get("params") or {}
    if "lr" not in params:
        raise ConfigError("completep: optimizer.params.lr is missing; write the base model's learning rate")
    return "\n".join(_lines(model, section, params, config.get("scheduler") or {}))


def minimum_ratio(scheduler: Mapping[str, Any]) -> float | None:
    """The smallest learning rate after warmup over the largest, or None when the scheduler is not one known here."""
    params = scheduler.get("params") or {}
    match scheduler.get("type"):
        case None | "WarmupLR":
            return 1.0
        case "WarmupDecayLR":
            return params.get("warmup_min_lr", 0.0) / params.get("warmup_max_lr", 0.001)
        case "WarmupCosineLR":
            return params.get("cos_min_ratio", 0.0001)
    return None


def _lines(model: GPTConfig, section: CompletePConfig, params: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Any:
    ratios = section.ratios(model.hidden_size, model.num_layers)
    head = model.hidden_size // model.num_attention_heads
    base_head = section.base_head_dim or head
    yield (
        f"recipe {section.recipe}, alpha {section.alpha:g}: width {model.hidden_size} / {section.base_width} = m_N "
        f"{ratios.m_N:g}, depth {model.num_layers} / {section.base_depth} = m_L {ratios.m_L:g}"
    )
    yield (
        f"residual branches x {rules.residual_multiplier(ratios, section.recipe):g}, logits x "
        f"{rules.logit_multiplier(ratios, section.recipe, tied=model.tie_embeddings):g}, q.k x "
        f"{rules.attention_scale(head, base_head, section.recipe):g}"
    )
    rows = [("role", "parameters", "init std", "lr", "min lr", "weight decay", "eps")]
    smallest = minimum_ratio(scheduler)
    for role in Role:
        if role is Role.UNEMBEDDING and model.tie_embeddings or role is Role.QK_NORM:
            continue  # this model has none
        if role is Role.BLOCK_BIAS and not model.bias:
            continue
        m = section.multipliers(role, ratios)
        drawn = role in (Role.EMBEDDING, Role.HIDDEN, Role.UNEMBEDDING)
        lr = params["lr"] * m.lr
        rows.append(
            (
                role.value,
                _WHAT[role],
                f"{model.init_std * m.init_std:.4g}" if drawn else "1 / 0",
                f"{lr:.4g}",
                "-" if smallest is None else f"{lr * smallest:.4g}",
                f"{params.get('weight_decay', 0.0) * m.weight_decay:.4g}",
                f"{params.get('eps', 1e-8) * m.eps:.4g}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
