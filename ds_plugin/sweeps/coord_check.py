"""The coordinate check: how far training moves the activations of models of every width and depth.

Under a parametrization that transfers, the mean absolute change of the last block's output after a few steps is the
same at every shape (CompleteP, arXiv 2505.01618, figure 7; for width, Yang et al., arXiv 2203.03466, appendix D.1).
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ds_plugin.completep.rules import Recipe
from ds_plugin.sweeps import figure, trial
from ds_plugin.sweeps.builders import Builder
from ds_plugin.sweeps.trial import Base, Seeded, Shape, Trial, grouped

LAST_BLOCK = "last_block"
LAYERS = ("embedding", "attention", "mlp", LAST_BLOCK, "logits")


@dataclass(frozen=True)
class Row(Seeded):
    """One measurement: the mean absolute change of a layer's output on a fixed probe after ``step`` optimizer steps."""

    step: int
    layer: str
    change: float


def measure(builder: Builder, shape: Shape, base: Base, *, seed: int, steps: int, lr: float) -> list[Row]:
    """Train one model for ``steps`` steps at the constant base learning rate ``lr``; the change after every step."""
    built = builder.build(shape, base, seed)
    optimizer, batches = built.optimizer(lr), trial.text_batches(base, seed)
    probe = next(batches)
    before = _outputs(built, probe)
    rows = []
    for step in range(1, steps + 1):
        trial.step(built, optimizer, next(batches))
        for layer, output in _outputs(built, probe).items():
            change = (output - before[layer]).abs().mean().item()
            rows.append(Row(**vars(shape), seed=seed, step=step, layer=layer, change=change))
    return rows


def changes(rows: Iterable[Row], recipe: Recipe) -> dict[Shape, float]:
    """The change of the last block after the last step, averaged over seeds, by the recipe's shapes."""
    rows = [row for row in rows if row.layer == LAST_BLOCK and row.recipe == recipe]
    last = max(row.step for row in rows)
    found = grouped((row.shape, row.change) for row in rows if row.step == last)
    return {shape: mean(each) for shape, each in found.items()}


def spread(rows: Iterable[Row], recipe: Recipe) -> float:
    """The largest over the smallest change of the last block over all shapes of a recipe; 1 is perfect transfer, and
    infinite is one where a shape diverged or did not move."""
    found = changes(rows, recipe).values()
    return max(found) / min(found) if all(0 < change < math.inf for change in found) else math.inf


def draw(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """The figure known from the muP papers: how far each layer moved against depth, a line per width, mixture and step
    (of several mixtures of experts the last step alone), there with a band from the least seed to the largest."""
    recipes, layers = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("recipe", "layer"))
    widths, depths, steps = (sorted({getattr(row, name) for row in rows}) for name in ("width", "depth", "step"))
    mixtures = list(dict.fromkeys(row.experts for row in rows))
    steps = steps if len(mixtures) == 1 else steps[-1:]
    coloured, dashed = zip(widths, itertools.cycle(figure.COLOURS)), zip(mixtures, itertools.cycle(figure.STYLES))
    lines = list(itertools.product(coloured, dashed, steps))
    points = (((row.recipe, row.layer, row.width, row.experts, row.step), (row.depth, row.change)) for row in rows)
    found = grouped(points)
    size = (3.6 * len(recipes) + 1, 2.4 * len(layers) + 1)
    shared: dict[str, Any] = {"title": title, "figsize": size, "sharex": True, "sharey": "row"}
    with figure.panels(path, len(layers), len(recipes), **shared) as axes:
        for (i, layer), (j, recipe) in itertools.product(enumerate(layers), enumerate(recipes)):
            axis = axes[i][j]
            for (width, colour), (experts, dashes), step in lines:
                line, last = (recipe, layer, width, experts, step), step == steps[-1]
                curve = sorted(grouped(found.get(line, ())).items())
                at, name = [depth for depth, _ in curve], f"width {width}" + (f", experts {experts}" if experts else "")
                style = {"marker": "o", "markersize": 3, "label": name} if last else {"linewidth": 0.8}
                style |= {"color": colour, "linestyle": dashes, "alpha": step / steps[-1]}
                axis.plot(at, [mean(each) for _, each in curve], **style)
                if last:
                    band = [min(each) for _, each in curve], [max(each) for _, each in curve]
                    axis.fill_between(at, *band, color=colour, alpha=0.2, linewidth=0)
            axis.set(yscale="log", ylabel=f"{layer}, mean |change|" if j == 0 else "")
            axis.set_xscale("log", base=2)
            axis.set_xticks(depths, [str(depth) for depth in depths])
        for axis, recipe in zip(axes[0], recipes, strict=True):
            axis.set_title(f"{recipe}: last block's spread {spread(rows, recipe):.3g}x")
        for axis in axes[-1]:
            axis.set_xlabel("depth (layers)")
        roomy = axes[layers.index(LAST_BLOCK)][0]  # the others' lines leave the first recipe's panel empty
        for step in steps:
            roomy.plot([], [], color="black", alpha=step / steps[-1], label=f"step {step}")
        roomy.legend(frameon=False, fontsize="x-small", ncols=2)


@torch.no_grad()
def _outputs(built: Trial, probe: trial.Batch) -> dict[str, torch.Tensor]:
    """The outputs of `LAYERS` on the probe; the last attention's and MLP's are without the branch's multiplier."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, divisor: float, module: Any, args: Any, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).detach() / divisor

    with contextlib.ExitStack() as undo:
        for name, module, divisor in zip(LAYERS, built.watched, built.scaled, strict=True):
            undo.callback(module.register_forward_hook(functools.partial(keep, name, divisor)).remove)
        undo.callback(built.model.train)
        built.model.eval()
        built.loss(probe)
    return found
