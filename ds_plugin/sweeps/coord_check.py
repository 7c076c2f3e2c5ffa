"""The coordinate check: how far training moves the activations of models of every width and depth.

Under a parametrization that transfers, the mean absolute change of the last block's output after a few steps is the
same at every shape (CompleteP, arXiv 2505.01618, figure 7; for width, Yang et al., arXiv 2203.03466, appendix D.1).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ds_plugin.completep.rules import Recipe
from ds_plugin.sweeps import figure, trial
from ds_plugin.sweeps.trial import Base, Shape
from megatron_patches.completep.residual import scaled_before

LAST_BLOCK = "last_block"


@dataclass(frozen=True)
class Row:
    """One measurement: the mean absolute change of a layer's output on a fixed probe after ``step`` optimizer steps."""

    recipe: Recipe
    width: int
    depth: int
    seed: int
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


def sweep(
    shapes: Iterable[Shape],
    base: Base,
    *,
    seeds: Sequence[int],
    steps: int,
    lr: float,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """`measure` of every shape and seed; ``progress`` gets a line after each."""
    jobs = [(shape, seed) for shape in shapes for seed in seeds]
    rows: list[Row] = []
    for number, (shape, seed) in enumerate(jobs, start=1):
        rows += measure(shape, base, seed=seed, steps=steps, lr=lr)
        last = next(row for row in reversed(rows) if row.layer == LAST_BLOCK)
        progress(
            f"[{number}/{len(jobs)}] {shape.recipe} width {shape.width} depth {shape.depth} seed {seed}: "
            f"last block moved {last.change:.4g}"
        )
    return rows


def final_changes(rows: Iterable[Row], layer: str = LAST_BLOCK) -> dict[Shape, float]:
    """The change of ``layer`` after the last step, averaged over seeds, by shape."""
    rows = [row for row in rows if row.layer == layer]
    last = max(row.step for row in rows)
    found: dict[Shape, list[float]] = {}
    for row in rows:
        if row.step == last:
            found.setdefault(Shape(row.recipe, row.width, row.depth), []).append(row.change)
    return {shape: mean(changes) for shape, changes in found.items()}


def spread(rows: Iterable[Row], recipe: Recipe) -> float:
    """The largest over the smallest change of the last block over all shapes of a recipe; 1 is perfect transfer."""
    changes = [change for shape, change in final_changes(rows).items() if shape.recipe == recipe]
    return max(changes) / min(changes)


def draw(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """The figure known from the muP papers: change of the last block after each step against depth, by recipe."""
    recipes = list(dict.fromkeys(row.recipe for row in rows))
    widths, depths = (sorted({getattr(row, name) for row in rows}) for name in ("width", "depth"))
    steps = max(row.step for row in rows)
    colours = dict(zip(widths, figure.COLOURS, strict=False))
    with figure.panels(path, 1, len(recipes), title=title, figsize=(4.2 * len(recipes), 4), sharey=True) as axes:
        for axis, recipe in zip(axes[0], recipes, strict=True):
            for width in widths:
                style: dict[str, Any] = {"color": colours.get(width, "#555555"), "alpha": 0.2, "linewidth": 0.8}
                for step in range(1, steps + 1):
                    key = recipe, width, step, LAST_BLOCK
                    chosen = [row for row in rows if (row.recipe, row.width, row.step, row.layer) == key]
                    found = sorted({row.depth for row in chosen})
                    changes = [mean(row.change for row in chosen if row.depth == depth) for depth in found]
                    if step == steps:
                        style |= {"alpha": 1.0, "linewidth": 1.8, "marker": "o", "label": f"width {width}"}
                    axis.plot(found, changes, **style)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(depths, [str(depth) for depth in depths])
            axis.set_xlabel("depth (layers)")
            axis.set_title(f"{recipe}: spread {spread(rows, recipe):.3g}x", fontsize=11)
        axes[0][0].set_ylabel(f"mean |change| of the last block after 1 to {steps} steps")
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

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        model.eval()
        trial.loss_of(model, probe)
    finally:
        model.train()
        for handle in handles:
            handle.remove()
    found["mlp"] /= scaled_before(last)
    return found
