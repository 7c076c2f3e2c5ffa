"""What sequence length warmup is for: where a plain run spikes, does the same run with warmup? How much sooner is it
at the plain run's best loss?

    python benchmarks/stability.py --out DIR --cache DIR [--workers 2]

The arms: plain; the modes truncate, carry and mask; constant, which is truncate with as many tokens in every step; and
slow_rate, a plain run whose learning rate warms up over as many steps as carry's. The length's warmup takes as many
steps in all of them; a step of mask or constant trains as many tokens as a plain one.

First a sweep: plain runs of one seed over learning rates, at the largest batch. Then all arms with every seed at the
plain run's best learning rate, at 4x that rate, and at the lowest rate where the plain run spiked (a loss ratio above
1.5; none if none did). Last, of the first seed, all arms at the rates beyond, and plain runs of the other batches at
the rates above the best. All runs train the same number of tokens and have the same learning rate at the same trained
token; runs that are to be compared train side by side.

DIR gets stability.csv (a row per run), curves.csv (evaluations at full length), training_losses.csv (a line per run),
reached.csv (when each run reached the best loss of the plain run of the best rate, and of its own), sweep.json
(settings, date and versions) and a figure. Runs that are there are not repeated; a DIR of others is refused.
"""

import functools
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import small_runs
from small_runs import Curve, Sweep, grouped

import ds_plugin
from ds_plugin.core.loss_statistics import LossRatio
from ds_plugin.sweeps import figure
from ds_plugin.sweeps.records import write_records

ARMS = ("plain", "truncate", "carry", "mask", "constant", "slow_rate")
PLAIN = ("plain", "slow_rate")  # of full length from the first step on
SPIKE = 1.5  # the loss ratio above which the paper speaks of a spike
FACTOR = 4.0  # what warmup should allow: this times the plain run's best learning rate
EVALUATIONS = 24
COLOURS = {"plain": "#D55E00", "truncate": "#0072B2", "carry": "#009E73", "mask": "#CC79A7", "constant": "#000000"}
COLOURS |= {"slow_rate": "#999999"}


