"""The rates of a model's matrices under Muon, from its config: by hand, and what has none."""

from types import SimpleNamespace

import pytest

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.muon import with_muon
from ds_plugin.completep.rules import Experts, Role
from ds_plugin.core.errors import ConfigError


class TransformerConfig(SimpleNamespace):
    """As much of megatron-core's as is read: four heads of 16 that share two keys, SwiGLU, eight experts."""

    def __init__(self, **changes):
        shape = {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16}
        hidden = {"ffn_hidden_size": 128, "moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 64}
        super().__init__(**{**shape, **hidden, "gated_linear_unit": True, "num_moe_experts": 8, **changes})


def rates(scale, *, dims=None, experts=None, config=None, section=None, **given):
    section = CompletePConfig.model_validate({"enabled": True, "base_width": 16, "base_depth": 2, **(section or {})})
    ratios = section.ratios(64, 8, dims, experts)
    return with_muon(ratios, config or TransformerConfig(), section, scale, **given).muon.rates


def test_a_model_in_proportion_has_the_rates_of_the_tables_groups():
    others = (Role.EXPERT_UP, Role.EXPERT_DOWN, Role.SHARED_UP, Role.SHARED_DOWN)
    for scale, square, router in (("unit_rms_norm", 1, 1), ("spectral", 1 / 2, 1 / 4), ("shape_scaling", 1, 1 / 2)):
        expected = {Role.HIDDEN: square, Role.ROUTER: router, **dict.fromkeys(others, square)}
        assert rates(scale) == pytest.approx(expected), scale
        folded = rates(scale, section={"residual": "folded"}, split_qkv=True)
        assert folded == pytest.approx({Role.BRANCH_OUT: square, **expected}), scale
        assert rates(scale, config=SimpleNamespace()) == pytest.approx(dict.fromkeys(folded.keys() - {Role.ROUTER} -
                                                                                     {*others}, square))  # fmt: skip


def test_other_proportions_have_rates_of_their_own():
    """An MLP of 256, eight times the base's 32, in a model of 64, four times 16, under shape_scaling."""
    config = TransformerConfig(ffn_hidden_size=256, num_moe_experts=None, moe_shared_expert_intermediate_size=None)
    found = rates("shape_scaling", dims={"ffn": 8}, config=config)
    # up: 512 of 64, the base's 64 of 16: 1 in both; down: (64 / 256)^1/2, in the base (16 / 32)^1/2
    assert found == pytest.approx({Role.HIDDEN: 1, Role.MLP_UP: 1, Role.MLP_DOWN: 2**-0.5})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"section": {"recipe": "completed_p"}}, '"completed_p" has no rule for Muon'),
        ({"experts": Experts(m_E=2, m_K=1)}, "2 times the base's experts, 1 times its active ones: no rule for Muon"),
        # queries 64 of 64, the base's 32 of 16: 1 in both; keys (32 / 64)^1/2, the base's 16 of 16: 1
        ({"dims": {"heads": 2}, "split_qkv": True}, "the role qkv need 1 and 0.707107 times the base's rate"),
        ({"config": TransformerConfig(multi_latent_attention=True)}, "multi_latent_attention is True: no rule"),
    ],
)
def test_what_no_rule_covers_is_refused(given, error):
    with pytest.raises(ConfigError, match=error):
        rates("shape_scaling", **given)
