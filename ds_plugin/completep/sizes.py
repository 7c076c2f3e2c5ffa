"""A megatron-core GPT's dimensions beside its base's: the ratios of those that are not in proportion to the width, and
what has none."""

from typing import Any, Literal

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.rules import Experts
from ds_plugin.core.errors import ConfigError

#: the dimension in `rules.FANS` by the TransformerConfig's field; the section's has base_ before it
_SIZES = {
    "ffn_hidden_size": "ffn",
    "moe_ffn_hidden_size": "expert_ffn",
    "moe_shared_expert_intermediate_size": "shared_ffn",
}
_RANKS = {"q_lora_rank": "q_rank", "kv_lora_rank": "kv_rank"}
_OF_EXPERTS = ("base_num_moe_experts", "base_moe_router_topk", "base_moe_router_topk_scaling_factor", "moe")
#: fields that only megatron-core's models are read for
OF_MEGATRON = (*(f"base_{name}" for name in (*_SIZES, *_RANKS, "num_heads", "num_query_groups")), *_OF_EXPERTS)


def head_size(config: Any) -> int:
    """The size of a TransformerConfig's heads, over which q.k is summed."""
    if config.multi_latent_attention:
        return int(config.qk_head_dim + config.qk_pos_emb_head_dim)
    return int(config.kv_channels or config.hidden_size // config.num_attention_heads)


def dims_of(config: Any, section: CompletePConfig) -> dict[str, float]:
    """The ratios of dimensions whose size in the base is given, by their names in `rules.FANS`. Raises ConfigError: the
    model has no such dimension, or repeats keys and values otherwise than its base; of latent attention the base's
    ranks are missing, its head size is another, or the ranks' ratios differ where one matrix leads to both vectors."""
    found: dict[str, float] = {}
    latent, heads, head = config.multi_latent_attention, config.num_attention_heads, head_size(config)
    for field, dimension in {**_SIZES, **_RANKS}.items():
        unused = field in _RANKS and not latent  # such a config has them all the same
        size, base = None if unused else getattr(config, field, None), getattr(section, f"base_{field}")
        if field in _RANKS and size is not None and base is None:
            what = f"missing, and the model has latent attention; write the base's (here {size}, mostly the same)"
            raise ConfigError(f"completep.base_{field}: {what}")
        if base is not None and bool(size) != bool(base):
            here = f"here {field} is {size!r}"
            raise ConfigError(f"completep.base_{field}: {base} in the base, {here}; both have one or none")
        if base:
            found[dimension] = size / base
    if latent and section.base_head_dim not in (None, head):
        here = f"{head} (qk_head_dim {config.qk_head_dim} + {config.qk_pos_emb_head_dim} for positions)"
        what = f"{section.base_head_dim} in the base, here {here}, and latent attention's scale cannot be set"
        raise ConfigError(f"completep.base_head_dim: {what}; keep the base's three head sizes, and leave it out")
    fused, kv = latent and getattr(config, "mla_down_proj_fusion", False), found.get("kv_rank")
    if fused and found.get("q_rank", kv) != kv:
        what = f"q_lora_rank is {config.q_lora_rank} on {section.base_q_lora_rank} in the base"
        what += f", kv_lora_rank {config.kv_lora_rank} on {section.base_kv_lora_rank}"
        raise ConfigError(f"completep: {what}: two ratios in one matrix; write mla_down_proj_fusion=False, or keep one")
    if "ffn" in found and section.base_moe_ffn_hidden_size is None and getattr(config, "num_moe_experts", None):
        if config.moe_ffn_hidden_size == config.ffn_hidden_size:  # which megatron-core takes where it is given none
            found["expert_ffn"] = found["ffn"]
    base_head = section.base_head_dim or head
    if section.base_num_heads is not None:
        found["heads"] = (heads * head) / (section.base_num_heads * base_head)
    if section.base_num_query_groups is not None:
        base_heads = section.base_num_heads or heads * head * section.base_width / (config.hidden_size * base_head)
        here, there = heads / (config.num_query_groups or heads), base_heads / section.base_num_query_groups
        if here != there:
            what = f"a key is shared by {there:g} heads in the base and by {here:g} here"
            raise ConfigError(f"completep.base_num_query_groups: {what}; keep the base's repetition")
    return found


def experts_of(config: Any, section: CompletePConfig) -> Experts:
    """How a mixture of experts differs from the base's; nothing differs in a dense model. Raises ConfigError: the
    section does not say the base's experts, or no rule that it asks for covers the difference."""
    number = getattr(config, "num_moe_experts", None)
    if number is None:
        for name in _OF_EXPERTS:
            if (value := getattr(section, name)) is not None:
                raise ConfigError(f"completep.{name}: {value!r}, and the model has no experts; remove it")
        return Experts()
    active = config.moe_router_topk
    base_number, base_active = section.base_num_moe_experts, section.base_moe_router_topk
    if base_number is None or base_active is None:
        name, here = ("num_moe_experts", number) if base_number is None else ("moe_router_topk", active)
        raise ConfigError(f"completep.base_{name}: missing, and the model has experts; write the base's (here {here})")
    form = _form(config, section, active, base_active)
    dims, width = dims_of(config, section), config.hidden_size / section.base_width
    routed, shared = dims.get("expert_ffn", width), dims.get("shared_ffn", width)
    share = f"{base_active} of {base_number} experts in the base, {active} of {number} here"
    remedy = 'which "mue" alone covers; write "moe": "mue", or keep it'
    if section.moe != "mue" and active * base_number != base_active * number:
        raise ConfigError(f"completep.moe: a token goes through {share}: another active share, {remedy}")
    if section.moe != "mue" and getattr(config, "moe_shared_expert_intermediate_size", None) and routed != shared:
        what = f"shared experts' hidden size is {shared:g} times the base's, a routed one's {routed:g} times"
        raise ConfigError(f"completep.moe: {what}: another share of shared experts, {remedy}")
    if section.moe is None and (number != base_number or routed != width):
        what = f"{share}; one's hidden size is {routed:g} times the base's, the width {width:g} times"
        raise ConfigError(f'completep.moe: missing, and sources differ for {what}; write "fixed_sparsity" or "mue"')
    return Experts(section.moe or "fixed_sparsity", form, number / base_number, active / base_active)


def _form(config: Any, section: CompletePConfig, active: int, base_active: int) -> Literal["mean", "sum"]:
    """Whether the weights of a token's experts sum to a constant or to their number. Raises ConfigError: otherwise in
    the base than here, or in another way that the rules do not cover."""
    factor, base_factor = config.moe_router_topk_scaling_factor, section.base_moe_router_topk_scaling_factor
    field, here = "completep.base_moe_router_topk_scaling_factor", factor or 1.0
    there = here if base_factor is None else base_factor
    sums = f"the weights of a token's {base_active} experts sum to {there:g} in the base, of {active} here to {here:g}"
    if active == base_active:
        if here != there:
            raise ConfigError(f"{field}: {sums}; keep the base's factor")
        return "mean"
    if base_factor is None and factor is not None:
        raise ConfigError(f"{field}: missing: the router's is {here:g} with {active} experts a token; write the base's")
    score = config.moe_router_score_function
    alone = f"{score} scores of one expert are not brought to a sum as others are"
    for holds, what in (
        (score != "softmax" and 1 in (active, base_active), alone),
        (score == "softmax" and config.moe_router_pre_softmax, "with moe_router_pre_softmax weights sum to the share"),
        (config.moe_router_load_balancing_type == "sinkhorn", "sinkhorn's weights are not brought to a sum"),
    ):
        if holds:
            what = f"{base_active} in the base, {active} here, and {what}"
            raise ConfigError(f"completep.base_moe_router_topk: {what}; keep the base's")
    if (here, there) == (active, base_active):
        return "sum"
    if here != there:
        raise ConfigError(f"{field}: {sums}, neither one constant nor their number; write it so in both")
    return "mean"
