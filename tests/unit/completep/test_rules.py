"""Table 1 of arXiv 2505.01618, worked out by hand for m_N = 4, m_L = 16."""

import math
from dataclasses import astuple

import pytest

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.param_groups import scaled_betas
from ds_plugin.completep.roles import role_of
from ds_plugin.completep.rules import (
    FANS,
    Experts,
    Multipliers,
    Muon,
    Ratios,
    Role,
    attention_scale,
    fold_factor,
    logit_multiplier,
    merged,
    multipliers,
    muon_rate,
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
    _table |= dict.fromkeys(FANS, _table[Role.HIDDEN])  # all of a block's matrices, in proportion
    _table |= dict.fromkeys((Role.Q_LATENT_NORM, Role.KV_LATENT_NORM), _table[Role.BLOCK_NORM])
    _table[Role.SOFTMAX_OFFSET] = _table[Role.BLOCK_BIAS]
    _table[Role.MTP_PROJECTION] = (1 / 2, 1 / 4, 4, 1 / 4)  # no branch's, so that nothing is of the depth


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
    Role.Q_LATENT_NORM: (1, 1, 0, 1 / 4),
    Role.KV_LATENT_NORM: (1, 1, 0, 1 / 4),
    Role.SOFTMAX_OFFSET: (1, 1, 0, 1 / 4),
    Role.HIDDEN: (1 / 2, 1 / 4, 4, 1 / 4),
    Role.BLOCK_BIAS: (1, 1, 0, 1 / 4),
    Role.FINAL_NORM: (1, 1, 0, 1),
    Role.UNEMBEDDING: (1, 1, 1, 1),
}
MUP |= {Role.BRANCH_OUT: MUP[Role.HIDDEN], Role.BRANCH_OUT_BIAS: MUP[Role.BLOCK_BIAS]}
MUP |= {Role.LOGIT_NORM: MUP[Role.FINAL_NORM], Role.SCALED_LOGIT_NORM: MUP[Role.FINAL_NORM]}
MUP |= {Role.SCALED_EMBEDDING: MUP[Role.EMBEDDING], **dict.fromkeys(FANS, MUP[Role.HIDDEN])}


def test_mup_is_width_only_and_standard_scales_nothing():
    for role in Role:
        assert multipliers(role, Ratios(4, 16), recipe="mup") == Multipliers(*MUP[role]), role
        matrices = (Role.EMBEDDING, Role.SCALED_EMBEDDING, *FANS, Role.UNEMBEDDING)
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
COMPLETED_P |= {Role.SCALED_EMBEDDING: COMPLETED_P[Role.EMBEDDING], **dict.fromkeys(FANS, COMPLETED_P[Role.HIDDEN])}
COMPLETED_P |= dict.fromkeys((Role.Q_LATENT_NORM, Role.KV_LATENT_NORM), COMPLETED_P[Role.BLOCK_NORM])
COMPLETED_P[Role.SOFTMAX_OFFSET] = COMPLETED_P[Role.BLOCK_BIAS]
COMPLETED_P[Role.MTP_PROJECTION] = (1 / 2, 1 / 8, 4 / 2, 2 / 4)


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
_LATENT = (Role.Q_DOWN, Role.KV_DOWN)  # down to a latent vector, where no branch ends
FOLDED |= {role: FOLDED[Role.BRANCH_OUT] for role in {*FANS} - {*_LATENT} if role.value.endswith(("_out", "_down"))}


