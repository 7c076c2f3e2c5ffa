"""CompleteP on megatron-core through DeepSpeed, against the plain-torch model written from Table 1."""

import copy
import dataclasses
import functools
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

import ds_plugin
from ds_plugin.completep import rules
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import build_param_groups, finish, finished_roles, prepare
from megatron_patches.models import gpt
from tests.harness import slow
from tests.reference.completep import ReferenceGPT, megatron_name

VOCAB, LENGTH, STEPS = 64, 12, 5
SIZE = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "seq_length": LENGTH}
BASE = {"enabled": True, "base_width": 16, "base_depth": 2, "base_head_dim": 8}
LR, DECAY, EPS = 0.01, 0.1, 1e-4  # an eps that matters, so that its rule is seen


def section(**changes):
    return CompletePConfig.model_validate({**BASE, **changes})


def build(completep, finished=True, **changes):
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, **changes})
    gpt.initialize_parallel(cfg, 1234)
    config, spec = gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg)
    if completep is not None:
        config, spec = prepare(config, spec, completep)
    model = gpt.build_gpt(cfg, VOCAB, config, spec)
    if completep is not None and finished:
        finish(model, completep)
    return model


def deepspeed_config(completep, zero=0):
    return {
        "train_micro_batch_size_per_gpu": 3,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "eps": EPS, "torch_adam": True}},
        "completep": completep.model_dump()
        if completep is not None
        else {"enabled": False, **{k: BASE[k] for k in ("base_width", "base_depth")}},
    }


def batch(step):
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def positions():
    return torch.arange(LENGTH).expand(3, -1)


