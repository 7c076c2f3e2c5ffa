"""What averaging can replace: how much of a learning rate's decay has an average of the run that goes on without one?

    python benchmarks/averaging_for_decay.py --out DIR --cache DIR [--workers 2]

One run at a constant rate is looked at after 25, 50, 75 and 100 % of its steps. Each look reads the last weights, their
averages over windows of 5, 10 and 20 % of the run (the mean, and weights that emulate a decay, `minus-sqrt`), and what
a decay would have given: a branch that leaves the run a fifth of those steps earlier, trains on the same samples and
takes the rate to zero linearly by then. So all are of as many steps; the branch's are trained in addition.

The gain is how far a look's loss is below the last weights'; an average's share is its gain over the branch's, both
summed over what a figure is of: single gains are near nothing here and there. DIR gets
looks.csv (a row per look and weights), sweep.json and a figure. Runs that are there are not repeated.
"""

import copy
import functools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import small_runs
from small_runs import Sweep, grouped

import ds_plugin
from ds_plugin.sweeps import figure
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig

LOOKS = (0.25, 0.5, 0.75, 1.0)  # of the run
WINDOWS = (0.05, 0.1, 0.2)  # of the run
WEIGHTS = ("mean", "minus-sqrt")
SNAPSHOTS = 10  # of a window
LAST, DECAYED = "last weights", "decayed"
_COLOURS = {LAST: "#999999", DECAYED: "#D55E00", "mean": "#0072B2", "minus-sqrt": "#009E73"}


@dataclass(frozen=True, kw_only=True)
class Scale(small_runs.Small):
    """What all runs share. ``branch``: the part of a look's steps in which a branch decays."""

    steps: int
    batch: int = 8
    warmup: int = 30
    branch: float = 0.2
    eval_samples: int = 64

    def interval(self, window: float) -> int:
        """Steps between two snapshots of a window."""
        return max(1, round(window * self.steps / SNAPSHOTS))


@dataclass(frozen=True, order=True)
class Setting(small_runs.Setting):
    """One run: ``lr`` its constant rate after the warmup."""

    lr: float
    seed: int

    def __str__(self) -> str:
        return f"lr {self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Look(Setting):
    """A row of looks.csv: the evaluation loss of ``weights`` after ``step`` steps; ``window`` of an average, else 0."""

    step: int
    weights: str
    window: float
    loss: float

    def __str__(self) -> str:
        return f"{self.weights} {self.loss:.4f} at step {self.step}"


def json_of(setting: Setting, scale: Scale) -> dict[str, Any]:
    """The run's JSON. Its own averager takes no snapshot; those that watch read the same masters."""
    warmed = {"warmup_num_steps": scale.warmup, "warmup_type": "linear", "warmup_max_lr": setting.lr}
    config = small_runs.json_of(scale.batch, setting.lr, {"type": "WarmupLR", "params": warmed})
    return {**config, "weight_averaging": {"enabled": True, "window": 1, "interval": 10**6}}


def train(setting: Setting, scale: Scale, cache: Path) -> list[Look]:
    """One run and its branches in this process (`common.start`)."""
    engine, text = small_runs.build(json_of(setting, scale), scale, setting.seed, cache)
    own = ds_plugin.get_plugin(engine).averager
    assert own is not None
    watching = {
        (weights, window): WeightAverager(
            WeightAveragingConfig.model_validate(
                {"enabled": True, "window": SNAPSHOTS, "interval": scale.interval(window), "weights": weights}
            ),
            own.shards,
        )
        for window in WINDOWS
        for weights in WEIGHTS
    }
    samples = small_runs.Samples(scale, text, cache, count=scale.steps * scale.batch, seed=setting.seed)
    looks = [round(share * scale.steps) for share in LOOKS]
    leaves = {look - round(scale.branch * look): look for look in looks}
    place, found = list(vars(setting).values()), []
    batches = samples.batches(scale.batch)
    engine.train()

    def step(batch: Any, factor: float) -> None:
        for group in engine.optimizer.param_groups:  # the scheduler sets it anew after every step
            group["lr"] *= factor
        engine.backward(small_runs.loss_of(engine, batch))
        engine.step()

    def look(at: int, weights: str, window: float = 0.0) -> Look:
        return Look(*place, at, weights, window, round(small_runs.evaluate(engine, samples.evaluation), 5))

    for number in range(1, scale.steps + 1):
        step(next(batches), 1.0)
        for averager in watching.values():
            if averager.due(number):
                averager.snapshot(number)
        if number in leaves:
            end = leaves[number]
            kept = copy.deepcopy((engine.module.state_dict(), engine.optimizer.state_dict()))
            ahead = samples.batches(scale.batch, first=number)
            for left in range(end - number, 0, -1):
                step(next(ahead), left / (end - number + 1))
            found.append(look(end, DECAYED))
            engine.module.load_state_dict(kept[0])
            engine.optimizer.load_state_dict(kept[1])
        if number in looks:
            found.append(look(number, LAST))
            for (weights, window), averager in watching.items():
                with averager.averaged_weights():
                    found.append(look(number, weights, window))
    return found


