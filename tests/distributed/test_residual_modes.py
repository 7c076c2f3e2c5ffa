"""The two residual modes: multipliers in the forward pass, or folded into the weights. One training run either way."""

import copy
import io

import pytest
import torch

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.rules import Role
from ds_plugin.core.errors import ConfigError
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import (
    build_param_groups,
    finish,
    fold,
    fold_attention,
    load_plain,
    prepare,
    ratios_of,
    unfold,
)
from megatron_patches.completep.residual import scaled_bias_dropout_add
from megatron_patches.models import gpt
from tests.harness import slow

VOCAB, LENGTH = 64, 12
SIZE = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 8, "seq_length": LENGTH}
LLAMA = {"position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu", "bias": False}
BASE = {"enabled": True, "base_width": 16, "base_depth": 2}


def section(residual, **changes):
    return CompletePConfig.model_validate({**BASE, "residual": residual, **changes})


def build(completep, edit=None, dtype=torch.float32, **changes):
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, **changes})
    gpt.initialize_parallel(cfg, 1234)
    config, spec = gpt.transformer_config(cfg, dtype), gpt.layer_spec(cfg)
    if edit is not None:
        edit(config, spec)
    if completep is not None:
        config, spec = prepare(config, spec, completep)
    model = gpt.build_gpt(cfg, VOCAB, config, spec)
    return model, finish(model, completep)


def batch(step):
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model, step):
    tokens, labels = batch(step)
    return model(tokens, torch.arange(LENGTH).expand(3, -1), None, labels=labels).mean()


