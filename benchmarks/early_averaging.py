"""What early weight averaging saves: how much sooner than the last weights, EMA and SWA is the average at a given loss?

    python benchmarks/early_averaging.py --out DIR --cache DIR --scan    # choose: one seed, many averages
    python benchmarks/early_averaging.py --out DIR --cache DIR           # measure: other seeds, what was chosen

Two regimes: `constant`, a constant learning rate and 2 thousand tokens a step; `cosine`, a decay to a tenth and 8
thousand. In each, every seed trains at three learning rates, and several averagers watch the one run: the last k
snapshots (lawa), a running exponential average (ema) and the mean of all snapshots (swa). They are evaluated along the
way on the same held-out samples as the last weights (raw). Then the constant run again with a loss spike: a few steps
of a learning rate many times too high, after which training just goes on, or restarts from the average, with the
optimizer's moments kept or reset.

DIR gets curves.csv (a row per evaluation and average), summary.csv (steps saved), spike.csv and a figure; with --scan,
scan.csv only. Runs that are there are not repeated: use another DIR for other settings.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import common
import small_runs
from small_runs import Curve, Sweep, grouped, reached, spread

import ds_plugin
from ds_plugin.sweeps import figure
from ds_plugin.sweeps.records import write_records
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig

ALL = 10**6  # an ema horizon beyond any run's number of snapshots: the plain mean of all of them, which is SWA
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the run, where steps saved are read
SMOOTHED = 5  # evaluations in the centred mean that both curves of a comparison are smoothed with
AFTER = ("on", "keep", "reset")  # what follows the spike: nothing, or a restart with moments kept or reset
_COLOURS = {"raw": "#000000", "lawa": "#0072B2", "ema": "#E69F00", "swa": "#CC79A7", "keep": "#009E73"}


@dataclass(frozen=True)
class Regime:
    """How the runs of a regime train, and what watches them. ``batch`` is in samples; all else in optimizer steps."""

    batch: int
    steps: int
    warmup: int
    cosine: bool
    rates: tuple[float, ...]  # ascending
    evaluate: int
    averages: Mapping[str, Mapping[str, Any]]  # by name, the weight_averaging section of each


@dataclass(frozen=True)
class Spike:
    """``steps`` optimizer steps after step ``after`` train at ``factor`` times the learning rate ``lr``."""

    lr: float
    after: int
    steps: int
    factor: float
    until: int  # the last step of the run

    @property
    def end(self) -> int:
        """Its last step, after which a restart comes."""
        return self.after + self.steps

    def factor_at(self, step: int) -> float:
        """What the learning rate of step ``step`` (counted from 1) is multiplied by."""
        return self.factor if self.after < step <= self.end else 1.0


@dataclass(frozen=True, kw_only=True)
class Plan(small_runs.Small):
    """What all runs of a sweep share."""

    regimes: Mapping[str, Regime]
    spike: Spike
    eval_samples: int = 32

    @property
    def shared(self) -> dict[str, Any]:
        """What runs have in common, with whatever averages and however often evaluated."""
        regimes = {name: [of.batch, of.steps, of.warmup, of.cosine] for name, of in self.regimes.items()}
        return {**vars(self), "regimes": regimes, "spike": vars(self.spike)}


@dataclass(frozen=True, order=True)
class Setting(small_runs.Setting):
    """One training run. ``after``: "" for a run without a spike, otherwise what follows it."""

    regime: str
    lr: float
    seed: int
    after: str

    def __str__(self) -> str:
        return f"{self.regime} lr {self.lr:g} seed {self.seed}" + (f" spike, {self.after}" if self.after else "")


@dataclass(frozen=True)
class Point(Setting):
    """A row of curves.csv: the evaluation loss (nats per byte) of one average (or "raw") after ``step``."""

    average: str
    step: int
    eval_loss: float

    def __str__(self) -> str:
        return f"{self.average} {self.eval_loss:.4f} at step {self.step}"


@dataclass(frozen=True)
class Saved:
    """A row of summary.csv: how much sooner ``average`` is where ``against`` is at a ``share`` of the run.

    Between smoothed curves: ``steps_saved`` is a share of the steps that ``against`` took (minus infinity: not in this
    run), ``loss_gain`` the difference at that same step.
    """

    regime: str
    lr: float
    seed: int
    average: str
    against: str
    share: float
    target: float
    steps_saved: float
    loss_gain: float


@dataclass(frozen=True)
class Recovery:
    """A row of spike.csv: what a spike did to ``average`` (or "raw").

    ``before`` is the raw evaluation loss at the spike's beginning, ``highest`` and ``last`` are the average's after its
    end (or the restart), ``steps`` those until it is back at ``before`` (0: never above; infinite: not in this run).
    """

    lr: float
    seed: int
    after: str
    average: str
    before: float
    highest: float
    steps: float
    last: float


def averages(start: int, interval: int, window: int, horizon: int) -> dict[str, dict[str, Any]]:
    """The three that are compared, all from the same snapshots."""
    snapshots = {"interval": interval, "start_step": start}
    return {
        "lawa": {**snapshots, "window": window},
        "ema": {**snapshots, "mode": "ema", "horizons": [horizon]},
        "swa": {**snapshots, "mode": "ema", "horizons": [ALL]},
    }


def candidates(start: int) -> dict[str, dict[str, Any]]:
    """What the scan tries, by a name that says what it is: window or horizon, and steps between snapshots."""
    found: dict[str, dict[str, Any]] = {}
    for name, sizes in {"lawa": ((5, 2), (5, 5), (10, 5), (5, 10)), "ema": ((3, 2), (3, 5), (5, 5), (10, 5))}.items():
        found |= {f"{name} {size} x {every}": averages(start, every, size, size)[name] for size, every in sizes}
    return {**found, "swa x 5": averages(start, 5, 1, 1)["swa"]}


FULL = Plan(
    regimes={
        "constant": Regime(
            8, 480, 30, False, (8e-3, 1.6e-2, 3.2e-2), 10, averages(40, interval=5, window=5, horizon=3)
        ),
        "cosine": Regime(32, 100, 7, True, (2e-3, 4e-3, 8e-3), 5, averages(10, interval=2, window=5, horizon=3)),
    },
    spike=Spike(lr=8e-3, after=120, steps=4, factor=20.0, until=220),
)
SMOKE = Plan(
    regimes={
        "constant": Regime(4, 24, 2, False, (1e-2,), 2, averages(3, interval=2, window=2, horizon=3)),
        "cosine": Regime(8, 12, 2, True, (1e-2,), 2, averages(3, interval=2, window=2, horizon=3)),
    },
    spike=Spike(lr=1e-2, after=12, steps=3, factor=10.0, until=20),
    layers=1,
    width=32,
    length=32,
    eval_samples=16,
)


def json_of(setting: Setting, plan: Plan) -> dict[str, Any]:
    """The run's JSON. Its averager is the first of the regime's; the others are built beside it."""
    regime = plan.regimes[setting.regime]
    first = next(iter(regime.averages.values()), None)
    constant = {"warmup_num_steps": regime.warmup, "warmup_type": "linear", "warmup_max_lr": setting.lr}
    scheduler = (
        small_runs.cosine(regime.steps, regime.warmup) if regime.cosine else {"type": "WarmupLR", "params": constant}
    )
    config = small_runs.json_of(regime.batch, setting.lr, scheduler)
    return config if first is None else {**config, "weight_averaging": {"enabled": True, **first}}


def train(setting: Setting, plan: Plan, cache: Path, losses: list[float] | None = None) -> list[Point]:
    """One run in this process (`common.start`): evaluations. ``losses`` gets those of training."""
    regime, spike = plan.regimes[setting.regime], plan.spike if setting.after else None
    engine, text = small_runs.build(json_of(setting, plan), plan, setting.seed, cache)
    plugin = ds_plugin.get_plugin(engine)
    watching = _averagers(plugin, regime)
    count = regime.steps * regime.batch
    samples = small_runs.Samples(plan, text, cache, count=count, seed=setting.seed)
    batches = samples.batches(regime.batch)
    points: list[Point] = []

    def evaluate(step: int) -> None:
        found = {"raw": small_runs.evaluate(engine, samples.evaluation)}
        for name, averager in watching.items():
            if averager.steps:
                with averager.averaged_weights():
                    found[name] = small_runs.evaluate(engine, samples.evaluation)
        points.extend(Point(**vars(setting), average=n, step=step, eval_loss=round(x, 5)) for n, x in found.items())

    engine.train()
    for step in range(1, (regime.steps if spike is None else spike.until) + 1):
        if spike is not None:
            for group in engine.optimizer.param_groups:  # the scheduler sets it anew after every step
                group["lr"] *= spike.factor_at(step)
        loss = small_runs.loss_of(engine, next(batches))
        engine.backward(loss)
        engine.step()
        if losses is not None:
            losses.append(loss.item())
        for averager in watching.values():
            if averager is not plugin.averager and averager.due(step):
                averager.snapshot(step)
        # A run with a spike is the run without one up to there, and need not be evaluated again.
        due = step % regime.evaluate == 0 and (spike is None or step > spike.after - 5 * regime.evaluate)
        if due or (spike is not None and step == spike.end):
            evaluate(step)
        if spike is not None and step == spike.end and setting.after != "on":
            plugin.restart_from_average("reset" if setting.after == "reset" else "keep")
            for averager in watching.values():  # what they hold is of the path that was left
                averager.reset()
    return points


def _averagers(plugin: Any, regime: Regime) -> dict[str, WeightAverager]:
    """By name: the run's own for the first, and others that read the same masters."""
    return {
        name: plugin.averager
        if number == 0
        else WeightAverager(WeightAveragingConfig.model_validate(section), plugin.averager.shards)
        for number, (name, section) in enumerate(regime.averages.items())
    }


