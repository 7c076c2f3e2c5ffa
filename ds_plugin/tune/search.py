"""Finds the warmup's start length and duration with short runs: the tuning recipe of arXiv 2108.06084.

A trial is the beginning of the real run. It ends after the first few multiples of the learning rate's warmup, or at the
first evaluation whose perplexity fluctuates significantly.
"""

import argparse
import copy
import functools
import json
import shlex
import shutil
import signal
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_plugin.config import load_json, split_config
from ds_plugin.core.arguments import above, checked, count, existing_file, new_folder, several
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.files import write_text
from ds_plugin.core.json_files import read_json
from ds_plugin.sequence_length_warmup.translate import object_at, translate
from ds_plugin.tune.trial import MULTIPLES, Trial, watched

EVALUATIONS = 20  # of a whole trial, five of them in its first quarter


def search(
    run: Callable[[int, int], Trial], *, start_lengths: Sequence[int], durations: Sequence[int], provisional: int
) -> Trial | None:
    """The trial of the smallest stable start length at its longest stable duration; None when nothing is stable.

    A start length is stable when its run with the ``provisional`` duration (the nearest of ``durations`` at or below)
    passes the very beginning. Where no duration is stable with it either, the next one is tried. Both lists rise; at
    most ``2 + log2(len(durations))`` runs for each start length.
    """
    run = functools.cache(run)
    first = max(0, bisect_right(durations, provisional) - 1)
    for start in start_lengths:
        if run(start, durations[first]).at_start:
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
    starts = args.start_lengths or [shortest << n for n in range(32) if shortest << n < section.end_length]
    if not starts or starts[-1] > section.end_length:
        raise ConfigError(f"--start-lengths: {starts} are not lengths of at most end_length {section.end_length}")
    most = object_at(config, "training").get("steps")
    return min(wanted, most) if isinstance(most, int) and most > 0 else wanted, starts


def tuned(config: dict[str, Any], start: int, duration: int) -> dict[str, Any]:
    """The JSON with another start length and duration, in its own unit."""
    config = copy.deepcopy(config)
    unit = next(iter(config["sequence_length_warmup"]["duration"]))
    config["sequence_length_warmup"] |= {"start_length": start, "duration": {unit: duration}}
    return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ds-plugin tune-warmup``."""
    add = parser.add_argument

    def rising(text: str) -> list[int]:
        return sorted(set(several(count)(text)))

    launcher = checked(shlex.split, bool, "a command")
    what = "takes --deepspeed_config FILE --runs FOLDER --name NAME and writes FOLDER/NAME/metrics.csv with the columns"
    add("--script", type=existing_file, required=True, help=f"{what} step, train_loss and eval_loss")
    add("--config", "--deepspeed_config", dest="config", type=Path, required=True, help="the JSON to tune; not changed")
    out = Path("runs/tune")
    add("--out", type=new_folder, default=out, help=f"trials, trials.json, the tuned JSON (default {out})")
    add("--start-lengths", type=rising, help="candidates, as 64,128 (default 8,16,32,... below the full length)")
    add("--durations", type=rising, required=True, help="candidates in the JSON's unit, as 500,1000,1500,2000")
    add("--steps", type=count, help=f"optimizer steps of a trial (default {MULTIPLES}x the learning rate's warmup)")
    add("--threshold", type=above(1), default=1.3, help="a perplexity above this times the best so far (default 1.3)")
    add("--launcher", type=launcher, default="deepspeed", help='as "torchrun --nproc_per_node 2" (default deepspeed)')
    add("arguments", nargs="*", metavar="-- ARGUMENT", help="passed on to the script, as -- --data TEXT")


def command(args: argparse.Namespace) -> int:
    """Search and write the tuned JSON; the exit code: 0, or 1 when nothing is stable."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a trial's processes are ended too
    try:
        return _tune(args)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tune(args: argparse.Namespace) -> int:
    config = translate(load_json(args.config))[0]
    steps, starts = candidates(config, args)
    target, record = args.out / args.config.name, args.out / "trials.json"
    if target.resolve() == args.config.resolve():
        raise ConfigError(f"--out: '{args.out}' is the folder of {args.config}, which must not change; give another")
    args.out.mkdir(parents=True, exist_ok=True)
    interval = max(1, steps // EVALUATIONS)
    steps -= steps % interval  # the last one is evaluated
    settings = [tuned(config, 8, 1), str(args.script), args.launcher, args.arguments, args.threshold, steps]
    found: dict[str, Any] = {"settings": settings, "trials": []}
    if record.exists():
        wanted = {"settings": list[Any], "trials": list[Trial]}
        found = read_json(record, wanted, error=ConfigError, remedy="give another folder by --out")
    if found["settings"] != settings:
        raise ConfigError(f"--out: '{record}' is of a search with other settings; give another folder")
    known = {(old.start_length, old.duration): old for old in found["trials"]}
    found["trials"] = [asdict(old) for old in known.values()]

    def run(start: int, duration: int) -> Trial:
        if (start, duration) in known:
            print(f"{known[start, duration]} - known from {record}", flush=True)
            return known[start, duration]
        folder = args.out / f"start{start}_duration{duration}"
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that was interrupted
        folder.mkdir()
        _write(folder / "config.json", _of_trial(tuned(config, start, duration), interval))
        # Ours come last, so that they win over the same flags among the user's.
        flags = ["--deepspeed_config", str(folder / "config.json"), "--runs", str(args.out), "--name", folder.name]
        started = [*args.launcher, str(args.script), *args.arguments, *flags]
        trial = Trial(start, duration, steps, *watched(started, folder, steps, args.threshold))
        found["trials"].append(asdict(trial))
        _write(record, found)
        print(trial, flush=True)
        return trial

    in_steps = "steps" in config["sequence_length_warmup"]["duration"]
    provisional = steps if in_steps else args.durations[len(args.durations) // 2]
    best = search(run, start_lengths=starts, durations=args.durations, provisional=provisional)
    if best is None:
        remedy = "lower the learning rate, lengthen its warmup, or give larger --start-lengths"
        print(f"error: no start length of {starts} is stable with any duration tried: {remedy}", file=sys.stderr)
        return 1
    _write(target, tuned(config, best.start_length, best.duration))
    print(f"start_length {best.start_length}, duration {best.duration}: {target}")
    return 0


def _of_trial(config: dict[str, Any], interval: int) -> dict[str, Any]:
    """The JSON of a trial. The run's own number of steps stays: schedules and the order of samples depend on it."""
    config.pop("weight_averaging", None)
    if "training" in config:  # a script of one's own may have another place for them
        config["training"] |= {"eval_interval": interval, "save_interval": 10**9}
    split_config(config)  # refuses what the methods would, before anything is started
    return config


def _write(path: Path, config: dict[str, Any]) -> None:
    write_text(path, json.dumps(config, indent=2) + "\n")
