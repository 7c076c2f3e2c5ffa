"""CompleteP's groups under torch's own AdamW, for the shapes that models have today and in folded mode.

test_completep.py has the paper's own shape, through DeepSpeed. Here: grouped queries, SwiGLU, RMSNorm and rotary
positions without biases; norms on queries and keys; the epsilon of the paper's reference code.
"""

import itertools
import re

import pytest
import torch

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.rules import Role
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import build_param_groups, finish, prepare, ratios_of
from megatron_patches.models import gpt
from tests.harness import slow
from tests.reference.completep import ReferenceGPT, megatron_name

VOCAB, LENGTH, STEPS = 64, 12, 5
SIZE = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "seq_length": LENGTH}
BASE = {"base_width": 16, "base_depth": 2, "base_head_dim": 8}  # m_N = m_L = 4
LR, DECAY, EPS = 0.01, 0.1, 1e-4  # an eps that matters, so that its rule is seen

# one shape in the words of GPTConfig and of the reference
PAPER = ({}, {})
LLAMA = (
    {"num_query_groups": 2, "activation": "swiglu", "normalization": "RMSNorm", "position_embedding": "rope",
     "bias": False},
    {"query_groups": 2, "swiglu": True, "rms_norm": True, "rotary": True, "bias": False},
)  # fmt: skip
# With learned positions the bias of the norm on keys would add one number to all scores of a query, which softmax takes
# away again: its gradient would be nothing but rounding. Turned by their positions, keys are told apart by it.
QK_NORM = ({"position_embedding": "rope", "qk_norm": True}, {"rotary": True, "qk_norm": True})


def section(**changes):
    return CompletePConfig.model_validate({"enabled": True, **BASE, **changes})


def build(completep, **shape):
    """A model and the role of every parameter."""
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, **shape})
    gpt.initialize_parallel(cfg, 1234)
    config, spec = prepare(gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg), completep)
    model = gpt.build_gpt(cfg, VOCAB, config, spec)
    return model, finish(model, completep)