def train(model, roles, completep, steps=10):
    ratios = ratios_of(model.config, completep)
    # a decay and an eps that matter, so that their rules are seen
    groups = build_param_groups(model, roles, ratios, completep, lr=0.01, weight_decay=0.5, eps=1e-4)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for step in range(steps):
        loss = loss_of(model, step % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _both(changes, **settings):
    runs = []
    for residual in ("forward", "folded"):
        completep = section(residual, **settings)
        model, roles = build(completep, **changes)
        runs.append((train(model, roles, completep), model))
    (forward_losses, forward), (folded_losses, folded) = runs
    tied = changes.get("tie_embeddings", False)
    plain = unfold(folded.state_dict(), folded.config, section("folded", **settings), tied=tied)
    theirs = forward.state_dict()
    different = [n for n, w in theirs.items() if torch.is_tensor(w) and not torch.equal(w, plain[n])]
    scaled = [n for n, w in folded.state_dict().items() if torch.is_tensor(w) and not torch.equal(w, plain[n])]
    return forward_losses, folded_losses, different, len(scaled)


@pytest.mark.parametrize(("shape", "tied"), [({}, True), (LLAMA, False), slow({}, False), slow(LLAMA, True)])
def test_both_are_the_same_training_run_bit_for_bit(workers, shape, tied):
    """Multipliers are powers of two here (m_N = m_L = 4), so that folding rounds nothing."""
    forward, folded, different, scaled = workers(1).run(_both, {**shape, "tie_embeddings": tied})[0]
    assert forward == folded and different == []
    assert forward[0] - forward[-2] > 0.05
    norm = 1 if shape else 2  # gain, bias
    assert scaled == (16 if shape else 32) + (norm if tied else 1)


#: what a user may set beside the recipe, in powers of two
SETTINGS = {
    "embedding_multiplier": 4.0,
    "output_multiplier": 0.5,
    "lr_multipliers": {"mlp_down": 0.5, "embedding": 2.0, "hidden": 0.25},
    "weight_decay_exponent": 0.5,
    "embedding_lr_exponent": 0.5,
    "eps_scope": "embedding",
}


def _with_settings():
    return [(_both({"tie_embeddings": tied}, **SETTINGS), _both({"tie_embeddings": tied})) for tied in (True, False)]


def test_what_a_user_sets_beside_the_recipe_is_the_same_in_both(workers):
    for (forward, folded, different, scaled), (plain, *_) in workers(1).run(_with_settings)[0]:
        assert forward == folded and different == [] and forward[1] != plain[1]
        assert scaled >= 32 + 2  # branches' ends, the two embeddings


def _any_ratio():
    runs = []
    for residual in ("forward", "folded"):
        completep = section(residual, base_width=24, base_depth=3, base_head_dim=4, alpha=0.7)
        model, roles = build(completep)
        runs.append(train(model, roles, completep))
    return runs


def test_any_ratio_differs_by_rounding_only(workers):
    forward, folded = workers(1).run(_any_ratio)[0]
    assert forward == pytest.approx(folded, abs=2e-6)


def _graph(model):
    def hooks(module):
        return sum(len(module.__dict__[name]) for name in module.__dict__ if name.endswith("_hooks"))

    modules = [(name, type(module), hooks(module)) for name, module in model.named_modules()]
    functions = [layer.__dict__[name] for layer in model.decoder.layers for name in ("self_attn_bda", "mlp_bda")]
    return modules, functions, [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]


def _graphs(tied):
    return [_graph(build(c, tie_embeddings=tied)[0]) for c in (None, section("folded"), section("forward"))]


@pytest.mark.parametrize("tied", [False, True])
def test_folded_leaves_the_modules_and_the_forward_pass_megatrons_own(workers, tied):
    same = workers(1).run(_same_graphs, tied)[0]
    assert same == {"folded": True, "forward": False}


def _same_graphs(tied):
    plain, folded, forward = _graphs(tied)
    return {"folded": plain == folded, "forward": plain == forward}


def _stock_logits(tied):
    """A forward-mode model, trained, and a stock GPT of the same architecture with the folded weights."""
    completep = section("forward")
    model, roles = build(completep, tie_embeddings=tied)
    train(model, roles, completep, steps=3)
    stock, _ = build(None, tie_embeddings=tied)
    stock.load_state_dict(fold(model.state_dict(), model.config, completep, tied=tied))
    tokens, _ = batch(99)
    positions = torch.arange(LENGTH).expand(3, -1)
    with torch.no_grad():
        return [m(tokens, positions, None) for m in (model, stock)]


@pytest.mark.parametrize("tied", [False, True])
def test_fold_exports_to_a_stock_model(workers, tied):
    ours, stock = workers(1).run(_stock_logits, tied)[0]
    assert torch.allclose(ours, stock, rtol=0, atol=1e-6) and ours.std() > 1e-3


ATTENTION = {  # heads of 8: a model, and the mode it is trained in
    "biases": ({"bias": True}, "folded"),
    "queries in groups": ({**LLAMA, "num_query_groups": 2}, "forward"),
    "norms on queries and keys": ({"qk_norm": True}, "folded"),
}


def _attention_folded(shape, residual):
    """Logits of a trained model with another head size than the base's; of stock code, with its queries and without."""
    completep = section(residual, base_head_dim=2)
    model, roles = build(completep, **shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "linear_qkv" in name:  # large enough for attention not to be even
                parameter.add_(0.5 * torch.randn_like(parameter))
    train(model, roles, completep, steps=3)
    assert model.config.softmax_scale == pytest.approx(2**0.5 / 8)
    stock, _ = build(None, **shape)
    weights = model.state_dict()
    if residual == "forward":
        weights = fold(weights, model.config, completep, tied=stock.share_embeddings_and_output_weights)
    tokens, _ = batch(99)
    found = [model(tokens, torch.arange(LENGTH).expand(3, -1), None)]
    for state in (fold_attention(weights, model.config, completep), weights):
        stock.load_state_dict(state)
        found.append(stock(tokens, torch.arange(LENGTH).expand(3, -1), None))
    before = {name: value.clone() for name, value in weights.items() if torch.is_tensor(value)}
    fold_attention(weights, model.config, completep)
    changed = [name for name, value in before.items() if not torch.equal(value, weights[name])]
    return [logits.detach() for logits in found], changed


@pytest.mark.parametrize("case", ATTENTION)
def test_an_attention_scale_goes_into_the_queries(workers, case):
    (ours, stock, without), changed = workers(1).run(_attention_folded, *ATTENTION[case])[0]
    assert torch.allclose(ours, stock, rtol=0, atol=1e-6) and changed == []
    assert not torch.allclose(ours, without, rtol=0, atol=1e-4)


def _attention_refused():
    model, _ = build(section("folded", base_head_dim=2), **LLAMA, num_query_groups=2)
    weights = model.state_dict()
    state = "decoder.layers.0.self_attention.q_layernorm._extra_state"  # TransformerEngine's are bytes
    kept = fold_attention({state: torch.arange(5), **weights}, model.config, section("folded", base_head_dim=2))
    assert torch.equal(kept[state], torch.arange(5))
    of_the_base = fold_attention(weights, model.config, section("folded", base_head_dim=8))
    assert of_the_base.keys() == weights.keys() and all(of_the_base[name] is value for name, value in weights.items())
    part = {"decoder.layers.0.self_attention.linear_qkv.weight": torch.zeros(24, 64)}
    said = []
    for weights, changes in (
        (part, {}),
        (model.state_dict(), {"attention_output_gate": True}),
        (model.state_dict(), {"qk_layernorm": True, "layernorm_zero_centered_gamma": True}),
        (model.state_dict(), {"qk_l2_norm": True}),
    ):
        config = copy.copy(model.config)
        for name, value in changes.items():
            setattr(config, name, value)
        with pytest.raises(ConfigError) as caught:
            fold_attention(weights, config, section("folded", base_head_dim=2))
        said.append(str(caught.value))
    return said


def test_queries_that_cannot_be_told_apart_are_refused(workers):
    said = workers(1).run(_attention_refused)[0]
    for message, words in zip(said, ("24 rows", "output_gate", "zero_centered_gamma", "qk_l2_norm"), strict=True):
        assert words in message


def _loaded(tied):
    """Logits of a trained forward-mode model, and of the others that its weights are loaded into by one call."""
    forward, roles = build(section("forward"), tie_embeddings=tied)
    train(forward, roles, section("forward"), steps=3)
    plain, models = forward.state_dict(), [forward]
    for residual in ("forward", "folded"):
        models.append(build(section(residual), tie_embeddings=tied)[0])
        load_plain(models[-1], plain, section(residual))
    again = unfold(models[-1].state_dict(), models[-1].config, section("folded"), tied=tied)
    load_plain(models[1], again, section("forward"))
    tokens, _ = batch(99)
    with torch.no_grad():
        return [m(tokens, torch.arange(LENGTH).expand(3, -1), None) for m in models]


@pytest.mark.parametrize("tied", [False, True])
def test_plain_weights_are_loaded_into_either_mode(workers, tied):
    """Multipliers are powers of two here: nothing is rounded."""
    trained, forward, folded = workers(1).run(_loaded, tied)[0]
    assert torch.equal(trained, forward) and torch.equal(trained, folded) and trained.std() > 1e-3


def _twice():
    """What is said of weights that were through these functions already, and of the same after a file."""
    completep = section("forward", base_head_dim=2)
    model, _ = build(completep)
    once = fold(model.state_dict(), model.config, completep, tied=False)
    file = io.BytesIO()
    torch.save(once, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    whole = fold_attention(read, model.config, completep)
    said = []
    for function in (
        lambda: fold(once, model.config, completep, tied=False),
        lambda: fold(read, model.config, completep, tied=False),
        lambda: fold_attention(whole, model.config, completep),
        lambda: load_plain(model, once, completep),
        lambda: load_plain(model, fold_attention(model.state_dict(), model.config, completep), completep),
    ):
        with pytest.raises(ConfigError) as caught:
            function()
        said.append(str(caught.value))
    back = unfold(once, model.config, completep, tied=False)
    fold(back, model.config, section("folded", base_head_dim=2), tied=False)  # they say themselves that they are plain
    return said


def test_weights_are_not_folded_twice(workers):
    *folds, attention, load, load_attention = workers(1).run(_twice)[0]
    assert all('"folded" already' in message and 'fold() takes those of "forward"' in message for message in folds)
    assert "fold_attention() has been called" in attention
    assert all("load_plain() takes the plain weights" in message for message in (load, load_attention))


def _wrong_mode():
    model, _ = build(section("forward"))
    messages = []
    for function, residual in ((fold, "folded"), (unfold, "forward")):
        with pytest.raises(ConfigError) as caught:
            function(model.state_dict(), model.config, section(residual), tied=False)
        messages.append(str(caught.value))
    plain = gpt.transformer_config(gpt.GPTConfig.model_validate(SIZE), torch.float32)
    for function in (fold, unfold):
        with pytest.raises(ConfigError) as caught:
            function(model.state_dict(), plain, CompletePConfig.model_validate(BASE), tied=False)
        messages.append(str(caught.value))
    return messages


def test_weights_of_the_other_mode_are_refused(workers):
    """Also those of which it is not known: a section without ``residual`` is another one with each framework."""
    folded, forward, *unsaid = workers(1).run(_wrong_mode)[0]
    assert all("depends on the framework" in message and 'write "residual"' in message for message in unsaid)
    assert 'trained with "folded"; fold() takes those of "forward"' in folded
    assert 'trained with "forward"; unfold() takes those of "folded"' in forward


def _zero_centered():
    """What is said of models whose gains are 1 + weight: built, by tied embeddings and mode; and folded later."""

    def said(function, *args, **kwargs):
        try:
            function(*args, **kwargs)
        except ConfigError as error:
            return str(error)
        return None

    def finished(mode, tied):
        completep = section(mode)
        cfg = gpt.GPTConfig.model_validate({**SIZE, "tie_embeddings": tied})
        config, spec = prepare(gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg), completep)
        model = gpt.build_gpt(cfg, VOCAB, config, spec)
        model.config.layernorm_zero_centered_gamma = True  # only now: torch's norms, all there is here, know no such
        finish(model, completep)

    model = build(section("forward"), tie_embeddings=True)[0]
    built = {(tied, mode): said(finished, mode, tied) for tied in (True, False) for mode in ("forward", "folded")}
    model.config.layernorm_zero_centered_gamma = True
    return built, said(fold, model.state_dict(), model.config, section("forward"), tied=True)


def test_gains_that_are_one_plus_weight_cannot_be_folded_into(workers):
    """Only those of the final norm would be, and only where the word embedding is the output layer."""
    built, folded = workers(1).run(_zero_centered)[0]
    assert [case for case, said in built.items() if said is not None] == [(True, "folded")]
    assert "layernorm_zero_centered_gamma" in built[True, "folded"] and folded == built[True, "folded"]


# -- the forward mode's own residual add ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_bias_dropout_add(bias, training):
    generator = torch.Generator().manual_seed(1)
    x, residual, b = (torch.randn(s, generator=generator) for s in ((5, 3, 8), (5, 3, 8), (8,)))
    leaves = [t.requires_grad_() for t in (x, residual, *([b] if bias else []))]
    out = scaled_bias_dropout_add(0.25)(training, False)((x, b if bias else None), residual, 0.0)
    assert torch.equal(out, residual + 0.25 * (x + b if bias else x))
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(gradients[0], torch.full_like(x, 0.25)) and torch.equal(gradients[1], torch.ones_like(x))
    if training:  # dropout comes before the multiplier: what survives is doubled, then scaled
        torch.manual_seed(1)
        dropped = scaled_bias_dropout_add(0.25)(True, False)((torch.ones(400), None), torch.zeros(400), 0.5)
        assert set(dropped.tolist()) == {0.0, 0.5} and 150 < (dropped > 0).sum() < 250


def test_an_fp32_stream_keeps_what_16_bits_would_lose():
    stream, branch = torch.full((4,), 256.0), torch.full((4,), 1.0, dtype=torch.bfloat16)
    out = scaled_bias_dropout_add(1 / 64)(True, False)((branch, None), stream, 0.0)
    assert out.dtype == torch.float32 and torch.equal(out, torch.full((4,), 256.015625))


class MixedNorm(torch.nn.Module):
    """A norm of an fp32 stream for 16-bit layers, as the fused ones on GPUs: the output has the weights' dtype."""

    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x):
        normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float())
        return normed.to(self.weight.dtype)


