"""Decoders of transformers in the folded mode, against the same with the multipliers in hooks; and what is refused."""

import logging
import math

import pytest
import torch
import transformers
from torch import nn

from ds_plugin.completep import clip_grad_norm_, optimizer_groups, prepare_decoder
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import checked_roles, finished_roles, in_force
from ds_plugin.completep.rules import Role
from ds_plugin.core.errors import ConfigError, StateError
from tests.harness import slow
from tests.reference.decoder_hooks import ENDS, GEMMA, Twin, mean_loss

WIDTH, DEPTH, HEAD, VOCAB, LENGTH, STD, CLIP = 32, 3, 8, 48, 12, 0.05, 0.2
SECTION = {"enabled": True, "base_width": 8, "base_depth": 1, "base_head_dim": 4}  # m_N 4, m_L 3
ADAM = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-6}
_GATED = {"intermediate_size": 64, "num_key_value_heads": 2}
_GEMMA = {**_GATED, "head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 8}
SIZES = {
    "Llama": _GATED,
    "Mistral": _GATED,
    "Qwen3": {**_GATED, "head_dim": HEAD},
    "GPT2": {},
    "GPTNeoX": {"intermediate_size": 64},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": WIDTH},
    "Phi": {"intermediate_size": 64},
    "Gemma": _GEMMA,
    "Gemma2": _GEMMA,
    "Gemma3": _GEMMA,
}
_TIED = ("Mistral", "GPT2", "OPT", "Gemma", "Gemma3")
CASES = [
    (family, tied) if tied == (family in _TIED) else slow(family, tied) for family in SIZES for tied in (False, True)
]


def build(family, tied=False, **changes):
    kind = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": WIDTH // HEAD}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = kind(vocab_size=VOCAB, tie_word_embeddings=tied, **{**shape, **ids, **SIZES[family], **changes})
    for name in config.to_dict():
        if "drop" in name and name != "layerdrop":
            setattr(config, name, 0.0)
    setattr(config, "init_std" if hasattr(config, "init_std") else "initializer_range", STD)
    torch.manual_seed(5)
    return getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)


def prepared(family, tied=False, seed=1, section=SECTION, **changes):
    model = build(family, tied, **changes)
    prepare_decoder(model, section, seed=seed)
    return model


