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
from ds_plugin.core.files import atomic_write
from ds_plugin.sweeps import trial
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    recipes = list(dict.fromkeys(row.recipe for row in rows))
    widths = sorted({row.width for row in rows})
    steps = max(row.step for row in rows)
    colours = dict(zip(widths, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"), strict=False))
    figure, axes = pyplot.subplots(1, len(recipes), figsize=(4.2 * len(recipes), 4), sharey=True, squeeze=False)
    for axis, recipe in zip(axes[0], recipes, strict=True):
        for width in widths:
            for step in range(1, steps + 1):
                chosen = [r for r in rows if (r.recipe, r.width, r.step, r.layer) == (recipe, width, step, LAST_BLOCK)]
                depths = sorted({r.depth for r in chosen})
                changes = [mean(r.change for r in chosen if r.depth == depth) for depth in depths]
                last = step == steps
                axis.plot(
                    depths,
                    changes,
                    marker="o" if last else None,
                    color=colours.get(width, "#555555"),
                    alpha=1.0 if last else 0.2,
                    linewidth=1.8 if last else 0.8,
                    label=f"width {width}" if last else None,
                )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted({row.depth for row in rows}), [str(d) for d in sorted({row.depth for row in rows})])
        axis.set_xlabel("depth (layers)")
        axis.set_title(f"{recipe}: spread {spread(rows, recipe):.3g}x", fontsize=11)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(f"mean |change| of the last block after 1 to {steps} steps")
    axes[0][0].legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=150))
    pyplot.close(figure)


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
