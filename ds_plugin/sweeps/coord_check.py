"""The coordinate check: how far training moves the activations of models of every width and depth.

Under a parametrization that transfers, the mean absolute change of the last block's output after a few steps is the
same at every shape (CompleteP, arXiv 2505.01618, figure 7; for width, Yang et al., arXiv 2203.03466, appendix D.1).
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ds_plugin.completep.rules import Recipe
from ds_plugin.sweeps import figure, trial
from ds_plugin.sweeps.trial import Base, Seeded, Shape
from megatron_patches.completep.residual import scaled_before

LAST_BLOCK = "last_block"


@dataclass(frozen=True)
class Row(Seeded):
    """One measurement: the mean absolute change of a layer's output on a fixed probe after ``step`` optimizer steps."""

    step: int
    layer: str
    change: float


def measure(shape: Shape, base: Base, *, seed: int, steps: int, lr: float) -> list[Row]:
    """Train one model for ``steps`` steps at the constant base learning rate ``lr``; the change after every step."""
    model, adamw = trial.build(shape, base, seed)
    optimizer, batches = adamw(lr), trial.text_batches(base, seed)
    probe = next(batches)
    before = _outputs(model, probe)
    rows = []
    for step in range(1, steps + 1):
        trial.step(model, optimizer, next(batches), base.clip)
        for layer, output in _outputs(model, probe).items():
            change = (output - before[layer]).abs().mean().item()
            rows.append(Row(shape.recipe, shape.width, shape.depth, seed, step, layer, change))
    return rows


def changes(rows: Iterable[Row], recipe: Recipe, step: int | None = None) -> dict[Shape, float]:
    """The change of the last block after a step (None: the last), averaged over seeds, by the recipe's shapes."""
    rows = [row for row in rows if row.layer == LAST_BLOCK and row.recipe == recipe]
    step = step or max(row.step for row in rows)
    found: dict[Shape, list[float]] = {}
    for row in rows:
        if row.step == step:
            found.setdefault(row.shape, []).append(row.change)
    return {shape: mean(each) for shape, each in found.items()}


def spread(rows: Iterable[Row], recipe: Recipe) -> float:
    """The largest over the smallest change of the last block over all shapes of a recipe; 1 is perfect transfer."""
    found = changes(rows, recipe).values()
    least = min(found)
    return max(found) / least if least > 0 else math.inf


def draw(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """The figure known from the muP papers: change of the last block after each step against depth, by recipe."""
    recipes, widths, depths, steps = (
        sorted({getattr(row, name) for row in rows}) for name in ("recipe", "width", "depth", "step")
    )
    early = {"alpha": 0.2, "linewidth": 0.8}
    with figure.panels(path, 1, len(recipes), title=title, figsize=(4.2 * len(recipes), 4), sharey=True) as axes:
        for axis, recipe in zip(axes[0], recipes, strict=True):
            for step in steps:
                found = changes(rows, recipe, step)
                for number, width in enumerate(widths):
                    points = sorted((shape.depth, change) for shape, change in found.items() if shape.width == width)
                    style = early if step < steps[-1] else {"marker": "o", "label": f"width {width}"}
                    axis.plot(*zip(*points, strict=True), color=figure.COLOURS[number % len(figure.COLOURS)], **style)
            axis.set_xscale("log", base=2)
            axis.set_xticks(depths, [str(depth) for depth in depths])
            axis.set(xlabel="depth (layers)", yscale="log", title=f"{recipe}: spread {spread(rows, recipe):.3g}x")
        axes[0][0].set_ylabel(f"mean |change| of the last block after 1 to {steps[-1]} steps")
        axes[0][0].legend(frameon=False)


@torch.no_grad()
def _outputs(model: Any, probe: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of the embedding, the last attention, the last MLP, the last block, and the logits, on the probe.

    Those of attention and MLP are without the branch's multiplier.
    """
    last = model.decoder.layers[-1]
    watched = {
        "embedding": model.embedding,
        "attention": last.self_attention,
        "mlp": last.mlp,
        LAST_BLOCK: last,
        "logits": model.output_layer,
    }
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, module: Any, args: Any, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    with contextlib.ExitStack() as undo:
        for name, module in watched.items():
            undo.callback(module.register_forward_hook(functools.partial(keep, name)).remove)
        undo.callback(model.train)
        model.eval()
        trial.loss_of(model, probe)
    found["mlp"] /= scaled_before(last)
    return found
