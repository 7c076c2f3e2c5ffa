"""Table 1 of arXiv 2505.01618, worked out by hand for m_N = 4, m_L = 16."""

import math

import pytest

from ds_plugin.completep.param_groups import scaled_betas
from ds_plugin.completep.roles import role_of
from ds_plugin.completep.rules import (
    Multipliers,
    Ratios,
    Role,
    attention_scale,
    fold_factor,
    logit_multiplier,
    multipliers,
    residual_multiplier,
)
from ds_plugin.core.errors import ConfigError

# role: init std, lr, weight decay, eps
ALPHA_1 = {
    Role.EMBEDDING: (1, 1, 1, 1),
    Role.BLOCK_NORM: (1, 1, 0, 1 / 64),  # lr 16^0; eps 1/4 * 1/16
    Role.QK_NORM: (1, 1, 0, 1 / 64),
    Role.HIDDEN: (1 / 2, 1 / 4, 4, 1 / 64),  # variance 1/4; lr 1/4 * 16^0
    Role.BLOCK_BIAS: (1, 1, 0, 1 / 64),
    Role.FINAL_NORM: (1, 1, 0, 1),
    Role.UNEMBEDDING: (1, 1, 1, 1),
}
ALPHA_HALF = {
    Role.EMBEDDING: (1, 1, 1, 1),
    Role.BLOCK_NORM: (1, 1 / 4, 0, 1 / 16),  # lr 16^-1/2; eps 1/4 * 1/4
    Role.QK_NORM: (1, 1 / 4, 0, 1 / 16),
    Role.HIDDEN: (1 / 2, 1 / 16, 4, 1 / 16),  # lr 1/4 * 1/4
    Role.BLOCK_BIAS: (1, 1 / 4, 0, 1 / 16),
    Role.FINAL_NORM: (1, 1, 0, 1),
    Role.UNEMBEDDING: (1, 1, 1, 1),
}


# what ends a residual branch is like any other matrix and bias of the block, until it is folded
for _table in (ALPHA_1, ALPHA_HALF):
    _table |= {Role.BRANCH_OUT: _table[Role.HIDDEN], Role.BRANCH_OUT_BIAS: _table[Role.BLOCK_BIAS]}
    _table |= {Role.LOGIT_NORM: _table[Role.FINAL_NORM], Role.SCALED_LOGIT_NORM: _table[Role.FINAL_NORM]}
    _table |= {Role.SCALED_EMBEDDING: _table[Role.EMBEDDING]}


@pytest.mark.parametrize(("alpha", "table"), [(1.0, ALPHA_1), (0.5, ALPHA_HALF)])
def test_table_1(alpha, table):
    assert set(table) == set(Role)
    for role, expected in table.items():
        assert multipliers(role, Ratios(4, 16, alpha)) == Multipliers(*expected), role


def test_the_base_model_is_unchanged():
    for alpha in (0.5, 1.0):
        for role in Role:
            found = multipliers(role, Ratios(1, 1, alpha))
            assert (found.init_std, found.lr, found.eps) == (1, 1, 1)
            assert found.weight_decay in (0, 1)
        assert residual_multiplier(Ratios(1, 1, alpha)) == logit_multiplier(Ratios(1, 1, alpha)) == 1


def test_forward_multipliers():
    assert residual_multiplier(Ratios(4, 16, 1.0)) == 1 / 16
    assert residual_multiplier(Ratios(4, 16, 0.5)) == 1 / 4
    assert logit_multiplier(Ratios(4, 16)) == 1 / 4
    assert attention_scale(64, 64) == 1 / math.sqrt(64)
    assert attention_scale(128, 32) == math.sqrt(32) / 128


def test_eps_scope_all_is_the_reference_codes():
    for role in Role:
        assert multipliers(role, Ratios(4, 16), eps_scope="all").eps == 1 / 64


# width only: m_L taken as 1
MUP = {
    Role.EMBEDDING: (1, 1, 1, 1),
    Role.BLOCK_NORM: (1, 1, 0, 1 / 4),
    Role.QK_NORM: (1, 1, 0, 1 / 4),
    Role.HIDDEN: (1 / 2, 1 / 4, 4, 1 / 4),
    Role.BLOCK_BIAS: (1, 1, 0, 1 / 4),
    Role.FINAL_NORM: (1, 1, 0, 1),
    Role.UNEMBEDDING: (1, 1, 1, 1),
}
MUP |= {Role.BRANCH_OUT: MUP[Role.HIDDEN], Role.BRANCH_OUT_BIAS: MUP[Role.BLOCK_BIAS]}
MUP |= {Role.LOGIT_NORM: MUP[Role.FINAL_NORM], Role.SCALED_LOGIT_NORM: MUP[Role.FINAL_NORM]}
MUP |= {Role.SCALED_EMBEDDING: MUP[Role.EMBEDDING]}