@dataclass(frozen=True)
class Gain:
    """What an average and the decay gain over the last weights in one look of one run, nats per token."""

    lr: float
    seed: int
    look: float
    weights: str
    window: float
    gain: float
    decays: float


def share(of: Iterable[Gain]) -> float:
    """How much of the decay's gain averages have."""
    rows = list(of)
    decays = sum(row.decays for row in rows)
    return sum(row.gain for row in rows) / decays if decays else math.nan


def gains(looks: Iterable[Look]) -> list[Gain]:
    """Of every average in every look."""
    rows = []
    for setting, of_run in grouped(looks, lambda row: row.setting):
        steps = max(row.step for row in of_run)
        for step, of_look in grouped(of_run, lambda row: row.step):
            losses = {(row.weights, row.window): row.loss for row in of_look}
            last = losses[LAST, 0.0]
            for (weights, window), loss in losses.items():
                if window:
                    both = last - loss, last - losses[DECAYED, 0.0]
                    rows.append(Gain(setting.lr, setting.seed, step / steps, weights, window, *both))
    return rows


def table(looks: Sequence[Look]) -> list[str]:
    """Markdown: by rate and average, its share of the decay's gain by look, and of all with the seeds' range."""

    def cells(of: tuple[float, str, float], chosen: list[Gain]) -> list[str]:
        by_look = [f"{share(rows):.0%}" for _, rows in grouped(chosen, lambda row: row.look)]
        seeds = [share(rows) for _, rows in grouped(chosen, lambda row: row.seed)]
        return [
            f"{of[0]:g}",
            of[1],
            f"{of[2]:.0%}",
            *by_look,
            f"{share(chosen):.0%} ({min(seeds):.0%} to {max(seeds):.0%})",
        ]

    heads = ["lr", "average", "window", *(f"share at {look:.0%}" for look in LOOKS), "of all looks"]
    return small_runs.table(heads, gains(looks), lambda row: (row.lr, row.weights, row.window), cells)


def loss_table(looks: Sequence[Look]) -> list[str]:
    """Markdown: by rate, the loss of every look's weights, mean over seeds."""

    def cells(of: tuple[float, str, float], chosen: list[Look]) -> list[str]:
        by_look = [f"{mean(row.loss for row in rows):.3f}" for _, rows in grouped(chosen, lambda row: row.step)]
        return [f"{of[0]:g}", of[1], f"{of[2]:.0%}" if of[2] else "", *by_look]

    heads = ["lr", "weights", "window", *(f"at {look:.0%}" for look in LOOKS)]
    return small_runs.table(heads, looks, lambda row: (row.lr, row.weights, row.window), cells)


def best(looks: Iterable[Look]) -> tuple[str, float]:
    """The average of the largest share over all rates, seeds and looks."""
    found = {of: share(rows) for of, rows in grouped(gains(looks), lambda row: (row.weights, row.window))}
    return max(found, key=lambda of: found[of])


def draw(looks: Sequence[Look], path: Path) -> None:
    """A panel per rate: the last weights, the branches' ends and the best average, by step; seeds as bands."""
    rates, chosen = sorted({row.lr for row in looks}), best(looks)
    with figure.panels(path, 1, len(rates), figsize=(3.6 * len(rates) + 1, 4), sharey=True) as axes:
        for axis, lr in zip(axes[0], rates, strict=True):
            for weights, window in ((LAST, 0.0), (DECAYED, 0.0), chosen):
                rows = [row for row in looks if (row.lr, row.weights, row.window) == (lr, weights, window)]
                name = "average" if window else weights
                curves = [[(row.step, row.loss) for row in of] for _, of in grouped(rows, lambda row: row.seed)]
                small_runs.show(axis, name, curves, _COLOURS[weights], marker="o", markersize=3)
            gained = share(row for row in gains(looks) if (row.lr, row.weights, row.window) == (lr, *chosen))
            axis.set_title(f"Rate {lr:g}: {gained:.0%} of the decay's gain", fontsize=11)
            axis.set(xlabel="step", xlim=(0, 1.4 * max(row.step for row in looks)))
        axes[0][0].set_ylabel("evaluation loss (nats per byte)")


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, draw, print the tables."""
    parser = small_runs.parser(__doc__, workers=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rates", type=small_runs.numbers(float), default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=small_runs.numbers(int), default=[1, 2, 3])
    args = parser.parse_args(arguments)
    os.environ |= small_runs.MALLOC  # for the workers
    scale = Scale(steps=args.steps)
    one = functools.partial(train, scale=scale, cache=args.cache.absolute())
    sweep = Sweep(args.out, {Look: "looks.csv"}, one, args.workers, settings=vars(scale))
    sweep.train(Setting(lr, seed) for seed in args.seeds for lr in args.rates)
    looks = sweep.rows[Look]
    draw(looks, args.out / "averaging_for_decay.png")
    print("\n".join([*loss_table(looks), "", *table(looks)]))
    for count in (len(LOOKS), 10):
        spent = scale.branch * sum(number / count for number in range(1, count + 1))
        print(f"{count} looks: their branches train {spent:.0%} of the run's steps in addition, averages none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
