"""The sweeps on models of transformers: a coordinate check that CompleteP passes, resumed, and what is refused."""

import json

import pytest
import transformers

from ds_plugin.cli.main import main
from ds_plugin.core.errors import ConfigError
from ds_plugin.sweeps import coord_check, lr_transfer
from ds_plugin.sweeps.builders import Function, HuggingFace
from ds_plugin.sweeps.coord_check import LAST_BLOCK, Row
from ds_plugin.sweeps.records import read_records
from ds_plugin.sweeps.trial import Base, Shape

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 8,
    "num_key_value_heads": 4, "intermediate_size": 160, "attention_dropout": 0.5, "pad_token_id": 31999,
}  # fmt: skip
SMALL = Base(width=32, depth=2, length=16, batch=4)


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA))
    return path


def test_a_coordinate_check_of_a_llama(llama, tmp_path, capsys):
    given = ["coord-check", "--hf", str(llama), "--widths", "32,64", "--depths", "2,8", "--base-width", "32"]
    given += ["--steps", "4", "--seeds", "1", "--recipes", "completep,standard", "--out", str(tmp_path / "out")]
    assert main([*given, "--at-most", "1.7"]) == 0
    rows = read_records(Row, tmp_path / "out" / "coord_check.csv")
    assert {row.layer for row in rows} == {"embedding", "attention", "mlp", LAST_BLOCK, "logits"}
    flat, steep = (coord_check.spread(rows, recipe) for recipe in ("completep", "standard"))
    assert flat < 1.7 < 4 < steep, (flat, steep)
    base = {r.recipe: r.change for r in rows if (r.width, r.depth, r.step, r.layer) == (32, 2, 4, LAST_BLOCK)}
    assert base["completep"] == base["standard"]  # at the base's size every recipe is the same run, bit for bit
    drawn = (tmp_path / "out" / "coord_check.png").stat()
    assert drawn.st_size > 40_000
    assert main([*given, "--at-most", "1.0001"]) == 1  # goes on: nothing is trained again
    assert "above --at-most" in capsys.readouterr().out
    assert read_records(Row, tmp_path / "out" / "coord_check.csv") == rows
    llama.write_text(json.dumps({**LLAMA, "intermediate_size": 128}))
    assert main(given) == 2 and "other settings" in capsys.readouterr().err


def test_sizes_follow_the_width(llama):
    model = HuggingFace(str(llama.parent)).model(96, 4, SMALL)
    sizes = {name: getattr(model.config, name) for name in LLAMA if name.startswith("num") or name.endswith("size")}
    assert sizes == {
        "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 6,
        "intermediate_size": 240,
    }  # fmt: skip
    assert model.config.head_dim == 8 and model.config.attention_dropout == 0.0
    assert model.get_input_embeddings().weight.shape == (256, 96)


def gpt2(width, depth):
    """As a user's own function would be."""
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    size = {"n_embd": width, "n_layer": depth, "n_head": width // 8, "vocab_size": 256, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **off))


def lopsided(width, depth):
    model = gpt2(width, depth)
    model.config.n_inner = 64
    return transformers.GPT2LMHeadModel(model.config)


def illiterate(width, depth):
    model = gpt2(width, depth)
    model.config.vocab_size = 100
    return transformers.GPT2LMHeadModel(model.config)


def nothing(width, depth):
    return {"width": width}


def test_a_function_of_ones_own():
    builder, found = Function(f"{__name__}:gpt2"), {}
    for recipe in ("completep", "standard"):
        run = lr_transfer.train(builder, Shape(recipe, 64, 4), SMALL, seed=1, steps=6, lr=0.01)
        assert 3 < run.loss < 5
        found[recipe] = run.loss
    assert found["completep"] != found["standard"]
    with pytest.raises(ConfigError, match=r"mlp.c_fc.weight of a layer is \[32, 64\] at width 32 and \[64, 64\] at 64"):
        Function(f"{__name__}:lopsided").build(Shape("completep", 64, 2), SMALL, 1)
    with pytest.raises(ConfigError, match="knows 100 tokens and the text has 256"):
        Function(f"{__name__}:illiterate").build(Shape("completep", 64, 2), SMALL, 1)
    with pytest.raises(ConfigError, match=r"returned \{'width': 64\}; return a model"):
        Function(f"{__name__}:nothing").build(Shape("completep", 64, 2), SMALL, 1)


def test_widths_that_the_config_cannot_have(llama, capsys):
    assert main(["coord-check", "--hf", str(llama), "--widths", "72", "--recipes", "mup"]) == 2
    assert "num_key_value_heads is 4 at width 64, which is no whole number at 72" in capsys.readouterr().err
    llama.write_text('{"model_type": "unheard-of"}')
    assert main(["coord-check", "--hf", str(llama), "--widths", "64"]) == 2
    error = capsys.readouterr().err
    assert "--hf:" in error and "config.json" in error and error.count("\n") == 1
