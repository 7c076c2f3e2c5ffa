"""The part of the JSON that is DeepSpeed's: the keys are those of the installed version, and wrong values are named."""

import json
import re
from pathlib import Path

import pytest
from deepspeed.runtime import config as deepspeed_config

import ds_plugin
from ds_plugin.config import split_config
from ds_plugin.core.errors import ConfigError
from ds_plugin.deepspeed_engine import json_check

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
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
    rest, _ = split_config(path)
    json_check.check({k: v for k, v in rest.items() if k not in ("model", "training", "megatron")}, auto=True)
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
    ({"steps_per_print": True}, ["steps_per_print: input should be a valid number, got True"]),
    ({"optimizer": {"type": "AdamW", "paams": {"lr": 1}}}, ["optimizer.paams: unknown key", 'mean "params"?']),
    ({"scheduler": {"type": "WarmupLR", "Params": {}}}, ["scheduler.Params: unknown key", 'mean "params"?']),
    ({"optimizer": {"params": {"lr": 0.1}}}, ["optimizer.type: missing", '"AdamW"']),
    ({"scheduler": {"params": {}}}, ["scheduler.type: missing", '"WarmupCosineLR"']),
    ({"Train_Batch_Size": 8}, ["Train_Batch_Size", 'did you mean "train_batch_size"?']),
    ({"OPTIMIZER": {}}, ["OPTIMIZER", 'did you mean "optimizer"?']),
    ({"train_batch_size": 2**31}, ["train_batch_size: ", "less than or equal to 1000000000", "2147483648"]),
    *(
        ({"optimizer": {"type": kind, "params": params}}, [f"optimizer.params{where}", *said])
        for kind, params, where, *said in (
            ("AdamW", {"lr": -0.1}, ".lr", "greater than or equal to 0", "-0.1"),
            ("AdamW", {"lr": float("nan")}, ".lr", "nan"),
            ("AdamW", {"lr": float("inf")}, ".lr", "inf"),
            ("AdamW", {"lr": 1e30}, ".lr", "less than or equal to 1000"),
            ("AdamW", {"betas": [0.9]}, ".betas", "[0.9]"),
            ("AdamW", {"betas": [0.9, 0.99, 0.999]}, ".betas", "[0.9, 0.99, 0.999]"),
            ("Adam", {"betas": (0.9, 1.5)}, " of Adam", "Invalid beta", "1.5"),
            ("AdamW", {"betaz": [0.9, 0.99]}, " of AdamW", "'betaz' is not known", 'did you mean "betas"?'),
            ("AdamW", {"max_grad_norm": 1.0}, " of AdamW", "'max_grad_norm' is not known"),
            ("AdamW", {"torch_adam": True, "bias_correction": True}, " of AdamW", "bias_correction"),
            ("Lamb", {"lr": 0.1, "max_coef": 1.0}, " of Lamb", 'did you mean "max_coeff"?'),
            ("Lion", {"eps": 1e-8}, " of Lion", "'eps' is not known"),
            ("Adagrad", {"lr_decay": -1.0}, " of Adagrad", "Invalid lr_decay"),
            ("SGD", {"lr": 0.1, "momentum": "x"}, " of SGD", "refused by SGD"),
            ("RMSprop", {"alpha": -1}, " of RMSprop", "Invalid alpha"),
        )
    ),
    *(
        (
            {"scheduler": {"type": kind, **({"params": params} if params is not None else {})}},
            [f"scheduler.params{where}", *said],
        )
        for kind, params, where, *said in (
            ("WarmupLR", {"warmup_type": "cosine"}, ".warmup_type", "'cosine' is not known", '"log"', "linear"),
            ("WarmupLR", {"warmup_max_lr": -0.1}, ".warmup_max_lr", "-0.1", "from 0 to 1000"),
            ("WarmupLR", {"warmup_max_lr": [0.1, float("nan")]}, ".warmup_max_lr", "nan"),
            ("WarmupLR", {"warmup_num_steps": 0}, " of WarmupLR", "positive integer, got 0"),
            ("WarmupLR", None, "", "missing; write {} for the defaults of WarmupLR"),
            ("WarmupLR", {"warmup_num_steps": 9.5}, " of WarmupLR", "positive integer, got 9.5"),
            ("WarmupLR", {"warmup_num_steps": "9"}, ".warmup_num_steps", "'9'; write a number"),
            ("WarmupLR", {"warmup_num_steps": [9]}, ".warmup_num_steps", "[9]; write a number"),
            ("WarmupDecayLR", {"warmup_num_steps": 9}, " of WarmupDecayLR", "total_num_steps"),
            ("WarmupDecayLR", {"total_num_steps": "auto"}, " of WarmupDecayLR", "auto"),
            ("WarmupCosineLR", {"total_num_steps": 9, "cos_min_ratio": -1}, ".cos_min_ratio", "-1"),
            ("StepLR", {"step_size": 5, "gamma": -0.5}, ".gamma", "-0.5"),
            ("LambdaLR", {}, " of LambdaLR", "lr_lambda"),
        )
    ),
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
    optimizers = {
        "adamw": {"lr": 0.1, "betas": (0.9, 0.95), "torch_adam": True, "foreach": False},
        "Adam": {"adam_w_mode": False, "bias_correction": True},
        "Lion": {"lr": 1, "betas": [0.9, 0.99]},
        "lamb": {"max_coeff": 5.0, "min_coeff": 0.1},
        "Adagrad": {"lr_decay": 0.1},
        "Muon": {"muon_lr": 0.02, "adam_lr": 1e-3, "momentum": 0.95},
        "RMSprop": {},
    }
    schedulers = {
        "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": [0.2, 0.3]},
        "CosineAnnealingLR": {"T_max": 9},
        "WarmupDecayLR": {"total_num_steps": 9, "warmup_max_lr": [0.1, 0.2], "last_batch_iteration": -1},
    }
    for optimizer, params in optimizers.items():
        for scheduler, given in schedulers.items():
            of = {"optimizer": {"type": optimizer, "params": params}, "scheduler": {"type": scheduler, "params": given}}
            json_check.check({**config, **of})
    json_check.check({**config, "steps_per_print": float("inf")})  # as Accelerate writes it
    decay = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}
    json_check.check({**config, "scheduler": decay}, auto=True)
    assert decay["params"] == {"total_num_steps": "auto"}
    # a section that is complete only beside another: what holds one key at a time is not asked for
    masters = {"enabled": True, "bf16_master_weights_and_grads": True}
    json_check.check({**config, "bf16": masters})
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("sizes", "fits", "said"),
    [
        ((8, 2, 2), True, ""),
        ((8, 2, None), True, ""),
        ((8, None, 4), True, ""),
        ((8, None, None), True, ""),
        ((None, 3, 5), True, ""),
        ((8, 2, 1), False, "train_batch_size: 8 does not fit 2 data-parallel rank(s)"),
        ((9, 2, None), False, "write 8 or 12"),
        ((7, None, None), False, "write 6 or 8"),
        ((None, None, 4), False, "train_micro_batch_size_per_gpu: missing"),
    ],
)
def test_batch_sizes_have_to_fit_the_ranks(sizes, fits, said):
    config = {**BASE, **dict(zip(BATCH, sizes, strict=True))}
    json_check.check(config)  # on ranks that are not known
    if fits:
        json_check.check(config, 2)
    else:
        with pytest.raises(ConfigError, match=re.escape(said)):
            json_check.check(config, 2)


def test_the_front_door_looks_at_both(tmp_path):
    """As in the scripts: a dict or a path."""
    path = tmp_path / "config.json"
    for wrong, said in (({"optimizer": {"type": "AdmW"}}, "AdmW"), ({"COMPLETEP": {}}, 'did you mean "completep"')):
        path.write_text(json.dumps({**BASE, **wrong}))
        for source in ({**BASE, **wrong}, path, str(path)):
            with pytest.raises(ConfigError, match=said):
                ds_plugin.split_config(source)
    assert ds_plugin.split_config(BASE) == (BASE, ds_plugin.PluginConfig())


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