def _prepared(residual, fp32_stream):
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate(SIZE)
    config, spec = gpt.transformer_config(cfg, torch.bfloat16), gpt.layer_spec(cfg)
    config.fp32_residual_connection, config.pipeline_dtype = fp32_stream, torch.bfloat16
    return str(prepare(config, spec, section(residual))[0].pipeline_dtype)


def test_pipeline_stages_send_the_stream_as_it_is(workers):
    """A stage that receives in another dtype than the one before it sends would hang or read garbage."""
    assert workers(1).run(_prepared, "forward", True) == ["torch.float32"]
    assert workers(1).run(_prepared, "forward", False) == ["torch.bfloat16"]
    assert workers(1).run(_prepared, "folded", True) == ["torch.bfloat16"]  # Megatron's own add, and its own dtype


def _block_specs():
    """A block's submodules in place of a layer's spec, as `get_gpt_decoder_block_spec` returns."""
    megatron_on_cpu.enable()
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    cfg = gpt.GPTConfig.model_validate(SIZE)
    layers = [gpt.layer_spec(cfg) for _ in range(SIZE["num_layers"])]
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=layers[0].submodules.input_layernorm)
    _, prepared = prepare(gpt.transformer_config(cfg, torch.float32), block, section("forward"))
    scaled = [layer.submodules.mlp_bda for layer in prepared.layer_specs]
    return sum(found is not layer.submodules.mlp_bda for found, layer in zip(scaled, layers, strict=True))


