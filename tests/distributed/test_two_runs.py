"""Two runs at once in one folder: the second is one error on every rank, and the first goes on as if alone."""

import json

import pytest

from tests.distributed.test_bad_input import run_main
from tests.distributed.test_pretrain import ROOT, config, folder, metrics, summary  # noqa: F401 - folder is a fixture
from tests.harness import Launched

SCRIPT = ROOT / "launch_scripts" / "pretrain_gpt.py"
STEPS = 16


def refused_while_it_runs(workers, launched, run, arguments):
    """The run stands still; neither a second start nor a resume in its folder changes anything there."""
    with launched.paused():
        assert not (run / "summary.json").exists()
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
        for flags in ([], ["--resume"]):
            results = workers(2).run(run_main, [*map(str, arguments), *flags], timeout=60)
            errors = [[line for line in text.splitlines() if line.startswith("error: ")] for _, text, _ in results]
            assert [code for code, _, _ in results] == [2, 2] and [len(lines) for lines in errors] == [1, 1], errors
            assert errors[0] == errors[1] and f"'{run}' is in use by process " in errors[0][0], errors
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@pytest.mark.slow  # test_interruption.py asks the same of a run that it kills then and resumes
def test_a_second_start_and_a_resume_during_a_run(workers, folder):  # noqa: F811
    settings = config(training__steps=STEPS, training__save_interval=4, training__eval_interval=8)
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    arguments = ["--config", path, "--data", folder / "text", "--runs", folder / "runs", "--cache", folder / "cache"]
    run = folder / "runs" / "run"
    with Launched([SCRIPT, *arguments], ranks=2) as launched:
        launched.wait_for_file(run / "checkpoints" / "latest", "step", timeout=120)
        refused_while_it_runs(workers, launched, run, arguments)
        ended = launched.wait(timeout=120)
    assert ended.returncode == 0, ended.stdout
    assert metrics(folder, "run")["step"] == list(range(1, STEPS + 1)) and summary(folder, "run")["steps"] == STEPS
