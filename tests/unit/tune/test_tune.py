"""The search for start length and duration: its logic with made-up runs, its trials with a made-up script."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ds_plugin.cli.main import main
from ds_plugin.tune import search as search_module
from ds_plugin.tune.search import ROOT, Trial, judge, search

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("perplexities", "index"),
    [
        ([500.0], None),
        ([10.0, 13.0, 8.0, 10.39], None),  # not above 1.3x
        ([10.0, 8.0, 10.41], 2),
        ([10.0, 8.0, 9.0, 10.5], 3),  # against the best, not the one before
        ([5.0, 20.0, 4.0, 20.0], 1),
        ([NAN], 0),
        ([5.0, INF, 4.0], 1),
    ],
)
def test_significant_fluctuation(perplexities, index):
    judged = judge(
        metrics(*((step, 2.0, math.log(p)) for step, p in enumerate(perplexities))), len(perplexities) - 1, 1.3
    )
    assert (judged[0] == "stable") is (index is None) and judged[1] == (
        len(perplexities) - 1 if index is None else index
    )


def test_the_threshold_is_the_callers():
    rows = metrics((0, 2.0, math.log(10)), (1, 2.0, math.log(12)))
    assert [judge(rows, 1, threshold)[0] for threshold in (1.1, 1.21)] == ["fluctuated", "stable"]


def metrics(*rows):
    names = ("step", "train_loss", "eval_loss")
    return [{name: "" if x is None else str(x) for name, x in zip(names, row, strict=True)} for row in rows]


TEN, EIGHT, ELEVEN = math.log(10), math.log(8), math.log(11)


@pytest.mark.parametrize(
    ("rows", "judged"),
    [
        ([], None),
        ([(2, 2.0, TEN)], None),
        ([(2, 2.0, TEN), (4, 2.0, EIGHT)], ("stable", 4, 8, 8)),
        ([(2, 2.0, EIGHT), (3, 2.0, None), (4, 2.0, ELEVEN)], ("fluctuated", 4, 11, 8)),
        ([(1, 2.0, EIGHT), (2, 2.0, ELEVEN), (3, NAN, None)], ("fluctuated", 2, 11, 8)),
        ([(1, 2.0, EIGHT), (2, NAN, None), (3, 2.0, ELEVEN)], ("diverged", 2, INF, 8)),
        ([(1, None, 2000.0)], ("diverged", 1, INF, INF)),  # its perplexity overflows
        ([(2, 2.0, EIGHT), (4, 2.0, EIGHT), (5, NAN, ELEVEN)], ("stable", 4, 8, 8)),  # it ran on
    ],
)
def test_a_run_is_judged_by_its_metrics(rows, judged):
    found = judge(metrics(*rows), 4, 1.3)
    assert found == (judged if judged is None else (*judged[:2], *map(pytest.approx, judged[2:])))


def test_a_run_without_evaluations_is_no_data_point():
    with pytest.raises(ValueError, match="no evaluation in the first 4 steps"):
        judge(metrics((4, 2.0, None)), 4, 1.3)


class Runs:
    """Made-up runs of 100 steps; ``fails(start, duration)`` gives the step at which one fluctuates, or None."""

    def __init__(self, fails):
        self.fails, self.asked = fails, []

    def __call__(self, start, duration):
        self.asked.append((start, duration))
        step = self.fails(start, duration)
        return Trial(start, duration, 100, "stable" if step is None else "fluctuated", step or 100, 9.0, 3.0)


DURATIONS = range(10, 170, 10)  # 16 of them


def searched(fails, start_lengths=(8,), provisional=40):
    runs = Runs(fails)
    found = search(runs, start_lengths=start_lengths, durations=DURATIONS, provisional=provisional)
    assert len(runs.asked) == len(set(runs.asked))
    return found and (found.start_length, found.duration), runs.asked


def test_everything_is_stable():
    # indices 3; then between 3 and 16: 9, 12, 14, 15
    assert searched(lambda s, d: None) == ((8, 160), [(8, 40), (8, 100), (8, 130), (8, 150), (8, 160)])


def test_nothing_is_stable_at_the_very_beginning():
    # steps 1 to 25 of 100 are the beginning: one run for each start length, no duration helps
    assert searched(lambda s, d: 25, (8, 16, 32)) == (None, [(8, 40), (16, 40), (32, 40)])


def test_nothing_is_stable_later():
    # indices 3; then between -1 and 3: 1, 0
    asked = [(8, 40), (8, 20), (8, 10), (16, 40), (16, 20), (16, 10)]
    assert searched(lambda s, d: 26, (8, 16)) == (None, asked)


def test_the_start_length_is_raised_until_the_beginning_is_stable():
    found, asked = searched(lambda s, d: 10 if s < 32 else None, (8, 16, 32, 64))
    assert found == (32, 160) and asked[:3] == [(8, 40), (16, 40), (32, 40)]


def test_a_later_fluctuation_shortens_the_duration_and_leaves_the_start_length():
    # 40 fails late; between -1 and 3: 20 is stable, 30 is stable
    assert searched(lambda s, d: 60 if d >= 40 else None, (8, 16)) == ((8, 30), [(8, 40), (8, 20), (8, 30)])


@pytest.mark.parametrize("longest", DURATIONS)
@pytest.mark.parametrize("provisional", [1, 40, 95, 1000])
def test_the_boundary_is_found_in_few_runs(longest, provisional):
    found, asked = searched(lambda s, d: 50 if d > longest else None, provisional=provisional)
    assert found == (8, longest)
    assert len(asked) <= 2 + math.log2(len(DURATIONS))


# -- trials: a script that is stable with a start length of 16 and a duration of at most 60

COLUMNS = ("step", "train_loss", "eval_loss", "length")

SCRIPT = f"""
import json, os, subprocess, sys, time
flag = lambda name: sys.argv[len(sys.argv) - sys.argv[::-1].index(name)]  # the last one, as argparse
config = json.load(open(flag("--deepspeed_config")))
warmup = config["sequence_length_warmup"]
start, (duration,) = warmup["start_length"], warmup["duration"].values()
folder = os.path.join(flag("--runs"), flag("--name"))
open(os.path.join(os.path.dirname(flag("--runs")), "started"), "a").write(folder + "\\n")
print("a line of the script", sys.argv, flush=True)
if "--exit" in sys.argv and duration == 60:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", folder])
    sys.exit(int(flag("--exit")))
