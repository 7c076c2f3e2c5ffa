"""Mixtures of experts: megatron-core's trained by the rules beside the plain torch twin, in both modes, and what the
rules do not cover."""

import dataclasses
import functools

import pytest
import torch

import ds_plugin
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.errors import ConfigError
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import build_param_groups, finish, fold, prepare, ratios_of, unfold
from megatron_patches.models import gpt
from tests.distributed.test_completep_parity import LENGTH, STEPS, VOCAB, batch, train
from tests.reference.experts import ReferenceMoE, name_of

HEADS = 4
BASE = {"base_width": 16, "base_depth": 2, "base_head_dim": 8}  # of width 64: m_N 4
LR, DECAY, EPS = 0.01, 0.1, 1e-4  # an eps that matters, so that its rule is seen
FIELDS = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
          "moe_router_topk_scaling_factor")  # fmt: skip
#: experts, active ones, hidden size of one, of the shared ones together, what weights sum to: here, then in the base
IN_PROPORTION = ((8, 2, 64, 64, None), (8, 2, 16, 16, None), {})
SAME_SHARE = ((8, 4, 64, 0, 4.0), (4, 2, 32, 0, 2.0), {"moe": "fixed_sparsity"})  # the sum form
OTHER_SHARE = ((8, 3, 64, 96, None), (4, 2, 32, 32, None), {"moe": "mue"})


def section(base=IN_PROPORTION[1], **changes):
    sizes = {f"base_{name}": value for name, value in zip(FIELDS, base, strict=True) if value}
    return CompletePConfig.model_validate({"enabled": True, **BASE, **sizes, **changes})


def build(completep, sizes, depth=4, seed=1234, **more):
    """A model and the roles of its parameters; without a section as megatron-core has it."""
    from megatron.core.models.gpt import gpt_layer_specs

    megatron_on_cpu.enable()
    shape = {"num_layers": depth, "hidden_size": 64, "num_attention_heads": HEADS, "seq_length": LENGTH}
    kind = {"activation": "swiglu", "normalization": "RMSNorm", "position_embedding": "rope", "bias": False}
    cfg = gpt.GPTConfig.model_validate({**shape, **kind})
    gpt.initialize_parallel(cfg, seed)
    given = {name: value or None for name, value in zip(FIELDS, sizes, strict=True)}
    config = dataclasses.replace(gpt.transformer_config(cfg, torch.float32), **given, **more)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=sizes[0], normalization="RMSNorm")
    config, spec = prepare(config, spec, completep)
    model = gpt.build_gpt(cfg, VOCAB, config, spec)
    return model, finish(model, completep)


def beside_the_twin(case, residual):
    """Losses of both; by parameter how far apart both end, how far it moved, and its init over megatron-core's."""
    sizes, base, changes = case
    completep = section(base, residual=residual, **changes)
    by_width = functools.partial(torch.nn.init.normal_, mean=0.0, std=0.02)  # not by depth, as megatron-core's is
    plain, _ = build(None, sizes, output_layer_init_method=by_width)
    model, roles = build(completep, sizes)
    ratios = ratios_of(model.config, completep)

    def unfolded():
        return {name: p.detach() / completep.fold_factor(roles[name], ratios) for name, p in model.named_parameters()}

    def loss_of(tokens, labels):
        return model(tokens, torch.arange(LENGTH).expand(3, -1), None, labels=labels).double().mean()

    experts, active, hidden, shared, sums_to = sizes
    twin = ReferenceMoE(
        vocab=VOCAB, length=LENGTH, width=64, depth=4, heads=HEADS, experts=experts, active=active, hidden=hidden,
        shared=shared, sums_to=sums_to or 1.0, base=(*base[:4], base[4] or 1.0), rule=changes.get("moe"), alpha=1.0,
        tied=False, **BASE,
    )  # fmt: skip
    start = unfolded()
    drawn = dict(plain.named_parameters())
    inits = {name: (start[name_of(name)].norm() / drawn[name_of(name)].norm()).item() for name, p in
             twin.named_parameters() if p.dim() > 1}  # fmt: skip
    expected_inits = {name: twin.row(name)[0] for name in inits}
    twin.copy_from(start)
    groups = build_param_groups(model, roles, ratios, completep, lr=LR, weight_decay=DECAY, eps=EPS)
    found = train(loss_of, torch.optim.AdamW(groups))
    expected = train(twin, torch.optim.AdamW(list(twin.groups(LR, DECAY, EPS))))
    apart, moved, end = {}, {}, unfolded()
    for name, p in twin.named_parameters():
        apart[name] = ((end[name_of(name)] - p).norm() / p.norm()).item()
        moved[name] = ((end[name_of(name)] - start[name_of(name)]).norm() / p.norm()).item()
    return found, expected, apart, moved, inits, expected_inits


def all_cases():
    cases = [(IN_PROPORTION, "forward"), (SAME_SHARE, "folded"), (OTHER_SHARE, "forward"), (OTHER_SHARE, "folded")]
    return [beside_the_twin(*case) for case in cases]


def test_experts_train_as_the_rules_say(workers):
    for found, expected, apart, moved, inits, expected_inits in workers(1).run(all_cases)[0]:
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-6, (found, expected)
        assert not {name: d for name, d in apart.items() if d > 2e-4}
        assert not {name: m for name, m in moved.items() if m < 0.003}
        assert inits == pytest.approx(expected_inits, rel=1e-5)


