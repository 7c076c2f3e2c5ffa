"""From an untuned model to a trained one, all compute counted: the three methods together against a tuned rival.

    python benchmarks/end_to_end.py --out DIR --cache DIR [--workers 2]

The arms, each a GPT of megatron-core in DeepSpeed:

rival       standard parametrization, full lengths, last weights; its learning rate is swept at the target itself.
slow_rival  the same, its rate warmed up over as many steps as that of a run with `carry`; swept as well.
base        what ours is tuned on: the base model with ours' JSON; swept over the same rates, seeds and tokens.
ours        the target by CompleteP at the base's best rate, the `carry` warmup, and averaged weights.
no_completep, no_warmup    ours without one of the three, at the base's best rate. Without averages: ours' last weights.
slow_rate   no_warmup, its rate warmed up as the slow rival's.
tuned       no_completep at the rival's best rate: what warmup and averaging do for who has paid for the sweep.

All have one batch, number of tokens and schedule (linear warmup, then cosine to a tenth, by trained tokens). A sweep's
best rate is that of the lowest mean loss at the end; where it lies at the grid's edge, both grids are widened.

DIR gets runs.csv (a row per run), curves.csv (evaluations), factors.csv (ours against the rival, by seed), sweep.json
(settings, date and versions) and a figure. Runs that are there are not repeated; a DIR of other settings or versions is
refused. Compute is in floating-point operations of training (launch_scripts/gpt/flops.py); evaluations are not counted.
"""

import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
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
from launch_scripts.gpt.flops import Flops
from megatron_patches.models.gpt import GPTConfig

ARMS = ("rival", "slow_rival", "base", "ours", "no_completep", "no_warmup", "slow_rate", "tuned")
RIVALS = ARMS[:2]
CARRIED = ("base", "ours", "no_completep", "tuned")
EVALUATIONS = 20
LAST, AVERAGE = "last weights", "average"
NAMES = {
    "rival": "standard, tuned at the target",
    "slow_rival": "with a slow rate warmup",
    "untuned": "standard, at the base's best rate",
    "ours": "the three methods",
}
_COLOURS = {"rival": "#D55E00", "slow_rival": "#E69F00", "untuned": "#999999", "ours": "#0072B2"}