def test_every_layer_of_a_blocks_spec_is_scaled(workers):
    assert workers(1).run(_block_specs) == [SIZE["num_layers"]]


def _own_adds():
    """A layer spec's own residual adds: one that adds nothing, one of the user's."""
    megatron_on_cpu.enable()
    from megatron.core.transformer.identity_op import IdentityFuncOp

    def mine(training, fused):
        return lambda x_with_bias, residual, prob: residual + x_with_bias[0]

    cfg = gpt.GPTConfig.model_validate(SIZE)
    config, spec = gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg)
    spec.submodules.mlp_bda = IdentityFuncOp
    left = prepare(config, spec, section("forward"))[1].submodules.mlp_bda is IdentityFuncOp
    spec.submodules.mlp_bda = mine
    kept = prepare(config, spec, section("folded"))[1].submodules.mlp_bda is mine
    with pytest.raises(ConfigError) as caught:
        prepare(config, spec, section("forward"))
    return left, kept, str(caught.value)


def test_own_residual_adds_are_kept_or_refused(workers):
    left, kept, message = workers(1).run(_own_adds)[0]
    assert left and kept
    assert "mlp_bda of its own" in message and "mine" in message and '"residual": "folded"' in message


def _inference_scale():
    changed = section("forward", base_head_dim=4)  # heads of 8 here: sqrt(4) / 8
    return [build(changed)[0].decoder.layers[0].self_attention.softmax_scale, 4**0.5 / 8]