@dataclass(frozen=True, kw_only=True)
class Scale(small_runs.Small):
    """What all runs share. ``tokens`` are trained tokens; a run ends with the first step that has trained them."""

    tokens: int
    start: int = 8
    eval_samples: int = 64

    def steps(self, batch: int) -> int:
        """Steps of a plain run."""
        return -(-self.tokens // (batch * self.length))


@dataclass(frozen=True, order=True)
class Setting(small_runs.Setting):
    """One run: ``arm`` one of `ARMS`, ``batch`` in samples, ``lr`` the peak."""

    arm: str
    batch: int
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} batch {self.batch} lr {self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Run(Setting):
    """A row of stability.csv. Seconds are of the training steps, data included and evaluations left out."""

    steps: int
    tokens_trained: int
    tokens_read: int
    max_loss_ratio: float
    steps_above_1_2: int
    steps_above_1_5: int
    best_eval_loss: float
    final_eval_loss: float
    cpu_seconds: float
    wall_seconds: float

    def __str__(self) -> str:
        return (
            f"evaluation loss {self.final_eval_loss:.4f}, largest loss ratio {self.max_loss_ratio:.2f}, "
            f"{self.steps} steps, {self.cpu_seconds:.0f} s of CPU time"
        )


@dataclass(frozen=True)
class Point(Setting):
    """A row of curves.csv: an evaluation at full length."""

    step: int
    tokens: int
    cpu_seconds: float
    wall_seconds: float
    eval_loss: float


@dataclass(frozen=True)
class Losses(Setting):
    """A row of training_losses.csv, with every step's after one another."""

    losses: str

    @property
    def values(self) -> list[float]:
        """By step."""
        return [float(loss) for loss in self.losses.split()]


@dataclass(frozen=True)
class Reached(Setting):
    """A row of reached.csv: when a run reached the target, the best loss of the plain run of its seed and batch and of
    learning rate ``against``. Infinite: never. The gains are over that plain run, when it reached that loss itself.
    """

    against: float
    target: float
    tokens: float
    cpu_seconds: float
    wall_seconds: float
    gain_tokens: float
    gain_cpu: float
    gain_wall: float


#: the files of a folder
FILES: dict[type, str] = {Point: "curves.csv", Losses: "training_losses.csv", Run: "stability.csv"}
_SECONDS = ("cpu_seconds", "wall_seconds")


def json_of(setting: Setting, scale: Scale) -> dict[str, Any]:
    """The run's JSON: plain or with the method, the same otherwise."""
    steps = scale.steps(setting.batch)
    warmup = max(2, steps // 20)
    section = {
        "enabled": True,
        "start_length": scale.start,
        "end_length": scale.length,
        # half of the plain run's steps, at half the length on average: about a quarter of the tokens, and half of them
        # where a step trains as many as a plain one
        "duration": {"steps": max(1, steps // 2)},
        "mode": {"constant": "truncate", "slow_rate": "carry"}.get(setting.arm, setting.arm),
        "tokens_per_step": "constant" if setting.arm == "constant" else "by_length",
        "learning_rate": {"by": "tokens"},
        "preflight": False,
    }
    if setting.arm == "slow_rate":
        warmup = small_runs.slow_rate(section, setting.batch, warmup * setting.batch * scale.length)
    config = small_runs.json_of(setting.batch, setting.lr, small_runs.cosine(steps, warmup))
    return config if setting.arm in PLAIN else {**config, "sequence_length_warmup": section}


def train(setting: Setting, scale: Scale, cache: Path) -> list[Setting]:
    """One training run in this process (`common.start`): its rows of all kinds."""
    engine, text = small_runs.build(json_of(setting, scale), scale, setting.seed, cache)
    plugin = ds_plugin.get_plugin(engine)
    # A truncated step reads as many samples as a plain one, so that half as many steps again are enough for all arms.
    count = 2 * scale.steps(setting.batch) * setting.batch
    samples = small_runs.Samples(scale, text, cache, count=count, seed=setting.seed)
    # mask takes samples as they are: the engine's hook gives attention its fragments
    whole = functools.partial(samples.batches, setting.batch)
    batches = whole() if setting.arm == "mask" else plugin.batches(whole)
    ratio = LossRatio()
    place: list[Any] = list(vars(setting).values())
    losses: list[float] = []
    points: list[Point] = []
    full_batch = setting.batch * scale.length
    trained, mark = 0, scale.tokens / EVALUATIONS
    cpu = wall = 0.0
    engine.train()
    while trained < scale.tokens and (not losses or math.isfinite(losses[-1])):
        started, started_wall = time.process_time(), time.perf_counter()
        loss = small_runs.loss_of(engine, next(batches))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        cpu, wall = cpu + time.process_time() - started, wall + time.perf_counter() - started_wall
        ratio.feed(losses[-1])
        before = trained
        trained = plugin.ledger.trained if plugin.ledger is not None else trained + full_batch
        if trained // mark > before // mark or trained >= scale.tokens:
            found = small_runs.evaluate(engine, samples.evaluation)
            at: list[Any] = [len(losses), trained, round(cpu, 3), round(wall, 3), round(found, 5)]
            points.append(Point(*place, *at))
    read = plugin.ledger.read if plugin.ledger is not None else trained
    evaluated = [point.eval_loss for point in points if math.isfinite(point.eval_loss)]
    run = Run(
        **vars(setting),
        steps=len(losses),
        tokens_trained=trained,
        tokens_read=read,
        max_loss_ratio=round(ratio.highest if ratio.highest is not None else math.nan, 4),
        steps_above_1_2=ratio.above[0],
        steps_above_1_5=ratio.above[1],
        best_eval_loss=min(evaluated, default=math.inf),
        final_eval_loss=points[-1].eval_loss if points and math.isfinite(losses[-1]) else math.inf,
        cpu_seconds=round(cpu, 2),
        wall_seconds=round(wall, 2),
    )
    return [*points, Losses(**vars(setting), losses=" ".join(f"{loss:.4g}" for loss in losses)), run]


def reached(points: Iterable[Point], rate: float) -> list[Reached]:
    """When each run reached the best loss of the plain run of its batch and seed at ``rate``."""
    curves = dict(grouped(points, lambda point: point.setting))
    found = []
    for setting in curves:
        plain = curves.get(Setting("plain", setting.batch, rate, setting.seed))
        if plain is None:
            continue
        target = min(point.eval_loss for point in plain)
        base, mine = (
            [small_runs.reached([(getattr(p, n), p.eval_loss) for p in c], target) for n in ("tokens", *_SECONDS)]
            for c in (plain, curves[setting])
        )
        gains = [round(theirs / ours, 3) for theirs, ours in zip(base, mine, strict=True)]
        seconds = [round(value, 2) for value in mine[1:]]
        row: list[Any] = [*vars(setting).values(), rate, target, mine[0], *seconds, *gains]
        found.append(Reached(*row))
    return found


def table(runs: Iterable[Run], times: Iterable[Reached]) -> list[str]:
    """Markdown: a row per batch, learning rate and arm over its seeds. Gains over seeds that reached the target."""
    gains = {time.setting: time for time in times}
    heads = "batch | lr | arm | seeds | largest loss ratio | steps above 1.2 / 1.5 | final loss | best loss | "
    heads += "tokens to target | gain in tokens | in CPU time | in wall time"

    def cells_of(of: tuple[int, float, int], chosen: list[Run]) -> list[str]:
        batch, lr, arm = of
        arrived = [gains[run.setting] for run in chosen if run.setting in gains]
        there = [time for time in arrived if math.isfinite(time.tokens)]
        cells = [f"{batch}", f"{lr:g}", ARMS[arm], f"{len(chosen)}"]
        cells.append(", ".join(f"{run.max_loss_ratio:.2f}" for run in chosen))
        cells.append(", ".join(f"{run.steps_above_1_2} / {run.steps_above_1_5}" for run in chosen))
        cells += [f"{mean(r.final_eval_loss for r in chosen):.3f}", f"{mean(r.best_eval_loss for r in chosen):.3f}"]
        missed = f" ({len(there)} of {len(arrived)} seeds)" if len(there) < len(arrived) else ""
        tokens = f"{mean(t.tokens for t in there) / 1e6:.2f} M{missed}" if there else "never" if arrived else ""
        each = [[getattr(t, name) for t in there] for name in ("gain_tokens", "gain_cpu", "gain_wall")]
        return [*cells, tokens, *(small_runs.spread(values, ".2f") if there else "" for values in each)]

    return small_runs.table(heads.split(" | "), runs, lambda r: (r.batch, r.lr, ARMS.index(r.arm)), cells_of)


def draw(sweep: Sweep, batch: int, best: float, path: Path) -> None:
    """Evaluation loss against tokens at the plain run's best rate, seeds as bands; every run's largest loss ratio."""
    runs = [run for run in sweep.rows[Run] if run.batch == batch]
    points = [p for p in sweep.rows[Point] if (p.batch, p.lr) == (batch, best)]
    floor = min(point.eval_loss for point in points)
    rates, end = sorted({run.lr for run in runs}), min(run.tokens_trained for run in runs) / 1e6
    with figure.panels(path, 1, 2, figsize=(11, 4.2)) as axes:
        left, right = axes[0]
        for number, arm in enumerate(ARMS):
            of_arm = [point for point in points if point.arm == arm]
            curves = [
                [(p.tokens / 1e6, p.eval_loss) for p in of] for _, of in grouped(of_arm, lambda point: point.seed)
            ]
            small_runs.show(left, arm, [regular(curve, end) for curve in curves], COLOURS[arm])
            mine = [run for run in runs if run.arm == arm]
            places = [rates.index(run.lr) + 0.12 * (number - 2.5) for run in mine]
            right.plot(places, [run.max_loss_ratio for run in mine], "o", color=COLOURS[arm], markersize=5, label=arm)
        left.set(
            xlabel="trained tokens (M)", ylabel="evaluation loss (nats per byte)", ylim=(floor * 0.98, floor * 1.4)
        )
        left.set_xlim(0, left.get_xlim()[1] * 1.15)
        left.set_title(f"At plain's best rate, {best:g}: fewer tokens to the same loss")
        right.axhline(SPIKE, color="#000000", linewidth=0.8, linestyle=":")
        right.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        right.set(xlabel="learning rate", ylabel="largest loss ratio of a run")
        right.set_title(f"Above it: which runs spike (a ratio above {SPIKE:g})")
        right.legend(frameon=False, fontsize=9)


def regular(curve: Curve, end: float, count: int = EVALUATIONS) -> Curve:
    """The curve at places up to ``end`` that all runs share, linear between its points."""
    places = [end * number / count for number in range(1, count + 1)]
    found = []
    for at in places:
        before = max((point for point in curve if point[0] <= at), default=None)
        after = min((point for point in curve if point[0] >= at), default=None)
        if before is not None and after is not None:
            share = 0.0 if after[0] == before[0] else (at - before[0]) / (after[0] - before[0])
            found.append((at, before[1] + share * (after[1] - before[1])))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Sweep, compare, write what was found and print the table."""
    parser = small_runs.parser(__doc__, workers=2)
    parser.add_argument("--tokens", type=int, default=1_200_000, help="trained tokens of a run")
    parser.add_argument("--batches", type=small_runs.numbers(int), default=[8, 32], help="samples a step")
    parser.add_argument("--rates", type=small_runs.numbers(float), default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2])
    parser.add_argument("--seeds", type=small_runs.numbers(int), default=[1, 2, 3])
    args = parser.parse_args(arguments)
    os.environ |= small_runs.MALLOC  # for the workers
    scale = Scale(tokens=args.tokens)
    one = functools.partial(train, scale=scale, cache=args.cache.absolute())
    sweep = Sweep(args.out, FILES, one, args.workers, settings=vars(scale))
    batch, first = max(args.batches), args.seeds[0]
    sweep.train(Setting("plain", batch, lr, first) for lr in sorted(args.rates))
    plain = [run for run in sweep.rows[Run] if (run.arm, run.batch, run.seed) == ("plain", batch, first)]
    best = min(plain, key=lambda run: run.best_eval_loss).lr
    spiked = [run.lr for run in plain if run.max_loss_ratio > SPIKE]  # in the order of the rates
    rates = sorted({best, FACTOR * best, *spiked[:1]})
    print(f"batch {batch}: compared at learning rates {', '.join(f'{lr:g}' for lr in rates)}", flush=True)
    sweep.train(Setting(arm, batch, lr, seed) for seed in args.seeds for lr in rates for arm in ARMS)
    beyond = [Setting(arm, batch, lr, first) for lr in sorted(args.rates) if lr > rates[-1] for arm in ARMS]
    others = [Setting("plain", b, lr, first) for b in args.batches if b != batch for lr in rates if lr > best]
    sweep.train([*beyond, *others])
    points = sweep.rows[Point]
    times = reached([point for point in points if point.batch == batch], best)
    same = [t for lr in rates if lr != best for t in reached(points, lr) if (t.batch, t.lr) == (batch, lr)]
    write_records(Reached, [*times, *same], args.out / "reached.csv")
    draw(sweep, batch, best, args.out / "stability.png")
    print("\n".join(table(sweep.rows[Run], times)))
    for row in same:
        if row.arm != "plain":
            print(f"{row.arm} lr {row.lr:g} seed {row.seed}: gain over the plain run of that rate {row.gain_cpu:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
