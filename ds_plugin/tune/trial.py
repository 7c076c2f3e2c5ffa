"""One trial: the beginning of the real run in processes of its own, judged by its metrics.csv, then ended."""

import contextlib
import csv
import math
import os
import shlex
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ds_plugin.core.errors import ConfigError, DataError, PluginError

ROOT = Path(__file__).resolve().parents[2]
MULTIPLES = 4  # learning-rate warmups in a trial; its first quarter is "the very beginning"
POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0  # in which a launcher ends its ranks, on other nodes too; then what is left here is killed


@dataclass(frozen=True)
class Trial:
    """How a run of at most ``steps`` optimizer steps went; the last four are `judge`'s."""

    start_length: int
    duration: int
    steps: int
    outcome: str
    step: int
    perplexity: float
    best: float

    @property
    def at_start(self) -> bool:
        """Whether it failed at the very beginning: in its first quarter, which is the learning rate's own warmup."""
        return self.outcome != "stable" and self.step * MULTIPLES <= self.steps

    def __str__(self) -> str:
        return (
            f"start {self.start_length}, duration {self.duration}: {self.outcome} at step {self.step} of {self.steps}, "
            f"perplexity {self.perplexity:.4g}, the best {self.best:.4g}"
        )


def judge(rows: Iterable[Mapping[str, str]], steps: int, threshold: float) -> tuple[str, int, float, float] | None:
    """Of a run by the rows of its metrics.csv so far: whether it is stable, has fluctuated or diverged, the step that
    decided (the last of a stable one), the perplexity there and the lowest. None while undecided.

    It fluctuates where an evaluation's perplexity is above ``threshold`` times the lowest before it.

    Raises:
        DataError: it has reached ``steps`` without any evaluation.
    """
    step, perplexity, best = 0, math.nan, math.inf
    for row in rows:
        if int(row["step"]) > steps:
            break  # it ran on between two looks; what is judged must not depend on when we look
        step = int(row["step"])
        if row["eval_loss"]:
            loss = float(row["eval_loss"])
            perplexity = math.exp(loss) if loss < 700 else math.inf  # NaN compares false
        if math.isinf(perplexity) or not math.isfinite(float(row["train_loss"] or 0)):
            return "diverged", step, math.inf, best
        if perplexity > threshold * best:
            return "fluctuated", step, perplexity, best
        best = min(best, perplexity)
    if step < steps:
        return None
    if math.isnan(perplexity):
        raise DataError(f"metrics: no evaluation in the first {steps} steps; evaluate more often")
    return "stable", step, perplexity, best


def watched(command: Sequence[str], folder: Path, steps: int, threshold: float) -> tuple[str, int, float, float]:
    """Run a command that writes metrics.csv into ``folder`` until `judge` can tell; it has ended then.

    Raises:
        PluginError: it ended before, which says nothing about its stability.
    """
    record, log, ended = folder / "metrics.csv", folder / "log.txt", False
    with _running(command, log) as process:
        while not ended:
            ended = process.poll() is not None  # before the look at the file, which then has all it wrote
            text = record.read_text() if record.exists() else ""
            rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())  # the last line may be half written
            missing = {"step", "train_loss", "eval_loss"} - set(rows.fieldnames or ())
            if rows.fieldnames and missing:
                raise DataError(f"'{record}' has no column {' and '.join(sorted(missing))}; the script must write it")
            if (judged := judge(rows, steps, threshold)) is not None:
                return judged
            time.sleep(POLL_SECONDS)
    said = f"the trial's script ended with exit code {process.returncode} before step {steps}; its command"
    end = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
    raise PluginError(f"{said}:\n{shlex.join(command)}\nthe end of {log}:\n{end}")


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen]:
    """A command in a process group of its own; it and all it started have ended on the way out."""
    # This interpreter's own torchrun or deepspeed, also where its environment is not activated.
    programs = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    modules = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": modules, "PATH": programs}
    with open(log, "wb") as out:
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "start_new_session": True}
        try:
            process = subprocess.Popen(command, env=env, **given)
        except OSError as error:
            raise ConfigError(f"--launcher: {command[0]!r} cannot be started ({error.strerror})") from None
    try:
        yield process
    finally:
        # The group, as a local deepspeed launcher passes no signal on; the tree, as torchrun's ranks have own groups.
        tree: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.killpg(process.pid, signal.SIGSTOP)  # nothing is started while we look
            tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGCONT)
        _, left = psutil.wait_procs(tree, GRACE_SECONDS)
        for member in left:
            member.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        psutil.wait_procs(left, 1.0)  # the next trial needs their memory
        process.wait()
