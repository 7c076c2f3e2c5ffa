"""Two built models like DeepSeek's and Qwen's: every parameter's init, learning rate, weight decay and eps over the
base's, beside numbers that were worked out by hand."""

import re

import pytest

from megatron_patches.completep import build_param_groups, finish, prepare, ratios_of
from tests.distributed.test_completep_latent import build_model, drawn, section, settings, weights

LR, DECAY, EPS = 0.01, 0.1, 1e-8

#: width 128 on 32 (m_N 4), 4 layers on 2 (m_L 2), alpha 1, forward; 8 heads on 2; ranks 32 on 16 and 16 on 16; of
#: everything else in proportion. sqrt(4 x 2) x 2 = 5.656854, sqrt(4 x 1) x 2 = 4, sqrt(4 x 4) x 2 = 8
DEEPSEEK = {
    "model": {
        "width": 128, "heads": 8,
        "latent": {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8,
                   "v_head_dim": 16, "rope_type": "rope"},
        "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64,
        "moe_shared_expert_intermediate_size": 64, "moe_router_score_function": "sigmoid", "mtp_num_layers": 1,
    },
    "section": {
        "base_width": 32, "base_depth": 2, "base_q_lora_rank": 16, "base_kv_lora_rank": 16, "base_num_heads": 2,
        "base_num_moe_experts": 4, "base_moe_router_topk": 2, "base_moe_ffn_hidden_size": 16,
        "base_moe_shared_expert_intermediate_size": 16,
    },
    # init, lr, weight decay, eps
    "rows": {
        r"embedding\.word_embeddings\.weight|output_layer\.weight": (1, 1, 1, 1),
        r"decoder\.final_layernorm\.weight|mtp\.layers\.0\.(enorm|hnorm|final_layernorm)\.weight": (1, 1, 0, 1),
        r"mtp\.layers\.0\.eh_proj\.weight": (0.5, 0.25, 4, 0.25),
        r".*\.(input_layernorm|pre_mlp_layernorm)\.weight": (1, 1, 0, 0.125),
        r".*\.linear_q_down_proj\.weight": (0.5, 0.25, 4, 0.1767767),
        r".*\.q_layernorm\.weight": (1, 1, 0, 0.1767767),
        r".*\.linear_q_up_proj\.weight": (0.7071068, 0.5, 2, 0.125),
        r".*\.linear_kv_down_proj\.weight": (0.5, 0.25, 4, 0.25),
        r".*\.kv_layernorm\.weight": (1, 1, 0, 0.25),
        r".*\.linear_kv_up_proj\.weight": (1, 1, 1, 0.125),
        r".*\.linear_proj\.weight": (0.5, 0.25, 4, 0.125),
        r".*\.router\.weight": (0.5, 0.25, 4, 0.125),
        r".*\.(local_experts\.\d|shared_experts)\.linear_fc[12]\.weight": (0.5, 0.25, 4, 0.125),
    },
}  # fmt: skip

#: width 96 on 32 (m_N 3), 4 layers on 2 (m_L 2), alpha 1/2, folded: branches x 2^-1/2 = 0.7071068, logits x 1/3; heads
#: of 16, 8 on 4 (x 2), a key for 4 of them; 8 experts on 4 and 4 active on 2, of 48 on 24 (x 2), weights that sum to 1,
#: by Jiang et al.; learning rates of blocks x 2^-1/2. 3^-1/2 = 0.5773503, (3 x 2)^-1/2 = 0.4082483, 1/6 = 0.1666667
QWEN = {
    "model": {
        "width": 96, "heads": 8, "kv_channels": 16, "num_query_groups": 2, "qk_layernorm": True, "num_moe_experts": 8,
        "moe_router_topk": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 96,
        "moe_shared_expert_gate": True,
    },
    "section": {
        "base_width": 32, "base_depth": 2, "base_num_heads": 4, "base_num_query_groups": 1, "alpha": 0.5,
        "residual": "folded", "moe": "fixed_sparsity", "base_num_moe_experts": 4, "base_moe_router_topk": 2,
        "base_moe_ffn_hidden_size": 24, "base_moe_shared_expert_intermediate_size": 48,
    },
    "rows": {
        r"embedding\.word_embeddings\.weight": (1, 1, 1, 1),
        r"output_layer\.weight": (0.3333333, 0.3333333, 3, 3),
        r"decoder\.final_layernorm\.weight": (1, 1, 0, 1),
        r".*\.(input_layernorm|pre_mlp_layernorm|q_layernorm|k_layernorm)\.weight": (1, 0.7071068, 0, 0.2357023),
        # 1/3 x 0.7071068 = 0.2357023; 0.4082483 x 0.7071068 = 0.2886751
        r".*\.linear_qkv\.weight": (0.5773503, 0.2357023, 3, 0.2886751),
        # forward (0.7071068, 0.3535534, 2, 0.2357023), folded
        r".*\.linear_proj\.weight": (0.5, 0.25, 2.8284271, 0.3333333),
        r".*\.(router\.weight|shared_experts\.gate_weight)": (0.5773503, 0.2357023, 3, 0.2357023),
        r".*\.shared_experts\.linear_fc1\.weight": (0.5773503, 0.2357023, 3, 0.2886751),
        r".*\.shared_experts\.linear_fc2\.weight": (0.5, 0.25, 2.8284271, 0.3333333),
        # half of the tokens: eps 3^1/2 / 2 x 1/2 x 0.4082483 = 0.1767767
        r".*\.local_experts\.\d\.linear_fc1\.weight": (0.5773503, 0.2357023, 3, 0.1767767),
        # forward (3^1/2 / 2 = 0.8660254, 0.3535534, 2, 1/2 x 0.2357023 = 0.1178511), folded
        r".*\.local_experts\.\d\.linear_fc2\.weight": (0.6123724, 0.25, 2.8284271, 0.1666667),
    },
}  # fmt: skip


def found(case):
    """By parameter its init over what megatron-core draws from the same seed, and its group's settings over the base's;
    init as the norms' ratio, and the largest difference from the drawn numbers times that."""
    model_of, completep = case["model"], section(**case["section"])
    plain = drawn(**model_of)
    config, spec = prepare(*settings(**model_of), completep)
    model = build_model(config, spec, spec if config.mtp_num_layers else None)
    roles = finish(model, completep)
    ratios = ratios_of(config, completep)
    groups = build_param_groups(model, roles, ratios, completep, lr=LR, weight_decay=DECAY, eps=EPS)
    group_of = {id(p): group for group in groups for p in group["params"]}
    rows = {}
    for name, p in weights(model).items():
        group, init = group_of[id(p)], (p.norm() / plain[name].norm()).item()
        off = (p - plain[name] * init).abs().max().item() / p.abs().max().item()
        rows[name] = (init, group["lr"] / LR, group["weight_decay"] / DECAY, group["eps"] / EPS, off)
    return rows


def both():
    return [found(case) for case in (DEEPSEEK, QWEN)]


def test_every_parameter_is_as_worked_out_by_hand(workers):
    for case, rows in zip((DEEPSEEK, QWEN), workers(1).run(both)[0], strict=True):
        used = set()
        for name, (*row, off) in rows.items():
            [pattern] = [pattern for pattern in case["rows"] if re.fullmatch(pattern, name)]
            assert row == pytest.approx(case["rows"][pattern], rel=1e-6), name
            assert off < 1e-6, name
            used.add(pattern)
        assert used == set(case["rows"])