def train(model, optimizer, clip, steps=10):
    losses, norms = [], []
    tokens = torch.randint(3, VOCAB, (4, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = mean_loss(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        norms.append(clip(model).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_folded_decoder_trains_as_the_forward_mode(family, tied):
    model = prepared(family, tied)
    shape = {"m_N": WIDTH / 8, "m_L": DEPTH, "head_dim": HEAD, "base_head_dim": 4}
    twin = Twin(build(family, tied), model, family, **shape)
    found, norms = train(model, torch.optim.AdamW(optimizer_groups(model, **ADAM)), lambda m: clip_grad_norm_(m, CLIP))
    plain = torch.optim.AdamW(twin.groups(**ADAM))
    expected, clipped = train(twin.model, plain, lambda m: nn.utils.clip_grad_norm_(m.parameters(), CLIP))
    # Gemma's gains of 1 + weight hold a third in 23 bits and its own rounding
    assert found == pytest.approx(expected, rel=0, abs=5e-6 if family in GEMMA else 1e-6)
    assert norms == pytest.approx(clipped, rel=1e-3) and max(norms) > CLIP  # clipping bites
    assert expected[-1] < expected[0] - 0.05


#: by kind of parameter of a GPT-2, untied: m_N 4, m_L 3, so std / 2, and / 3 where a branch ends, / 4 for the logits
STDS = {"wte": STD, "wpe": STD, "c_attn.weight": STD / 2, "c_fc.weight": STD / 2, "c_proj.weight": STD / 6,
        "lm_head": STD / 4}  # fmt: skip


def test_the_init_is_table_1s_and_depends_on_the_seed_alone():
    first, other, model = prepared("GPT2", seed=1), prepared("GPT2", seed=2), build("GPT2")
    torch.manual_seed(77)
    prepare_decoder(model, SECTION, seed=1)
    first, other, again = (dict(each.named_parameters()) for each in (first, other, model))
    seen = set()
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if kind := next((kind for kind in STDS if kind in name), None):
            assert p.std().item() == pytest.approx(STDS[kind], rel=0.1) and not torch.equal(p, other[name]), name
            seen.add(kind)
        else:
            value = 1.0 if name.endswith("weight") else 0.0  # gains; every bias
            assert (p == value).all(), name
    assert seen == set(STDS)
    llama = prepared("Llama")
    assert (llama.model.embed_tokens.weight[0] == 0).all()  # the padding token's
    tied = prepared("GPT2", tied=True)
    assert (tied.transformer.ln_f.weight == 1 / 4).all()
    gemma = prepared("Gemma2", tied=True)
    assert torch.allclose(1 + gemma.model.layers[0].post_attention_layernorm.weight, torch.tensor(1 / 3))
    assert gemma.model.embed_tokens.weight.std().item() == pytest.approx(STD / 2, rel=0.1)


def test_a_tied_embedding_is_one_by_whatever_name():
    """Where the output layer is registered first, its weight goes by that name."""
    model = build("Mistral", tied=True)
    inner = model.model
    del model.model
    model.model = inner
    prepare_decoder(model, SECTION, seed=1)
    roles = finished_roles(model, CompletePConfig.model_validate(SECTION))
    assert roles["lm_head.weight"] is Role.EMBEDDING and "model.embed_tokens.weight" not in roles
    assert roles["model.norm.weight"] is Role.LOGIT_NORM and (inner.norm.weight == 1 / 4).all()
    assert model.lm_head.weight.std().item() == pytest.approx(STD, rel=0.1)
    assert (model.lm_head.weight[0] == 0).all()  # the padding token's


def test_the_groups_are_those_of_the_roles():
    """Llama, m_N 4 and m_L 3, folded: c is 1/3 where a branch ends, 1/4 at the logits."""
    groups = {g["role"]: g for g in optimizer_groups(prepared("Llama"), lr=0.12, weight_decay=0.1, eps=1e-6)}
    found = {role: (g["lr"], g["weight_decay"], g["eps"]) for role, g in groups.items()}
    expected = {
        "embedding": (0.12, 0.1, 1e-6),
        "hidden": (0.03, 0.4, 1e-6 / 12),
        "branch_out": (0.01, 1.2, 1e-6 / 4),
        "block_norm": (0.12, 0.0, 1e-6 / 12),
        "final_norm": (0.12, 0.0, 1e-6),
        "unembedding": (0.03, 0.4, 4e-6),
    }
    assert list(found) == list(expected)
    for role, values in expected.items():
        assert found[role] == pytest.approx(values, rel=1e-12), role


def test_at_the_bases_size_nothing_is_scaled_and_the_weights_run_in_a_stock_model(tmp_path, caplog):
    base = {"enabled": True, "base_width": WIDTH, "base_depth": DEPTH}
    with caplog.at_level(logging.WARNING, "ds_plugin"):
        model = prepared("Llama", section=base)
    assert not caplog.records
    assert {g["lr_scale"] for g in optimizer_groups(model, **ADAM)} == {1.0}
    model = prepared("Llama", section={key: value for key, value in SECTION.items() if key != "base_head_dim"})
    model.save_pretrained(tmp_path)
    stock, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(LENGTH)[None]
    assert torch.equal(stock(tokens).logits, model(tokens).logits)
    with pytest.raises(ConfigError, match=r"has been trained or loaded.*\"keep\""):
        prepare_decoder(stock, SECTION)
    before = {name: p.clone() for name, p in stock.named_parameters()}
    prepare_decoder(stock, SECTION, trained="keep")
    assert all(torch.equal(p, before[name]) for name, p in stock.named_parameters())
    with caplog.at_level(logging.WARNING, "ds_plugin"):
        prepared("Llama")
    assert "attention is scaled by 0.25 in place of 0.353553" in caplog.text


def test_a_second_call_and_the_method_off_change_nothing():
    model = prepared("Llama")
    before = [p.clone() for p in model.parameters()]
    prepare_decoder(model, SECTION, seed=9)
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(ConfigError, match="another section: base_depth 1 there, 2 here"):
        prepare_decoder(model, {**SECTION, "base_depth": 2})
    other = build("Llama")
    for off in (None, {**SECTION, "enabled": False}):
        prepare_decoder(other, off)
    with pytest.raises(ConfigError, match="prepare_decoder"):
        optimizer_groups(other, **ADAM)


def test_another_optimizer_than_the_roles_is_refused_at_its_first_step():
    model = prepared("Llama")
    optimizer = torch.optim.AdamW(model.parameters())
    mean_loss(model, torch.arange(LENGTH)[None]).backward()
    with pytest.raises(StateError, match="optimizer_groups"):
        optimizer.step()
    optimizer_groups(model, **ADAM)
    optimizer.step()


# -- roles -----------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A layer's module around an MLP, with a parameter of a kind of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.inner(x * self.gate)


def gated():
    model = build("Llama")
    for layer in model.model.layers:
        layer.mlp = Gated(layer.mlp)
    return model


def test_what_is_not_recognised_is_one_error_that_says_how_to_settle_it():
    with pytest.raises(ConfigError) as refused:
        prepare_decoder(gated(), SECTION)
    said = str(refused.value)
    for part in ("'model.layers.0.mlp.gate'", "[32]", "Gated", '"model.layers.[0-9]+.mlp.gate": "block_bias"'):
        assert part in said, said
    model = gated()
    roles = {"model.layers.[0-9]+.mlp.gate": "block_norm"}
    prepare_decoder(model, {**SECTION, "roles": roles})
    section = in_force(model, CompletePConfig(**SECTION, roles=roles))
    found = finished_roles(model, section)
    assert found["model.layers.2.mlp.gate"] is Role.BLOCK_NORM
    assert found["model.layers.2.mlp.inner.down_proj.weight"] is Role.BRANCH_OUT
    model.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match=r"'extra' came to the model after"):
        finished_roles(model, section)


@pytest.mark.parametrize(
    ("name", "role", "otherwise"), [("up_proj", "mlp_up", "hidden"), ("down_proj", "mlp_down", "branch_out")]
)
def test_a_role_of_megatrons_names_trains_as_the_decoders_own(name, role, otherwise):
    """In proportion both are one row of the table: init and group."""
    name, found = rf"model.layers.[0-9]+.mlp.{name}.weight", []
    for given in (role, otherwise):
        model = prepared("Llama", section={**SECTION, "roles": {name: given}})
        groups = [(group["role"], len(group["params"])) for group in optimizer_groups(model, **ADAM)]
        found.append((model.state_dict(), groups))
    (weights, groups), (expected, expected_groups) = found
    assert groups == expected_groups and all(torch.equal(weights[key], expected[key]) for key in expected)


def test_attention_that_wants_a_gpu_is_looked_at_without_one():
    """A Trainer's model comes to its GPU when its engine is built, after this."""

    def on_gpus(module, query, *args, **kwargs):
        raise RuntimeError("FlashAttention only supports CUDA tensors")

    transformers.AttentionInterface.register("stub_of_a_kernel", on_gpus)
    model = build("Llama")
    model.set_attn_implementation("stub_of_a_kernel")
    prepare_decoder(model, SECTION, seed=1)
    with pytest.raises(RuntimeError, match="FlashAttention"):  # as before
        model(torch.zeros(1, 4, dtype=torch.int64))
    expected = prepared("Llama").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_roles_are_for_decoders_alone():
    with pytest.raises(ConfigError, match=r"completep.roles: a megatron-core GPT's parameters have their roles"):
        checked_roles(nn.Linear(2, 2), CompletePConfig(**SECTION, roles={"weight": "hidden"}))


def with_layers(change):
    model = build("Llama")
    for layer in model.model.layers:
        change(layer)
    return model


def with_two_lists():
    model = build("Llama")
    model.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(DEPTH))
    return model


def silent(layer):
    nn.init.zeros_(layer.self_attn.o_proj.weight)


def experts(layer):
    layer.mlp.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])


