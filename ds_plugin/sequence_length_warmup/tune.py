"""Finds the warmup's start length and duration with short runs: the tuning recipe of arXiv 2108.06084.

A trial is the beginning of the real run, with its samples and learning rates. It ends after the first few multiples of
the learning rate's warmup, or at the first evaluation whose perplexity fluctuates significantly.
"""

import argparse
import functools
import json
import shlex
import signal
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_plugin.config import load_json, split_config
from ds_plugin.errors import ConfigError, DataError, PluginError
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.translate import translate
from ds_plugin.sequence_length_warmup.trial import MULTIPLES, ROOT, Trial, Trials, lr_warmup, needed, write_json
from megatron_patches.completep.records import read_records, write_records

LAUNCHER_OPTIONS = ("num_gpus", "num_accelerators", "num_nodes", "hostfile", "include", "exclude", "master_port")

Run = Callable[[int, int], Trial]


def search(run: Run, *, start_lengths: Sequence[int], durations: Sequence[int], provisional: int) -> Trial | None:
    """The trial of the smallest stable start length at its longest stable duration; None when nothing is stable.

    A start length is stable when its run with the ``provisional`` duration (the nearest of ``durations`` at or below)
    passes the very beginning. Where no duration is stable with it either, the next one is tried. At most
    ``2 + log2(len(durations))`` runs for each start length; both lists rise.
    """
    run = functools.cache(run)
    first = max(0, bisect_right(durations, provisional) - 1)
    for start in start_lengths:
        if run(start, durations[first]).at_start:
            continue
        if (found := _longest(functools.partial(run, start), durations, first)) is not None:
            return found
    return None


def _longest(run: Callable[[int], Trial], durations: Sequence[int], first: int) -> Trial | None:
    """The longest duration's stable trial, by bisection from index ``first``: stability is taken to end somewhere."""
    found, low, high, probe = None, -1, len(durations), first
    while high - low > 1:
        trial = run(durations[probe])
        found, low, high = (trial, probe, high) if trial.stable else (found, low, probe)
        probe = (low + high) // 2
    return found


