"""`ds-plugin tune-warmup` with the real script under the real launcher."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from launch_scripts.gpt import settings
from tests.distributed.test_pretrain import ROOT, config, folder, metrics  # noqa: F401 - folder is a fixture
from tests.harness import RANK_ENV, slow


def tune(folder, json_config, *flags):  # noqa: F811
    (folder / "tiny.json").write_text(json.dumps(json_config))
    arguments = [
        "--script",
        ROOT / "launch_scripts/pretrain_gpt.py",
        "--deepspeed_config",
        folder / "tiny.json",
        "--out",
        folder / "runs",
        "--start-lengths",
        "8",
        *flags,
    ]
    of_script = ["--data", folder / "text", "--cache", folder / "cache"]
    command = [sys.executable, "-m", "ds_plugin", "tune-warmup", *arguments, "--", *of_script]
    env = {**os.environ, **RANK_ENV}
    ended = subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    ranks = [
        p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in part for part in p.info["cmdline"] or ())
    ]
    assert ranks == [], ended.stdout + ended.stderr
    return ended


def test_a_search_finds_a_json_that_the_script_takes(folder):  # noqa: F811
    # 4 steps of learning-rate warmup, so trials of 16 of the 20 steps, the first with a duration of 12
    ended = tune(
        folder, config(), "--durations", "12", "--launcher", "deepspeed --num_accelerators 1 --master_port 29617"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "start 8, duration 12: stable at step 16 of 16, perplexity" in ended.stdout
    trial = metrics(folder, "start8_duration12")
    # 8 + 2t, floored to 8; every step is evaluated
    assert trial["step"][:16] == list(range(1, 17)) and trial["length"][:16] == [8] * 3 + [16] * 4 + [24] * 4 + [32] * 5
    assert None not in trial["eval_loss"][:16] and set(trial["eval_loss_averaged"]) == {None}

    tuned = settings.load_settings(settings.parser().parse_args(["--config", str(folder / "runs" / "tiny.json")]))
    assert tuned.plugin.sequence_length_warmup.start_length == 8
    assert tuned.plugin.sequence_length_warmup.duration.steps == 12
    assert tuned.plugin.weight_averaging is not None


@pytest.mark.parametrize(
    ("launcher", "lr", "outcome"),
    [
        slow("deepspeed --num_accelerators 1 --master_port 29618", 1.0, "fluctuated"),
        slow("torchrun --nproc_per_node 1 --master_port 29619", 100.0, "diverged"),
    ],
)
def test_an_unstable_trial_is_ended_at_once(folder, launcher, lr, outcome):  # noqa: F811
    absurd = config(training__steps=2000, training__log_interval=1)
    absurd["optimizer"]["params"]["lr"] = absurd["scheduler"]["params"]["warmup_max_lr"] = lr
    ended = tune(folder, absurd, "--steps", "40", "--durations", "8", "--launcher", launcher)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert f"start 8, duration 8: {outcome} at step " in ended.stdout
    assert "no start length of [8] is stable" in ended.stderr
    assert not (folder / "runs" / "tiny.json").exists()
    assert len(metrics(folder, "start8_duration8")["step"]) < 1000
