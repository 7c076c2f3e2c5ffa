"""A larger batch with sequence length warmup: is it as good as without, how much sooner, and how steady?

    python benchmarks/larger_batch.py --out DIR --cache DIR [--workers 2] [--batches 8,32,64] [--length 128]

The arms, from the stability benchmark: plain, carry, and slow_rate, a plain run whose learning rate warms up over as
many steps as carry's. At every batch all are swept over the same rates with the first seed; where a best lies at the
grid's edge, all grids are widened. Then all seeds train at their arm's best rate, and at the largest of several batches
at 4x plain's best. All runs train the same number of tokens.

DIR gets stability.csv (a row per run), curves.csv (evaluations), training_losses.csv, reached.csv (when each run
reached the best loss of the plain run of its seed, of its own batch and of the smallest, at that batch's best rate),
sweep.json (settings, date and versions) and a figure. Runs that are there are not repeated.
"""

import functools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import small_runs
import stability
from small_runs import Sweep, grouped
from stability import FACTOR, FILES, Point, Run, Scale, Setting

from ds_plugin.sweeps import figure
from ds_plugin.sweeps.records import write_records

ARMS = ("plain", "carry", "slow_rate")
_SPENT = ("tokens", "step", "cpu_seconds")


@dataclass(frozen=True)
class Reached(Setting):
    """A row of reached.csv: when a run was at the best loss of the plain run of ``target_batch``. Infinite: never."""

    target_batch: int
    target: float
    tokens: float
    steps: float
    cpu_seconds: float
    gain_tokens: float  # over that plain run, when it was there itself
    gain_steps: float
    gain_cpu: float


def best_rates(runs: Iterable[Run], seed: int) -> dict[tuple[int, str], float]:
    """By batch and arm, the rate of the lowest loss at the end; of the seed with which all rates are run."""
    swept = [run for run in runs if run.seed == seed]
    return {
        of: min(found, key=lambda run: run.final_eval_loss).lr
        for of, found in grouped(swept, lambda run: (run.batch, run.arm))
    }


def reached(points: Iterable[Point], best: dict[tuple[int, str], float]) -> list[Reached]:
    """Every run against the plain run of its seed, of its own batch and of the smallest."""
    curves = dict(grouped(points, lambda point: point.setting))
    smallest, found = min(batch for batch, _ in best), []
    for setting, curve in curves.items():
        for batch in sorted({setting.batch, smallest}):
            plain = curves.get(Setting("plain", batch, best[batch, "plain"], setting.seed))
            if plain is None:
                continue
            target = min(point.eval_loss for point in plain)
            theirs, mine = (
                [small_runs.reached([(getattr(p, n), p.eval_loss) for p in of], target) for n in _SPENT]
                for of in (plain, curve)
            )
            gains = [round(of_plain / ours, 3) for of_plain, ours in zip(theirs, mine, strict=True)]
            found.append(Reached(*vars(setting).values(), batch, target, *(round(m, 2) for m in mine), *gains))
    return found


def table(runs: Sequence[Run], times: Iterable[Reached], best: dict[tuple[int, str], float]) -> list[str]:
    """Markdown: a row per batch, arm and rate that all seeds have."""
    by_setting = dict(grouped(times, lambda time: time.setting))
    smallest = min(batch for batch, _ in best)

    def cells(of: tuple[int, int, float], chosen: list[Run]) -> list[str]:
        batch, arm, lr = of
        spent = [time for run in chosen for time in by_setting[run.setting]]
        shown = ((batch, "gain_tokens"), (batch, "gain_cpu"), (smallest, "gain_tokens"), (smallest, "gain_steps"))
        gains = [[getattr(t, name) or math.inf for t in spent if t.target_batch == size] for size, name in shown]
        return [
            f"{batch}", ARMS[arm], f"{lr:g}", small_runs.spread([run.final_eval_loss for run in chosen], ".3f"),
            *(small_runs.spread(values, ".2f") for values in gains),
            ", ".join(f"{run.max_loss_ratio:.2f}" for run in chosen),
            ", ".join(f"{run.steps_above_1_5}" for run in chosen),
        ]  # fmt: skip

    heads = ["batch", "arm", "lr", "loss at the end", "tokens to plain's best loss, less by", "CPU time"]
    heads += [f"tokens to plain's best at {smallest} samples, less by", "steps", "largest loss ratios"]
    seeds = {setting: {run.seed for run in of} for setting, of in grouped(runs, _kind)}
    every = {run.seed for run in runs}
    compared = [run for run in runs if seeds[_kind(run)] == every]
    return small_runs.table([*heads, "steps above 1.5"], compared, _kind, cells)