def candidates(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What `search` is to choose from, by the JSON and the flags; durations are in the JSON's unit.

    Raises:
        ConfigError: there is nothing to choose from, or a default cannot be told from this JSON.
    """
    section = _section(config)
    warmup, training = lr_warmup(config), config.get("training", {})
    full = config["train_batch_size"] * section.end_length if "train_batch_size" in config else None
    steps = training.get("steps") or (full and training.get("tokens", 0) // full)
    # A step of the warmup has half the full length on average.
    scale = 1 if section.duration.unit == "steps" else full and full // 2
    needed("steps", args.steps or warmup)
    low = needed("min-duration", args.min_duration or (warmup and scale and warmup * scale))
    high = needed("max-duration", args.max_duration or (steps and scale and steps * scale // 2))
    grain = args.granularity or max(1, (high - low) // 16)
    durations = range(-(-low // grain) * grain, high + 1, grain)
    if not durations:
        raise ConfigError(f"no multiple of --granularity {grain} is from --min-duration {low} to --max-duration {high}")
    doubled = -(-8 // section.multiple_of) * section.multiple_of
    default = [doubled << n for n in range(32) if doubled << n < section.end_length]
    starts = sorted(set(args.start_lengths or default))
    if not starts or starts[-1] > section.end_length:
        raise ConfigError(f"--start-lengths: {starts} are not lengths of at most end_length {section.end_length}")
    provisional = MULTIPLES * (warmup * scale if warmup and scale else low)
    return {"start_lengths": starts, "durations": durations, "provisional": provisional}


def _section(config: dict[str, Any]) -> SequenceLengthWarmupConfig:
    section = split_config(config)[1].sequence_length_warmup
    if section is None:
        raise ConfigError('sequence_length_warmup: absent or not enabled; write "enabled": true and the other fields')
    if section.schedule == "discrete":
        raise ConfigError('sequence_length_warmup.schedule: "discrete" has no duration to search; write "linear"')
    return section


def _lengths(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m ds_plugin tune-warmup``."""
    add = parser.add_argument
    add("--deepspeed_config", "--config", dest="config", type=Path, required=True, help="the JSON to tune; not changed")
    add("--out", type=Path, default=Path("runs/tune"), help="trials, trials.csv and the tuned JSON (default runs/tune)")
    add("--start-lengths", type=_lengths, help="candidates, as 64,128 (default 8,16,32,... below the full length)")
    add("--min-duration", type=_positive, help="in the JSON's unit (default the learning rate's warmup)")
    add("--max-duration", type=_positive, help="in the JSON's unit (default half the training)")
    add("--granularity", type=_positive, help="durations are multiples of it (default a 16th of the range)")
    add("--steps", type=_positive, help=f"optimizer steps of a trial (default {MULTIPLES}x the learning rate's warmup)")
    add("--threshold", type=float, default=1.3, help="a perplexity above this times the best so far (default 1.3)")
    add("--script", type=Path, default=ROOT / "launch_scripts/pretrain_gpt.py", help="default pretrain_gpt.py")
    add("--launcher", help='in place of the deepspeed launcher, as "torchrun --nproc_per_node 2"')
    for option in LAUNCHER_OPTIONS:
        add(f"--{option}", help=argparse.SUPPRESS)
    parser.epilog = f"Passed on to the launcher: --{', --'.join(LAUNCHER_OPTIONS)}."
    add("arguments", nargs="*", metavar="-- ARGUMENT", help="passed on to the script, as -- --data TEXT")


def command(args: argparse.Namespace) -> int:
    """Search and write the tuned JSON; the exit code: 0, or 1 when nothing is stable, 2 on an error, 130 on Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a trial's processes are ended too
    try:
        return _tune(args)
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the trials that are finished", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tune(args: argparse.Namespace) -> int:
    config = translate(load_json(args.config))[0]
    options = [f"--{name}={value}" for name in LAUNCHER_OPTIONS if (value := getattr(args, name)) is not None]
    port = [] if args.master_port else ["--master_port={port}"]
    launcher = shlex.split(args.launcher or "") or [sys.executable, "-m", "deepspeed.launcher.runner", *port]
    launch = [*launcher, *options, str(args.script)]
    chosen, target, unit = candidates(config, args), args.out / args.config.name, _section(config).duration.unit
    if not args.script.is_file():
        raise ConfigError(f"--script: '{args.script}' does not exist; give the training script")
    if target.resolve() == args.config.resolve():
        raise ConfigError(f"--out: '{args.out}' is the folder of {args.config}, which must not change; give another")
    if args.threshold <= 1:
        raise ConfigError(f"--threshold: {args.threshold} is not above 1; write e.g. 1.3")

    args.out.mkdir(parents=True, exist_ok=True)
    trials = Trials(config, unit, launch, args.arguments, args.out, args.steps, args.threshold)
    path = args.out / "trials.csv"
    # What trials depend on, apart from what is searched (and their length, which is in trials.csv).
    trials.known = _known(path, [trials.tuned(8, 1), launch, args.arguments, args.threshold])
    trials.keep = lambda done: write_records(Trial, done, path)
    found = search(trials, **chosen)

    print(f"{'start':>6} {'duration':>10}  {'outcome':<10} {'step':>6} {'perplexity':>11} {'best':>11}")
    for t in sorted(trials.known, key=lambda t: (t.start_length, t.duration)):
        row = f"{t.start_length:>6} {t.duration:>10}  {t.outcome:<10} {t.step:>6} {t.perplexity:>11.4g} {t.best:>11.4g}"
        print(row)
    if found is None:
        print(
            f"error: no start length of {chosen['start_lengths']} is stable with any of the durations that were tried: "
            "lower the learning rate, lengthen its warmup, or give larger --start-lengths",
            file=sys.stderr,
        )
        return 1
    write_json(target, trials.tuned(found.start_length, found.duration))
    print(f"start_length {found.start_length}, duration {found.duration} {unit}: {target}")
    return 0


def _known(path: Path, settings: list[Any]) -> list[Trial]:
    """The trials of an earlier search with the same settings; refuses one with others."""
    described = path.with_suffix(".json")
    if not described.exists():
        write_json(described, {"settings": settings})
    elif json.loads(described.read_text()) != {"settings": settings}:
        raise ConfigError(f"--out: '{described}' is of a search with other settings; give another folder")
    try:
        return read_records(Trial, path) if path.exists() else []
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"'{path}' is damaged ({error!r}); remove it") from error
