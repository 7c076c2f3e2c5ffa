"""Bad input to the example script: one message with field, value and remedy; every rank ends; nothing is touched."""

import contextlib
import io
import json
import sys
import time
import types

import pytest

from tests.distributed.test_pretrain import config, files, folder, load_script, run_script  # noqa: F401 - folder is a fixture
from tests.harness import Launched

RANKS = 2


def without(section, key):
    changed = config()
    changed[section] = {k: v for k, v in changed[section].items() if k != key}
    return changed


def without_section(name):
    return {k: v for k, v in config().items() if k != name}


CURRICULUM = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": 32,
    "schedule_type": "custom",
}

CASES = {
    # name: (config, flags, what the message must hold)
    "unknown key": (config(weight_averaging__windw=3), (), ["weight_averaging.windw", "3", '"window"']),
    "unknown key of the model": (config(model__num_layer=3), (), ["model.num_layer", "3", '"num_layers"']),
    "unknown key of the run": (config(training__step=3), (), ["training.step", "3", '"steps"']),
    "wrong type": (config(sequence_length_warmup__start_length="8"), (), ["start_length", "'8'", "integer"]),
    "start above end": (config(sequence_length_warmup__start_length=64), (), ["start_length", "64", "at most 32"]),
    "length not divisible": (config(sequence_length_warmup__multiple_of=12), (), ["end_length", "32", "24 or 36"]),
    "length is not the model's": (config(model__seq_length=64), (), ["end_length", "32", "write 64"]),
    "base width missing": (without("completep", "base_width"), (), ["completep.base_width", "missing", "256"]),
    "window 0": (config(weight_averaging__window=0), (), ["weight_averaging.window", "0"]),
    "removed section": (
        {**without_section("sequence_length_warmup"), "curriculum_learning": CURRICULUM},
        (),
        ["curriculum_learning.schedule_type", "'custom'", "package.module:function", "sequence_length_warmup"],
    ),
    "section missing": (without_section("model"), (), ['"model"', "quickstart.json"]),
    "heads do not divide": (config(model__num_attention_heads=5), (), ["num_attention_heads = 5", "hidden_size = 32"]),
    "fp16 on a CPU": (config(), ("--precision", "fp16"), ["fp16", "bf16"]),
    "wrong clipping norm": (
        config(model__tensor_parallel=2),
        ("--precision", "bf16", "--zero-stage", "0"),
        ["zero_optimization.stage", "tensor_parallel 2", "write stage 1"],
    ),
    "unmanaged accumulation": (
        {**config(), "managed_gradient_accumulation": False},
        (),
        ["managed_gradient_accumulation", "False", "remove it"],
    ),
    "no sections": ([config()], (), ["a list in place of a JSON object"]),
    "no section of DeepSpeed's": ({**config(), "zero_optimization": 5}, (), ["zero_optimization: 5", "a JSON object"]),
    "two that are none": (
        {**config(), "optimizer": [], "scheduler": "x"},
        (),
        ["optimizer: []", "scheduler: 'x'", "a JSON object"],
    ),
    "a batch in quotes": ({**config(), "train_batch_size": "8"}, (), ["train_batch_size", "integer, got '8'"]),
    "unknown key of DeepSpeed's section": (
        {**config(), "bf16": {"enable": True}},
        (),
        ["bf16.enable", "True", '"enabled"'],
    ),
    "what DeepSpeed refuses itself": (
        {**config(), "checkpoint": {"tag_validation": "Sometimes"}},
        (),
        ["checkpoint: {'tag_validation': 'Sometimes'}", "WARN"],
    ),
    "averaging what is on NVMe": (
        {**config(), "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
        (),
        ["weight_averaging", "'nvme'", "write 'cpu' or 'none'"],
    ),
    "more steps than any run": (config(), ("--steps", "3000000000"), ["training.steps", "1000000000", "3000000000"]),
    "a seed of 33 bits": (config(), ("--seed", "4294967296"), ["training.seed", "2147483647", "4294967296"]),
    "a misspelt params": (
        {**config(), "optimizer": {"type": "AdamW", "paams": {"lr": 0.1}}},
        (),
        ["optimizer.paams", 'did you mean "params"?'],
    ),
    "a batch that does not fit": (
        {**config(), "train_batch_size": 7},
        (),
        ["train_batch_size: 7 does not fit", "data-parallel rank(s)"],
    ),
    "ranks do not divide": (config(model__tensor_parallel=4), (), ["tensor_parallel x ", "= 4 x 1", "2 ranks"]),
    "no such data": (config(), ("--data", "/no/such/place"), ["data", "/no/such/place", "stdlib"]),
    "data without a name": (config(), ("--data", ""), ["data", "''", "stdlib"]),
    "a tag and no resume": (config(), ("--tag", "step00000002"), ["--tag", "step00000002", "--resume"]),
    "no text": (config(), ("--data", "{empty}"), ["data", "holds no text", "plain text files"]),
    "no such tokenizer": (config(), ("--tokenizer", "/no/tokenizer.json"), ["tokenizer", "/no/tokenizer.json"]),
    "nothing to resume": (config(), ("--resume", "--name", "never"), ["resume", "never", "without --resume"]),
    "already a run": (config(), ("--name", "earlier"), ["earlier", "metrics.csv", "--resume", "another --name"]),
    "another model": (
        config(model__hidden_size=64),
        ("--name", "earlier", "--resume"),
        ["model.hidden_size", "32", "64", "another --name"],
    ),
}


def run_main(arguments):
    """`main()` as the launcher would run it on a CPU without fp16: exit code, what it printed, seconds."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False  # some have it
    script = load_script()
    script.startup.time = types.SimpleNamespace(sleep=lambda seconds: None)  # on other ranks, and before it ends
    sys.argv = ["pretrain_gpt.py", *arguments]
    printed, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(printed):
        code = script.main()
    return code, printed.getvalue(), time.monotonic() - start


@pytest.fixture
def place(workers, folder):  # noqa: F811
    """The folder with a finished earlier run in it, and a folder that holds no text."""
    workers(RANKS).run(run_script, str(folder), "earlier", config(training__steps=2))
    (folder / "empty").mkdir()
    (folder / "empty" / "picture.png").write_bytes(b"\x89PNG\0\0")
    return folder


def test_every_case(workers, place):
    runs = place / "runs"
    before = files(runs)
    for case, (settings, flags, parts) in CASES.items():
        path = place / "case.json"
        path.write_text(json.dumps(settings))
        arguments = ["--config", str(path), "--runs", str(runs), "--cache", str(place / "cache")]
        arguments += ["--data", str(place / "text"), *(flag.format(empty=place / "empty") for flag in flags)]
        results = workers(RANKS).run(run_main, arguments, timeout=60)
        assert [code for code, _, _ in results] == [2] * RANKS, (case, results)
        # the frameworks may have said things of their own before
        errors = [[line for line in text.splitlines() if line.startswith("error: ")] for _, text, _ in results]
        assert [len(lines) for lines in errors] == [1] * RANKS, (case, results)
        message = errors[0][0]
        assert all(part in message for part in parts), (case, message)
        assert errors == [[message]] * RANKS, case
        assert all(seconds < 30 for _, _, seconds in results), case
        assert files(runs) == before, case


def test_a_misspelt_key_is_said_once(workers, tmp_path):
    """On rank 0, and training goes on: here to the next error."""
    path = tmp_path / "case.json"
    path.write_text(json.dumps({**config(), "gradient_cliping": 1.0}))
    arguments = ["--config", str(path), "--runs", str(tmp_path / "runs"), "--data", "/no/such/place"]
    first, second = [text for _, text, _ in workers(RANKS).run(run_main, arguments, timeout=60)]
    assert first.count("gradient_cliping: ") == 1 and 'did you mean "gradient_clipping"?' in first
    assert "gradient_cliping" not in second and "/no/such/place" in first and "/no/such/place" in second


def _interrupted(arguments):
    """Ctrl-C in the middle of training, as it reaches Python."""
    script = load_script()
    script.startup.OTHERS_WAIT_SECONDS = 0

    def train(*_):
        raise KeyboardInterrupt

    script.train, sys.argv = train, ["pretrain_gpt.py", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return script.main(), printed.getvalue()


def test_ctrl_c_says_how_to_go_on(workers, tmp_path):
    path = tmp_path / "case.json"
    path.write_text(json.dumps(config()))
    results = workers(RANKS).run(_interrupted, ["--config", str(path), "--runs", str(tmp_path)])
    assert [code for code, _ in results] == [130] * RANKS
    assert "--resume" in results[0][1] and "Traceback" not in results[0][1] and results[1][1] == ""


@pytest.mark.slow  # test_interruption.py starts one launcher, and test_every_case has the message of every rank
def test_through_the_real_launcher(tmp_path):
    from tests.distributed.test_pretrain import ROOT

    path = tmp_path / "case.json"
    path.write_text(json.dumps(config(weight_averaging__windw=3)))
    script = ROOT / "launch_scripts" / "pretrain_gpt.py"
    with Launched([script, "--deepspeed_config", path, "--runs", tmp_path / "runs"], ranks=RANKS) as launched:
        launched.wait_for("error: ", timeout=120)
        start = time.monotonic()
        ended = launched.wait(timeout=60)
        assert time.monotonic() - start < 30
    assert ended.returncode != 0
    assert ended.stdout.count("error: weight_averaging.windw") == 1, ended.stdout
    assert "Traceback" not in ended.stdout
    assert not (tmp_path / "runs").exists()
