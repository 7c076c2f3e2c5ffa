"""A run killed in mid-step and resumed, under the real launcher; while it runs, its folder is taken."""

import json
import random
import re
import time

import pytest
from safetensors.torch import load_file

from tests.distributed.test_pretrain import (  # noqa: F401 - folder is a fixture
    ROOT,
    config,
    folder,
    metrics,
    run_script,
    summary,
)
from tests.distributed.test_two_runs import refused_while_it_runs
from tests.harness import Launched, launch, slow

SCRIPT = ROOT / "launch_scripts" / "pretrain_gpt.py"
WARNING = r"\w+Warning: .*"  # `startup.quiet` knows every message of an ordinary run


@pytest.mark.parametrize(("zero", "steps", "all_launched"), [slow(1, 60, True), slow(3, 60, True), (3, 20, False)])
def test_killed_after_half_the_steps_and_resumed(workers, folder, zero, steps, all_launched):  # noqa: F811
    """``all_launched``: the uninterrupted run and the resumed one as well; else their ranks are forked ones."""
    settings = config(zero_optimization__stage=zero)
    saved = steps // 2
    settings["training"] |= {"steps": steps, "save_interval": saved, "log_interval": 1, "eval_interval": 10}
    settings["sequence_length_warmup"]["duration"] = {"steps": steps * 2 // 3}  # under way at the interruption
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    arguments = [SCRIPT, "--deepspeed_config", path, "--data", folder / "text"]
    arguments += ["--runs", folder / "runs", "--cache", folder / "cache", "--name"]

    def run_to_the_end(name, *flags):
        if not all_launched:
            workers(2).run(run_script, str(folder), name, settings, *flags)
            return
        ended = launch([*arguments, name, *flags], ranks=2, timeout=120)
        assert ended.returncode == 0, ended.stdout
        assert not re.findall(WARNING, ended.stdout)
        assert not flags or f"resumed from step {saved}" in ended.stdout

    run_to_the_end("whole")
    cut = folder / "runs" / "cut"
    with Launched([*arguments, "cut"], ranks=2) as launched:
        if not all_launched:
            launched.wait_for_file(cut / "metrics.csv", f"\n{saved + 1},", timeout=120)
            refused_while_it_runs(workers, launched, cut, [*arguments[1:], "cut"])
        launched.wait_for_file(cut / "metrics.csv", f"\n{saved + 3},", timeout=120)
        launched.kill()
        assert not re.findall(WARNING, launched.output)
    assert not (cut / "summary.json").exists()
    before = (cut / "metrics.csv").read_text().splitlines()[: 1 + saved]
    run_to_the_end("cut", "--resume")
    assert (cut / "metrics.csv").read_text().splitlines()[: 1 + saved] == before  # times too: not trained again

    whole = metrics(folder, "whole")
    assert whole["step"] == list(range(1, steps + 1)) and len(set(whole["length"])) == 4
    assert metrics(folder, "cut") == whole
    last = [steps - 4, steps - 2, steps]
    assert summary(folder, "cut")["averaged_steps"] == summary(folder, "whole")["averaged_steps"] == last
    first, second = (load_file(folder / "runs" / name / "averaged.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("zero", [1, 3])
def test_killed_fifteen_times_at_any_moment(folder, zero, record_property):  # noqa: F811
    """In a step, in a save, while it is sealed, at the start: what is on disk then carries the run on bit for bit."""
    steps, rounds, moments = 150, 15, random.Random(zero)
    settings = config(zero_optimization__stage=zero)
    settings["training"] |= {"steps": steps, "save_interval": 3, "log_interval": 1, "eval_interval": 50}
    settings["sequence_length_warmup"]["duration"] = {"steps": steps // 2}
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    arguments = [SCRIPT, "--deepspeed_config", path, "--data", folder / "text"]
    arguments += ["--runs", folder / "runs", "--cache", folder / "cache", "--name"]
    ended = launch([*arguments, "whole"], ranks=2, timeout=600)
    assert ended.returncode == 0, ended.stdout

    cut = folder / "runs" / "cut" / "metrics.csv"
    for number in range(rounds):
        trained = len(cut.read_text().splitlines()) if number else 1
        with Launched([*arguments, "cut", *(["--resume"] if number else [])], ranks=2) as launched:
            launched.wait_for_file(cut, f"\n{trained + 5},", timeout=300)
            time.sleep(moments.uniform(0, 0.5))
            launched.kill()
    assert not (cut.parent / "summary.json").exists(), "the run ended before it was killed so often"
    ended = launch([*arguments, "cut", "--resume"], ranks=2, timeout=600)
    assert ended.returncode == 0, ended.stdout
    assert metrics(folder, "cut") == metrics(folder, "whole")
    first, second = (load_file(folder / "runs" / name / "averaged.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    record_property("tried", rounds)