if "--hang" in sys.argv:
    child = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", child, folder], start_new_session=True)
with open(os.path.join(folder, "metrics.csv"), "x", buffering=1) as stream:
    stream.write("{",".join(COLUMNS)}\\n")
    for step in range(1, 4 if "--stall" in sys.argv else (config["training"]["steps"] or 200) + 1):
        loss = 1.0 if start >= 16 and duration <= 60 or step != (10 if start < 16 else 30) else 1.3
        evaluated = loss if step % config["training"]["eval_interval"] == 0 else ""
        row = dict(step=step, train_loss=loss, eval_loss=evaluated)
        stream.write(",".join(str(row.get(name, "")) for name in {COLUMNS!r}) + "\\n")
if "--hang" in sys.argv or "--stall" in sys.argv:
    time.sleep(600)
"""


@pytest.fixture
def tune(tmp_path, monkeypatch, capsys):
    """``tune(*flags)`` runs the command on a JSON in tmp_path; exit code, stdout, stderr."""
    monkeypatch.setattr(search_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(search_module, "GRACE_SECONDS", 0.2)
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*flags, **changes):
        arguments, _, of_script = " ".join(flags).partition("--- ")
        code = main([*command(tmp_path, **changes), *arguments.split(), "--", *of_script.split()])
        return (code, *capsys.readouterr())

    return run


def command(folder, **changes):
    config = {
        "model": {"seq_length": 64},
        "training": {"steps": 200, "eval_interval": 50},
        "sequence_length_warmup": {"enabled": True, "end_length": 64, "multiple_of": 8, "duration": {"steps": 1}},
        "weight_averaging": {"enabled": True, "interval": 5},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "total_num_steps": "auto"}},
    }
    (folder / "in.json").write_text(json.dumps(config | changes))
    paths = ["--config", str(folder / "in.json"), "--out", str(folder / "out")]
    durations = ",".join(map(str, range(10, 101, 10)))
    given = ["--launcher", f"'{sys.executable}'", "--durations", durations]
    return ["tune-warmup", "--script", str(folder / "script.py"), *paths, *given]


def started(folder):
    return [line.rpartition("/")[2] for line in (folder / "started").read_text().splitlines()]


# 10 to 100 by tens, compared at 4 warmups: 40; then between 40 and the end 70, 50, 60
TRIALS = [f"start{start}_duration{duration}" for start, duration in [(8, 40), (16, 40), (16, 70), (16, 50), (16, 60)]]


def test_the_tuned_json_is_the_input_with_two_values_changed(tmp_path, tune):
    code, out, _ = tune("--- --data text")
    assert code == 0 and started(tmp_path) == TRIALS
    before = json.loads((tmp_path / "in.json").read_text())
    before["sequence_length_warmup"] |= {"start_length": 16, "duration": {"steps": 60}}
    assert json.loads((tmp_path / "out" / "in.json").read_text()) == before
    assert list((tmp_path / "out").glob(".*")) == []
    assert f"start_length 16, duration 60: {tmp_path / 'out' / 'in.json'}" in out.splitlines()
    for line in (
        "start 8, duration 40: fluctuated at step 10 of 40, perplexity 3.669, the best 2.718",
        "start 16, duration 40: stable at step 40 of 40, perplexity 2.718, the best 2.718",
        "start 16, duration 70: fluctuated at step 30 of 40, perplexity 3.669, the best 2.718",
    ):
        assert line in out.splitlines()


def test_a_trial_is_the_beginning_of_the_real_run(tmp_path, tune):
    tune("--- --data text --name other")
    config = json.loads((tmp_path / "out" / TRIALS[0] / "config.json").read_text())
    assert config["training"]["steps"] == 200  # the schedules' and the sample order's
    assert config["training"]["eval_interval"] == 2 and config["training"]["save_interval"] == 10**9
    assert "weight_averaging" not in config
    assert config["sequence_length_warmup"]["start_length"] == 8
    log = (tmp_path / "out" / TRIALS[0] / "log.txt").read_text()
    assert "'--data', 'text'" in log and log.rstrip().endswith("'start8_duration40']")  # ours come last and win


def test_a_duration_in_tokens_stays_in_tokens(tmp_path, tune):
    section = {"enabled": True, "end_length": 64, "duration": {"tokens": 1}}
    code, out, _ = tune("--start-lengths 16", sequence_length_warmup=section)
    assert code == 0 and "start_length 16, duration 60" in out and started(tmp_path)[0] == "start16_duration60"
    tuned = json.loads((tmp_path / "out" / "in.json").read_text())
    assert tuned["sequence_length_warmup"]["duration"] == {"tokens": 60}


def test_an_interrupted_search_goes_on(tmp_path, tune):
    first = tune()
    path = tmp_path / "out" / "trials.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"trials": kept["trials"][:-1]}))  # the last one was not finished
    (tmp_path / "started").unlink()
    code, out, _ = tune()
    assert code == first[0] == 0 and started(tmp_path) == TRIALS[-1:]
    assert out.count("known from") == len(TRIALS) - 1
    (tmp_path / "started").unlink()
    assert tune()[0] == 0 and not (tmp_path / "started").exists()
    code, _, err = tune("--threshold 1.5")
    assert code == 2 and "is of a search with other settings" in err


@pytest.mark.parametrize("exit_code", [3, 0])
def test_a_trial_that_fails_or_stops_early_is_an_error_and_no_data_point(tmp_path, tune, exit_code):
    code, _, err = tune(f"--- --exit {exit_code}")
    assert code == 2 and f"exit code {exit_code} before step 40" in err
    assert (
        "a line of the script" in err
        and f"{sys.executable} {tmp_path}/script.py --exit {exit_code} --deepspeed_config" in err
    )
    assert len(json.loads((tmp_path / "out" / "trials.json").read_text())["trials"]) == len(TRIALS) - 1
    assert not (tmp_path / "out" / "in.json").exists()
    deadline = time.monotonic() + 10
    while left(tmp_path) and time.monotonic() < deadline:  # what the script had started is killed, not waited for
        time.sleep(0.05)
    assert left(tmp_path) == []


def test_nothing_stable_is_exit_code_1(tmp_path, tune):
    code, _, err = tune("--start-lengths 8")
    assert code == 1 and "no start length of [8] is stable" in err and "lower the learning rate" in err
    assert not (tmp_path / "out" / "in.json").exists()


BY_TOKENS = {"enabled": True, "end_length": 64, "duration": {"steps": 1}}


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ("", {"scheduler": {}}, "--steps: missing"),
        ("", {"scheduler": 5}, "--steps: missing"),
        ("", {"scheduler": {"params": {"warmup_num_steps": -5}}}, "--steps: missing"),
        ("", {"sequence_length_warmup": {**BY_TOKENS, "learning_rate": {"by": "tokens"}}}, "--steps: missing"),
        ("", {"sequence_length_warmup": {"enabled": False, "end_length": 8, "duration": {"steps": 1}}}, "not enabled"),
        ("--start-lengths 128", {}, "not lengths of at most end_length 64"),
        ("--threshold 1", {}, "--threshold: 1 is not a finite number above 1"),
        ("--out {}", {}, "which must not change"),
        ("--launcher nowhere", {}, "'nowhere' cannot be started"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, tune, flags, changes, message):
    code, _, err = tune(flags.format(tmp_path), **changes)
    assert code == 2 and message in err and not (tmp_path / "started").exists()


def test_a_script_or_a_record_that_is_not_there(tmp_path, tune):
    (tmp_path / "script.py").unlink()
    assert "script.py is not a file that exists" in tune()[2]
    (tmp_path / "script.py").write_text(SCRIPT.replace("train_loss=loss", "loss=loss").replace("train_loss,", "loss,"))
    code, _, err = tune()
    assert code == 2 and "metrics.csv" in err and "train_loss" in err


def left(folder):
    """The processes that name a folder on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        named = any(str(folder / "out") in part for part in process.info["cmdline"] or ())
        if named and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(process)
    return found


def test_no_process_is_left_behind(tmp_path, tune, monkeypatch):
    monkeypatch.setattr(search_module, "GRACE_SECONDS", 0.2)
    assert tune("--- --hang")[0] == 0  # each with a child in a session of its own that ignores SIGTERM
    assert started(tmp_path) == TRIALS and left(tmp_path) == []


def test_ctrl_c_ends_the_trial(tmp_path, tune, monkeypatch):
    def interrupt(*_):
        deadline = time.monotonic() + 60
        while len(left(tmp_path)) < 2 and time.monotonic() < deadline:  # the script and its child
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(search_module, "judge", interrupt)
    code, _, err = tune("--- --hang")
    assert code == 130 and "go on from there with the same command" in err and left(tmp_path) == []


def test_termination_ends_the_trial(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [*command(tmp_path), "--", "--stall"]
    process = subprocess.Popen([sys.executable, "-m", "ds_plugin", *arguments], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while len(left(tmp_path)) < 2 and time.monotonic() < deadline:  # the command and the script
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143 and left(tmp_path) == []
    finally:
        process.kill()