def batch(step):
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def train(loss_of, optimizer):
    losses = []
    for step in range(STEPS):
        loss = loss_of(*batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _parity(changes, shape, twin, alpha, tied):
    """Both models' losses, the relative distance of every parameter after training, and how far it has moved."""
    completep = section(alpha=alpha, **changes)
    model, roles = build(completep, tie_embeddings=tied, **shape)
    ratios = ratios_of(model.config, completep)

    def unfolded():
        # the weights as the forward mode has them; in that mode a division by 1
        return {name: p.detach() / completep.fold_factor(roles[name], ratios) for name, p in model.named_parameters()}

    def megatron_loss(tokens, labels):
        return model(tokens, torch.arange(LENGTH).expand(3, -1), None, labels=labels).double().mean()

    reference = ReferenceGPT(
        vocab=VOCAB, length=LENGTH, width=64, depth=8, heads=4, alpha=alpha, tied=tied, **BASE, **twin
    )
    start = unfolded()
    reference.copy_from(start)
    groups = build_param_groups(model, roles, ratios, completep, lr=LR, weight_decay=DECAY, eps=EPS)
    found = train(megatron_loss, torch.optim.AdamW(groups))
    expected = train(reference, torch.optim.AdamW(list(reference.groups(LR, DECAY, EPS))))
    end = unfolded()
    distances, moved = {}, {}
    for name, p in reference.named_parameters():
        theirs = megatron_name(name)
        distances[theirs] = ((end[theirs] - p).norm() / p.norm()).item()
        moved[theirs] = ((end[theirs] - start[theirs]).norm() / p.norm()).item()
    return found, expected, distances, moved


def check_parity(workers, *, shape=PAPER, alpha=1.0, tied=False, **changes):
    ours, theirs = shape
    theirs = {**theirs, "block_eps_everywhere": changes.get("eps_scope") == "all"}
    found, expected, distances, moved = workers(1).run(_parity, changes, ours, theirs, alpha, tied)[0]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-6, (found, expected)
    assert not {name: d for name, d in distances.items() if d > 2e-4}
    # all of it has trained, so there was something to differ in
    assert not {name: m for name, m in moved.items() if m < 0.003}


PAIRS = [(1.0, False), (0.5, True), slow(1.0, True), slow(0.5, False)]


@pytest.mark.parametrize(("alpha", "tied"), PAIRS)
def test_a_llama(workers, alpha, tied):
    check_parity(workers, shape=LLAMA, alpha=alpha, tied=tied)


@pytest.mark.parametrize("alpha", [slow(1.0), 0.5])
def test_norms_on_queries_and_keys(workers, alpha):
    check_parity(workers, shape=QK_NORM, alpha=alpha)


def test_the_epsilon_of_the_papers_reference_code(workers):
    check_parity(workers, eps_scope="all")


@pytest.mark.parametrize(("alpha", "tied"), PAIRS)
def test_folded_weights_train_as_the_forward_multipliers_do(workers, alpha, tied):
    """With biases: those of the layers that end a branch are folded too. Tied, the final norm scales the logits."""
    check_parity(workers, alpha=alpha, tied=tied, residual="folded")


def test_a_folded_llama(workers):
    check_parity(workers, shape=LLAMA, residual="folded")


# all names that any combination below has, "N" for the number of the layer
LOCAL = {
    "embedding.word_embeddings.weight": Role.EMBEDDING,
    "embedding.position_embeddings.weight": Role.EMBEDDING,
    "decoder.layers.N.input_layernorm.weight": Role.BLOCK_NORM,
    "decoder.layers.N.input_layernorm.bias": Role.BLOCK_NORM,
    "decoder.layers.N.self_attention.linear_qkv.weight": Role.HIDDEN,
    "decoder.layers.N.self_attention.linear_qkv.bias": Role.BLOCK_BIAS,
    "decoder.layers.N.self_attention.q_layernorm.weight": Role.QK_NORM,
    "decoder.layers.N.self_attention.q_layernorm.bias": Role.QK_NORM,
    "decoder.layers.N.self_attention.k_layernorm.weight": Role.QK_NORM,
    "decoder.layers.N.self_attention.k_layernorm.bias": Role.QK_NORM,
    "decoder.layers.N.self_attention.linear_proj.weight": Role.HIDDEN,
    "decoder.layers.N.self_attention.linear_proj.bias": Role.BLOCK_BIAS,
    "decoder.layers.N.pre_mlp_layernorm.weight": Role.BLOCK_NORM,
    "decoder.layers.N.pre_mlp_layernorm.bias": Role.BLOCK_NORM,
    "decoder.layers.N.mlp.linear_fc1.weight": Role.HIDDEN,
    "decoder.layers.N.mlp.linear_fc1.bias": Role.BLOCK_BIAS,
    "decoder.layers.N.mlp.linear_fc2.weight": Role.HIDDEN,
    "decoder.layers.N.mlp.linear_fc2.bias": Role.BLOCK_BIAS,
    "decoder.final_layernorm.weight": Role.FINAL_NORM,
    "decoder.final_layernorm.bias": Role.FINAL_NORM,
    "output_layer.weight": Role.UNEMBEDDING,
}
FOLDED = LOCAL | {
    "decoder.layers.N.self_attention.linear_proj.weight": Role.BRANCH_OUT,
    "decoder.layers.N.self_attention.linear_proj.bias": Role.BRANCH_OUT_BIAS,
    "decoder.layers.N.mlp.linear_fc2.weight": Role.BRANCH_OUT,
    "decoder.layers.N.mlp.linear_fc2.bias": Role.BRANCH_OUT_BIAS,
}
# a tied output layer cannot hold the multiplier of the logits: the norm before it does
FOLDED_TIED = FOLDED | {
    "decoder.final_layernorm.weight": Role.LOGIT_NORM,
    "decoder.final_layernorm.bias": Role.LOGIT_NORM,
}


def _roles_of_all_combinations(residual, tied):
    """All names with their roles, and how many models they come from."""
    seen, models = set(), 0
    for position, normalization, activation, groups, bias, qk_norm in itertools.product(
        ("learned", "rope"), ("LayerNorm", "RMSNorm"), ("gelu", "swiglu"), (None, 2), (False, True), (False, True)
    ):
        model, roles = build(
            section(residual=residual), num_layers=1, hidden_size=16, num_attention_heads=4, qk_norm=qk_norm,
            position_embedding=position, normalization=normalization, activation=activation, num_query_groups=groups,
            bias=bias, tie_embeddings=tied,
        )  # fmt: skip
        assert set(roles) == {name for name, _ in model.named_parameters()}
        seen |= {(re.sub(r"\.\d+\.", ".N.", name), role) for name, role in roles.items()}
        models += 1
    return seen, models


@pytest.mark.parametrize(
    ("residual", "tied", "table"),
    [("forward", False, LOCAL), ("forward", True, LOCAL), ("folded", False, FOLDED), ("folded", True, FOLDED_TIED)],
)
def test_every_parameter_of_every_combination_has_its_role(workers, residual, tied, table):
    seen, models = workers(1).run(_roles_of_all_combinations, residual, tied)[0]
    assert models == 2**6
    assert seen == {item for item in table.items() if not (tied and item[0] == "output_layer.weight")}
