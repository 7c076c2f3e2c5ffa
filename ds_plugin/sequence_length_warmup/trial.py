"""One trial of `tune`: the beginning of the real run in processes of its own, judged by its metrics.csv, then ended."""

import contextlib
import copy
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ds_plugin.atomic import atomic_write
from ds_plugin.config import split_config
from ds_plugin.errors import ConfigError, DataError, PluginError
from ds_plugin.run.progress import Progress
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig

ROOT = Path(__file__).resolve().parents[2]
MULTIPLES = 4  # learning-rate warmups in a trial; its first quarter is "the very beginning"
EVALUATIONS = 20  # of a whole trial, five of them in its first quarter
POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0  # in which a launcher ends its ranks, on other nodes too; then what is left here is killed


def significant_fluctuation(perplexities: Sequence[float], threshold: float = 1.3) -> int | None:
    """Index of the first perplexity above ``threshold`` times the lowest before it, or not finite; None without one."""
    best = math.inf
    for index, value in enumerate(perplexities):
        if not math.isfinite(value) or value > threshold * best:
            return index
        best = min(best, value)
    return None


@dataclass(frozen=True)
class Trial:
    """How a run of at most ``steps`` optimizer steps went; ``outcome`` is stable, fluctuated or diverged.

    ``step``: the one that decided, the last of a stable trial. ``perplexity``: measured there (infinite when it
    diverged), and ``best`` the lowest until then.
    """

    start_length: int
    duration: int
    outcome: str
    step: int
    steps: int
    perplexity: float
    best: float

    @property
    def stable(self) -> bool:
        """Whether it went on to its last step without a significant fluctuation."""
        return self.outcome == "stable"

    @property
    def at_start(self) -> bool:
        """Whether it failed at the very beginning: in its first quarter, which is the learning rate's own warmup."""
        return not self.stable and self.step * MULTIPLES <= self.steps

    def describe(self, unit: str) -> str:
        """The trial and why it ended, in one line."""
        where = {
            "stable": f"perplexity {self.perplexity:.4g} after {self.steps} steps",
            "fluctuated": f"at step {self.step} of {self.steps}, perplexity {self.perplexity:.4g} is "
            f"{self.perplexity / self.best:.2f}x the best so far, {self.best:.4g}",
            "diverged": f"at step {self.step} of {self.steps}, the perplexity is not finite",
        }[self.outcome]
        return f"start {self.start_length}, duration {self.duration} {unit}: {self.outcome} ({where})"


def judge(metrics: Mapping[str, list], steps: int, threshold: float) -> tuple[str, int, float, float] | None:
    """``(outcome, step, perplexity, best)`` of a run by its metrics.csv so far; None while it is undecided.

    Raises:
        DataError: it has reached ``steps`` without any evaluation.
    """
    perplexities: list[float] = []
    for step, loss, evaluated in zip(metrics["step"], metrics["train_loss"], metrics["eval_loss"], strict=True):
        if step > steps:
            break  # it ran on between two looks; what is judged must not depend on when we look
        best = min(perplexities, default=math.inf)
        if loss is not None and not math.isfinite(loss):
            return "diverged", step, math.inf, best
        if evaluated is not None:
            perplexities.append(math.exp(evaluated) if evaluated < 700 else math.inf)  # NaN compares false
            if significant_fluctuation(perplexities, threshold) is not None:
                outcome = "fluctuated" if math.isfinite(perplexities[-1]) else "diverged"
                return outcome, step, perplexities[-1], best
    if not metrics["step"] or metrics["step"][-1] < steps:
        return None
    if not perplexities:
        raise DataError(f"metrics: no evaluation in the first {steps} steps; evaluate more often")
    return "stable", steps, perplexities[-1], min(perplexities)