def smooth(curve: Curve) -> Curve:
    """Centred means of `SMOOTHED` evaluations; towards the ends of as many as lie on both sides."""
    losses = [loss for _, loss in curve]
    half = SMOOTHED // 2
    reach = [min(half, i, len(curve) - 1 - i) for i in range(len(curve))]
    return [(step, mean(losses[i - r : i + r + 1])) for i, ((step, _), r) in enumerate(zip(curve, reach, strict=True))]


def saved(ours: Curve, theirs: Curve, step: int) -> tuple[float, float, float]:
    """(target, share of steps saved, loss gained) of the smoothed ``ours`` at what ``theirs`` is at ``step``.

    The steps saved are of those that ``theirs`` needed to reach that loss for the first time.
    """
    target = dict(theirs)[step]
    share = 1 - reached(ours, target) / reached(theirs, target)
    return target, share, target - dict(ours).get(step, math.nan)


def curves_of(points: Iterable[Point]) -> dict[Setting, dict[str, Curve]]:
    """Raw evaluations by run and average, in the order of the steps."""
    found: dict[Setting, dict[str, Curve]] = {}
    for (setting, average), curve in grouped(sorted(points), lambda p: (p.setting, p.average)):
        found.setdefault(setting, {})[average] = [(p.step, p.eval_loss) for p in curve]
    return found