@dataclass(frozen=True, kw_only=True)
class Scale(small_runs.Small):
    """What all runs share: the target's sizes, the base's, ``tokens`` to train. Heads are of one size."""

    layers: int = 8
    width: int = 128
    heads: int = 4
    length: int = 128
    base_layers: int = 2
    base_width: int = 64
    batch: int = 32
    tokens: int
    start: int = 8
    window: int = 5
    interval: int = 2
    init_std: float = 0.04
    eval_samples: int = 64

    @property
    def steps(self) -> int:
        """Steps of a run of full lengths."""
        return -(-self.tokens // (self.batch * self.length))

    def of(self, arm: str) -> "Scale":
        """The arm's own sizes."""
        heads = self.heads * self.base_width // self.width
        base = {"layers": self.base_layers, "width": self.base_width, "heads": heads}
        return dataclasses.replace(self, **base) if arm == "base" else self


@dataclass(frozen=True, order=True)
class Setting(small_runs.Setting):
    """One run: ``arm`` one of `ARMS`, ``lr`` the base learning rate's peak."""

    arm: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} lr {self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Run(Setting):
    """A row of runs.csv. ``final`` is the evaluation loss at the end, of the last weights and of their average, which
    is the last weights where none is taken. Seconds are of training, data included."""

    steps: int
    tokens: int
    flops: float
    cpu_seconds: float
    final: float
    final_average: float
    largest_ratio: float

    @property
    def reported(self) -> float:
        """What an arm is judged by."""
        return self.final if self.arm in RIVALS else self.final_average

    def __str__(self) -> str:
        return f"{self.final:.4f}, averaged {self.final_average:.4f}, {self.steps} steps, {self.cpu_seconds:.0f} s"


@dataclass(frozen=True)
class Point(Setting):
    """A row of curves.csv: an evaluation at full length of ``weights``, after so much of the run."""

    weights: str
    step: int
    tokens: int
    flops: float
    cpu_seconds: float
    loss: float


@dataclass(frozen=True)
class Factor:
    """A row of factors.csv: ``arm``'s ``weights`` against a rival's best run of that seed.

    The compute and CPU time that the rival took to its lowest loss, ``target``, over what the arm took to be there (0:
    never); with all trials of the sweeps counted on both sides; and with the trials of one seed only.
    """

    against: str
    arm: str
    weights: str
    seed: int
    target: float
    final: float
    flops: float
    cpu: float
    flops_tuned: float
    cpu_tuned: float
    flops_tuned_by_one_seed: float


FILES: dict[type, str] = {Point: "curves.csv", Run: "runs.csv"}


def json_of(setting: Setting, scale: Scale) -> dict[str, Any]:
    """The run's JSON."""
    steps = scale.steps
    warmup, carried = max(2, steps // 20), {
        "enabled": True, "start_length": scale.start, "end_length": scale.length, "mode": "carry",
        "duration": {"steps": max(1, steps // 2)}, "learning_rate": {"by": "tokens"}, "preflight": False,
    }  # fmt: skip
    if setting.arm in ("slow_rival", "slow_rate"):
        warmup = small_runs.slow_rate(carried, scale.batch, warmup * scale.batch * scale.length)
    config = small_runs.json_of(scale.batch, setting.lr, small_runs.cosine(steps, warmup))
    standard = setting.arm in (*RIVALS, "no_completep", "tuned")
    base = {"base_width": scale.base_width, "base_depth": scale.base_layers}
    config["completep"] = {"enabled": True, "recipe": "standard" if standard else "completep", **base}
    if setting.arm in CARRIED:
        config["sequence_length_warmup"] = carried
    if setting.arm not in RIVALS:
        snapshots = {"window": scale.window, "interval": scale.interval, "start_step": max(2, steps // 10)}
        config["weight_averaging"] = {"enabled": True, **snapshots}
    return config


def train(setting: Setting, scale: Scale, cache: Path) -> list[Setting]:
    """One training run in this process (`common.start`): its rows of all kinds."""
    small = scale.of(setting.arm)
    engine, text = small_runs.build(json_of(setting, scale), small, setting.seed, cache)
    plugin = ds_plugin.get_plugin(engine)
    samples = small_runs.Samples(small, text, cache, count=2 * scale.steps * scale.batch, seed=setting.seed)
    whole = functools.partial(samples.batches, scale.batch)
    batches = plugin.batches(whole) if setting.arm in CARRIED else whole()
    sizes = {"num_layers": small.layers, "hidden_size": small.width, "num_attention_heads": small.heads}
    flops = Flops(engine.module, GPTConfig.model_validate({**sizes, "seq_length": small.length}))
    place: list[Any] = list(vars(setting).values())
    points: list[Point] = []
    steps = trained = 0
    spent = cpu = 0.0
    ratio = LossRatio()
    mark, loss = scale.tokens / EVALUATIONS, math.nan
    engine.train()
    while trained < scale.tokens and (not steps or math.isfinite(loss)):
        started = time.process_time()
        batch = next(batches)
        found = small_runs.loss_of(engine, batch)
        engine.backward(found)
        engine.step()
        loss = found.item()
        cpu += time.process_time() - started
        steps, before = steps + 1, trained
        trained += batch["tokens"].numel()
        spent += batch["tokens"].numel() * flops.per_token(batch["tokens"].shape[1])
        ratio.feed(loss)
        if trained // mark > before // mark or trained >= scale.tokens:
            at: list[Any] = [steps, trained, spent, round(cpu, 3)]
            points.append(Point(*place, LAST, *at, round(small_runs.evaluate(engine, samples.evaluation), 5)))
            if plugin.averager is not None and plugin.averager.steps:
                with plugin.averaged_weights():
                    averaged = small_runs.evaluate(engine, samples.evaluation)
                points.append(Point(*place, AVERAGE, *at, round(averaged, 5)))
    ends = {point.weights: point.loss if math.isfinite(loss) else math.inf for point in points}
    last = ends.get(LAST, math.inf)
    losses = last, ends.get(AVERAGE, last)
    figures: list[Any] = [steps, trained, spent, round(cpu, 2), *losses, round(ratio.highest or 1.0, 3)]
    return [*points, Run(*place, *figures)]


def best_rate(runs: Iterable[Run], arm: str) -> float:
    """That of the lowest mean loss of the arm's runs."""
    means = {lr: mean(run.reported for run in of) for lr, of in grouped(_of(runs, arm), lambda run: run.lr)}
    return min(means, key=lambda lr: means[lr])


def _of(rows: Iterable[Any], arm: str, lr: float | None = None) -> list[Any]:
    return [row for row in rows if row.arm == arm and lr in (None, row.lr)]


def factors(runs: Sequence[Run], points: Iterable[Point], against: str = "rival") -> list[Factor]:
    """Every arm but the sweeps' own, the last weights and the average, against that rival by seed."""
    rate, base = best_rate(runs, against), best_rate(runs, "base")
    curves = {(s, w): list(of) for (s, w), of in grouped(points, lambda p: (p.setting, p.weights))}
    rows = []
    for (setting, weights), curve in curves.items():
        rival = curves.get((Setting(against, rate, setting.seed), LAST))
        named = "untuned" if (setting.arm, setting.lr) == ("rival", base) else setting.arm
        if rival is None or named in ("base", *RIVALS):
            continue
        target = min(point.loss for point in rival)
        tuned_at = "rival" if setting.arm == "tuned" else "base"
        found: list[float] = []
        for spent in ("flops", "cpu_seconds"):
            theirs, mine = (small_runs.reached(_curve(of, spent), target) for of in (rival, curve))
            trials = {arm: sum(getattr(run, spent) for run in _of(runs, arm)) for arm in (*RIVALS, "base")}
            seeds = len({run.seed for run in _of(runs, against)})
            # the rival's last run is one of its trials
            found += [theirs / mine, trials[against] / (trials[tuned_at] + mine)]
            found += [trials[against] / (trials[tuned_at] + seeds * mine)]
        final = curve[-1].loss
        plain, counted, by_one, cpu, cpu_counted, _ = (round(value, 3) for value in found)
        rows.append(
            Factor(against, named, weights, setting.seed, target, final, plain, cpu, counted, cpu_counted, by_one)
        )
    return sorted(rows, key=dataclasses.astuple)


def _curve(points: Sequence[Point], spent: str) -> Curve:
    return [(getattr(point, spent), point.loss) for point in sorted(points, key=lambda p: p.tokens)]


def sweep_table(runs: Iterable[Run]) -> list[str]:
    """Markdown: the sweeps, mean and range over seeds by rate."""

    def cells(of: tuple[int, float], chosen: list[Run]) -> list[str]:
        losses = small_runs.spread([run.reported for run in chosen], ".3f")
        ratios = ", ".join(f"{run.largest_ratio:.2f}" for run in chosen)
        seconds = f"{mean(run.cpu_seconds for run in chosen):.0f}"
        return [
            ARMS[of[0]],
            f"{of[1]:g}",
            f"{len(chosen)}",
            losses,
            f"{mean(r.flops for r in chosen):.3g}",
            seconds,
            ratios,
        ]

    heads = ["arm", "lr", "seeds", "loss at the end", "FLOPs of a run", "CPU seconds", "largest loss ratios"]
    return small_runs.table(heads, runs, lambda run: (ARMS.index(run.arm), run.lr), cells)


def factor_table(rows: Iterable[Factor]) -> list[str]:
    """Markdown: mean and range over seeds by arm and weights."""
    shown = ("flops", "cpu", "flops_tuned", "flops_tuned_by_one_seed", "cpu_tuned")

    def cells(of: tuple[str, str, str], chosen: list[Factor]) -> list[str]:
        values = ([getattr(row, name) or math.inf for row in chosen] for name in shown)
        return [
            *of,
            small_runs.spread([r.final for r in chosen], ".3f"),
            *(small_runs.spread(v, ".2f") for v in values),
        ]

    heads = ["against", "arm", "weights", "loss at the end", "less compute to the rival's best loss", "CPU time"]
    heads += ["compute with sweeps", "with sweeps of one seed", "CPU time with sweeps"]
    return small_runs.table(heads, rows, lambda row: (row.against, row.arm, row.weights), cells)


def draw(runs: Sequence[Run], points: Sequence[Point], path: Path) -> None:
    """Evaluation loss against compute: of the last run alone, and from the first trial of the sweep on."""
    rates = {arm: best_rate(runs, arm) for arm in (*RIVALS, "base")}
    base, whole = rates["base"], mean(run.flops for run in _of(runs, "rival", rates["rival"]))
    trials = {arm: sum(run.flops for run in _of(runs, arm)) / whole for arm in rates}
    rivals = {arm: (arm, rates[arm], LAST) for arm in RIVALS}
    shown = {"untuned": ("rival", base, LAST), **rivals, "ours": ("ours", base, AVERAGE)}
    before = {**dict.fromkeys(shown, trials["base"]), **{arm: trials[arm] - 1 for arm in RIVALS}}
    targets = {
        arm: mean(min(p.loss for p in of) for _, of in grouped(_of(points, arm, rates[arm]), lambda p: p.seed))
        for arm in RIVALS
    }
    with figure.panels(path, 1, 2, figsize=(11, 4.2), sharey=True) as axes:
        left, right = axes[0]
        for axis, offset in ((left, dict.fromkeys(shown, 0.0)), (right, before)):
            for name, (arm, lr, weights) in shown.items():
                chosen = [p for p in _of(points, arm, lr) if p.weights == weights]
                curves = [
                    [(round(offset[name] + p.flops / whole, 4), p.loss) for p in of]
                    for _, of in grouped(chosen, lambda p: p.seed)
                ]
                small_runs.show(axis, NAMES[name], curves, _COLOURS[name])
            for arm, target in targets.items():
                axis.hlines(target, 0, offset[arm] + 1, color=_COLOURS[arm], linewidth=0.8, linestyle=":")
        found = [factors(runs, points, arm) for arm in RIVALS]
        ours = [[row for row in rows if (row.arm, row.weights) == ("ours", AVERAGE)] for rows in found]
        plain, counted = (
            " and ".join(f"{mean(getattr(row, name) for row in rows):.1f}" for rows in ours)
            for name in ("flops", "flops_tuned")
        )
        lowest, target = min(run.reported for run in _of(runs, "ours")), targets["rival"]
        left.set(xlabel="compute, in trainings of the target", ylabel="evaluation loss (nats per byte)", xlim=(0, 2))
        right.set(xlabel="the same, with the sweeps before it", xlim=(0, 1.85 * (before["rival"] + 1)))
        left.set(title=f"The rivals' losses for {plain} times less compute", ylim=(lowest * 0.99, target * 1.25))
        right.set(title=f"and for {counted} times less with the tuning counted")


def main(arguments: list[str] | None = None) -> int:
    """Sweep, widen, train, write what was found and print the tables."""
    parser = small_runs.parser(__doc__, workers=2)
    parser.add_argument("--tokens", type=int, default=614_400, help="trained tokens of a run")
    parser.add_argument("--rates", type=small_runs.numbers(float), default=[2.0**n for n in range(-11, -6)])
    parser.add_argument("--seeds", type=small_runs.numbers(int), default=[1, 2, 3])
    args = parser.parse_args(arguments)
    os.environ |= small_runs.MALLOC  # for the workers
    scale = Scale(tokens=args.tokens)
    one = functools.partial(train, scale=scale, cache=args.cache.absolute())
    sweep = Sweep(args.out, FILES, one, args.workers, settings=vars(scale))
    sweep.widen(
        args.rates,
        lambda lr: [Setting(arm, lr, seed) for arm in ("base", *RIVALS) for seed in args.seeds],
        lambda: [best_rate(sweep.rows[Run], arm) for arm in (*RIVALS, "base")],
    )
    base, rival = (best_rate(sweep.rows[Run], arm) for arm in ("base", "rival"))
    print(f"best rates: {base:g} at the base, {rival:g} of the rival at the target", flush=True)
    of_arms = {**dict.fromkeys(("ours", "no_warmup", "slow_rate", "no_completep"), base), "tuned": rival}
    sweep.train(Setting(arm, lr, seed) for arm, lr in of_arms.items() for seed in args.seeds)
    runs, points = sweep.rows[Run], sweep.rows[Point]
    rows = [row for against in RIVALS for row in factors(runs, points, against)]
    write_records(Factor, rows, args.out / "factors.csv")
    draw(runs, points, args.out / "end_to_end.png")
    print("\n".join([*sweep_table(runs), "", *factor_table(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