def test_folding():
    ratios = Ratios(4, 16)
    for role in Role:
        expected = FOLDED.get(role, ALPHA_1[role])
        assert multipliers(role, ratios, folded=True) == Multipliers(*expected), role
    assert {role: fold_factor(role, ratios) for role in FOLDED} == {
        **dict.fromkeys((Role.BRANCH_OUT, Role.ATTENTION_OUT, Role.MLP_DOWN, Role.EXPERT_DOWN), 1 / 16),
        Role.SHARED_DOWN: 1 / 16,
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
    LAYER + "self_attention.linear_qkv.weight": Role.QKV,
    LAYER + "self_attention.linear_qkv.bias": Role.BLOCK_BIAS,
    LAYER + "self_attention.q_layernorm.weight": Role.QK_NORM,
    LAYER + "self_attention.q_layernorm.bias": Role.QK_NORM,
    LAYER + "self_attention.k_layernorm.weight": Role.QK_NORM,
    LAYER + "self_attention.k_layernorm.bias": Role.QK_NORM,
    LAYER + "self_attention.linear_proj.weight": Role.ATTENTION_OUT,
    LAYER + "self_attention.linear_proj.bias": Role.BLOCK_BIAS,
    LAYER + "mlp.linear_fc1.layer_norm_weight": Role.BLOCK_NORM,
    LAYER + "mlp.linear_fc1.layer_norm_bias": Role.BLOCK_NORM,
    LAYER + "mlp.linear_fc1.weight": Role.MLP_UP,
    LAYER + "mlp.linear_fc1.bias": Role.BLOCK_BIAS,
    LAYER + "mlp.linear_fc2.weight": Role.MLP_DOWN,
    LAYER + "mlp.linear_fc2.bias": Role.BLOCK_BIAS,
    LAYER + "mlp.router.weight": Role.ROUTER,
    LAYER + "mlp.experts.local_experts.3.linear_fc1.weight": Role.EXPERT_UP,
    LAYER + "mlp.experts.local_experts.3.linear_fc1.bias": Role.BLOCK_BIAS,
    LAYER + "mlp.experts.local_experts.3.linear_fc2.weight": Role.EXPERT_DOWN,
    LAYER + "mlp.experts.local_experts.3.linear_fc2.bias": Role.BLOCK_BIAS,
    LAYER + "mlp.experts.weight1": Role.EXPERT_UP,
    LAYER + "mlp.experts.weight2": Role.EXPERT_DOWN,
    LAYER + "mlp.experts.linear_fc1.weight11": Role.EXPERT_UP,
    LAYER + "mlp.experts.linear_fc2.weight0": Role.EXPERT_DOWN,
    LAYER + "mlp.experts.linear_fc2.bias0": Role.BLOCK_BIAS,
    LAYER + "mlp.shared_experts.linear_fc1.weight": Role.SHARED_UP,
    LAYER + "mlp.shared_experts.linear_fc2.weight": Role.SHARED_DOWN,
    LAYER + "mlp.shared_experts.gate_weight": Role.ROUTER,
    "decoder.final_layernorm.weight": Role.FINAL_NORM,
    "decoder.final_layernorm.bias": Role.FINAL_NORM,
    "output_layer.weight": Role.UNEMBEDDING,
}
# the copy of the word embedding that a pipeline's last stage holds
TIED_NAMES = NAMES | {"output_layer.weight": Role.EMBEDDING}
_ENDS_OF_BRANCHES = {
    LAYER + "self_attention.linear_proj.bias": Role.BRANCH_OUT_BIAS,
    LAYER + "mlp.linear_fc2.bias": Role.BRANCH_OUT_BIAS,
    LAYER + "mlp.experts.local_experts.3.linear_fc2.bias": Role.BRANCH_OUT_BIAS,
    LAYER + "mlp.experts.linear_fc2.bias0": Role.BRANCH_OUT_BIAS,
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
        "decoder.layers.0.mlp.router.bias",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc3.weight",
        "decoder.layers.0.self_attention.linear_k_down_proj.weight",
        "mtp.layers.0.eh_proj.bias",
        "mtp.layers.0.mtp_model_layer.layers.0.mixer.in_proj.weight",
        "decoder.layers.0.mixer.in_proj.weight",
        "output_layer.bias",
        "prefix.output_layer.weight",
    ],
)
def test_an_unknown_parameter_is_named(name):
    with pytest.raises(ConfigError, match=name):
        role_of(name)


LATENT = LAYER + "self_attention."
LATENT_NAMES = {
    LATENT + "linear_q_proj.weight": Role.QKV,
    LATENT + "linear_q_down_proj.weight": Role.Q_DOWN,
    LATENT + "linear_q_up_proj.weight": Role.Q_UP,
    LATENT + "linear_kv_down_proj.weight": Role.KV_DOWN,
    LATENT + "linear_qkv_down_proj.weight": Role.KV_DOWN,
    LATENT + "linear_kv_up_proj.weight": Role.KV_UP,
    LATENT + "linear_proj.weight": Role.ATTENTION_OUT,
    LATENT + "linear_proj.bias": Role.BLOCK_BIAS,
    LATENT + "core_attention.softmax_offset": Role.SOFTMAX_OFFSET,
    LATENT + "q_layernorm.weight": Role.Q_LATENT_NORM,
    LATENT + "kv_layernorm.weight": Role.KV_LATENT_NORM,
    LATENT + "kv_layernorm.bias": Role.KV_LATENT_NORM,
    LATENT + "linear_q_up_proj.layer_norm_weight": Role.Q_LATENT_NORM,
    LATENT + "linear_kv_up_proj.layer_norm_bias": Role.KV_LATENT_NORM,
    LATENT + "linear_q_proj.layer_norm_weight": Role.BLOCK_NORM,
    LATENT + "linear_q_down_proj.layer_norm_weight": Role.BLOCK_NORM,
    LATENT + "linear_qkv_down_proj.layer_norm_weight": Role.BLOCK_NORM,
}


