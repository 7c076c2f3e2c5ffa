"""The table a user wants to see before spending money: what every role gets in this model against its base."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ds_plugin.completep import rules, sizes
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.param_groups import scaled_betas
from ds_plugin.completep.roles import role_of
from ds_plugin.completep.rules import FANS, Ratios, Role
from ds_plugin.config import PluginConfig, load_json
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import parse_section
from ds_plugin.deepspeed_engine import json_check
from ds_plugin.deepspeed_engine.group_lr import check_peak
from ds_plugin.plan import costs
from megatron_patches.models.gpt import GPTConfig

_WHAT = {
    Role.EMBEDDING: "token and position embeddings",
    Role.HIDDEN: "matrices inside a block",
    Role.BRANCH_OUT: "matrices that end a branch",
    Role.QKV: "queries, keys, values",
    Role.ATTENTION_OUT: "attention's last matrix",
    Role.MLP_UP: "the MLP's first matrix",
    Role.MLP_DOWN: "the MLP's last matrix",
    Role.BLOCK_NORM: "norms inside a block",
    Role.QK_NORM: "norms on queries and keys",
    Role.BLOCK_BIAS: "biases inside a block",
    Role.BRANCH_OUT_BIAS: "biases that end a branch",
    Role.FINAL_NORM: "final norm",
    Role.LOGIT_NORM: "final norm",
    Role.UNEMBEDDING: "output matrix",
}


def rules_table(source: str | Path | Mapping[str, Any]) -> str:
    """The table for the ``model``, ``completep`` and ``optimizer`` sections of a config, as aligned text. Raises
    ConfigError: a section is missing or wrong."""
    config = load_json(source)
    section = PluginConfig.from_dict(config).completep
    if section is None:
        raise ConfigError('completep: not enabled in this file; write "completep": {"enabled": true, ...}')
    if "model" not in config:
        remedy = 'write {"num_layers": ..., "hidden_size": ..., ...} of the model to train'
        table_is_in = "a recipe of Megatron-LM's options has its table in ds-plugin plan --config FILE --world-size N"
        raise ConfigError(f"model: missing; {table_is_in if 'megatron' in config else remedy}")
    model = parse_section(GPTConfig, "model", config["model"])
    described: dict[str, Any] = {name: config[name] for name in ("optimizer", "scheduler") if name in config}
    json_check.check(described, auto=True)
    return "\n".join(table(model, section, config.get("optimizer") or {}, config.get("scheduler") or {}))


def applied(
    model: GPTConfig, section: CompletePConfig, params: Mapping[str, Any], vocab: int
) -> dict[str, dict[str, float]]:
    """What each role gets: init std, learning rate, weight decay, eps; its tensors and parameters; of a matrix inside a
    block the ratios of its fan-in and fan-out. ``params``: DeepSpeed's ``optimizer.params``; ``vocab``: padded."""
    folded, tied, ratios = section.residual == "folded", model.tie_embeddings, _ratios(model, section)
    tensors, parameters = Counter[Role](), Counter[Role]()
    for name, size, number, _ in costs.tensors(model, vocab):
        role = section.merged(role_of(name, folded=folded, tied=tied), ratios)
        tensors[role] += number
        parameters[role] += number * size
    decay, eps, found = params.get("weight_decay", 0.0), params.get("eps", 1e-8), {}
    base = {"init_std": model.init_std, "lr": params["lr"], "weight_decay": decay, "eps": eps}
    for role in filter(tensors.get, Role):  # in its order
        multipliers, fans = section.multipliers(role, ratios), zip(("m_in", "m_out"), FANS.get(role, ()), strict=False)
        row = {name: value * getattr(multipliers, name) for name, value in base.items()}
        row |= {"tensors": tensors[role], "parameters": parameters[role]}
        found[role.value] = row | {name: ratios.of(size) for name, size in fans}
    return found


def minimum_ratio(scheduler: Mapping[str, Any]) -> float | None:
    """The smallest learning rate after warmup over the largest, or None when the scheduler is not one known here."""
    params, kind = scheduler.get("params") or {}, scheduler.get("type")
    if kind == "WarmupDecayLR":
        least, most = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr", 0.001)
        return None if isinstance(least, list) or isinstance(most, list) else least / most  # one for each group
    return {None: 1.0, "WarmupLR": 1.0, "WarmupCosineLR": params.get("cos_min_ratio", 0.0001)}.get(kind)