def _kind(run: Run) -> tuple[int, int, float]:
    return run.batch, ARMS.index(run.arm), run.lr


def draw(points: Sequence[Point], best: dict[tuple[int, str], float], path: Path) -> None:
    """A panel per batch: evaluation loss against tokens, or CPU time if there is one batch; seeds as bands."""
    batches = sorted({batch for batch, _ in best})
    spent, scale, name, gain, of_what = (
        ("tokens", 1e6, "trained tokens (M)", "gain_tokens", "fewer tokens")
        if batches[1:]
        else ("cpu_seconds", 60, "CPU minutes", "gain_cpu", "less CPU time")
    )
    times = reached(points, best)
    small = [p for p in points if (p.batch, p.arm, p.lr) == (batches[0], "plain", best[batches[0], "plain"])]
    target = mean(min(p.eval_loss for p in of) for _, of in grouped(small, lambda p: p.seed))
    with figure.panels(path, 1, len(batches), figsize=(4.2 * len(batches) + 1.5, 4), sharey=True) as axes:
        for axis, batch in zip(axes[0], batches, strict=True):
            for arm in [arm for arm in ARMS if (batch, arm) in best]:
                mine = [p for p in points if (p.batch, p.arm, p.lr) == (batch, arm, best[batch, arm])]
                curves = [
                    [(getattr(p, spent) / scale, p.eval_loss) for p in of] for _, of in grouped(mine, lambda p: p.seed)
                ]
                end = min(curve[-1][0] for curve in curves)
                small_runs.show(axis, arm, [stability.regular(curve, end) for curve in curves], stability.COLOURS[arm])
            axis.axhline(target, color="#000000", linewidth=0.8, linestyle=":")
            key = ("carry", batch, best[batch, "carry"], batch)
            gains = [getattr(t, gain) for t in times if (t.arm, t.batch, t.lr, t.target_batch) == key]
            axis.set_title(f"{batch} samples: {mean(gains):.1f} times {of_what}", fontsize=11)
            axis.set(xlabel=name, ylim=(target * 0.93, target * 1.3))
            axis.set_xlim(0, axis.get_xlim()[1] * 1.2)
        axes[0][0].set_ylabel("evaluation loss (nats per byte)")


def main(arguments: list[str] | None = None) -> int:
    """Sweep, compare, write what was found and print the table."""
    parser = small_runs.parser(__doc__, workers=2)
    parser.add_argument("--tokens", type=int, default=800_000, help="trained tokens of a run")
    parser.add_argument("--batches", type=small_runs.numbers(int), default=[8, 32, 64], help="samples a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--without-slow-rate", action="store_true", help="compare plain and carry alone")
    parser.add_argument("--rates", type=small_runs.numbers(float), default=[2.0**n for n in range(-11, -7)])
    parser.add_argument("--seeds", type=small_runs.numbers(int), default=[1, 2, 3])
    args = parser.parse_args(arguments)
    arms = ARMS[:2] if args.without_slow_rate else ARMS
    os.environ |= small_runs.MALLOC  # for the workers
    scale = Scale(tokens=args.tokens, length=args.length)
    one = functools.partial(stability.train, scale=scale, cache=args.cache.absolute())
    sweep = Sweep(args.out, FILES, one, args.workers, settings=vars(scale))
    first, *others = args.seeds
    for batch in args.batches:
        sweep.widen(
            args.rates,
            lambda lr, batch=batch: [Setting(arm, batch, lr, first) for arm in arms],
            lambda batch=batch: [best_rates(sweep.rows[Run], first)[batch, arm] for arm in arms],
        )
    best = best_rates(sweep.rows[Run], first)
    print("best rates: " + ", ".join(f"{arm} {lr:g} at {batch}" for (batch, arm), lr in best.items()), flush=True)
    compared = [(arm, batch, lr) for (batch, arm), lr in best.items()]
    if (largest := max(args.batches)) > min(args.batches):
        compared += [(arm, largest, FACTOR * best[largest, "plain"]) for arm in arms]
    sweep.train(Setting(*of, seed) for of in compared for seed in (first, *others))
    runs, points = sweep.rows[Run], sweep.rows[Point]
    times = reached(points, best)
    write_records(Reached, times, args.out / "reached.csv")
    draw(points, best, args.out / "larger_batch.png")
    print("\n".join(table(runs, times, best)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
