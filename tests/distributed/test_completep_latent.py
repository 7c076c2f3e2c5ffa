"""Latent attention and multi-token prediction: megatron-core's trained by the rules, in both modes."""

import dataclasses
import functools

import pytest
import torch

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.errors import ConfigError
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import build_param_groups, building, finish, prepare, ratios_of
from megatron_patches.models import gpt
from tests.reference.latent import ReferenceLatent

VOCAB, LENGTH, STEPS, HEADS = 64, 12, 5, 4
BASE = {"base_width": 16, "base_depth": 2}  # of width 64: m_N 4
LR, DECAY, EPS = 0.01, 0.1, 1e-4  # an eps that matters, so that its rule is seen


def section(**changes):
    return CompletePConfig.model_validate({"enabled": True, **BASE, **changes})


def settings(width=64, heads=HEADS, latent=None, **more):
    """TransformerConfig and layer spec of a model with 4 layers; ``latent``: fields of its latent attention, if any."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import MLATransformerConfig

    megatron_on_cpu.enable()
    shape = {"num_layers": 4, "hidden_size": width, "num_attention_heads": heads, "seq_length": LENGTH}
    kind = {"activation": "swiglu", "normalization": "RMSNorm", "position_embedding": "rope", "bias": False}
    cfg = gpt.GPTConfig.model_validate({**shape, **kind})
    gpt.initialize_parallel(cfg, 1234)
    config = gpt.transformer_config(cfg, torch.float32)
    if latent:
        given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        config = MLATransformerConfig(**given | latent | {"multi_latent_attention": True, "qk_layernorm": True} | more)
    else:
        config = dataclasses.replace(config, **more)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        config.num_moe_experts, False, config.qk_layernorm, config.multi_latent_attention, normalization="RMSNorm"
    )
    return config, spec


def build_model(config, spec, block_of, tied=False):
    """A GPTModel; ``block_of``: the layer spec of its multi-token prediction, if any."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    block = block_of and gpt_layer_specs.get_gpt_mtp_block_spec(config, block_of, use_transformer_engine=False)
    kind = {"share_embeddings_and_output_weights": tied, "position_embedding_type": "rope", "mtp_block_spec": block}
    return gpt.in_one_dtype(GPTModel(config, spec, VOCAB, LENGTH, **kind), config)


def batch(step):
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def in_0_16(name):
    """A parameter's name there; 0.19 calls a prediction's layer otherwise."""
    return name.replace("mtp_model_layer", "transformer_layer")


def weights(model):
    return {in_0_16(name): p for name, p in model.named_parameters()}


def drawn(**given):
    """The weights that megatron-core draws itself, from the same seed; its output projections' not by the depth."""
    by_width = functools.partial(torch.nn.init.normal_, mean=0.0, std=0.02)
    config, spec = settings(**given, output_layer_init_method=by_width)
    return weights(build_model(config, spec, spec if config.mtp_num_layers else None))


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
            config, spec = settings(mtp_num_layers=2, mtp_loss_scaling_factor=0.5, layernorm_epsilon=0.01)
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
    config, spec = settings(mtp_num_layers=1)
    with building(section(residual="forward")):
        model = build_model(config, spec, spec)
    adds = [layer.self_attn_bda(True, False) for layer in model.modules() if hasattr(layer, "self_attn_bda")]
    ones = torch.ones(1)
    found = [add((ones, None), torch.zeros(1), 0.0).item() for add in adds]
    config, spec = settings(mtp_num_layers=1)
    config, prepared_spec = prepare(config, spec, section())
    model = build_model(config, prepared_spec, spec)
    with pytest.raises(ConfigError) as error:
        finish(model, section())
    return found, str(error.value)


def test_a_predictions_branches_are_scaled_or_it_is_refused(workers):
    found, error = workers(1).run(branches)[0]
    assert found == [0.5] * 5  # four layers', and the prediction's
    assert "multiplied by {1.0}, and the section says 0.5" in error and "get_gpt_mtp_block_spec" in error