def table(
    model: GPTConfig, section: CompletePConfig, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any],
    vocab: int | None = None,
) -> Iterator[str]:  # fmt: skip
    """The table's lines, by DeepSpeed's ``optimizer`` and ``scheduler``; ``vocab``: as in `applied`, None for V. Raises
    ConfigError: there is no learning rate, or two, another optimizer, or a size has no ratio to the base's."""
    params = optimizer.get("params") or {}
    if (kind := str(optimizer.get("type", "AdamW"))).lower() not in ("adam", "adamw"):
        what = "the table has AdamW's rules alone; write AdamW, or leave completep out"
        raise ConfigError(f"completep: the optimizer is {kind}: {what}")
    if "lr" not in params:
        raise ConfigError("completep: optimizer.params.lr is missing; write the base model's learning rate")
    check_peak(scheduler, params["lr"])
    ratios, head = _ratios(model, section), model.kv_channels
    scale = rules.attention_scale(head, section.base_head_dim or head, section.recipe)
    width = f"width {model.hidden_size} / {section.base_width} = m_N {ratios.m_N:g}"
    depth = f"depth {model.num_layers} / {section.base_depth} = m_L {ratios.m_L:g}"
    yield f"recipe {section.recipe}, alpha {section.alpha:g}: {width}, {depth}"
    branch = rules.residual_multiplier(ratios, section.recipe)
    logits = rules.logit_multiplier(ratios, section.recipe, tied=model.tie_embeddings)
    where = ", folded into the weights" if section.residual == "folded" else ""
    embeddings = "" if ratios.embedding == 1 else f", embeddings x {ratios.embedding:g}"
    yield f"residual branches x {branch:g}, logits x {logits:g}{embeddings}{where}; q.k x {scale:g}"
    smallest = minimum_ratio(scheduler)
    rows = [tuple("role,which,tensors,parameters,m_in,m_out,init std,lr,min lr,weight decay,eps".split(","))]
    more = applied(model, section, params, (vocab or 0) + 1)
    for name, row in applied(model, section, params, vocab or 0).items():
        role, parameters, a_token = Role(name), row["parameters"], more[name]["parameters"] - row["parameters"]
        counts = [f"{parameters:,}"] if parameters else []
        held = " + ".join(counts if vocab or not a_token else [*counts, f"{a_token:,} V"])
        m_in, m_out = (f"{row[fan]:.4g}" if fan in row else "-" for fan in ("m_in", "m_out"))
        m = section.multipliers(role, ratios)
        std, lr, decay, eps = (_cell(row[x], getattr(m, x)) for x in ("init_std", "lr", "weight_decay", "eps"))
        if role not in (Role.EMBEDDING, *FANS, Role.UNEMBEDDING):
            biases = rules.kind_of(role) is Role.BLOCK_BIAS
            std = "0" if biases else f"{section.fold_factor(role, ratios):g} / 0"
        least = "-" if smallest is None else f"{row['lr'] * smallest:.4g}"
        rows.append((name, _WHAT[role], str(row["tensors"]), held, m_in, m_out, std, lr, least, decay, eps))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
    said = "(x n): the base model's value times n; init of norms: gains / biases"
    yield said if vocab else f"{said}; V: the padded vocabulary"
    if (change := section.multipliers(Role.HIDDEN, ratios).one_minus_beta) != 1.0:
        scaled = ", ".join(f"{beta:.6g}" for beta in scaled_betas(params.get("betas", (0.9, 0.999)), change))
        yield f"betas {scaled} for every role: 1 - beta (x {change:g})"


def _ratios(model: GPTConfig, section: CompletePConfig) -> Ratios:
    """Of the sizes as a TransformerConfig says them, which takes seconds to import."""
    said = {"ffn_hidden_size": model.ffn_size, "kv_channels": model.kv_channels, "multi_latent_attention": False}
    config = SimpleNamespace(**{**dict(model), **said})
    dims, experts = sizes.dims_of(config, section), sizes.experts_of(config, section)
    return section.ratios(model.hidden_size, model.num_layers, dims, experts)


def _cell(value: float, multiplier: float) -> str:
    return f"{value:.4g}" + ("" if multiplier in (0.0, 1.0) else f" (x {multiplier:.4g})")
