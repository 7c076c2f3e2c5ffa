"""The figure of a run: it is drawn whatever was measured, and its smoothing is right at the ends."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ds_plugin.core.errors import DataError
from launch_scripts.gpt.folder import COLUMNS, RunFolder
from launch_scripts.gpt.report import draw, smooth


def write(tmp_path: Path, rows: int, **columns) -> RunFolder:
    folder = RunFolder(tmp_path)
    for step in range(1, rows + 1):
        row = {"step": step, "tokens_trained": 1000 * step, "length": 64, "lr": 1e-3 * step / rows}
        row["train_loss"] = 1 + 4 * 0.9**step
        folder.append(row | {name: value(step) for name, value in columns.items()})
    folder.close()
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every figure that is saved."""
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    savefig = Figure.savefig

    def noted_savefig(self: Figure, *args, **kwargs) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noted_savefig)
    return saved


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_full_run(tmp_path: Path, figures: list):
    folder = write(
        tmp_path,
        200,
        eval_loss=lambda step: 1.1 if step % 20 == 0 else None,
        eval_loss_averaged=lambda step: 1.05 if step % 20 == 0 and step > 100 else None,
        length=lambda step: 32 if step < 100 else 64,
    )
    draw(folder.metrics, folder.figure, title="a title", unigram_entropy=3.25)
    assert folder.figure.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    loss, schedule = figure.axes[:2]
    assert loss.get_title(loc="left") == "a title"
    assert labels(figure) == [
        "training, smoothed",
        "validation (last 1.100)",
        "validation, averaged weights (last 1.050)",
    ]
    assert loss.get_ylabel() == "loss (nats per token)" and "tokens" in schedule.get_ylabel()
    assert schedule.get_xlabel() == "tokens trained (thousand)"
    assert [text.get_text() for text in loss.texts] == ["unigram entropy 3.250"]
    assert loss.get_xlim() == schedule.get_xlim()
    line = schedule.lines[0]
    assert line.get_xydata()[:2].tolist() == [[0, 32], [1, 32]] and line.get_ydata()[-1] == 64
    assert len(loss.child_axes) == 1  # flat at the end: enlarged
    assert [path.name for path in tmp_path.glob("*.png")] == ["report.png"]


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_few_rows(tmp_path: Path, figures: list, rows: int):
    folder = write(tmp_path, rows)
    if rows == 0:
        folder.metrics.write_text(",".join(COLUMNS) + "\n")
    draw(folder.metrics, folder.figure, title="t", unigram_entropy=3.0)
    assert folder.figure.stat().st_size > 1000
    if rows:
        assert labels(figures[0]) == ["training"] and not figures[0].axes[0].child_axes


def test_nothing_optional(tmp_path: Path, figures: list):
    folder = write(tmp_path, 30, lr=lambda step: None, train_loss=lambda step: 2.0)
    draw(folder.metrics, folder.figure, title="t", unigram_entropy=None)
    assert labels(figures[0]) == ["training, smoothed"] and not figures[0].axes[0].texts
    assert len(figures[0].axes) == 2  # no axis for a learning rate that nobody measured


def test_diverged_run(tmp_path: Path):
    folder = write(tmp_path, 30, train_loss=lambda step: 2.0 if step < 20 else float("nan"))
    draw(folder.metrics, folder.figure, title="t", unigram_entropy=3.0)
    assert folder.figure.is_file()


def test_missing_metrics(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        draw(tmp_path / "none.csv", tmp_path / "x.png", title="t", unigram_entropy=None)
    assert list(tmp_path.iterdir()) == []


def test_no_backend_is_chosen(tmp_path: Path):
    """A user's notebook keeps the pyplot backend it has."""
    before = "matplotlib.pyplot" in sys.modules
    folder = write(tmp_path, 3)
    draw(folder.metrics, folder.figure, title="t", unigram_entropy=None)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_smooth():
    # reach 2; narrower at the start (0, 1, 2 to each side), cut off at the end
    values = [10.0, 0.0, 5.0, 1.0, 4.0, 8.0]
    expected = [10.0, 15 / 3, 20 / 5, 18 / 5, 18 / 4, 13 / 3]
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-15)
    np.testing.assert_allclose(smooth(np.full(1000, 3.0)), 3.0, rtol=1e-12)
    assert len(smooth([])) == 0 and smooth([2.0]).tolist() == [2.0]