SIZES = {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 20}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64,
           "moe_shared_expert_intermediate_size": 64}  # fmt: skip
BASE_EXPERTS = {"base_num_moe_experts": 4, "base_moe_router_topk": 2}
PREDICTIONS = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}
#: the ranks here and in the base, what else the model has, and the mode
RANKS = {"q_lora_rank": 24, "kv_lora_rank": 32}, {"base_q_lora_rank": 24, "base_kv_lora_rank": 16}
ALL = {**PREDICTIONS, "softmax_type": "learnable"}
IN_PROPORTION = {"q_lora_rank": 32, "kv_lora_rank": 16}, {"base_q_lora_rank": 8, "base_kv_lora_rank": 4}
CASES = [(*RANKS, ALL, "forward"), (*RANKS, ALL, "folded"), (*IN_PROPORTION, {}, "forward")]


def beside_the_twin(ranks, base_ranks, more, residual):
    """Losses of both; by parameter how far apart both end, how far it moved, and its init over megatron-core's."""
    given = {"latent": {**ranks, **SIZES, "rope_type": "rope"}, **EXPERTS, **more}
    completep = section(residual=residual, **BASE_EXPERTS, **base_ranks)
    plain = drawn(**given)
    config, spec = prepare(*settings(**given), completep)
    model = build_model(config, spec, spec if config.mtp_num_layers else None)
    roles, ratios = finish(model, completep), ratios_of(config, completep)

    factors = {in_0_16(name): completep.fold_factor(role, ratios) for name, role in roles.items()}

    def unfolded():
        return {name: p.detach() / factors[name] for name, p in weights(model).items()}

    twin = ReferenceLatent(
        vocab=VOCAB, length=LENGTH, width=64, depth=4, heads=HEADS, experts=4, active=2, hidden=64, shared=64,
        sums_to=1.0, base=(4, 2, 16, 16, 1.0), rule=None, alpha=1.0, tied=False, base_head_dim=16, **BASE,
        ranks=tuple(ranks.values()), sizes=tuple(SIZES.values()), offset="softmax_type" in more,
        base_ranks=(base_ranks.get("base_q_lora_rank"), base_ranks["base_kv_lora_rank"]),
        predictions=(more.get("mtp_num_layers", 0), 0.5),
    )  # fmt: skip
    start = unfolded()
    names = {name: twin.name_of(name) for name, p in twin.named_parameters()}
    inits = {name: (start[theirs].norm() / plain[theirs].norm()).item() for name, theirs in names.items()}
    expected_inits = {name: twin.row(name)[0] for name in inits}
    twin.copy_from(start)
    groups = build_param_groups(model, roles, ratios, completep, lr=LR, weight_decay=DECAY, eps=EPS)
    found = train(model, loss_of, torch.optim.AdamW(groups))
    optimizer = torch.optim.AdamW(list(twin.groups(LR, DECAY, EPS)))
    expected = train(twin, lambda model, *given: model(*given), optimizer)
    apart, moved, end = {}, {}, unfolded()
    for name, p in twin.named_parameters():
        apart[name] = ((end[names[name]] - p).norm() / p.norm()).item()
        moved[name] = ((end[names[name]] - start[names[name]]).norm() / p.norm()).item()
    return found, expected, apart, moved, inits, expected_inits


def all_cases():
    return [beside_the_twin(*case) for case in CASES]


def test_latent_attention_and_predictions_train_as_the_rules_say(workers):
    for found, expected, apart, moved, inits, expected_inits in workers(1).run(all_cases)[0]:
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-6, (found, expected)
        assert not {name: d for name, d in apart.items() if d > 1e-3 * moved[name]}
        assert min(moved.values()) > 1e-5  # far more than rounding, also where eps is above the gradients
        assert inits == pytest.approx(expected_inits, rel=1e-5)