@dataclass
class Trials:
    """Runs trials that are not in ``known`` yet; ``keep`` gets all of them after each."""

    config: dict[str, Any]
    unit: str  # of durations: steps or tokens
    launch: list[str]  # the command up to the script's own arguments; "{port}" stands for a free one
    arguments: list[str]
    folder: Path
    steps: int | None
    threshold: float
    known: list[Trial] = field(default_factory=list)
    keep: Callable[[list[Trial]], None] = lambda trials: None

    def __call__(self, start: int, duration: int) -> Trial:
        """The trial of a start length and a duration, in the JSON's unit.

        Raises:
            PluginError: the run failed, which says nothing about its stability.
        """
        config = self.tuned(start, duration)
        steps = self.steps or trial_steps(config)
        steps = min(steps, config.get("training", {}).get("steps") or steps)
        interval = max(1, steps // EVALUATIONS)
        steps -= steps % interval  # the last one is evaluated
        for trial in self.known:
            if (trial.start_length, trial.duration, trial.steps) == (start, duration, steps):
                print(f"{trial.describe(self.unit)} - known from {self.folder}", flush=True)
                return trial
        folder, of_trial = self.folder / f"start{start}_{self.unit}{duration}", _of_trial(config, interval)
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that was interrupted
        folder.mkdir(parents=True)
        write_json(folder / "config.json", of_trial)
        flags = ["--deepspeed_config", str(folder / "config.json"), "--runs", str(self.folder), "--name", folder.name]
        # Ours come last, so that they win over the same flags among the user's.
        command = [part.replace("{port}", str(_free_port())) for part in self.launch] + self.arguments + flags
        log = folder / "log.txt"
        with Progress(steps, enabled=True) as progress, running(command, log) as process:
            progress.stage(f"trial {folder.name}: up to {steps} steps, its output is in {log}")
            judged = self._watch(process, folder / "metrics.csv", steps, progress)
            if judged is None:
                lines = log.read_text(errors="replace").splitlines()[-60:]
                raise PluginError(
                    f"the trial's script ended with exit code {process.returncode} before step {steps}; its command:\n"
                    f"{shlex.join(command)}\nthe end of {log}:\n" + "\n".join(lines)
                )
            trial = Trial(start, duration, judged[0], judged[1], steps, *judged[2:])
            self.known = [*self.known, trial]
            self.keep(self.known)
            progress.message(trial.describe(self.unit))
        return trial

    def tuned(self, start: int, duration: int) -> dict[str, Any]:
        """The JSON with another start length and duration."""
        config = copy.deepcopy(self.config)
        config["sequence_length_warmup"] |= {"start_length": start, "duration": {self.unit: duration}}
        return config

    def _watch(
        self, process: subprocess.Popen, path: Path, steps: int, progress: Progress
    ) -> tuple[str, int, float, float] | None:
        from ds_plugin.run.folder import read_metrics  # imports torch

        shown = 0
        while True:
            ended = process.poll() is not None  # before the look at the file, which then has all it wrote
            if path.exists():
                metrics = read_metrics(path)
                for values in list(zip(*metrics.values(), strict=True))[shown:]:
                    row, shown = dict(zip(metrics, values, strict=True)), shown + 1
                    if row["step"] <= steps:
                        progress.step(row)
                if (judged := judge(metrics, steps, self.threshold)) is not None:
                    return judged
            if ended:
                return None
            time.sleep(POLL_SECONDS)


def _of_trial(config: dict[str, Any], interval: int) -> dict[str, Any]:
    """The JSON of a trial. The run's own number of steps stays: schedules and the order of samples depend on it."""
    config = {key: value for key, value in config.items() if key != "weight_averaging"}
    if "training" in config:  # a script of one's own may have another place for them
        config["training"] |= {"eval_interval": interval, "save_interval": sys.maxsize}
    split_config(config)  # refuses what the methods would, before anything is started
    return config


def trial_steps(config: Mapping[str, Any]) -> int:
    """Optimizer steps of a few learning-rate warmups; one by tokens takes more steps while they are short.

    Raises:
        ConfigError: this JSON does not tell.
    """
    section = SequenceLengthWarmupConfig.model_validate(config["sequence_length_warmup"])
    full_steps = MULTIPLES * needed("steps", lr_warmup(config))
    if section.learning_rate.by == "steps":
        return full_steps
    from ds_plugin.sequence_length_warmup.plan import plan  # imports DeepSpeed
    from ds_plugin.sequence_length_warmup.scheduler import SequenceLengthScheduler

    # Of a duration in steps, any batch gives the same steps.
    batch = 1 if section.duration.unit == "steps" else needed("steps", config.get("train_batch_size"))
    return plan(SequenceLengthScheduler(section), batch, tokens=full_steps * batch * section.end_length).steps


def lr_warmup(config: Mapping[str, Any]) -> int | None:
    """The scheduler's warmup in steps, if the JSON has one."""
    steps = ((config.get("scheduler") or {}).get("params") or {}).get("warmup_num_steps")
    return steps if isinstance(steps, int) else None


def needed(flag: str, value: int | None) -> int:
    """A flag's value or default; ConfigError where there is neither."""
    if not value:
        raise ConfigError(
            f"--{flag}: missing, and its default needs scheduler.params.warmup_num_steps, training.steps and, with a "
            "duration or learning rate in tokens, train_batch_size in the JSON; give the flag"
        )
    return value


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen]:
    """A command that writes to ``log``, in a process group of its own; it and all it started have ended on the way out.

    Raises:
        ConfigError: there is no such command.
    """
    modules = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    # This interpreter's own torchrun or deepspeed, also where its environment is not activated.
    programs = os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]))
    env = {**os.environ, "PYTHONPATH": modules, "PATH": programs}
    process = None
    try:
        try:
            with open(log, "wb") as stream, _no_interrupts():
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=env, start_new_session=True
                )
        except OSError as error:
            raise ConfigError(f"--launcher: {command[0]!r} cannot be started ({error.strerror})") from None
        yield process
    finally:
        if process is not None:
            _end(process)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM: one that came while a process is being started would leave nobody who knows it."""
    came: list[int] = []
    usual = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    for late in came:
        signal.raise_signal(late)


def _end(process: subprocess.Popen) -> None:
    # The group, as a local deepspeed launcher passes no signal on; the tree, as torchrun's ranks have their own groups.
    tree: list[psutil.Process] = []
    try:
        if process.poll() is None:
            tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            os.killpg(process.pid, signal.SIGTERM)
        _wait(process, tree)
    finally:
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()  # psutil checks that the id is still this process's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _wait(process, tree)  # the next trial needs their memory


def _wait(process: subprocess.Popen, tree: Sequence[psutil.Process]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(map(_runs, tree)):
        process.poll()
        time.sleep(0.05)


def _runs(member: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        # In a container nobody may collect the dead ones.
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    return False


def write_json(path: Path, config: Mapping[str, Any]) -> None:
    """Put a JSON file in place as a whole."""
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
