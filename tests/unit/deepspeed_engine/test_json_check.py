"""The part of the JSON that is DeepSpeed's: the keys are those of the installed version, and wrong values are named."""

import json
import re
from pathlib import Path

import pytest
from deepspeed.runtime import config as deepspeed_config

from ds_plugin.config import split_config
from ds_plugin.core.errors import ConfigError
from ds_plugin.deepspeed_engine import json_check

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.json"))
BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 1},
}


class Asked(dict):
    """A config that remembers which keys were asked for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.keys_asked = set()

    def get(self, key, default=None):
        self.keys_asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.keys_asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_the_known_keys_are_those_that_deepspeed_asks_for():
    config = Asked(train_micro_batch_size_per_gpu=1)
    deepspeed_config.DeepSpeedConfig(config)
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    meshes = {"data_parallel_size", "sequence_parallel_size"}  # deepspeed.initialize reads these
    assert "gradient_clipping" in config.keys_asked and removed < config.keys_asked
    assert config.keys_asked - removed | meshes == json_check.KNOWN


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_recipes_have_no_other_keys(path, caplog):
    host, _ = split_config(path)
    json_check.check({k: v for k, v in host.items() if k not in ("model", "training", "megatron")})
    assert caplog.text == "" and CONFIGS


WRONG = [
    # sections, what the message must hold
    ({"zero_optimization": 5}, ["zero_optimization: 5; write a JSON object"]),
    ({"zero_optimization": True}, ["zero_optimization: True; write a JSON object"]),
    ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage: input should be a valid integer, got True"]),
    ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage: input should be less than or equal to 3, got 4"]),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, ["zero_optimization.offload_optimizer: 'cpu'"]),
    ({"zero_optimization": {"offload_optimizer": {"devise": 1}}}, ["offload_optimizer.devise", '"device"']),
    ({"zero_optimization": {"overlap_comm": "x"}}, ["zero_optimization.overlap_comm", "boolean", "'x'"]),
    ({"optimizer": []}, ["optimizer: []; write a JSON object"]),
    (
        {"optimizer": {"type": 3, "params": {"lr": "x"}}},
        ["optimizer.type: input should be a valid string, got 3", "optimizer.params.lr: input", "number, got 'x'"],
    ),
    ({"scheduler": None}, ["scheduler: None"]),
    ({"scheduler": {"type": "WarmupLR", "params": [1]}}, ["scheduler.params: [1]"]),
    ({"optimizer": {"type": "AdmW"}}, ["optimizer.type: 'AdmW' is not known", 'mean "AdamW"?']),
    ({"optimizer": {"type": "Sophia"}}, ["optimizer.type: 'Sophia' is not known", 'write "AdamW"', "RMSprop"]),
    ({"scheduler": {"type": "WarmupCosinLR"}}, ["scheduler.type: 'WarmupCosinLR'", 'mean "WarmupCosineLR"?']),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_step": 1}}},
        ["scheduler.params of WarmupLR: 'warmup_num_step' is not known", 'mean "warmup_num_steps"?'],
    ),
    ({"bf16": 1}, ["bf16: 1; write a JSON object"]),
    ({"fp16": {"enabled": "no"}}, ["fp16.enabled: input should be a valid boolean, got 'no'"]),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["the JSON", "cannot be simultaneously enabled"]),
    ({"train_batch_size": "8"}, ["train_batch_size: input should be a valid integer, got '8'"]),
    ({"train_batch_size": 0}, ["train_batch_size: input should be greater than or equal to 1, got 0"]),
    ({"gradient_accumulation_steps": 1.5}, ["gradient_accumulation_steps: input should be a valid integer, got 1.5"]),
    ({"gradient_clipping": None}, ["gradient_clipping: input should be a valid number, got None"]),
    ({"gradient_clipping": True}, ["gradient_clipping: input should be a valid number, got True"]),
    ({"steps_per_print": True}, ["steps_per_print: input should be a valid integer, got True"]),
    ({"tensorboard": {"enabledd": 1}}, ["tensorboard: {'enabledd': 1}", "tensorboard.enabledd: Extra inputs"]),
    ({"checkpoint": {"tag_validation": 5}}, ["checkpoint: {'tag_validation': 5}", "AttributeError"]),
    ({"nebula": {}, "compile": {}}, ["nebula: {}", "has been removed"]),
]


@pytest.mark.parametrize(("sections", "parts"), WRONG)
def test_a_wrong_value_is_named_in_one_line(sections, parts):
    before = json.dumps(config := {**BASE, **sections})
    with pytest.raises(ConfigError) as caught:
        json_check.check(config)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value) and json.dumps(config) == before


def test_what_deepspeed_takes_is_taken():
    config = {
        **BASE, "train_batch_size": None, "bf16": None, "steps_per_print": None, "gradient_clipping": 0,
        "zero_optimization": {"stage": 2, "offload_optimizer": None, "stage3_prefetch_bucket_size": "auto"},
        "data_efficiency": {"enabled": False}, "datastates_ckpt": False, "aio": None,
    }  # fmt: skip
    before = json.dumps(config)
    json_check.check(config)
    for optimizer in ("adamw", "Lion", "RMSprop"):
        for scheduler in ("OneCycle", "CosineAnnealingLR", "WarmupDecayLR"):
            json_check.check({**config, "optimizer": {"type": optimizer}, "scheduler": {"type": scheduler}})
    # a section that is complete only beside another: what holds one key at a time is not asked for
    masters = {"enabled": True, "bf16_master_weights_and_grads": True}
    json_check.check({**config, "bf16": masters})
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("my_own_note", None),
    ],
)
def test_an_unknown_key_is_said_once_on_rank_0(caplog, monkeypatch, key, meant):
    json_check.check({**BASE, key: {}})
    json_check.check({**BASE, key: {}})
    [said] = [record.getMessage() for record in caplog.records]
    assert re.match(rf"{key}: DeepSpeed [\d.]+ does not know this key and ignores it; ", said)
    assert f'did you mean "{meant}"?' in said if meant else "remove it" in said
    monkeypatch.setenv("RANK", "1")
    json_check.check({**BASE, f"{key}_too": {}})
    assert len(caplog.records) == 1
