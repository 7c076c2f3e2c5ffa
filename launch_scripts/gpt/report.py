"""The figure of a run, from its metrics.csv."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds_plugin.core.files import atomic_write
from launch_scripts.gpt.folder import read_metrics

# Okabe and Ito's palette: told apart with every common kind of colour blindness, and by marker and dash in print.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#A8457F", "#6B6B6B"
_INK, _RULE = "#222222", "#D9D9D9"
_UNITS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
_EVALUATIONS = (
    ("eval_loss", "validation", _ORANGE, "o"),
    ("eval_loss_averaged", "validation, averaged weights", _GREEN, "D"),
)
_SMOOTH_FROM = 20  # with fewer points the line is its own summary
_FLAT = 0.15  # the last half gets a panel of its own when it spans less than this part of the whole range


def draw(metrics_csv: Path, png: Path, *, title: str, unigram_entropy: float | None) -> None:
    """Draw losses (nats per token), sequence length (tokens) and learning rate against tokens trained.

    `unigram_entropy` is in nats (see corpus.entropy), None to leave the line out. Whatever was not measured is left
    out. Where the last half of the run is flat beside its beginning, an inset enlarges it.

    Raises DataError when `metrics_csv` is missing or damaged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = {
        name: np.array([np.nan if value is None else value for value in column], dtype=float)
        for name, column in read_metrics(metrics_csv).items()
    }
    largest = np.nanmax(metrics["tokens_trained"], initial=0)
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if largest >= scale), (1.0, ""))
    x, right = metrics["tokens_trained"] / scale, (largest / scale or 1.0)

    # Figure and canvas by hand: pyplot would choose a backend for the whole process.
    figure = Figure(figsize=(9, 6), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    loss, schedule = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    loss.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=30)
    loss.set_xlim(0, 1.01 * right)  # the last marker is not cut in half
    _draw_losses(loss, x, metrics, unigram_entropy)
    _draw_schedule(schedule, x, metrics)
    schedule.set_xlabel(f"tokens trained ({unit})" if unit else "tokens trained")
    figure.align_ylabels([loss, schedule])
    atomic_write(png, lambda path: figure.savefig(path, format="png", metadata={"Title": title}))


def smooth(values: Sequence[float] | np.ndarray, share: float = 0.02) -> np.ndarray:
    """Centred moving average over `share` of the values (at least 5). Same shape as `values`, float64.

    The window narrows towards the start, where the loss falls too fast to average over it from one side, and is cut off
    at the end, where it does not.
    """
    values = np.asarray(values, dtype=float)
    reach = max(2, int(len(values) * share / 2))
    position = np.arange(len(values))
    first = position - np.minimum(reach, position)
    last = np.minimum(position + (position - first), len(values) - 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _draw_losses(axes: Any, x: np.ndarray, metrics: dict[str, np.ndarray], unigram_entropy: float | None) -> None:
    _tidy(axes)
    axes.set_ylabel("loss (nats per token)")
    shown = _draw_curves(axes, x, metrics)
    if shown:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9.5, borderpad=0.2,
            columnspacing=1.6, handletextpad=0.6, labelcolor=_INK,
        )  # fmt: skip
    losses = [value for _, values in shown for value in values]
    if unigram_entropy is not None:
        losses.append(unigram_entropy)
        axes.axhline(unigram_entropy, color=_GREY, linestyle=(0, (5, 3)), linewidth=1.1, zorder=1.5)
        axes.annotate(
            f"unigram entropy {unigram_entropy:.3f}", (0.995, unigram_entropy), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=9, color=_GREY,
        )  # fmt: skip
    if losses:
        low, high = min(losses), max(losses)
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
        _enlarge_last_half(axes, x, metrics, shown, unigram_entropy)