def test_roles_of_latent_attention():
    assert {name: role_of(name, latent=True) for name in LATENT_NAMES} == LATENT_NAMES


@pytest.mark.parametrize("branch", ["self_attention.linear_proj", "mlp.linear_fc2"])
def test_a_norm_after_a_branch_has_a_role_in_the_forward_mode(branch):
    name = f"{LAYER}{branch}.post_layernorm.weight"
    assert role_of(name) is Role.BLOCK_NORM
    with pytest.raises(ConfigError, match=f'{name}.*norm after a residual branch.*"residual": "forward"'):
        role_of(name, folded=True)


def test_mamba_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="mixer.in_proj.weight' has no role: on Mamba layers muP.*Vankadara"):
        role_of("decoder.layers.0.mixer.in_proj.weight")


MTP = "mtp.layers.1."
PREDICTION_NAMES = {
    MTP + "eh_proj.weight": Role.MTP_PROJECTION,
    MTP + "enorm.weight": Role.FINAL_NORM,
    MTP + "hnorm.bias": Role.FINAL_NORM,
    MTP + "transformer_layer.input_layernorm.weight": Role.BLOCK_NORM,
    MTP + "transformer_layer.self_attention.linear_proj.weight": Role.ATTENTION_OUT,
    MTP + "transformer_layer.mlp.linear_fc2.bias": Role.BLOCK_BIAS,
    MTP + "mtp_model_layer.self_attention.linear_qkv.layer_norm_weight": Role.BLOCK_NORM,
    MTP + "mtp_model_layer.mlp.experts.linear_fc2.weight3": Role.EXPERT_DOWN,
    MTP + "final_layernorm.weight": Role.FINAL_NORM,
}


def test_roles_of_a_multi_token_prediction():
    assert {name: role_of(name, folded=True) for name in PREDICTION_NAMES} == {
        **PREDICTION_NAMES,
        MTP + "transformer_layer.mlp.linear_fc2.bias": Role.BRANCH_OUT_BIAS,
    }
    tied = {name: role_of(name, folded=True, tied=True) for name in PREDICTION_NAMES if "norm.weight" in name}
    logits = [name for name, role in tied.items() if role is Role.LOGIT_NORM]
    assert logits == [MTP + "final_layernorm.weight"]  # of all its norms, the one that logits are made of


def test_latent_attention_by_rank():
    """Width and heads x 4, depth x 8; the queries' rank x 2, that of keys and values the base's: by hand."""
    ratios = Ratios(4.0, 8.0, dims={"q_rank": 2.0, "kv_rank": 1.0})
    expected = {
        Role.Q_DOWN: (1 / 2, 1 / 4, 4, 1 / math.sqrt(4 * 2) / 8),
        Role.Q_UP: (1 / math.sqrt(2), 1 / 2, 2, 1 / 4 / 8),
        Role.KV_DOWN: (1 / 2, 1 / 4, 4, 1 / 2 / 8),
        Role.KV_UP: (1, 1, 1, 1 / 4 / 8),
        Role.Q_LATENT_NORM: (1, 1, 0, 1 / math.sqrt(4 * 2) / 8),
        Role.KV_LATENT_NORM: (1, 1, 0, 1 / 2 / 8),
    }
    for role, row in expected.items():
        assert astuple(multipliers(role, ratios))[:4] == pytest.approx(row, rel=1e-12), role
        assert merged(role, ratios, folded=False) is role
    in_proportion = Ratios(4.0, 8.0, dims={"q_rank": 4.0, "kv_rank": 4.0})
    found = {role: merged(role, in_proportion, folded=True) for role in expected}
    norms = (Role.Q_LATENT_NORM, Role.KV_LATENT_NORM)
    assert found == {role: Role.BLOCK_NORM if role in norms else Role.HIDDEN for role in expected}


def test_matrices_in_proportion_train_in_the_tables_groups():
    ratios = Ratios(4.0, 8.0, dims={"ffn": 4.0})
    for folded, ends in ((False, Role.HIDDEN), (True, Role.BRANCH_OUT)):
        found = {role: merged(role, ratios, folded=folded) for role in (Role.QKV, Role.MLP_UP, Role.EXPERT_UP)}
        assert found == {Role.QKV: Role.HIDDEN, Role.MLP_UP: Role.HIDDEN, Role.EXPERT_UP: Role.EXPERT_UP}
        assert merged(Role.MLP_DOWN, ratios, folded=folded) is merged(Role.ATTENTION_OUT, ratios, folded=folded) is ends
    for role in (Role.QKV, Role.ATTENTION_OUT, Role.MLP_UP, Role.MLP_DOWN):
        assert multipliers(role, ratios) == multipliers(Role.HIDDEN, ratios)