def half(name):
    model = build("Llama")
    with torch.no_grad():
        model.get_parameter(name)[:3] = 0.5
    return model


def adapted():
    import peft

    return peft.get_peft_model(build("Llama"), peft.LoraConfig(target_modules=["q_proj"]))


def quantized():
    model = build("Llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB)
    )


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=VOCAB, is_decoder=True, **sizes))


def meta():
    with torch.device("meta"):
        return build("Llama")


ROLE = {"roles": {"cls.predictions.*": "hidden"}}
REFUSED = {
    "trained": (lambda: half("model.norm.weight"), {}, ["'model.norm.weight' has been trained", 'trained="redraw"']),
    "adapters": (adapted, {}, ["PEFT's adapters"]),
    "quantized": (quantized, {}, ["is quantized by its config"]),
    "encoder-decoder": (t5, {}, ["T5ForConditionalGeneration is an encoder-decoder"]),
    "no language model": (lambda: build("Llama").model, {}, ["LlamaModel has no get_output_embeddings()"]),
    "no decoder": (lambda: nn.Linear(2, 2), {}, ["Linear has no config.num_hidden_layers", "get_input_embeddings()"]),
    "meta": (meta, {}, ["on device meta"]),
    "forward": (lambda: build("Llama"), {"residual": "forward"}, ['write "folded"']),
    "post-norm": (bert, ROLE, ["not its input plus outputs of its modules"]),
    "multiplied": (
        lambda: transformers.GraniteForCausalLM(
            transformers.GraniteConfig(
                hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, vocab_size=VOCAB, residual_multiplier=0.22, pad_token_id=0,
            )
        ),
        {"base_head_dim": None},
        ["residual multipliers are not covered"],
    ),
    "zeros": (lambda: with_layers(silent), {}, ["self_attn.o_proj of a layer gives zeros"]),
    "experts": (lambda: with_layers(experts), {}, ["'model.layers.0.mlp.experts.0.weight'", "[32, 32]", "Linear"]),
    "two lists": (with_two_lists, {}, ["2 ModuleLists of config.num_hidden_layers = 3"]),
    "no such role": (lambda: build("Llama"), {"roles": {"a": "norms"}}, ["'a' is given 'norms'", "block_norm"]),
    "no expression": (lambda: build("Llama"), {"roles": {"(": "hidden"}}, ["'(' is no regular expression"]),
    "no such parameter": (lambda: build("Llama"), {"roles": {"layers": "hidden"}}, ["'layers' matches no parameter"]),
    "attention scale": (
        lambda: build("GPT2", scale_attn_by_inverse_layer_idx=True),
        {},
        ["'scaling' of Hugging Face's GPT2Block's modules are [0.176", "base_head_dim"],
    ),
    "no attention scale": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=4, vocab_size=VOCAB)
        ),
        {},
        ["BloomBlock's modules are []"],
    ),
    "no final gains": (
        lambda: transformers.OlmoForCausalLM(
            transformers.OlmoConfig(
                hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, vocab_size=VOCAB, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
            )
        ),
        {},
        ["OlmoForCausalLM ties its embeddings", "tie_word_embeddings=False"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_stays_as_it_was(case):
    make, changes, parts = REFUSED[case]
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
    with pytest.raises(ConfigError) as refused:
        prepare_decoder(model, {**SECTION, **changes})
    assert all(part in str(refused.value) for part in parts), str(refused.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.is_meta)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_trained_weights_are_drawn_anew_where_that_is_insisted_on():
    model = build("Llama")
    model.model.norm.weight._is_hf_initialized = True  # as from_pretrained leaves it
    with pytest.raises(ConfigError, match=r"'model.norm.weight' has been trained or loaded"):
        prepare_decoder(model, SECTION, seed=1)
    prepare_decoder(model, SECTION, seed=1, trained="redraw")
    for (name, p), expected in zip(model.named_parameters(), prepared("Llama").parameters(), strict=True):
        assert torch.equal(p, expected), name


def test_every_family_of_the_twin_is_tried():
    assert set(SIZES) == set(ENDS) and set(GEMMA) < set(SIZES) and math.isclose(WIDTH / 8, 4)
