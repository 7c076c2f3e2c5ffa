"""`building`: what is built in its block is what `prepare` and `finish` would have made of it."""

import pytest
import torch

import megatron_patches
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.errors import StateError
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import building, finish, prepare
from megatron_patches.models import gpt

VOCAB, LENGTH = 64, 8
SIZE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": LENGTH}
SECTION = {"enabled": True, "base_width": 16, "base_depth": 2, "base_head_dim": 4}  # every multiplier differs from 1


def _stock(section=None):
    """The model that a script builds; with a section, by `prepare` and `finish`."""
    cfg = gpt.GPTConfig.model_validate(SIZE)
    gpt.initialize_parallel(cfg, 1234)
    config, spec = prepare(gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg), section)
    model = gpt.build_gpt(cfg, VOCAB, config, spec)
    finish(model, section)
    return model


def _seen(model):
    """Weights by name, and the loss of each token."""
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH)
    with torch.no_grad():
        losses = model(tokens, torch.arange(LENGTH).expand(2, -1), None, labels=tokens)
    return {**{name: p.detach().clone() for name, p in model.named_parameters()}, "losses": losses}


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _refused(call):
    with pytest.raises(StateError) as error:
        call()
    return str(error.value)


def _run():
    from megatron.core.models.gpt import GPTModel

    megatron_on_cpu.enable()
    init, section = GPTModel.__init__, CompletePConfig.model_validate(SECTION)
    scaled, stock = _seen(_stock(section)), _seen(_stock())
    found, said = {}, {}

    for source in ({"completep": SECTION}, section):
        with building(source) as given:
            model = _stock()
        found[f"scaled by a {type(source).__name__}"] = _equal(_seen(model), scaled)
        found[f"yields the section of a {type(source).__name__}"] = given == section
    off = section.model_copy(update={"enabled": False})
    megatron_patches.apply(off)
    found["nothing is patched by a section that is off"] = GPTModel.__init__ is init
    for source in ({"completep": {**SECTION, "enabled": False}}, off, {}, None):
        with building(source) as given:
            found[f"stock with {source}"] = given is None and _equal(_seen(_stock()), stock)
    found["stock after the block"] = _equal(_seen(_stock()), stock)
    found["scaled is not stock"] = not _equal(scaled, stock)

    def without_a_model():
        with building(section):
            pass

    def twice():
        with building(section), building(section):
            _stock()

    said["nothing built"] = _refused(without_a_model)
    said["a second block"] = _refused(twice)
    found["reverted after refusals"] = GPTModel.__init__ is init
    megatron_patches.apply(section)
    said["inside apply"] = _refused(without_a_model)
    found["apply stays in force"] = GPTModel.__init__ is not init
    megatron_patches.revert()
    megatron_on_cpu.enable()  # which is reverted, too

    with pytest.raises(ZeroDivisionError), building(section):
        found["patched inside"] = GPTModel.__init__ is not init
        raise ZeroDivisionError
    found["reverted after an error"] = GPTModel.__init__ is init
    return found, said


def test_building(workers):
    found, said = workers(1).run(_run)[0]
    assert [name for name, right in found.items() if not right] == []
    assert "no megatron-core GPTModel was built in the block" in said["nothing built"]
    for nested in ("a second block", "inside apply"):
        assert "a recipe is in force for every GPTModel already" in said[nested]
