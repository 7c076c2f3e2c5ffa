"""A run killed in mid-step and resumed, under the real launcher."""

import json

import pytest
from safetensors.torch import load_file

from tests.distributed.test_pretrain import ROOT, config, folder, metrics, summary  # noqa: F401 - folder is a fixture
from tests.harness import Launched, launch

SCRIPT = ROOT / "launch_scripts" / "pretrain_gpt.py"


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_killed_after_step_30_and_resumed(folder, zero):  # noqa: F811
    settings = config(zero_optimization__stage=zero)
    settings["training"] |= {"steps": 60, "save_interval": 30, "log_interval": 1, "eval_interval": 10}
    settings["sequence_length_warmup"]["duration"] = {"steps": 40}  # still under way at the interruption
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    arguments = [SCRIPT, "--deepspeed_config", path, "--data", folder / "text"]
    arguments += ["--runs", folder / "runs", "--cache", folder / "cache", "--name"]

    ended = launch([*arguments, "whole"], ranks=2, timeout=120)
    assert ended.returncode == 0, ended.stdout
    cut = folder / "runs" / "cut"
    with Launched([*arguments, "cut"], ranks=2) as launched:
        launched.wait_for_file(cut / "metrics.csv", "\n33,", timeout=120)
        launched.kill()
    assert not (cut / "summary.json").exists()
    ended = launch([*arguments, "cut", "--resume"], ranks=2, timeout=120)
    assert ended.returncode == 0, ended.stdout
    assert "resumed from step 30" in ended.stdout

    whole = metrics(folder, "whole")
    assert whole["step"] == list(range(1, 61)) and len(set(whole["length"])) == 4
    assert metrics(folder, "cut") == whole
    assert summary(folder, "cut")["averaged_steps"] == summary(folder, "whole")["averaged_steps"] == [56, 58, 60]
    first, second = (load_file(folder / "runs" / name / "averaged.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