def test_matrices_out_of_proportion_have_their_own_fan_in():
    """Width x 4, depth x 8, an MLP of 3.25 times and heads of 2 times the base's: by hand."""
    ratios, alpha = Ratios(4.0, 8.0, 0.5, dims={"ffn": 3.25, "heads": 2.0}), 0.5
    lr, depth = 8.0 ** (alpha - 1), 8.0**alpha
    expected = {
        Role.QKV: (1 / 2, lr / 4, 4, 1 / math.sqrt(8) / depth),
        Role.ATTENTION_OUT: (1 / math.sqrt(2), lr / 2, 2, 1 / 4 / depth),
        Role.MLP_UP: (1 / 2, lr / 4, 4, 1 / math.sqrt(13) / depth),
        Role.MLP_DOWN: (1 / math.sqrt(3.25), lr / 3.25, 3.25, 1 / 4 / depth),
    }
    for role, row in expected.items():
        assert astuple(multipliers(role, ratios))[:4] == pytest.approx(row, rel=1e-12), role
        assert merged(role, ratios, folded=True) is role
        assert multipliers(role, ratios, recipe="standard") == Multipliers(1, 1, 1, 1)
    assert fold_factor(Role.MLP_DOWN, ratios) == fold_factor(Role.ATTENTION_OUT, ratios) == 8.0**-alpha


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_experts(form):
    """m_N 4, m_L 8, experts of 2 times the base's hidden size, twice as many and as many active; both papers' rows."""
    for rule, std in (("fixed_sparsity", 4**0.5 / 2), ("mue", (2 / 2) ** 0.5)):
        ratios = Ratios(4.0, 8.0, dims={"expert_ffn": 2.0}, experts=Experts(rule, form, m_E=2.0, m_K=2.0))
        k = 2 if form == "sum" else 1
        down = (std / k, 1 / (2 * k), 2 * k, k / 2 / 4 / 8)  # k / m_E of the tokens' weights
        up = (1 / 2, 1 / 4, 4, std / k * k / 2 / 2 / 8)
        assert astuple(multipliers(Role.EXPERT_DOWN, ratios))[:4] == pytest.approx(down, rel=1e-12)
        assert astuple(multipliers(Role.EXPERT_UP, ratios))[:4] == pytest.approx(up, rel=1e-12)
        assert multipliers(Role.ROUTER, ratios) == multipliers(Role.HIDDEN, ratios)
        assert multipliers(Role.SHARED_DOWN, ratios) == multipliers(Role.HIDDEN, ratios)


def test_the_two_forms_of_the_mix_are_one_model():
    """A mean-form expert is one of the sum form whose down-projection is m_K times as large."""
    mean, of_sum = (Ratios(4.0, 8.0, experts=Experts("mue", form, m_E=4.0, m_K=2.0)) for form in ("mean", "sum"))
    assert multipliers(Role.EXPERT_UP, mean) == multipliers(Role.EXPERT_UP, of_sum)
    a, b = (astuple(multipliers(Role.EXPERT_DOWN, ratios)) for ratios in (mean, of_sum))
    assert a[:4] == pytest.approx((b[0] * 2, b[1] * 2, b[2] / 2, b[3] / 2))


