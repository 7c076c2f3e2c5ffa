"""Names without what wrappers put into them."""

import pytest
import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.weight_averaging.state.fragments import plain_name, plain_names


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("embed.weight", "embed.weight"),
        ("_orig_mod.embed.weight", "embed.weight"),
        ("_orig_mod.layers.0._orig_mod.mlp._checkpoint_wrapped_module.bias", "layers.0.mlp.bias"),
        ("_fsdp_wrapped_module.head.weight", "head.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module.weight", "module.weight"),  # which a model may call a part of its own
    ],
)
def test_a_plain_name(name, plain):
    assert plain_name(name) == plain


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module, self.head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, bias=False)


class Compiled(torch.nn.Module):
    """Names as torch.compile's wrapper does, which takes five seconds to import (test_averaging_publish has it)."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


NAMES = ["module.weight", "module.bias", "head.weight"]


def test_wrapped_models_have_the_names_of_the_model():
    model = Small()
    parts = Small()
    parts.head = Compiled(parts.head)
    for wrapped in (model, Compiled(model), parts, Compiled(parts), torch.nn.DataParallel(Compiled(model))):
        names = plain_names(wrapped)
        assert list(names.values()) == NAMES
        assert list(names) == [id(p) for p in wrapped.parameters()]


def test_two_parameters_of_one_name_are_refused():
    model = Small()
    model.head._orig_mod = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ConfigError, match="head.weight and head._orig_mod.weight are both head.weight.*rename"):
        plain_names(model)