def train(engine):
    losses = []
    for step in range(STEPS):
        tokens, labels = batch(step)
        loss = engine(tokens, positions(), None, labels=labels).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _parity(alpha, tied):
    completep = section(alpha=alpha)
    model = build(completep, tie_embeddings=tied)
    engine, *_ = ds_plugin.initialize(model=model, config=deepspeed_config(completep), mpu=gpt.DeepSpeedMPU())
    base = {"base_width": 16, "base_depth": 2, "base_head_dim": 8}
    reference = ReferenceGPT(vocab=VOCAB, length=LENGTH, width=64, depth=8, heads=4, alpha=alpha, tied=tied, **base)
    reference.copy_from_megatron(model)
    optimizer = torch.optim.AdamW(list(reference.groups(LR, DECAY, EPS)))
    expected = []
    for step in range(STEPS):
        loss = reference(*batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    found = train(engine)
    theirs = dict(model.named_parameters())
    drift = max(
        ((theirs[megatron_name(name)] - p).norm() / p.norm()).item() for name, p in reference.named_parameters()
    )
    return found, expected, drift


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_parity_with_the_paper(workers, alpha, tied):
    found, expected, drift = workers(1).run(_parity, alpha, tied)[0]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-6, (found, expected)
    assert drift <= 2e-4
    assert found[0] - found[-1] > 0.005  # it has trained, so there was something to differ in


def _init_stds(completep):
    model = build(completep)
    if completep is not None:
        finish(model, completep)
        finish(model, completep)  # twice is once
    return {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}


def test_init(workers):
    """s = 0.02; m_N = 4, so hidden matrices have 0.01; everything else 0.02. Tolerance: 5 standard errors."""
    stds = workers(1).run(_init_stds, section())[0]
    for name, std in stds.items():
        expected = 0.01 if "decoder.layers" in name else 0.02
        samples = 64 * (LENGTH if "position" in name else 64)
        assert abs(std / expected - 1) < 5 / math.sqrt(2 * samples), (name, std)
    assert sum("decoder.layers" in name for name in stds) == 32


def _own_inits(changes):
    """The std's that a model is drawn with whose config has init methods of its own."""
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate(SIZE)
    gpt.initialize_parallel(cfg, 1234)
    config = dataclasses.replace(gpt.transformer_config(cfg, torch.float32), **UNSET | changes)
    completep = section(base_head_dim=None)
    config, spec = prepare(*prepare(config, gpt.layer_spec(cfg), completep), completep)  # twice is once
    model = gpt.build_gpt(cfg, VOCAB, config, spec)
    finish(model, completep)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    return {role: [std for name, std in stds.items() if role in name] for role in INIT_ROLES}


def normal(std):
    return functools.partial(torch.nn.init.normal_, mean=0.0, std=std)


INIT_ROLES = ("word_embeddings", "linear_qkv", "linear_fc1", "linear_proj", "linear_fc2", "output_layer")
UNSET = dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"))
# what is given beside init_method_std 0.02; the base std's of embeddings, hidden matrices and branch ends. 8 layers.
OWN_INITS = {
    "none": ({}, {}, (0.02, 0.02, 0.02)),
    "init_method": ({"init_method": 0.05}, {}, (0.05, 0.05, 0.05)),
    "all by depth": ({"init_method": 0.05, "output_layer_init_method": 0.05 / 4}, {}, (0.05, 0.05, 0.05)),
    "embeddings": ({"embedding_init_method": 0.3}, {}, (0.3, 0.02, 0.02)),
    "embeddings' std": ({}, {"embedding_init_method_std": 0.3}, (0.3, 0.02, 0.02)),
    "branch ends": ({"output_layer_init_method": 0.1}, {}, (0.02, 0.02, 0.1)),
}


@pytest.mark.parametrize("case", OWN_INITS)
def test_own_init_methods_are_the_bases(workers, case):
    """m_N = 4: hidden matrices and branch ends have half the base's std, embeddings and unembedding all of it."""
    methods, changes, (embeddings, hidden, ends) = OWN_INITS[case]
    found = workers(1).run(_own_inits, {**{name: normal(std) for name, std in methods.items()}, **changes})[0]
    expected = (embeddings, hidden / 2, hidden / 2, ends / 2, ends / 2, hidden)
    for role, std in zip(INIT_ROLES, expected, strict=True):
        assert found[role] and found[role] == pytest.approx([std] * len(found[role]), rel=0.06), role


def _inits_of_copies():
    """The std's of the three init methods of what becomes of a prepared config, each prepared again."""
    cfg, completep = gpt.GPTConfig.model_validate(SIZE), section()
    megatron_on_cpu.enable()
    config, spec = prepare(gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg), completep)
    deeper = copy.copy(config)
    deeper.num_layers = 2 * config.num_layers
    copies = {
        "itself": config,
        "replace": dataclasses.replace(config, softmax_scale=None),
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
        "deeper": deeper,
    }
    again = {name: prepare(each, spec, completep)[0] for name, each in copies.items()}
    return {
        name: ([getattr(each, m).keywords["std"] for m in UNSET], each.softmax_scale) for name, each in again.items()
    }


def test_copies_of_a_prepared_config_are_scaled_once(workers):
    """s = 0.02, halved for what lies in a block (m_N = 4); the attention scale sqrt(8) / 16."""
    for name, (stds, scale) in workers(1).run(_inits_of_copies)[0].items():
        assert stds == pytest.approx([0.01, 0.01, 0.02]), name
        assert scale == pytest.approx(8**0.5 / 16), name


def _switched_off():
    cfg = gpt.GPTConfig.model_validate(SIZE)
    megatron_on_cpu.enable()
    config, spec = gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg)
    same = all(a is b for a, b in zip(prepare(config, spec, None), (config, spec), strict=True))
    model = build(None)
    before = [p.clone() for p in model.parameters()]
    roles = finish(model, None)
    return same, roles, all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_without_a_section_nothing_changes(workers):
    assert workers(1).run(_switched_off) == [(True, {}, True)]