def _draw_curves(
    axes: Any, x: np.ndarray, metrics: dict[str, np.ndarray], *, raw: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw the curves; return the points that should be in view, (x, y) for each."""
    shown = []
    measured = np.isfinite(metrics["train_loss"])
    where, train = x[measured], metrics["train_loss"][measured]
    if len(train) > _SMOOTH_FROM:
        if raw:
            axes.plot(where, train, color=_BLUE, alpha=0.28, linewidth=0.7)
        train = smooth(train)
        axes.plot(where, train, color=_BLUE, linewidth=1.8, label="training, smoothed")
    elif len(train):
        axes.plot(where, train, color=_BLUE, linewidth=1.5, marker=".", label="training")
    if len(train):
        shown.append((where, train))
    for name, label, color, marker in _EVALUATIONS:
        measured = np.isfinite(metrics[name])
        if measured.any():
            where, values = x[measured], metrics[name][measured]
            axes.plot(
                where, values, color=color, marker=marker, markersize=5.5, markeredgecolor="white", linewidth=1.3,
                markeredgewidth=0.8, zorder=4, label=f"{label} (last {values[-1]:.3f})",
            )  # fmt: skip
            shown.append((where, values))
    return shown


def _enlarge_last_half(
    axes: Any,
    x: np.ndarray,
    metrics: dict[str, np.ndarray],
    shown: list[tuple[np.ndarray, np.ndarray]],
    unigram_entropy: float | None,
) -> None:
    right = axes.get_xlim()[1]
    middle = right / 2
    late = np.concatenate([values[where >= middle] for where, values in shown] or [np.zeros(0)])
    bottom, top = axes.get_ylim()
    if len(late) < 10 or np.ptp(late) == 0 or np.ptp(late) > _FLAT * (top - bottom):
        return
    # The free space above the curve, cut in two by the line of the unigram entropy: take the taller part.
    free = [((late.max() - bottom) / (top - bottom) + 0.16, 0.97)]
    if unigram_entropy is not None and free[0][0] < (line := (unigram_entropy - bottom) / (top - bottom)) < 0.97:
        free = [(free[0][0], line - 0.03), (line + 0.13, 0.97)]
    low, high = max(free, key=lambda part: part[1] - part[0])
    if high - low < 0.25:
        return
    inset = axes.inset_axes([0.44, low, 0.56, high - low], zorder=5)
    _tidy(inset)
    inset.set_facecolor("white")
    _draw_curves(inset, x, metrics, raw=False)  # the scatter of single batches would fill this scale
    inset.set_xlim(middle, right)
    inset.set_ylim(late.min() - 0.2 * np.ptp(late), late.max() + 0.2 * np.ptp(late))
    inset.tick_params(labelsize=8.5)
    inset.locator_params(axis="y", nbins=4)
    inset.locator_params(axis="x", nbins=5)
    inset.text(0.99, 0.96, "the last half, enlarged", transform=inset.transAxes, ha="right", va="top", fontsize=9,
               color=_GREY)  # fmt: skip


def _draw_schedule(axes: Any, x: np.ndarray, metrics: dict[str, np.ndarray]) -> None:
    _tidy(axes)
    axes.set_ylabel("length\n(tokens)", color=_PURPLE)
    measured = np.isfinite(metrics["length"])
    if measured.any():
        length = metrics["length"][measured]
        # A row tells what held up to it, so each level is drawn before its point, the first from 0 on.
        axes.step([0, *x[measured]], [length[0], *length], where="pre", color=_PURPLE, linewidth=1.8)
        axes.set_ylim(0, 1.15 * length.max())
        axes.set_yticks([0, length.max() / 2, length.max()])
    measured = np.isfinite(metrics["lr"])
    if measured.any():
        peak = metrics["lr"][measured].max() or 1.0
        twin = axes.twinx()
        twin.plot(x[measured], metrics["lr"][measured], color=_GREY, linewidth=1.4, linestyle=(0, (1, 1)))
        twin.set_ylim(0, 1.15 * peak)
        twin.set_yticks([0, peak / 2, peak], [f"{value:.2g}" for value in (0, peak / 2, peak)])
        twin.set_ylabel("learning rate\n(dotted)", color=_GREY, fontsize=10.5)
        twin.tick_params(colors=_GREY, labelsize=9, length=0)
        twin.spines[:].set_visible(False)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9.5, length=0)
    axes.xaxis.label.set(color=_INK, fontsize=10.5)
    axes.yaxis.label.set(color=_INK, fontsize=10.5)