def test_what_a_user_sets_beside_the_recipe():
    given = {"base_width": 16, "base_depth": 2, "lr_multipliers": {"hidden": 0.5, "mlp_down": 3.0, "qk_norm": 7.0}}
    given |= {
        "weight_decay_exponent": 0.5,
        "embedding_lr_exponent": 0.5,
        "eps_scope": "embedding",
        "embedding_multiplier": 8.0,
        "output_multiplier": 3.0,
    }
    forward, folded = (CompletePConfig.model_validate({"residual": mode, **given}) for mode in ("forward", "folded"))
    ratios = forward.ratios(64, 32)  # m_N 4, m_L 16
    rates = {role: forward.multipliers(role, ratios).lr for role in Role}
    assert [rates[r] for r in (Role.QKV, Role.BRANCH_OUT, Role.MLP_DOWN, Role.ROUTER)] == [1 / 8, 1 / 8, 3 / 4, 1 / 4]
    assert [rates[r] for r in (Role.BLOCK_NORM, Role.QK_NORM)] == [1, 7]
    assert [rates[r] for r in (Role.EMBEDDING, Role.SCALED_EMBEDDING, Role.UNEMBEDDING)] == [1 / 2, 1 / 2, 1]
    assert forward.multipliers(Role.HIDDEN, ratios).weight_decay == 2
    assert (
        forward.multipliers(Role.EMBEDDING, ratios).eps == 1 / 4
        and forward.multipliers(Role.UNEMBEDDING, ratios).eps == 1
    )
    assert forward.merged(Role.MLP_DOWN, ratios) is Role.MLP_DOWN and forward.merged(Role.MLP_UP, ratios) is Role.HIDDEN
    factors = {role: folded.fold_factor(role, ratios) for role in Role}
    assert factors[Role.EMBEDDING] == 8 and factors[Role.UNEMBEDDING] == 3 / 4 and factors[Role.LOGIT_NORM] == 3 / 4 / 8
    assert factors[Role.SCALED_EMBEDDING] == 4 and factors[Role.SCALED_LOGIT_NORM] == 3 / 4 / 4
    assert folded.multipliers(Role.MLP_DOWN, ratios).lr == 3 / 4 / 16
    with pytest.raises(ValueError, match="'mlp' is no role; roles are embedding, hidden"):
        CompletePConfig.model_validate({**given, "lr_multipliers": {"mlp": 2.0}})


#: scale: (fan-out, fan-in), how many times the base's they are, the rate by hand: sqrt(out / in) / s over the base's
MUON = {
    "unit_rms_norm": [((64, 64), (4, 4), 1), ((8, 64), (1, 4), 1), ((512, 64), (8, 4), 1)],
    "spectral": [
        ((64, 64), (4, 4), 1 / 2),  # s 8, in the base 4
        ((256, 64), (4, 4), 1 / 2),  # 2 / 16, in the base 2 / 8
        ((8, 64), (1, 4), 1 / 4),  # a router: 8^1/2 / 64, in the base 8^1/2 / 16
        ((512, 64), (8, 4), 1 / 2),  # 8^1/2 / 512^1/2 = 1/8, in the base 2 / 8
    ],
    "shape_scaling": [
        ((64, 64), (4, 4), 1),
        ((256, 64), (4, 4), 1),  # 2 / 2 in both
        ((64, 256), (4, 4), 1),  # 1/2 in both
        ((8, 64), (1, 4), 1 / 2),  # (1/8)^1/2 / 1, in the base (1/2)^1/2
        ((64, 256), (4, 8), 2**-0.5),  # 1/2, in the base (16 / 32)^1/2
    ],
}


@pytest.mark.parametrize("scale", MUON)
def test_the_rate_of_a_matrix_under_muon(scale):
    for shape, growth, expected in MUON[scale]:
        assert muon_rate(scale, shape, growth) == pytest.approx(expected, rel=1e-12), shape
        assert muon_rate(scale, shape, (1, 1)) == 1


def test_muon_changes_rate_and_decay_of_its_matrices_alone():
    """A rate of 1/2, Muon's in the base 20 times Adam's, m_N 4, m_L 16, alpha 1/2: the depth's factor is 16^-1/2."""
    muon = Muon({Role.HIDDEN: 0.5, Role.BRANCH_OUT: 0.5}, lr=20)
    ratios = Ratios(4, 16, 0.5, muon=muon)
    assert multipliers(Role.HIDDEN, ratios) == Multipliers(1 / 2, 20 / 2 / 4, 2, 1 / 16)
    assert multipliers(Role.BRANCH_OUT, ratios, folded=True) == Multipliers(1 / 8, 20 / 2 / 4 / 4, 2 * 4, 4 / 16)
    assert multipliers(Role.HIDDEN, ratios, recipe="mup") == Multipliers(1 / 2, 20 / 2, 2, 1 / 4)
    assert multipliers(Role.HIDDEN, ratios, recipe="standard") == Multipliers(1, 20, 1, 1)
    for role in set(Role) - set(muon.rates):
        assert multipliers(role, ratios) == multipliers(role, Ratios(4, 16, 0.5)), role


def test_a_projection_in_no_branch_has_no_depth_under_muon_either():
    ratios = Ratios(4.0, 16.0, 0.5, muon=Muon({Role.MTP_PROJECTION: 0.5, Role.HIDDEN: 0.5}))
    assert multipliers(Role.MTP_PROJECTION, ratios).lr == 0.5
    assert multipliers(Role.HIDDEN, ratios).lr == 0.5 / 4