def _loaded_weights():
    """A trained model's weights, loaded into a model that is then given to initialize()."""
    trained, model = build(section()), build(section())
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.01)
    model.load_state_dict(trained.state_dict())
    engine, *_ = ds_plugin.initialize(model=model, config=deepspeed_config(section()), mpu=gpt.DeepSpeedMPU())
    ours = dict(engine.module.named_parameters())
    return [name for name, p in trained.named_parameters() if not torch.equal(p, ours[name])]


def test_loaded_weights_are_not_scaled_again(workers):
    assert workers(1).run(_loaded_weights) == [[]]


def _group_rates(kind):
    config = {**deepspeed_config(section()), "scheduler": {"type": kind, "params": {"warmup_num_steps": 2}}}
    if kind != "WarmupLR":
        config["scheduler"]["params"]["total_num_steps"] = 20
    if kind != "WarmupCosineLR":
        config["scheduler"]["params"]["warmup_max_lr"] = LR
    engine, *_ = ds_plugin.initialize(model=build(section()), config=config, mpu=gpt.DeepSpeedMPU())
    train(engine)
    return {g["role"]: g["lr"] / engine.optimizer.param_groups[0]["lr"] for g in engine.optimizer.param_groups}


@pytest.mark.parametrize("kind", [slow("WarmupLR"), slow("WarmupDecayLR"), "WarmupCosineLR"])
def test_schedulers_keep_the_groups_apart(workers, kind):
    for rates in workers(1).run(_group_rates, kind):
        assert rates == pytest.approx({role: lr / LR for role, lr, _, _ in GROUPS})


def _groups_of(**changes):
    engine, *_ = ds_plugin.initialize(
        model=build(section(**changes)), config=deepspeed_config(section(**changes)), mpu=gpt.DeepSpeedMPU()
    )
    return {g["role"]: (g["eps"], g["betas"]) for g in engine.optimizer.param_groups}


def test_eps_scope_and_betas_reach_the_optimizer(workers):
    everywhere = workers(1).run(_groups_of, eps_scope="all")[0]
    assert {eps for eps, _ in everywhere.values()} == {EPS / 16}
    completed = workers(1).run(_groups_of, recipe="completed_p", batch_ratio=2.0, token_ratio=8.0)[0]
    # betas 0.9, 0.999; (1 - beta) / 4; eps x sqrt(8 / 2), embeddings also / m_N
    assert all(betas == pytest.approx((0.975, 0.99975)) for _, betas in completed.values())
    assert completed["embedding"][0] == pytest.approx(EPS * 2 / 4)
    assert completed["hidden"][0] == pytest.approx(EPS * 2 / 16)