def test_mup_is_width_only_and_standard_scales_nothing():
    for role in Role:
        assert multipliers(role, Ratios(4, 16), recipe="mup") == Multipliers(*MUP[role]), role
        matrices = (Role.EMBEDDING, Role.SCALED_EMBEDDING, Role.HIDDEN, Role.BRANCH_OUT, Role.UNEMBEDDING)
        decays = role in matrices
        assert multipliers(role, Ratios(4, 16), recipe="standard") == Multipliers(1, 1, int(decays), 1), role
    assert residual_multiplier(Ratios(4, 16), "mup") == residual_multiplier(Ratios(4, 16), "standard") == 1
    assert logit_multiplier(Ratios(4, 16), "mup") == 1 / 4 and logit_multiplier(Ratios(4, 16), "standard") == 1
    assert attention_scale(128, 32, "standard") == 1 / math.sqrt(128)


# m_N = 4, m_L = 16, alpha 1, batch x4, tokens x16: every lr and decay x 1/2, every eps x 2, 1 - beta x 1/4
COMPLETED_P = {
    Role.EMBEDDING: (1, 1 / 2, 1 / 2, 2 / 4),  # eps m_N^-1
    Role.BLOCK_NORM: (1, 1 / 2, 0, 2 / 64),
    Role.QK_NORM: (1, 1 / 2, 0, 2 / 16),  # eps m_L^-alpha only
    Role.HIDDEN: (1 / 2, 1 / 8, 4 / 2, 2 / 64),
    Role.BLOCK_BIAS: (1, 1 / 2, 0, 2 / 64),
    Role.FINAL_NORM: (1, 1 / 2, 0, 2),
    Role.UNEMBEDDING: (1 / 4, 1 / 8, 4 / 2, 2),  # the logit multiplier, absorbed
}
COMPLETED_P |= {Role.BRANCH_OUT: COMPLETED_P[Role.HIDDEN], Role.BRANCH_OUT_BIAS: COMPLETED_P[Role.BLOCK_BIAS]}
COMPLETED_P |= {Role.LOGIT_NORM: COMPLETED_P[Role.FINAL_NORM], Role.SCALED_LOGIT_NORM: COMPLETED_P[Role.FINAL_NORM]}
COMPLETED_P |= {Role.SCALED_EMBEDDING: COMPLETED_P[Role.EMBEDDING]}


def test_completed_p():
    ratios = Ratios(4, 16, 1.0, m_B=4, m_D=16)
    for role in Role:
        assert multipliers(role, ratios, recipe="completed_p") == Multipliers(*COMPLETED_P[role], 1 / 4), role
    assert logit_multiplier(ratios, "completed_p") == 1
    assert logit_multiplier(ratios, "completed_p", tied=True) == 1 / 4  # nowhere to absorb it
    assert residual_multiplier(ratios, "completed_p") == 1 / 16


# m_N = 4, m_L = 16, alpha 1: branches x 1/16, logits x 1/4; an embedding's sqrt(width) x 1/2, as the base's
FOLDED = {
    Role.BRANCH_OUT: (1 / 2 / 16, 1 / 4 / 16, 4 * 16, 1 / 64 * 16),
    Role.BRANCH_OUT_BIAS: (1 / 16, 1 / 16, 0, 1 / 64 * 16),
    Role.UNEMBEDDING: (1 / 4, 1 / 4, 4, 4),
    Role.LOGIT_NORM: (1 / 4, 1 / 4, 0, 4),
    Role.SCALED_EMBEDDING: (1 / 2, 1 / 2, 2, 2),
    Role.SCALED_LOGIT_NORM: (1 / 2, 1 / 2, 0, 2),  # the logits' 1/4, of which the tied embedding has 1/2
}


