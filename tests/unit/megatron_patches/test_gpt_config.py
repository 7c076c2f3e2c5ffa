"""The model's settings: what is refused, in which words, and what megatron-core is told."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from ds_plugin.core.errors import ConfigError, StateError
from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt

SMALL = dict(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16)


def test_defaults():
    cfg = gpt.GPTConfig(**SMALL)
    assert (cfg.query_groups, cfg.ffn_size) == (4, 128)
    assert (cfg.position_embedding, cfg.normalization, cfg.activation) == ("learned", "LayerNorm", "gelu")
    assert (cfg.bias, cfg.tie_embeddings, cfg.dropout, cfg.init_std, cfg.tensor_parallel) == (True, False, 0.0, 0.02, 1)
    assert all(field.description for field in gpt.GPTConfig.model_fields.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 5}, ["num_attention_heads = 5", "hidden_size = 32", "divisor of 32"]),
        ({"num_query_groups": 3}, ["num_query_groups = 3", "num_attention_heads = 4", "divisor of 4"]),
        ({"tensor_parallel": 8}, ["tensor_parallel = 8", "num_attention_heads = 4"]),
        ({"tensor_parallel": 4, "num_query_groups": 2}, ["tensor_parallel = 4", "num_query_groups = 2"]),
        ({"tensor_parallel": 4, "ffn_hidden_size": 6}, ["tensor_parallel = 4", "ffn_hidden_size = 6"]),
        ({"hidden_size": 20, "position_embedding": "rope"}, ["position_embedding", "= 5", "'learned'"]),
        ({"hidden_sise": 64}, ["hidden_sise", "Extra inputs"]),
        ({"hidden_size": "64"}, ["hidden_size", "valid integer"]),
        ({"activation": "relu"}, ["activation", "'gelu' or 'swiglu'"]),
        ({"dropout": 1.0}, ["dropout", "less than 1"]),
        ({"num_layers": 0}, ["num_layers", "greater than or equal to 1"]),
    ],
)
def test_a_bad_setting_is_refused_by_name_value_and_remedy(change, words):
    with pytest.raises(ValidationError) as caught:
        gpt.GPTConfig(**{**SMALL, **change})
    for word in words:
        assert word in str(caught.value)


def test_the_config_is_frozen():
    with pytest.raises(ValidationError):
        gpt.GPTConfig(**SMALL).num_layers = 3


@pytest.mark.parametrize(
    ("vocab_size", "tensor_parallel", "padded"),
    [(50257, 1, 50304), (50257, 2, 50304), (50257, 8, 50304), (64, 1, 64), (65, 2, 128), (100, 3, 192), (1, 1, 64)],
)
def test_vocabulary_padding(vocab_size, tensor_parallel, padded):
    assert gpt.padded_vocab_size(vocab_size, tensor_parallel) == padded
    assert padded % tensor_parallel == 0


def test_transformer_config_says_what_the_settings_say():
    cfg = gpt.GPTConfig(
        **SMALL, num_query_groups=2, ffn_hidden_size=48, normalization="RMSNorm", activation="swiglu", bias=False,
        dropout=0.25, init_std=0.5, tensor_parallel=2,
    )  # fmt: skip
    config = gpt.transformer_config(cfg, torch.bfloat16)
    expected = dict(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48,
        normalization="RMSNorm", activation_func=F.silu, gated_linear_unit=True, add_bias_linear=False,
        hidden_dropout=0.25, attention_dropout=0.25, init_method_std=0.5, tensor_model_parallel_size=2,
        params_dtype=torch.bfloat16, bf16=True, fp16=False,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    torch.manual_seed(0)
    drawn = torch.empty(4000)
    config.init_method(drawn)
    assert abs(drawn.std().item() - 0.5) < 0.03


def test_an_unsupported_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"dtype = torch.float64.*torch.bfloat16"):
        gpt.transformer_config(gpt.GPTConfig(**SMALL), torch.float64)


def test_layer_spec_is_fresh_each_time():
    cfg = gpt.GPTConfig(**SMALL)
    first, second = gpt.layer_spec(cfg), gpt.layer_spec(cfg)
    first.submodules.mlp_bda = None
    assert second.submodules.mlp_bda is not None


def test_steps_out_of_order_are_refused_with_the_missing_step():
    cfg = gpt.GPTConfig(**SMALL)
    with pytest.raises(StateError, match="init_distributed"):
        gpt.initialize_parallel(cfg, 1)
    with pytest.raises(StateError, match="initialize_parallel"):
        gpt.build_gpt(cfg, 64, gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg))
    with pytest.raises(StateError, match="initialize_parallel"):
        gpt.DeepSpeedMPU()
    with pytest.raises(StateError, match="initialize_parallel"):
        megatron_on_cpu.check_replicas(torch.nn.Linear(1, 1))
