"""What a run prints: plain lines in a log, a bar on a terminal, nothing elsewhere."""

import io

import pytest
from rich.console import Console

from launch_scripts.gpt import progress as module
from launch_scripts.gpt.progress import Progress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(console: Console) -> list[str]:
    return written(console).splitlines()


def test_log_of_a_run(clock: Clock, log: Console):
    with Progress(100, True, console=log) as progress:
        progress.stage("building the model")
        progress.data(12_300_000, 31_500_000)  # too soon after the stage to be worth a line
        clock.now += 5
        progress.data(12_300_000, 31_500_000)
        progress.data(31_500_000, 31_500_000)
        progress.message("kept [as it is]")
        row = {"step": 1, "length": 64, "lr": 3e-4, "train_loss": 5.5, "eval_loss": None, "tokens_per_second": 12345.6}
        progress.step(row)
        clock.now += 1
        progress.step({**row, "step": 2})  # nothing new: left out
        progress.step({**row, "step": 3, "eval_loss": 5.0, "eval_loss_averaged": 4.9})
        clock.now += 9
        progress.step({**row, "step": 11, "train_loss": 5.25})
    start = "length 64  lr 3.00e-04  loss"
    # From step 1 at second 5 to step 11 at second 15: a second each, 89 are left.
    assert lines(log) == [
        "building the model ...",
        "preparing data 12.3/31.5 MB",
        "preparing data 31.5/31.5 MB",
        "kept [as it is]",
        f"step 1/100  {start} 5.5000  12,346 tokens/s  0:05 elapsed, -:-- left",
        f"step 3/100  {start} 5.5000  eval 5.0000  averaged 4.9000  12,346 tokens/s  0:06 elapsed, 0:49 left",
        f"step 11/100  {start} 5.2500  12,346 tokens/s  0:15 elapsed, 1:29 left",
    ]


def test_last_step_is_always_shown(clock: Clock, log: Console):
    progress = Progress(2, True, console=log)
    progress.step({"step": 1})
    progress.step({"step": 2})
    assert [line.split()[1] for line in lines(log)] == ["1/2", "2/2"]


def test_resumed_run_counts_its_own_steps(clock: Clock, log: Console):
    progress = Progress(1000, True, console=log)
    progress.step({"step": 901})
    clock.now += 10
    progress.step({"step": 902})
    assert lines(log)[-1].endswith("0:10 elapsed, 16:20 left")  # 98 steps of 10 s


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_on_other_ranks(terminal: bool):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with Progress(10, False, console=console) as progress:
        progress.stage("a")
        progress.data(0, 1)
        progress.message("b")
        progress.step({"step": 10, "eval_loss": 1.0})
    assert written(console) == ""


def test_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(10, True, console=console) as progress:
        progress.stage("building the model")
        progress.data(1_000_000, 2_000_000)
        progress.step({"step": 4, "length": 64, "train_loss": 1.5})
        progress.message("kept [as it is]")
        progress.step({"step": 10, "train_loss": 1.25, "eval_loss": 1.5})
    text = written(console)
    assert text.count("kept [as it is]") == 1
    last = text[text.rindex("training") :]
    assert "10/10" in last and "loss 1.2500  eval 1.5000" in last  # the last state stays on the screen


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (83, "1:23"), (59.6, "1:00"), (3600, "1:00:00"), (5025, "1:23:45")],
)
def test_hours_minutes_and_seconds(clock: Clock, log: Console, seconds: float, shown: str):
    progress = Progress(2, True, console=log)
    clock.now += seconds
    progress.step({"step": 1})
    assert lines(log)[0].endswith(f"  {shown} elapsed, -:-- left")