def test_folding():
    ratios = Ratios(4, 16)
    for role in Role:
        expected = FOLDED.get(role, ALPHA_1[role])
        assert multipliers(role, ratios, folded=True) == Multipliers(*expected), role
    assert {role: fold_factor(role, ratios) for role in FOLDED} == {
        Role.BRANCH_OUT: 1 / 16,
        Role.BRANCH_OUT_BIAS: 1 / 16,
        Role.UNEMBEDDING: 1 / 4,
        Role.LOGIT_NORM: 1 / 4,
        Role.SCALED_EMBEDDING: 1 / 2,
        Role.SCALED_LOGIT_NORM: 1 / 2,
    }
    assert {fold_factor(role, ratios) for role in Role if role not in FOLDED} == {1.0}
    # completed_p has the logit multiplier in the unembedding already: nothing more to fold
    unembedding = multipliers(Role.UNEMBEDDING, ratios, recipe="completed_p", folded=True)
    assert unembedding == multipliers(Role.UNEMBEDDING, ratios, recipe="completed_p")


def test_betas_follow_the_batch_and_token_ratios():
    assert scaled_betas((0.9, 0.95), 1 / 4) == pytest.approx((0.975, 0.9875))
    with pytest.raises(ConfigError, match=r"20 times 1 - beta of betas \[0.9, 0.95\]"):
        scaled_betas((0.9, 0.95), 20)


LAYER = "decoder.layers.11."
# TransformerEngine's layers, which need a GPU to be built; test_completep_parity.py builds the local ones.
NAMES = {
    "embedding.word_embeddings.weight": Role.EMBEDDING,
    "embedding.position_embeddings.weight": Role.EMBEDDING,
    LAYER + "self_attention.linear_qkv.layer_norm_weight": Role.BLOCK_NORM,
    LAYER + "self_attention.linear_qkv.layer_norm_bias": Role.BLOCK_NORM,
    LAYER + "self_attention.linear_qkv.weight": Role.HIDDEN,
    LAYER + "self_attention.linear_qkv.bias": Role.BLOCK_BIAS,
    LAYER + "self_attention.q_layernorm.weight": Role.QK_NORM,
    LAYER + "self_attention.q_layernorm.bias": Role.QK_NORM,
    LAYER + "self_attention.k_layernorm.weight": Role.QK_NORM,
    LAYER + "self_attention.k_layernorm.bias": Role.QK_NORM,
    LAYER + "self_attention.linear_proj.weight": Role.HIDDEN,
    LAYER + "self_attention.linear_proj.bias": Role.BLOCK_BIAS,
    LAYER + "mlp.linear_fc1.layer_norm_weight": Role.BLOCK_NORM,
    LAYER + "mlp.linear_fc1.layer_norm_bias": Role.BLOCK_NORM,
    LAYER + "mlp.linear_fc1.weight": Role.HIDDEN,
    LAYER + "mlp.linear_fc1.bias": Role.BLOCK_BIAS,
    LAYER + "mlp.linear_fc2.weight": Role.HIDDEN,
    LAYER + "mlp.linear_fc2.bias": Role.BLOCK_BIAS,
    "decoder.final_layernorm.weight": Role.FINAL_NORM,
    "decoder.final_layernorm.bias": Role.FINAL_NORM,
    "output_layer.weight": Role.UNEMBEDDING,
}
# the copy of the word embedding that a pipeline's last stage holds
TIED_NAMES = NAMES | {"output_layer.weight": Role.EMBEDDING}
_ENDS_OF_BRANCHES = {
    LAYER + "self_attention.linear_proj.weight": Role.BRANCH_OUT,
    LAYER + "self_attention.linear_proj.bias": Role.BRANCH_OUT_BIAS,
    LAYER + "mlp.linear_fc2.weight": Role.BRANCH_OUT,
    LAYER + "mlp.linear_fc2.bias": Role.BRANCH_OUT_BIAS,
}
FOLDED_NAMES = NAMES | _ENDS_OF_BRANCHES
FOLDED_TIED_NAMES = TIED_NAMES | _ENDS_OF_BRANCHES
FOLDED_TIED_NAMES |= {f"decoder.final_layernorm.{kind}": Role.LOGIT_NORM for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("folded", "tied", "names"),
    [(False, False, NAMES), (False, True, TIED_NAMES), (True, False, FOLDED_NAMES), (True, True, FOLDED_TIED_NAMES)],
)
def test_roles(folded, tied, names):
    assert {name: role_of(name, folded=folded, tied=tied) for name in names} == names


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight",
        "decoder.layers.0.self_attention.linear_q_down_proj.weight",
        "mtp.layers.0.eh_proj.weight",
        "decoder.layers.0.mixer.in_proj.weight",
        "output_layer.bias",
        "prefix.output_layer.weight",
    ],
)
def test_an_unknown_parameter_is_named(name):
    with pytest.raises(ConfigError, match=name):
        role_of(name)