def with_a_balancing_bias():
    """What a state dict with the router's bias, which no optimizer trains, becomes when it is folded and back."""
    sizes, base, changes = IN_PROPORTION
    completep = section(base, residual="forward", **changes)
    router = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    model, _ = build(completep, sizes, **router)
    weights = model.state_dict()
    for name in (biases := [name for name in weights if name.endswith("router.expert_bias")]):
        weights[name] += 0.25
    folded = fold(weights, model.config, completep, tied=False)
    in_folded = completep.model_copy(update={"residual": "folded"})
    back = unfold(folded, model.config, in_folded, tied=False)
    kept = [bool((folded[name] == 0.25).all() and (back[name] == 0.25).all()) for name in biases]
    matrix = "decoder.layers.0.mlp.router.weight"
    return kept, torch.equal(back[matrix], weights[matrix]), "decoder.layers.0.mlp.router.expert_bias" in folded


def test_a_balancing_bias_is_neither_folded_nor_refused(workers):
    assert workers(1).run(with_a_balancing_bias) == [([True] * 4, True, True)]


def on_deepspeed():
    """Losses of engines at ZeRO 1 and 3, and of torch's AdamW, in the forward mode."""
    sizes, base, changes = OTHER_SHARE
    completep, found = section(base, **changes), {}
    adam = {"lr": LR, "weight_decay": DECAY, "eps": EPS, "torch_adam": True}
    for stage in (None, 1, 3):
        model, roles = build(completep, sizes)

        def loss_of(tokens, labels, model=model):
            return model(tokens, torch.arange(LENGTH).expand(3, -1), None, labels=labels).mean()

        if stage is None:
            ratios = ratios_of(model.config, completep)
            groups = build_param_groups(model, roles, ratios, completep, lr=LR, weight_decay=DECAY, eps=EPS)
            found[stage] = train(loss_of, torch.optim.AdamW(groups))
            continue
        config = {"train_batch_size": 3, "zero_optimization": {"stage": stage}, "completep": completep.model_dump()}
        config |= {"optimizer": {"type": "AdamW", "params": adam}}
        engine, *_ = ds_plugin.initialize(model=model, config=config, mpu=gpt.DeepSpeedMPU())
        found[stage] = []
        for step in range(STEPS):
            loss = loss_of(*batch(step), model=engine)
            engine.backward(loss)
            engine.step()
            found[stage].append(loss.item())
        engine.destroy()
    return found


def test_experts_on_deepspeed(workers):
    found = workers(1).run(on_deepspeed)[0]
    expected = found.pop(None)
    assert expected[0] - expected[-1] > 0.005
    for stage, losses in found.items():
        assert losses == pytest.approx(expected, abs=1e-6), stage


#: what is refused, by case: the model, its base, what the section says besides, options of the router; the error
REFUSED = {
    "unknown base": ((8, 2, 64, 0, None), (0, 0, 0, 0, None), {}, {}, r"base_num_moe_experts: missing.*\(here 8\)"),
    "another share": ((8, 3, 64, 0, None), (4, 2, 16, 0, None), {}, {}, 'through 2 of 4 experts in the base, 3 of 8'),
    "shared": ((8, 2, 64, 96, None), (8, 2, 16, 16, None), {}, {}, "size is 6 times the base's, a routed one's 4"),
    "no shared": ((8, 2, 64, 0, None), (8, 2, 16, 16, None), {}, {}, "16 in the base, here moe_shared.* is None"),
    "unnamed rule": ((8, 2, 32, 0, None), (8, 2, 16, 0, None), {}, {}, 'write "fixed_sparsity" or "mue"'),
    "more of them": ((16, 4, 64, 0, None), (8, 2, 16, 0, None), {}, {}, "2 of 8 experts in the base, 4 of 16 here"),
    "factor": ((8, 2, 64, 0, 2.0), (8, 2, 16, 0, 1.0), {}, {}, "2 experts sum to 1 in the base, of 2 here to 2"),
    "form": ((8, 4, 64, 0, 4.0), (8, 2, 16, 0, 1.0), {"moe": "mue"}, {}, "neither one constant nor their number"),
    "unsaid form": ((8, 4, 64, 0, 4.0), (8, 2, 16, 0, None), {"moe": "mue"}, {}, "missing: the router's is 4 with 4"),
    "pre-softmax": ((8, 4, 64, 0, None), (8, 2, 16, 0, None), {"moe": "mue"}, {"moe_router_pre_softmax": True},
                    "2 in the base, 4 here, and with moe_router_pre_softmax"),
    "sigmoid": ((8, 2, 64, 0, None), (8, 1, 16, 0, None), {"moe": "mue"}, {"moe_router_score_function": "sigmoid"},
               "sigmoid scores of one expert"),
    "repetition": ((8, 2, 64, 0, None), (8, 2, 16, 0, None), {"base_num_query_groups": 1}, {},
                   "shared by 2 heads in the base and by 1 here"),
}  # fmt: skip


def refusals():
    said = {}
    for name, (sizes, base, changes, options, _) in REFUSED.items():
        try:
            build(section(base, **changes), sizes, **options)
        except ConfigError as error:
            said[name] = str(error)
    return said


def test_what_no_rule_covers_is_refused(workers):
    said = workers(1).run(refusals)[0]
    for name, (*_, error) in REFUSED.items():
        with pytest.raises(ConfigError, match=error):
            raise ConfigError(said.get(name, "nothing"))
