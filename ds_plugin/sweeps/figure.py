"""A figure of a sweep: panels side by side, in a file that is whole or not there."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_plugin.core.files import atomic_write

#: of a figure's curves, and what curves of one colour differ in
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "--", ":", "-.")


@contextlib.contextmanager
def panels(path: Path, rows: int, columns: int, *, title: str | None = None, **settings: Any) -> Iterator[Any]:
    """The axes, an array of rows and columns, to draw on; written to ``path`` when the block ends. ``settings``: of
    pyplot's ``subplots``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, squeeze=False, **settings)
    try:
        yield axes
        for axis in axes.flat:
            axis.grid(alpha=0.25)
        if title is not None:
            figure.suptitle(title)
        figure.tight_layout()
        for axis in axes.flat:
            _part(axis)
        atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=150))
    finally:
        pyplot.close(figure)


def _part(axis: Any) -> None:
    """Move names that are written at the ends of curves apart, upwards from the lowest."""
    low, high = axis.get_ylim()
    gap = 0.045 * (high - low)
    names = sorted((text for text in axis.texts if low <= text.xy[1] <= high), key=lambda text: text.xy[1])
    for below, above in itertools.pairwise(names):
        above.set_y(max(above.get_position()[1], below.get_position()[1] + gap))