def summary(points: Iterable[Point]) -> list[Saved]:
    """Every average against raw, and the first (lawa) against the others as well, in all runs without a spike."""
    rows = []
    for setting, curves in curves_of(p for p in points if not p.after).items():
        smoothed = {name: smooth(curve) for name, curve in curves.items()}
        end = curves["raw"][-1][0]
        pairs = [(n, "raw") for n in curves if n != "raw"]
        pairs += [("lawa", n) for n in ("ema", "swa") if {"lawa", n} <= curves.keys()]
        for ours, theirs in pairs:
            for share in SHARES:
                at = min((step for step, _ in curves[theirs]), key=lambda step: abs(step - share * end))
                found = [round(x, 5) for x in saved(smoothed[ours], smoothed[theirs], at)]
                rows.append(Saved(setting.regime, setting.lr, setting.seed, ours, theirs, share, *found))
    return rows


def recoveries(points: Iterable[Point], spike: Spike) -> list[Recovery]:
    """The rows of spike.csv."""
    rows = []
    for setting, curves in curves_of(p for p in points if p.after).items():
        before = dict(curves["raw"])[spike.after]
        first = spike.end if setting.after == "on" else spike.end + 1  # at the end itself, the restart is yet to come
        for name, curve in curves.items():
            later = [(step, loss) for step, loss in curve if step >= first]
            highest = max(loss for _, loss in later)
            top = next(i for i, (_, loss) in enumerate(later) if loss == highest)
            steps = 0.0 if highest <= before else reached(later[top:], before) - spike.end
            key = setting.lr, setting.seed, setting.after, name
            rows.append(Recovery(*key, before, highest, round(steps, 2), later[-1][1]))
    return rows


