"""The script's settings: what its flags and the JSON's older names come to."""

import json
from pathlib import Path

import pytest
import torch

from ds_plugin.core.errors import ConfigError
from launch_scripts.gpt import settings

QUICKSTART = json.loads((Path(__file__).resolve().parents[3] / "configs" / "quickstart.json").read_text())


def loaded(*flags, **changes):
    args = settings.parser().parse_args(["--config", "-", *flags])
    args.config = json.loads(json.dumps({**QUICKSTART, **changes}))
    return settings.load_settings(args)


@pytest.mark.parametrize(
    ("flags", "changes", "dtype", "deepspeeds"),
    [
        ((), {"bf16": {"enabled": True}}, torch.bfloat16, {"enabled": True}),
        ((), {"bfloat16": {"enabled": True}}, torch.bfloat16, {"enabled": True}),
        ((), {"bfloat16": {"enabled": True}, "bf16": None}, torch.bfloat16, {"enabled": True}),
        ((), {"bfloat16": {"enabled": True}, "bf16": {"enabled": True}}, torch.bfloat16, {"enabled": True}),
        (("--precision", "fp32"), {"bfloat16": {"enabled": True}}, torch.float32, None),
        (("--precision", "bf16"), {"bfloat16": {"enabled": False}}, torch.bfloat16, {"enabled": True}),
        (("--precision", "fp32"), {"bfloat16": {"enabled": True}, "bf16": {"enabled": False}}, torch.float32, None),
    ],
)
def test_bf16_has_one_name(flags, changes, dtype, deepspeeds):
    """DeepSpeed reads "bfloat16" where there is no "bf16": model and engine are of one precision all the same."""
    run = loaded(*flags, **changes)
    assert run.dtype == dtype and run.deepspeed.get("bf16") == deepspeeds and "bfloat16" not in run.deepspeed


@pytest.mark.parametrize(
    ("end", "duration"), [({"steps": 50}, {"steps": 10}), ({"tokens": 4000}, {"tokens": 800})], ids=["steps", "tokens"]
)
def test_a_share_is_of_the_run(end, duration):
    warmup = {**QUICKSTART["sequence_length_warmup"], "duration": {"share": 0.2}}
    training = {name: value for name, value in QUICKSTART["training"].items() if name not in ("steps", "tokens")}
    run = loaded(sequence_length_warmup=warmup, training={**training, **end})
    for section in (run.plugin.sequence_length_warmup.model_dump(mode="json"), run.deepspeed["sequence_length_warmup"]):
        assert {name: value for name, value in section["duration"].items() if value} == duration


def test_two_names_that_disagree_and_a_wrong_value_are_refused():
    with pytest.raises(ConfigError, match="bfloat16: 'yes'; write a JSON object"):
        loaded(bfloat16="yes")
    with pytest.raises(ConfigError, match="bfloat16: {'enabled': True} and bf16: {'enabled': False}"):
        loaded(bfloat16={"enabled": True}, bf16={"enabled": False})