def test_inference_finds_the_attention_scale(workers):
    found, expected = workers(1).run(_inference_scale)[0]
    assert found == expected


def _stream_dtypes(base_depth):
    def edit(config, spec):
        config.fp32_residual_connection = True
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = MixedNorm

    completep = section("forward", base_depth=base_depth)
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate(SIZE)
    gpt.initialize_parallel(cfg, 1234)
    config, spec = gpt.transformer_config(cfg, torch.bfloat16), gpt.layer_spec(cfg)
    edit(config, spec)
    config, spec = prepare(config, spec, completep)
    model = gpt.build_gpt(cfg, VOCAB, config, spec)
    model.decoder.final_layernorm = MixedNorm(config, SIZE["hidden_size"]).to(torch.bfloat16)
    finish(model, completep)
    seen = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(str(out[0].dtype)))
    loss_of(model, 0).backward()
    return seen


@pytest.mark.parametrize("base_depth", [2, 8])  # also where the multiplier is 1: the base model has the same stream
def test_an_fp32_residual_stream_stays_fp32_through_the_model(workers, base_depth):
    assert workers(1).run(_stream_dtypes, base_depth) == [["torch.float32"] * 8]


@pytest.mark.slow
def test_the_fused_add_is_the_same_function():
    """Compiles, which takes a C++ compiler on a CPU and about 20 s."""
    x, residual, bias = torch.randn(5, 3, 8), torch.randn(5, 3, 8), torch.randn(8)
    for training in (True, False):
        fused, plain = (scaled_bias_dropout_add(0.25)(training, kind)((x, bias), residual, 0.0) for kind in (1, 0))
        assert torch.allclose(fused, plain, rtol=0, atol=1e-6)


def test_roles_that_carry_a_multiplier():
    folded, forward = section("folded"), section("forward")
    ratios = folded.ratios(64, 8)
    assert {r.value: folded.fold_factor(r, ratios) for r in Role if folded.fold_factor(r, ratios) != 1} == {
        **dict.fromkeys(("branch_out", "attention_out", "mlp_down", "expert_down", "shared_down"), 0.25),
        "branch_out_bias": 0.25,
        "logit_norm": 0.25,
        "unembedding": 0.25,
        "scaled_embedding": 0.5,  # its forward pass multiplies by sqrt(width) itself
        "scaled_logit_norm": 0.5,
    }
    assert {forward.fold_factor(r, ratios) for r in Role} == {1.0}
