"""The learning rates of a model's matrices under Muon, by their shapes."""

import math
from dataclasses import replace
from typing import Any

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.rules import FANS, Muon, MuonScale, Ratios, Role, muon_rate
from ds_plugin.completep.supported import is_transformer_config
from ds_plugin.core.errors import ConfigError


def with_muon(
    ratios: Ratios, config: Any, section: CompletePConfig, scale: MuonScale, *, split_qkv: bool = False, lr: float = 1.0
) -> Ratios:
    """A model's ratios where Muon trains its matrices. ``config``: its TransformerConfig, or a decoder's; ``scale``: of
    an update, by the matrix's shape; ``split_qkv``: queries, keys and values have one each; ``lr``: as `rules.Muon`'s.
    Raises ConfigError: no rule covers the recipe, the experts or latent attention, or matrices of one param group need
    different rates."""
    if section.recipe == "completed_p":
        raise ConfigError('completep.recipe: "completed_p" has no rule for Muon; write "completep" or AdamW')
    experts = ratios.experts
    if (experts.m_E, experts.m_K) != (1.0, 1.0):
        what = f"{experts.m_E:g} times the base's experts, {experts.m_K:g} times its active ones"
        raise ConfigError(f"completep.moe: {what}: no rule for Muon covers it; keep the base's numbers, or use AdamW")
    if getattr(config, "multi_latent_attention", False):
        raise ConfigError("completep: multi_latent_attention is True: no rule for Muon covers it; use AdamW")
    rates: dict[Role, float] = {}
    for role, shapes in _shapes(config, ratios, section, split_qkv).items():
        fan_in, out = (ratios.of(dimension) for dimension in FANS[role])
        growth = (1.0 if role is Role.ROUTER else out, fan_in)  # a router's outputs are the experts
        group = section.merged(role, ratios)
        for shape in shapes:
            rate = muon_rate(scale, shape, growth)
            if not math.isclose(rates.setdefault(group, rate), rate, rel_tol=1e-9):
                what = f"matrices of the role {group.value} need {rates[group]:g} and {rate:g} times the base's rate"
                remedy = "keep the base's proportions, or use unit_rms_norm"
                raise ConfigError(f"completep: under Muon with the scale {scale}, {what}; {remedy}")
    return replace(ratios, muon=Muon(rates, lr))


def _shapes(
    config: Any, ratios: Ratios, section: CompletePConfig, split_qkv: bool
) -> dict[Role, list[tuple[float, float]]]:
    """(fan-out, fan-in) of the matrices inside a block that Muon takes as one, by role. A decoder's are in proportion,
    where the rate is the same for every shape, and have other roles than two where the section names them."""
    if not is_transformer_config(config):
        own = [role for role in FANS if role.value in section.lr_multipliers]
        return dict.fromkeys((Role.HIDDEN, Role.BRANCH_OUT, *own), [(ratios.m_N, ratios.m_N)])
    width, up = config.hidden_size, 2 if config.gated_linear_unit else 1
    queries = config.num_attention_heads * config.kv_channels
    keys = (config.num_query_groups or config.num_attention_heads) * config.kv_channels
    found: dict[Role, list[tuple[float, float]]] = {
        Role.QKV: [(queries, width), (keys, width)] if split_qkv else [(queries + 2 * keys, width)],
        Role.ATTENTION_OUT: [(width, queries)],
    }
    hidden = [(Role.MLP_UP, Role.MLP_DOWN, config.ffn_hidden_size)]
    if config.num_moe_experts:
        gates = [(1, width)] if getattr(config, "moe_shared_expert_gate", False) else []
        found[Role.ROUTER] = [(config.num_moe_experts, width), *gates]
        hidden.append((Role.EXPERT_UP, Role.EXPERT_DOWN, config.moe_ffn_hidden_size or config.ffn_hidden_size))
        hidden.append((Role.SHARED_UP, Role.SHARED_DOWN, config.moe_shared_expert_intermediate_size))
    for into, out_of, size in hidden:
        if size:
            found |= {into: [(up * size, width)], out_of: [(width, size)]}
    return found
