"""Latent attention and multi-token prediction: megatron-core's trained by the rules, in both modes."""

import dataclasses

import pytest
import torch

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.errors import ConfigError
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import build_param_groups, building, finish, prepare, ratios_of
from megatron_patches.models import gpt

VOCAB, LENGTH, STEPS, HEADS = 64, 12, 5, 4
BASE = {"base_width": 16, "base_depth": 2}  # of width 64: m_N 4
LR, DECAY, EPS = 0.01, 0.1, 1e-4  # an eps that matters, so that its rule is seen


def section(**changes):
    return CompletePConfig.model_validate({"enabled": True, **BASE, **changes})


def settings(**more):
    """GPTConfig, TransformerConfig and layer spec of width 64 and 4 layers."""
    from megatron.core.models.gpt import gpt_layer_specs

    megatron_on_cpu.enable()
    shape = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": HEADS, "seq_length": LENGTH}
    kind = {"activation": "swiglu", "normalization": "RMSNorm", "position_embedding": "rope", "bias": False}
    cfg = gpt.GPTConfig.model_validate({**shape, **kind})
    gpt.initialize_parallel(cfg, 1234)
    config = dataclasses.replace(gpt.transformer_config(cfg, torch.float32), **more)
    return cfg, config, gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")


def build_model(config, spec, block_of, tied=False):
    """A GPTModel; ``block_of``: the layer spec of its multi-token prediction, if any."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    block = block_of and gpt_layer_specs.get_gpt_mtp_block_spec(config, block_of, use_transformer_engine=False)
    kind = {"share_embeddings_and_output_weights": tied, "position_embedding_type": "rope", "mtp_block_spec": block}
    return gpt.in_one_dtype(GPTModel(config, spec, VOCAB, LENGTH, **kind), config)


def batch(step):
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def train(model, loss_of, optimizer):
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, *batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_of(model, tokens, labels):
    return model(tokens, torch.arange(LENGTH).expand(3, -1), None, labels=labels).double().mean()


def predictions():
    """By mode and tying, losses of a model with two multi-token predictions and an eps of norms that matters."""
    found = {}
    for tied in (False, True):
        for residual in ("forward", "folded"):
            _, config, spec = settings(mtp_num_layers=2, mtp_loss_scaling_factor=0.5, layernorm_epsilon=0.01)
            completep = section(residual=residual)
            config, spec = prepare(config, spec, completep)
            model = build_model(config, spec, spec, tied)
            base = {"lr": LR, "weight_decay": DECAY, "eps": EPS}
            ratios = ratios_of(config, completep)
            groups = build_param_groups(model, finish(model, completep), ratios, completep, **base)
            norms = [layer.hnorm.eps for layer in model.mtp.layers]
            found[tied, residual] = train(model, loss_of, torch.optim.AdamW(groups)), norms
    return found


def test_a_prediction_trains_alike_in_both_modes(workers):
    found = workers(1).run(predictions)[0]
    for tied in (False, True):
        assert found[tied, "forward"][0] == found[tied, "folded"][0]  # multipliers are powers of two
        assert found[tied, "forward"][1] == [0.01, 0.01]
    assert found[False, "folded"][1] == [0.01, 0.01]
    assert found[True, "folded"][1] == [0.01 / 16, 0.01 / 16]  # on what a final norm of 1/4 the gains returns


def branches():
    """What residual branches are multiplied by in a model built in `building`, and what an unprepared block says."""
    _, config, spec = settings(mtp_num_layers=1)
    with building(section(residual="forward")):
        model = build_model(config, spec, spec)
    adds = [layer.self_attn_bda(True, False) for layer in model.modules() if hasattr(layer, "self_attn_bda")]
    ones = torch.ones(1)
    found = [add((ones, None), torch.zeros(1), 0.0).item() for add in adds]
    _, config, spec = settings(mtp_num_layers=1)
    config, prepared_spec = prepare(config, spec, section())
    model = build_model(config, prepared_spec, spec)
    with pytest.raises(ConfigError) as error:
        finish(model, section())
    return found, str(error.value)


def test_a_predictions_branches_are_scaled_or_it_is_refused(workers):
    found, error = workers(1).run(branches)[0]
    assert found == [0.5] * 5  # four layers', and the prediction's
    assert "multiplied by {1.0}, and the section says 0.5" in error and "get_gpt_mtp_block_spec" in error