def _base_model(completep):
    model = build(completep, num_layers=2, hidden_size=16, num_attention_heads=2)
    # the one difference Table 1 makes to the base model: its output projections start as wide as the rest
    with torch.no_grad():
        for name, p in model.named_parameters():
            if completep is None and name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                p.mul_(math.sqrt(2 * 2))
    groups = None
    if completep is None:
        named = list(model.named_parameters())
        groups = [
            {"params": [p for _, p in named if p.dim() > 1]},
            {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
        ]
    engine, *_ = ds_plugin.initialize(
        model=model, config=deepspeed_config(completep), model_parameters=groups, mpu=gpt.DeepSpeedMPU()
    )
    return train(engine)


def test_the_base_model_trains_as_without_it(workers):
    with_it = workers(1).run(_base_model, section())[0]
    without = workers(1).run(_base_model, None)[0]
    assert with_it == pytest.approx(without, abs=1e-6)


def _save(folder, completep):
    engine, *_ = ds_plugin.initialize(
        model=build(completep), config=deepspeed_config(completep), mpu=gpt.DeepSpeedMPU()
    )
    train(engine)
    engine.save_checkpoint(folder)


def _load(folder, completep):
    engine, *_ = ds_plugin.initialize(
        model=build(completep), config=deepspeed_config(completep), mpu=gpt.DeepSpeedMPU()
    )
    engine.load_checkpoint(folder)


def test_a_checkpoint_of_another_recipe_is_refused(workers, tmp_path):
    workers(1).run(_save, str(tmp_path), section())
    workers(1).run(_load, str(tmp_path), section())
    error = workers(1).run(_load, str(tmp_path), section(alpha=0.5), expect="errors")[0]
    assert error.type == "CheckpointError" and '"alpha": 1.0' in error.message and '"alpha": 0.5' in error.message


def _save_plain(folder):
    engine, *_ = ds_plugin.initialize(model=build(None), config=deepspeed_config(None), mpu=gpt.DeepSpeedMPU())
    engine.save_checkpoint(folder)


def test_a_checkpoint_without_the_plugin_is_refused(workers, tmp_path):
    workers(1).run(_save_plain, str(tmp_path))
    error = workers(1).run(_load, str(tmp_path), section(), expect="errors")[0]
    assert error.type == "CheckpointError" and "another parametrization" in error.message


def test_every_setting_of_a_checkpoint_is_compared():
    stored = section().model_dump()
    assert section().differences(stored) == ""
    assert section(residual="folded").differences(stored) == 'residual "forward" there, "folded" here'
    two = section(alpha=0.5).differences({**stored, "another": 1})
    assert two == "alpha 1.0 there, 0.5 here, another 1 there, null here"
    assert "base_width null there, 16 here" in section().differences(None)


def _stage_losses(zero, tensor_parallel):
    completep = section()
    model = build(completep, tensor_parallel=tensor_parallel)
    engine, *_ = ds_plugin.initialize(model=model, config=deepspeed_config(completep, zero), mpu=gpt.DeepSpeedMPU())
    losses = train(engine)
    return losses, [(g["role"], g["lr"], g["weight_decay"], g["eps"]) for g in engine.optimizer.param_groups]


# lr 0.01, decay 0.1, eps 1e-4; m_N = 4, m_L = 4, alpha 1
GROUPS = [
    ("embedding", 0.01, 0.1, 1e-4),
    ("hidden", 0.0025, 0.4, 1e-4 / 16),
    ("block_norm", 0.01, 0.0, 1e-4 / 16),
    ("block_bias", 0.01, 0.0, 1e-4 / 16),
    ("final_norm", 0.01, 0.0, 1e-4),
    ("unembedding", 0.01, 0.1, 1e-4),
]


@pytest.mark.parametrize(("ranks", "zero", "tensor_parallel"), [slow(2, 1, 1), slow(2, 2, 1), (2, 3, 1), (2, 1, 2)])
def test_layouts_agree_and_keep_the_groups(workers, ranks, zero, tensor_parallel):
    expected, groups = workers(1).run(_stage_losses, 0, 1)[0]
    assert [g[0] for g in groups] == [g[0] for g in GROUPS]
    for found, wanted in zip(groups, GROUPS, strict=True):
        assert found[1:] == pytest.approx(wanted[1:], rel=1e-12)
    for losses, layout_groups in workers(ranks).run(_stage_losses, zero, tensor_parallel):
        assert losses == pytest.approx(expected, abs=1e-5)
        assert layout_groups == groups


def _other_kinds(attempt, config, cfg):
    """Models, configs and specs of other kinds, and what may and may not be around the right one."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec

    spec = gpt.layer_spec(cfg)
    llama = type("LlamaForCausalLM", (torch.nn.Linear,), {"__module__": "transformers.models.llama"})(2, 2)
    llama.config = type("LlamaConfig", (), {"__module__": "transformers.models.llama"})()
    attempt("HF config", lambda: prepare(llama.config, spec, section()))
    attempt("our settings", lambda: prepare(cfg, spec, section()))
    attempt("BERT spec", lambda: prepare(config, bert_layer_local_spec, section()))
    attempt("T5 spec", lambda: prepare(config, get_t5_decoder_with_local_block_spec(2), section()))
    attempt("no spec", lambda: prepare(config, None, section()))
    hybrid = type("HybridModel", (torch.nn.Linear,), {"__module__": "megatron.core.models.hybrid"})(2, 2)
    attempt("hybrid model", lambda: finish(hybrid, section()))
    attempt("HF model", lambda: finish(llama, section()))
    attempt("HF model's roles", lambda: finished_roles(torch.nn.DataParallel(llama), section()))
    attempt("HF engine", lambda: ds_plugin.initialize(model=llama, config=deepspeed_config(section())))
    model = build(section(), finished=False)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    attempt("wrapped", lambda: finish(ddp, section()))
    attempt("wrapped in the engine", lambda: ds_plugin.initialize(model=ddp, config=deepspeed_config(section())))


def _compiled():
    """Roles, groups and an engine of a model that torch.compile is around, as a whole or around a layer."""
    model = build(section(), finished=False)
    layer = model.decoder.layers[0]
    model.decoder.layers[0] = torch.compile(layer)
    compiled = torch.compile(model)
    roles = finish(compiled, section())
    base = {"lr": LR, "weight_decay": DECAY, "eps": EPS}
    groups = build_param_groups(compiled, roles, section().ratios(64, 8), section(), **base)
    ddp = torch.nn.DataParallel(compiled)
    model.decoder.layers[0] = layer
    engine, *_ = ds_plugin.initialize(model=compiled, config=deepspeed_config(section()), mpu=gpt.DeepSpeedMPU())
    same = finished_roles(ddp, section()) == {name.replace("_orig_mod.", ""): role for name, role in roles.items()}
    return same, [g["role"] for g in groups], [g["role"] for g in engine.optimizer.param_groups]


def test_a_compiled_model_is_the_model(workers):
    roles = [group[0] for group in GROUPS]
    assert workers(1).run(_compiled) == [(True, roles, roles)]


def _refusals():
    megatron_on_cpu.enable()
    from deepspeed.pipe import PipelineModule
    from megatron.core.ssm.mamba_block import MambaStackSubmodules
    from megatron.core.transformer.attention import CrossAttention
    from megatron.core.transformer.spec_utils import ModuleSpec

    messages = {}

    def attempt(name, function):
        try:
            function()
        except ConfigError as error:
            messages[name] = str(error)

    plain, prepared = build(None), build(section())
    attempt("unprepared", lambda: finish(plain, section()))
    attempt("other base", lambda: finish(prepared, section(base_width=32)))
    unfinished = build(section(), finished=False)
    attempt("unfinished", lambda: ds_plugin.initialize(model=unfinished, config=deepspeed_config(section())))
    attempt(
        "groups",
        lambda: ds_plugin.initialize(
            model=prepared, config=deepspeed_config(section()), model_parameters=[{"params": prepared.parameters()}]
        ),
    )
    attempt(
        "optimizer",
        lambda: ds_plugin.initialize(
            model=prepared, config=deepspeed_config(section()), optimizer=torch.optim.SGD(prepared.parameters(), 0.1)
        ),
    )
    attempt(
        "scheduler",
        lambda: ds_plugin.initialize(
            model=prepared, config={**deepspeed_config(section()), "scheduler": {"type": "OneCycle", "params": {}}}
        ),
    )
    two = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 2)
    normed = build(section(), qk_norm=True)
    attempt("qk_norm", lambda: ds_plugin.initialize(model=normed, config=deepspeed_config(section()), mpu=two))
    prepared.extra = torch.nn.Linear(2, 2)
    attempt("unknown parameter", lambda: finish(prepared, section()))
    for name, value in (
        ("num_moe_experts", 4),
        ("multi_latent_attention", True),
        ("softmax_scale", 0.1),
        ("use_mup", True),
        ("is_hybrid_model", True),
        ("inference_fuse_tp_communication", True),
        ("apply_query_key_layer_scaling", True),
        ("experimental_attention_variant", "gated_delta_net"),
        ("heterogeneous_block_specs", True),
        ("enable_hyper_connections", True),
    ):
        cfg = gpt.GPTConfig.model_validate(SIZE)
        config = gpt.transformer_config(cfg, torch.float32)
        setattr(config, name, value)
        attempt(name, lambda config=config, cfg=cfg: prepare(config, gpt.layer_spec(cfg), section()))
    config = gpt.transformer_config(cfg, torch.float32)
    mamba, crossed = gpt.layer_spec(cfg), gpt.layer_spec(cfg)
    mamba.submodules = MambaStackSubmodules()
    attempt("mamba", lambda: prepare(config, mamba, section()))
    for name, method in (
        ("xavier", torch.nn.init.xavier_uniform_),
        ("off zero", functools.partial(torch.nn.init.normal_, mean=0.1, std=0.02)),
        ("generator", functools.partial(torch.nn.init.normal_, std=0.02, generator=torch.Generator())),
    ):
        drawn = gpt.transformer_config(cfg, torch.float32)
        drawn.init_method = method
        attempt(name, lambda drawn=drawn: prepare(drawn, gpt.layer_spec(cfg), section()))
    pipeline = PipelineModule([torch.nn.Linear(2, 2)], num_stages=1)
    attempt("pipeline", lambda: ds_plugin.initialize(model=pipeline, config=deepspeed_config(section())))
    low = {**deepspeed_config(section()), "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}}
    attempt("peak", lambda: ds_plugin.initialize(model=build(section()), config=low))
    crossed.submodules.cross_attention = ModuleSpec(module=CrossAttention)
    attempt("cross-attention", lambda: prepare(config, crossed, section()))
    _other_kinds(attempt, config, cfg)
    prepared = build(section(), finished=False)
    prepared.output_layer.weight = torch.nn.Parameter(prepared.output_layer.weight.to("meta"))
    attempt("meta", lambda: finish(prepared, section()))
    return messages


EXPECTED = {
    "unprepared": ["built without it", "prepare"],
    "other base": ["base_width 32", "base_width 16"],
    "unfinished": ["finish(model, section)", "before any weights are loaded"],
    "groups": ["model_parameters"],
    "optimizer": ["SGD", "lambda groups"],
    "scheduler": ["OneCycle"],
    "qk_norm": ["qk_layernorm with tensor parallelism 2"],
    "unknown parameter": ["extra.weight"],
    "num_moe_experts": ["num_moe_experts", "4"],
    "multi_latent_attention": ["multi_latent_attention is True", "MLATransformerConfig"],
    "softmax_scale": ["softmax_scale", "0.1"],
    "use_mup": ["use_mup", "True", "leave it off"],
    "is_hybrid_model": ["is_hybrid_model is True: on Mamba layers muP and the spectral condition fail"],
    "inference_fuse_tp_communication": ["inference_fuse_tp_communication"],
    "apply_query_key_layer_scaling": ["apply_query_key_layer_scaling"],
    "experimental_attention_variant": ["gated_delta_net"],
    "heterogeneous_block_specs": ["heterogeneous_block_specs"],
    "enable_hyper_connections": ["enable_hyper_connections"],
    "mamba": ["StackSubmodules, of a hybrid model, and on Mamba layers muP"],  # or Mamba's, by the version
    "cross-attention": ["CrossAttention", "decoder-only"],
    "xavier": ["init_method", "xavier_uniform_", "init_method_std"],
    "off zero": ["TransformerConfig.init_method", "mean=0.1", "normal_, mean=0.0"],
    "generator": ["TransformerConfig.init_method", "generator"],
    "pipeline": ["pipeline engine", "completep"],
    "peak": ["warmup_max_lr: 0.001, DeepSpeed's default", "0.01"],
    "meta": ["output_layer.weight", "device meta"],
    "HF config": ["Hugging Face's LlamaConfig", "TransformerConfig"],
    "our settings": ["megatron_patches.models.gpt.GPTConfig", "gpt.transformer_config(cfg, dtype)"],
    "BERT spec": ["attn_mask_type is 'padding'", "BERT", "decoder-only"],
    "T5 spec": ["CrossAttention", "decoder-only"],
    "no spec": ["layer spec is None", "ModuleSpec"],
    "hybrid model": ["this is megatron-core's HybridModel: on Mamba layers muP", "supported are"],
    "HF model": ["this is Hugging Face's LlamaForCausalLM", "supported are megatron-core GPTModels, dense"],
    "HF model's roles": ["this is Hugging Face's LlamaForCausalLM"],
    "HF engine": ["this is Hugging Face's LlamaForCausalLM"],
    "wrapped": ["megatron-core's DistributedDataParallel around megatron-core's GPTModel", "before it is wrapped"],
    "wrapped in the engine": ["megatron-core's DistributedDataParallel around"],
}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"base_width": 0}, ["base_width", "0"]),
        ({"base_width": -64}, ["base_width", "-64"]),
        ({"base_depth": "two"}, ["base_depth", "two"]),
        ({"base_depth": 2.5}, ["base_depth", "2.5"]),
        ({"base_width": None}, ["base_width", "None"]),
        ({"alpha": 0.4}, ["alpha", "0.4"]),
        ({"alpha": 1.5}, ["alpha", "1.5"]),
        ({"alpha": "one"}, ["alpha", "one"]),
        ({"base_head_dim": -8}, ["base_head_dim", "-8"]),
        ({"recipe": "sp"}, ["recipe", "sp", "standard"]),
        ({"residual": "fold"}, ["residual", "fold", "folded"]),
        ({"batch_ratio": 2.0}, ["batch_ratio: 2.0 has no effect with recipe 'completep'", '"recipe": "completed_p"']),
        ({"recipe": "mup", "alpha": 0.5}, ["alpha: 0.5 has no effect", '"completep" or "completed_p"']),
        (
            {"recipe": "standard", "base_head_dim": None, "weight_decay_exponent": 0.5},
            ["weight_decay_exponent: 0.5 has no"],
        ),
        ({"recipe": "standard"}, ["base_head_dim: 8 has no effect with recipe 'standard'"]),
        ({"recipe": "standard", "base_head_dim": None, "eps_scope": "all"}, ["eps_scope: 'all'", '"mup"']),
        ({"base_widht": 64}, ["base_widht", "base_width"]),
    ],
)
def test_a_wrong_section_is_refused_in_one_line(changes, parts):
    with pytest.raises(ConfigError) as caught:
        PluginConfig.from_dict({"completep": {**BASE, **changes}})
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message, message


def test_what_has_its_default_is_no_setting():
    whole = section(recipe="standard", base_head_dim=None).model_dump()  # as checkpoints hold it
    assert section(**whole) == section(recipe="standard", base_head_dim=None)
    assert rules.attention_scale(64, section(base_head_dim=1).base_head_dim) == 1 / 64  # the reference code's


def _smaller_than_the_base():
    """m_N = 1/4, m_L = 1/4: ratios below one are as good as any."""
    completep = section(base_width=256, base_depth=32, base_head_dim=16)
    engine, *_ = ds_plugin.initialize(
        model=build(completep), config=deepspeed_config(completep), mpu=gpt.DeepSpeedMPU()
    )
    losses = train(engine)
    return losses, {g["role"]: (g["lr"], g["weight_decay"], g["eps"]) for g in engine.optimizer.param_groups}


def test_a_model_smaller_than_its_base_trains(workers):
    losses, groups = workers(1).run(_smaller_than_the_base)[0]
    assert all(3 < loss < 6 for loss in losses)
    assert groups["hidden"] == pytest.approx((LR * 4, DECAY / 4, EPS * 16))


def test_refusals(workers):
    messages = workers(1).run(_refusals)[0]
    for name, parts in EXPECTED.items():
        assert name in messages, f"{name} was not refused"
        assert all(part in messages[name] for part in parts), messages[name]
