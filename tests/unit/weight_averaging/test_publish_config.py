"""The configuration beside a published model: whose it is written for, what it says, and when it cannot be saved."""

import importlib
import json
import sys

import pytest
import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.weight_averaging.publish.config import write_config

OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own"

class Own(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.norm = torch.nn.Linear(2, 2)
        self.rest = torch.nn.Linear(2, 2, bias=False)
        self.post_init()

OwnConfig.register_for_auto_class()
Own.register_for_auto_class("AutoModel")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A model whose code is in a file of its own, as those that are loaded with ``trust_remote_code``."""
    path = tmp_path / "code" / "own_model.py"
    path.parent.mkdir()
    path.write_text(OWN_CODE)
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    code = importlib.import_module("own_model")
    return code.Own(code.OwnConfig())


def test_says_the_widest_dtype_and_takes_the_models_code_along(own, tmp_path):
    """A reader's copies then keep the bits of every parameter; a model that cannot generate has no settings for it."""
    own.rest.bfloat16()
    before = own.config.to_dict()
    write_config(own, tmp_path, None)
    found = json.loads((tmp_path / "config.json").read_text())
    assert (found["dtype"], found["architectures"]) == ("float32", ["Own"])
    assert found["auto_map"] == {"AutoConfig": "own_model.OwnConfig", "AutoModel": "own_model.Own"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"config.json", "own_model.py"}
    write_config(torch.compile(own), tmp_path, torch.float16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert own.config.to_dict() == before


def test_a_configuration_that_is_not_saved_is_named(own, tmp_path, monkeypatch):
    def refuse(folder):
        raise ValueError("temperature is set")

    monkeypatch.setattr(type(own.config), "save_pretrained", lambda self, folder: refuse(folder))
    with pytest.raises(ConfigError, match="temperature is set.; change model.config"):
        write_config(own, tmp_path, None)


def test_others_have_none(own, tmp_path):
    wrapper = torch.nn.Sequential(own)  # whose names are others than from_pretrained looks for
    wrapper.config = own.config
    write_config(wrapper, tmp_path, None)
    assert not (tmp_path / "config.json").exists()
