"""Finds the warmup's start length and duration with short runs: the tuning recipe of arXiv 2108.06084. A trial is the
beginning of the real run. It ends after the first few multiples of the learning rate's warmup, or at the first
evaluation whose perplexity fluctuates significantly."""

import argparse
import contextlib
import csv
import functools
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ds_plugin.config import load_json, split_config
from ds_plugin.core.arguments import above, checked, count, existing_file, new_folder, several, tokens
from ds_plugin.core.errors import ConfigError, DataError, PluginError
from ds_plugin.core.files import write_json
from ds_plugin.core.json_files import object_at, read_json
from ds_plugin.sequence_length_warmup.translate import translate

ROOT = Path(__file__).resolve().parents[2]
MULTIPLES = 4  # learning-rate warmups in a trial; its first quarter is "the very beginning"
POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0  # in which a launcher ends its ranks, on other nodes too; then what is left here is killed
EVALUATIONS = 20  # of a whole trial, five of them in its first quarter


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

    def __str__(self) -> str:
        went = f"{self.outcome} at step {self.step} of {self.steps}, perplexity {self.perplexity:.4g}"
        return f"start {self.start_length}, duration {self.duration}: {went}, the best {self.best:.4g}"


def judge(rows: Iterable[Mapping[str, str]], steps: int, threshold: float) -> tuple[str, int, float, float] | None:
    """Of a run by the rows of its metrics.csv so far: whether it is stable, has fluctuated (an evaluation's perplexity
    above ``threshold`` times the lowest before it) or diverged, the step that decided (the last of a stable one), the
    perplexity there and the lowest. None while undecided. Raises DataError: no evaluation in ``steps`` steps."""
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
    """Run a command that writes metrics.csv into ``folder`` until `judge` can tell; it has ended then. Raises
    PluginError: it ended before, which says nothing about its stability."""
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
    given: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": modules, "PATH": programs}, "start_new_session": True}
    with open(log, "wb") as out:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **given)
        except OSError as error:
            raise ConfigError(f"--launcher: {command[0]!r} cannot be started ({error.strerror})") from None
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else it would leave them behind
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
        for member in psutil.wait_procs(tree, GRACE_SECONDS)[1]:
            member.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        psutil.wait_procs(tree, 1.0)  # the next trial needs their memory
        process.wait()
        signal.signal(signal.SIGTERM, previous)


def search(
    run: Callable[[int, int], Trial], *, start_lengths: Sequence[int], durations: Sequence[int], provisional: int
) -> Trial | None:
    """The trial of the smallest stable start length at its longest stable duration; None when nothing is stable.

    A start length is stable when its run with the ``provisional`` duration (the nearest of ``durations`` at or below)
    passes its first quarter, the learning rate's own warmup. Where no duration is stable with it either, the next one
    is tried. Both lists rise; at most ``2 + log2(len(durations))`` runs for each start length."""
    run = functools.cache(run)
    first = max(0, bisect_right(durations, provisional) - 1)
    for start in start_lengths:
        trial = run(start, durations[first])
        if trial.outcome != "stable" and trial.step * MULTIPLES <= trial.steps:
            continue
        low, high, probe = -1, len(durations), first
        while high - low > 1:
            stable = run(start, durations[probe]).outcome == "stable"
            low, high = (probe, high) if stable else (low, probe)
            probe = (low + high) // 2
        if low >= 0:
            return run(start, durations[low])
    return None


