"""Learning-rate transfer: does the best learning rate of the base model stay the best at every width and depth?"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ds_plugin.sweeps import figure, processes, trial
from ds_plugin.sweeps.builders import Builder
from ds_plugin.sweeps.text import Text
from ds_plugin.sweeps.trial import Base, Seeded, Shape, grouped

#: the loss of a run is the mean over this share of its last steps, which smooths the noise of single batches
TAIL = 0.1


@dataclass(frozen=True)
class Run(Seeded):
    """One training run: its mean loss in nats per token over the last steps; infinite when it diverged."""

    lr: float
    loss: float


def train(
    builder: Builder, shape: Shape, base: Base, *, seed: int, steps: int, lr: float, text: Text | None = None
) -> Run:
    """Train one model: linear warmup over a tenth of the steps, then linear decay to zero."""
    built = builder.build(shape, base, seed)
    optimizer, batches = built.optimizer(lr), trial.text_batches(base, seed, text)
    peaks = [group["lr"] for group in optimizer.param_groups]
    of_shape, losses = functools.partial(Run, **vars(shape), seed=seed, lr=lr), []
    for step in range(1, steps + 1):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps)
        losses.append(trial.step(built, optimizer, next(batches)))
        if not math.isfinite(losses[-1]):
            return of_shape(loss=math.inf)
    return of_shape(loss=mean(losses[-max(1, round(steps * TAIL)) :]))


def schedule(step: int, steps: int) -> float:
    """The learning rate of ``step`` (the first is 1) over its peak."""
    warmup = max(1, steps // 10)
    return step / warmup if step <= warmup else (steps - step) / (steps - warmup)


def sweep(
    builder: Builder,
    shapes: Iterable[Shape],
    base: Base,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    text: Text,
    workers: int,
    known: Iterable[Run],
    keep: Callable[[list[Run], str], None],
) -> list[Run]:
    """`train` of every shape, rate and seed that ``known`` lacks; ``keep`` gets all runs, and a line, before and after.

    Known runs that are not asked for stay in the result: a grid may be widened. A run that two recipes share
    (`Shape.same_as`) is trained once and reported for both. All shapes of the first seed come first, so that an
    interrupted sweep shows whole curves. ``workers``: processes that train at the same time.
    """
    wanted = [(shape, lr, seed) for seed in seeds for shape in shapes for lr in rates]
    jobs = list(dict.fromkeys((shape.same_as(base), lr, seed) for shape, lr, seed in wanted))
    kept = {(run.shape, run.lr, run.seed): run for run in known}
    losses = {(shape.same_as(base), lr, seed): run.loss for (shape, lr, seed), run in kept.items()}

    def runs() -> list[Run]:
        for shape, lr, seed in wanted:
            if (loss := losses.get((shape.same_as(base), lr, seed))) is not None:
                kept[shape, lr, seed] = Run(**vars(shape), seed=seed, lr=lr, loss=loss)
        return sorted(kept.values(), key=dataclasses.astuple)

    missing = [
        functools.partial(train, builder, shape, base, seed=seed, steps=steps, lr=lr, text=text)
        for shape, lr, seed in jobs
        if (shape, lr, seed) not in losses
    ]
    keep(runs(), f"[{len(jobs) - len(missing)}/{len(jobs)}] are there")  # another recipe's may be among them
    finished: Iterable[tuple[Any, Run]] = ((one, one()) for one in missing)
    if workers > 1:
        finished = processes.results(operator.call, missing, workers, builder.start)
    for number, (_, run) in enumerate(finished, start=len(jobs) - len(missing) + 1):
        losses[run.shape, run.lr, run.seed] = run.loss
        said = f"{run} lr 2^{math.log2(run.lr):g} seed {run.seed}"
        keep(runs(), f"[{number}/{len(jobs)}] {said}: loss {run.loss:.4f}")
    return runs()


def curves(runs: Iterable[Run]) -> dict[Shape, dict[float, float]]:
    """Mean loss over seeds by shape and learning rate."""
    each = grouped((run.shape, (run.lr, run.loss)) for run in runs).items()
    return {shape: {lr: mean(losses) for lr, losses in sorted(grouped(curve).items())} for shape, curve in each}


@dataclass(frozen=True)
class Transfer:
    """How a shape does at its own best learning rate and at the base model's.

    ``moved``: factors of two between the two rates. ``cost``: relative loss given up by using the base model's.
    """

    shape: Shape
    best_lr: float
    best_loss: float
    moved: float
    cost: float


def transfer(runs: Iterable[Run], base: Base) -> list[Transfer]:
    """Each shape against its recipe's smallest one (the base shape where it was swept)."""
    found = curves(runs)
    results = []
    for recipe, shapes in grouped((shape.recipe, shape) for shape in found).items():
        wanted = Shape(recipe, base.width, base.depth)
        origin = wanted if wanted in found else min(shapes, key=lambda s: (s.depth * s.width**2, s.depth))
        chosen = _best(found[origin])
        for shape in shapes:
            curve, best = found[shape], _best(found[shape])
            cost = curve.get(chosen, math.nan) / curve[best] - 1  # it may lack a rate, or have diverged at all
            results.append(Transfer(shape, best, curve[best], math.log2(best / chosen), cost))
    return results


def draw(runs: Sequence[Run], path: Path, *, title: str) -> None:
    """Loss against learning rate, a curve per shape with its minimum marked, a panel per recipe."""
    found = curves(runs)
    recipes = list(dict.fromkeys(shape.recipe for shape in found))
    sizes = sorted({(shape.width, shape.depth, shape.experts) for shape in found})
    floor = min(loss for curve in found.values() for loss in curve.values())
    with figure.panels(path, 1, len(recipes), title=title, figsize=(4.4 * len(recipes), 4), sharey=True) as axes:
        for axis, recipe in zip(axes[0], recipes, strict=True):
            for (width, depth, experts), colour in zip(sizes, itertools.cycle(figure.COLOURS)):
                if (curve := found.get(Shape(recipe, width, depth, experts=experts))) is None:
                    continue
                finite = {lr: loss for lr, loss in curve.items() if math.isfinite(loss)}
                name = f"{width} x {depth}" + (f", experts {experts}" if experts else "")
                axis.plot(list(finite), list(finite.values()), color=colour, marker=".", label=name)
                axis.plot([_best(curve)], [curve[_best(curve)]], color=colour, marker="*", markersize=13)
            axis.set_xscale("log", base=2)
            axis.set(xlabel="base learning rate", title=recipe)
            if math.isfinite(floor):  # not everything diverged
                axis.set_ylim(floor * 0.98, floor * 1.35)
        axes[0][0].set_ylabel("training loss (nats per byte)")
        axes[0][0].legend(frameon=False, title="width x depth")


def _best(curve: dict[float, float]) -> float:
    return min(curve, key=lambda lr: curve[lr])


def summary(results: Iterable[Transfer]) -> list[str]:
    """A line per shape and one per recipe, for people."""
    lines = []
    for recipe, chosen in grouped((r.shape.recipe, r) for r in results).items():
        for r in chosen:
            at = f"2^{math.log2(r.best_lr):g}, moved {r.moved:+g} steps of 2x"
            lines.append(f"{r.shape}: best loss {r.best_loss:.4f} at {at}; the base model's rate costs {r.cost:.2%}")
        farthest = max(abs(r.moved) for r in chosen)
        dearest = max((r.cost for r in chosen), key=lambda cost: (math.isnan(cost), cost))
        lines.append(f"{recipe}: the optimum moves by up to {farthest:g} steps of 2x and costs up to {dearest:.2%}")
    return lines