def table(points: Sequence[Point], rows: Iterable[Saved]) -> list[str]:
    """Markdown: means (smallest to largest) over seeds of the steps saved, and the last evaluation."""
    last = {(p.setting, p.average): p.eval_loss for p in sorted(points, key=lambda p: p.step)}

    def cells_of(of: tuple[Any, ...], found: list[Saved]) -> list[str]:
        regime, lr, _, against, average = of
        cells = [regime, f"{lr:g}", average, against]
        cells += [spread([row.steps_saved for row in found if row.share == share], ".0%") for share in SHARES]
        by_seed = dict(grouped(found, lambda row: row.seed))
        cells.append(spread([mean(r.steps_saved for r in of if r.share < 1) for of in by_seed.values()], ".0%"))
        ends = [mean(last[Setting(regime, lr, s, ""), name] for s in by_seed) for name in (average, against)]
        return [*cells, f"{ends[0]:.3f} ({ends[1]:.3f})"]

    shares = [f"saved at {share:.0%}" for share in SHARES]
    heads = ["regime", "lr", "average", "against", *shares, "25-75 %", "final loss (the other's)"]
    return small_runs.table(heads, rows, lambda r: (r.regime, r.lr, r.against != "raw", r.against, r.average), cells_of)


def largest_rise(curve: Curve) -> float:
    """How far the loss was at most above the lowest before it: what says whether a learning rate was stable."""
    lowest, rise = math.inf, 0.0
    for _, loss in curve:
        rise, lowest = max(rise, loss - lowest), min(lowest, loss)
    return rise


def rate_table(points: Iterable[Point]) -> list[str]:
    """Markdown: the runs without a spike as they train, by learning rate."""
    raw = [(setting, curves["raw"]) for setting, curves in curves_of(p for p in points if not p.after).items()]

    def cells(of: tuple[str, float], found: list[tuple[Setting, Curve]]) -> list[str]:
        columns = [curve[-1][1] for _, curve in found], [largest_rise(curve) for _, curve in found]
        return [of[0], f"{of[1]:g}", *(spread(values, ".3f") for values in columns)]

    heads = ["regime", "lr", "final raw loss", "largest rise of the raw loss"]
    return small_runs.table(heads, raw, lambda run: (run[0].regime, run[0].lr), cells)


def spike_table(rows: Iterable[Recovery]) -> list[str]:
    """Markdown: means (smallest to largest) over seeds."""
    shown = {"highest": ".3f", "steps": ".0f", "last": ".3f"}

    def cells(of: tuple[float, int, str], found: list[Recovery]) -> list[str]:
        columns = (spread([getattr(row, name) for row in found], how) for name, how in shown.items())
        return [f"{of[0]:g}", AFTER[of[1]], of[2], f"{mean(row.before for row in found):.3f}", *columns]

    heads = ["lr", "after the spike", "weights", "before", "highest after", "steps until back", "last"]
    return small_runs.table(heads, rows, lambda row: (row.lr, AFTER.index(row.after), row.average), cells)