def candidates(config: dict[str, Any], args: argparse.Namespace) -> tuple[int, list[int]]:
    """The steps of a trial and the start lengths to try: the flags, or what this JSON tells. Raises ConfigError where
    there is nothing to search, or it does not tell."""
    section = split_config(config)[1].sequence_length_warmup
    if section is None:
        raise ConfigError('sequence_length_warmup: absent or not enabled; write "enabled": true and the other fields')
    if section.schedule == "discrete":
        raise ConfigError('sequence_length_warmup.schedule: "discrete" has no duration to search; write "linear"')
    rise: Any = object_at(config, "scheduler", "params").get("warmup_num_steps")
    known = isinstance(rise, int) and rise > 0 and section.learning_rate.by == "steps"
    if not (wanted := args.steps or (MULTIPLES * rise if known else 0)):
        told = "missing, and not told by scheduler.params.warmup_num_steps with a learning rate by steps"
        raise ConfigError(f"--steps: {told}; give {MULTIPLES} times as many as the learning rate's warmup takes")
    shortest = -(-8 // section.multiple_of) * section.multiple_of
    doubled = [shortest << n for n in range(32) if shortest << n < section.end_length]
    starts = sorted(set(args.start_lengths or doubled))
    if not starts or starts[-1] > section.end_length:
        raise ConfigError(f"--start-lengths: {starts} are not lengths of at most end_length {section.end_length}")
    most = object_at(config, "training").get("steps")
    return min(wanted, most) if isinstance(most, int) and most > 0 else wanted, starts


def tuned(config: dict[str, Any], start: int, duration: int) -> dict[str, Any]:
    """The JSON with another start length and duration, in its own unit."""
    section = config["sequence_length_warmup"]
    unit = "tokens" if section.get("duration", {}).get("tokens") else "steps"  # of which a share is one
    return {**config, "sequence_length_warmup": {**section, "start_length": start, "duration": {unit: duration}}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ds-plugin tune-warmup``."""
    add = parser.add_argument
    what = "takes --deepspeed_config FILE --runs FOLDER --name NAME and writes FOLDER/NAME/metrics.csv with the columns"
    add("--script", type=existing_file, required=True, help=f"{what} step, train_loss and eval_loss")
    add("--config", "--deepspeed_config", dest="config", type=Path, required=True, help="the JSON to tune; not changed")
    out, launcher = Path("runs/tune"), checked(shlex.split, bool, "a command")
    add("--out", type=new_folder, default=out, help=f"trials, trials.json, the tuned JSON (default {out})")
    add("--start-lengths", type=several(count), help="candidates, as 64,128 (default 8,16,32,... below the full)")
    add("--durations", type=several(tokens), required=True, help="candidates in the JSON's unit, as 500,1000,1500,2000")
    add("--steps", type=count, help=f"optimizer steps of a trial (default {MULTIPLES}x the learning rate's warmup)")
    add("--threshold", type=above(1), default=1.3, help="a perplexity above this times the best so far (default 1.3)")
    add("--launcher", type=launcher, default="deepspeed", help='as "torchrun --nproc_per_node 2" (default deepspeed)')
    add("arguments", nargs="*", metavar="-- ARGUMENT", help="passed on to the script, as -- --data TEXT")


def command(args: argparse.Namespace) -> int:
    """Search and write the tuned JSON; the exit code: 0, or 1 when nothing is stable."""
    config = translate(load_json(args.config))[0]
    (steps, starts), durations = candidates(config, args), sorted(set(args.durations))
    target, record = args.out / args.config.name, args.out / "trials.json"
    if target.resolve() == args.config.resolve():
        raise ConfigError(f"--out: '{args.out}' is the folder of {args.config}, which must not change; give another")
    steps -= steps % (interval := max(1, steps // EVALUATIONS))  # the last one is evaluated
    settings = [tuned(config, 8, 1), str(args.script), args.launcher, args.arguments, args.threshold, steps]
    trials, another = list[Trial](), "give another folder by --out"
    if record.exists():
        found = read_json(record, {"settings": list, "trials": list[Trial]}, error=ConfigError, remedy=another)
        if found["settings"] != settings:
            raise ConfigError(f"'{record}' is of a search with other settings; {another}")
        trials += found["trials"]

    def run(start: int, duration: int) -> Trial:
        for old in trials:
            if (old.start_length, old.duration) == (start, duration):
                print(f"{old} - known from {record}", flush=True)
                return old
        folder = args.out / f"start{start}_duration{duration}"
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that was interrupted
        folder.mkdir(parents=True)
        tried = tuned(config, start, duration)  # the run's own number of steps stays: schedules and data depend on it
        tried.pop("weight_averaging", None)
        if "training" in tried:  # a script of one's own may have another place for them
            tried["training"] = {**tried["training"], "eval_interval": interval, "save_interval": 10**9}
        split_config(tried)  # refuses what the methods would, before anything is started
        write_json(folder / "config.json", tried)
        # Ours come last, so that they win over the same flags among the user's.
        flags = ["--deepspeed_config", str(folder / "config.json"), "--runs", str(args.out), "--name", folder.name]
        started = [*args.launcher, str(args.script), *args.arguments, *flags]
        trials.append(Trial(start, duration, steps, *watched(started, folder, steps, args.threshold)))
        write_json(record, {"settings": settings, "trials": [asdict(trial) for trial in trials]})
        print(trials[-1], flush=True)
        return trials[-1]

    by_steps = "steps" in tuned(config, 8, 1)["sequence_length_warmup"]["duration"]
    provisional = steps if by_steps else durations[len(durations) // 2]
    best = search(run, start_lengths=starts, durations=durations, provisional=provisional)
    if best is None:
        remedy = "lower the learning rate, lengthen its warmup, or give larger --start-lengths"
        print(f"error: no start length of {starts} is stable with any duration tried: {remedy}", file=sys.stderr)
        return 1
    write_json(target, tuned(config, best.start_length, best.duration))
    print(f"start_length {best.start_length}, duration {best.duration}: {target}")
    return 0
