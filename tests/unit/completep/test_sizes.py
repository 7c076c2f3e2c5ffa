"""What a TransformerConfig's sizes are to its base's, and what has no ratio."""

from types import SimpleNamespace

import pytest

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.sizes import dims_of, experts_of, head_size
from ds_plugin.core.errors import ConfigError

LATENT = {
    "multi_latent_attention": True, "hidden_size": 256, "num_attention_heads": 16, "kv_channels": 16,
    "num_query_groups": 16, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8,
    "v_head_dim": 20,
}  # fmt: skip
RANKS = {"base_q_lora_rank": 24, "base_kv_lora_rank": 32}


def dims(base, **changes):
    section = CompletePConfig.model_validate({"enabled": True, "base_width": 64, "base_depth": 2, **base})
    return dims_of(SimpleNamespace(**LATENT | changes), section)


def test_ranks_have_their_own_ratios():
    assert head_size(SimpleNamespace(**LATENT)) == 24
    assert dims({**RANKS, "base_head_dim": 8 + 16} | {"base_width": 48}) == {"q_rank": 2.0, "kv_rank": 1.0}
    assert dims({"base_kv_lora_rank": 16}, q_lora_rank=None) == {"kv_rank": 2.0}
    assert dims({**RANKS, "base_num_heads": 8}) == {"q_rank": 2.0, "kv_rank": 1.0, "heads": 2.0}
    assert dims({}, multi_latent_attention=False) == {}  # such a config has ranks all the same


def test_experts_that_take_their_size_from_the_mlps_take_their_ratio_too():
    dense = {"multi_latent_attention": False, "ffn_hidden_size": 1024, "moe_ffn_hidden_size": 1024}
    experts = {**dense, "num_moe_experts": 8}
    assert dims({"base_ffn_hidden_size": 512}, **experts) == {"ffn": 2.0, "expert_ffn": 2.0}
    both = {"base_ffn_hidden_size": 512, "base_moe_ffn_hidden_size": 1024}
    assert dims(both, **experts) == {"ffn": 2.0, "expert_ffn": 1.0}
    assert dims({"base_ffn_hidden_size": 512}, **experts | {"moe_ffn_hidden_size": 256}) == {"ffn": 2.0}
    assert dims({"base_ffn_hidden_size": 512}, **experts | {"num_moe_experts": None}) == {"ffn": 2.0}


def test_heads_need_not_divide_the_width():
    """As in Gemma 3 1B (width 1152, heads of 256)."""
    assert CompletePConfig(enabled=True, base_width=1152, base_depth=26, base_head_dim=256).base_head_dim == 256


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_routers_whose_weights_have_no_constant_sum(score):
    """But for a softmax's, one expert's score is brought to no sum; a softmax's before the choice sum to its share."""

    def form(active, base_active, pre_softmax=False):
        router = {"moe_router_score_function": score, "moe_router_pre_softmax": pre_softmax,
                  "moe_router_topk_scaling_factor": None, "moe_router_load_balancing_type": "none"}  # fmt: skip
        experts = {"num_moe_experts": 8, "moe_router_topk": active, "moe_ffn_hidden_size": 128, "ffn_hidden_size": 512,
                   "moe_shared_expert_intermediate_size": None, "multi_latent_attention": False}  # fmt: skip
        base = {"base_num_moe_experts": 8, "base_moe_router_topk": base_active, "base_moe_ffn_hidden_size": 128}
        section = CompletePConfig(enabled=True, base_width=64, base_depth=2, moe="mue", **base)
        return experts_of(SimpleNamespace(**LATENT | router | experts), section).form

    assert form(4, 2) == form(2, 2, pre_softmax=True) == "mean"
    refused, fine = ((4, 2, True), (2, 1)) if score == "softmax" else ((2, 1), (4, 2, True))
    assert form(*fine) == "mean"
    with pytest.raises(ConfigError, match="pre_softmax" if score == "softmax" else f"{score} scores of one expert"):
        form(*refused)


@pytest.mark.parametrize(
    ("base", "changes", "error"),
    [
        ({"base_kv_lora_rank": 32}, {}, r"base_q_lora_rank: missing.*\(here 48"),
        ({"base_q_lora_rank": 24}, {}, r"base_kv_lora_rank: missing.*\(here 32"),
        (RANKS, {"q_lora_rank": None}, "base_q_lora_rank: 24 in the base, here q_lora_rank is None"),
        (RANKS, {"multi_latent_attention": False}, "base_q_lora_rank: 24 in the base, here q_lora_rank is None"),
        ({**RANKS, "base_head_dim": 16}, {}, r"base_head_dim: 16 in the base, here 24 \(qk_head_dim 16 \+ 8"),
        (RANKS, {"mla_down_proj_fusion": True}, "q_lora_rank is 48 on 24 in the base, kv_lora_rank 32 on 32"),
    ],
)  # fmt: skip
def test_what_has_no_ratio_is_named(base, changes, error):
    with pytest.raises(ConfigError, match=error):
        dims(base, **changes)