def draw(points: Sequence[Point], plan: Plan, path: Path) -> None:
    """A panel per regime at its lowest rate, and one of the spike; seeds as bands."""
    curves, count = curves_of(points), len(plan.regimes) + 1
    titles = {"constant": "A constant rate: the average is ahead", "cosine": "A rate that decays: nothing to gain"}

    def of_seeds(average: str, chosen: Callable[[Setting], bool], first: int = 0) -> list[Curve]:
        found = [curves[setting][average] for setting in sorted(curves) if chosen(setting)]
        return [[(step, loss) for step, loss in curve if step > first] for curve in found]

    with figure.panels(path, 1, count, figsize=(5 * count, 4.2)) as axes:
        *panels, last = axes[0]
        for axis, (name, regime) in zip(panels, plan.regimes.items(), strict=True):
            lr, first = min(regime.rates), 2 * regime.averages["lawa"]["start_step"]
            chosen = partial(_is, name, lr, "")
            for average, said in (("raw", "last weights"), ("swa", "mean of all"), ("lawa", "average")):
                smoothed = [smooth(curve) for curve in of_seeds(average, chosen, first)]
                small_runs.show(axis, said, smoothed, _COLOURS[average])
            axis.set_title(f"{titles[name]} ({lr:g})")
        spike = plan.spike
        for after, average, said in (("on", "raw", "goes on"), ("on", "lawa", "average"), ("keep", "raw", "restarts")):
            chosen = partial(_is, "constant", spike.lr, after)
            colour = _COLOURS["keep" if after == "keep" else average]
            small_runs.show(last, said, of_seeds(average, chosen, spike.end if after == "keep" else 0), colour)
        last.set_title(f"A spike: {spike.steps} steps of {spike.factor:g} times the rate")
        for axis in axes[0]:
            axis.set_xlabel("step")
            axis.set_xlim(right=axis.get_xlim()[1] + 0.2 * (axis.get_xlim()[1] - axis.get_xlim()[0]))
        panels[0].set_ylabel("evaluation loss (nats per byte)")


def _is(regime: str, lr: float, after: str, setting: Setting) -> bool:
    return (setting.regime, setting.lr, setting.after) == (regime, lr, after)


def settings_of(plan: Plan, seeds: Sequence[int]) -> list[Setting]:
    """All runs without a spike, the highest rates first."""
    return [Setting(name, lr, s, "") for name, of in plan.regimes.items() for lr in of.rates[::-1] for s in seeds]


def spiked(plan: Plan, seeds: Sequence[int]) -> list[Setting]:
    """All runs with one."""
    return [Setting("constant", plan.spike.lr, seed, after) for seed in seeds for after in AFTER]


def report(points: Sequence[Point], plan: Plan, out: Path) -> None:
    """Write the summaries and the figure, and print the tables."""
    rows, recovered = summary(points), recoveries(points, plan.spike)
    write_records(Saved, rows, out / "summary.csv")
    write_records(Recovery, recovered, out / "spike.csv")
    draw(points, plan, out / "early_averaging.png")
    print("\n".join([*rate_table(points), "", *table(points, rows), "", *spike_table(recovered)]))


def scan(plan: Plan, seed: int, cache: Path, out: Path) -> None:
    """The runs of one seed with all `candidates` watching, evaluated half as often: scan.csv, and what each saves."""
    regimes = {
        name: replace(regime, averages=candidates(regime.averages["lawa"]["start_step"]), evaluate=2 * regime.evaluate)
        for name, regime in plan.regimes.items()
    }
    plan = replace(plan, regimes=regimes)
    sweep = Sweep(out, {Point: "scan.csv"}, functools.partial(train, plan=plan, cache=cache), settings=plan.shared)
    for setting in settings_of(plan, [seed]):
        sweep.train([setting])
        rows = [row for row in summary(p for p in sweep.rows[Point] if p.setting == setting) if row.against == "raw"]
        for name in regimes[setting.regime].averages:
            gains = ", ".join(f"{row.steps_saved:.1%} at {row.share:.0%}" for row in rows if row.average == name)
            print(f"{setting}: {name:12s} {gains}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Scan, or measure and publish."""
    parser = small_runs.parser(__doc__)
    parser.add_argument("--scan", action="store_true", help="try many averages on one seed instead")
    parser.add_argument("--seeds", help="default 2,3,4; with --scan 1")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model: does it run?")
    args = parser.parse_args(arguments)
    common.start()
    plan, cache = SMOKE if args.smoke else FULL, args.cache.absolute()
    seeds = [int(seed) for seed in (args.seeds or ("1" if args.scan else "2,3,4")).split(",")]
    if args.scan:
        scan(plan, seeds[0], cache, args.out)
    else:
        sweep = Sweep(
            args.out, {Point: "curves.csv"}, functools.partial(train, plan=plan, cache=cache), settings=plan.shared
        )
        sweep.train(settings_of(plan, seeds) + spiked(plan, seeds))
        report(sweep.rows[Point], plan, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
