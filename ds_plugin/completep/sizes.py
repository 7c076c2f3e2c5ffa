"""A megatron-core GPT's dimensions beside its base's: the ratios of those that are not in proportion to the width, and
what has none."""

from typing import Any, Literal

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.rules import Experts
from ds_plugin.core.errors import ConfigError

#: by the section's field, the dimension in `rules.FANS` and the TransformerConfig's field
_SIZES = {
    "base_ffn_hidden_size": ("ffn", "ffn_hidden_size"),
    "base_moe_ffn_hidden_size": ("expert_ffn", "moe_ffn_hidden_size"),
    "base_moe_shared_expert_intermediate_size": ("shared_ffn", "moe_shared_expert_intermediate_size"),
}
_OF_EXPERTS = ("base_num_moe_experts", "base_moe_router_topk", "base_moe_router_topk_scaling_factor", "moe")
#: fields that only megatron-core's models are read for
OF_MEGATRON = (*_SIZES, "base_num_heads", "base_num_query_groups", *_OF_EXPERTS)


def dims_of(config: Any, section: CompletePConfig) -> dict[str, float]:
    """The ratios of dimensions whose size in the base is given, by their names in `rules.FANS`. Raises ConfigError: the
    model has no such dimension, or repeats keys and values otherwise than its base."""
    found: dict[str, float] = {}
    for name, (dimension, field) in _SIZES.items():
        size, base = getattr(config, field, None), getattr(section, name)
        if base is not None and bool(size) != bool(base):
            raise ConfigError(f"completep.{name}: {base} in the base, here {field} is {size!r}; both have one or none")
        if base:
            found[dimension] = size / base
    heads, head = config.num_attention_heads, config.kv_channels or config.hidden_size // config.num_attention_heads
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
    active, base_number, base_active = (
        config.moe_router_topk,
        section.base_num_moe_experts,
        section.base_moe_router_topk,
    )
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
    sigmoid = config.moe_router_score_function == "sigmoid"
    for holds, what in (
        (sigmoid and 1 in (active, base_active), "sigmoid scores of one expert are not brought to a sum as others are"),
        (not sigmoid and config.moe_router_pre_softmax, "with moe_router_pre_softmax weights sum to about the share"),
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
