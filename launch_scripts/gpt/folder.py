"""The folder of one run: metrics.csv, summary.json, report.png and checkpoints/."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from ds_plugin.core.errors import CheckpointError, ConfigError, DataError, raise_on_all_ranks
from ds_plugin.core.files import atomic_write, hold_folder

INT_COLUMNS = ("step", "tokens_trained", "tokens_read", "tokens_carried", "length", "length_held")
FLOAT_COLUMNS = (
    "lr", "train_loss", "eval_loss", "eval_loss_averaged", "tokens_per_second", "flops", "loss_ratio",
    "adam_variance_l1", "adam_variance_max",
)  # fmt: skip
COLUMNS = INT_COLUMNS + FLOAT_COLUMNS
"""The columns of metrics.csv, one row for each step that was logged; a cell is empty when nothing was measured.

step                optimizer steps finished, the first is 1
tokens_trained      tokens that entered a loss so far, all ranks together (shorter sequences count as shorter)
tokens_read         tokens taken from the data so far, all ranks together
tokens_carried      tokens read that later steps will train
length              sequence length of this step
length_held         1 if adaptive pacing held it at the length of the step before, 0 if not
lr                  learning rate of the first parameter group
train_loss          nats per token of this step's batch
eval_loss           nats per token on the validation batches, the weights as trained
eval_loss_averaged  the same with the averaged weights
tokens_per_second   trained tokens per second, all ranks together
flops               floating-point operations of training so far, all ranks together (see flops.py)
loss_ratio          this step's loss over the lowest before it
adam_variance_l1    l1 norm of the square root of Adam's second moments, after this step ("variance": true)
adam_variance_max   their largest element
"""


class RunFolder:
    """Paths and files of a run. Only rank 0 may call the methods that write."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.figure = self.path / "report.png"
        self.checkpoints = self.path / "checkpoints"
        self._stream: TextIO | None = None

    @classmethod
    def open(cls, root: Path, name: str, resume: bool) -> "RunFolder":
        """Return the folder `root/name`, made when it is not there, and held by this process until it ends.

        With torch.distributed initialised every rank must call this; rank 0 looks, makes and holds. No run's file is
        touched when it raises: StateError for a folder that another process holds (see `hold_folder`); ConfigError for
        a bad name, a folder that cannot be written, or without `resume` one that holds a run already; CheckpointError
        with `resume` for a folder without checkpoints/latest.
        """
        folder = cls(Path(root) / name)
        with raise_on_all_ranks():
            if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
                try:
                    folder._take(Path(root), name, resume)
                except OSError as error:
                    raise ConfigError(
                        f"name: the run's folder '{folder.path}' cannot be used ({error}); give --runs a folder that "
                        "can be written"
                    ) from error
        return folder

    def _take(self, root: Path, name: str, resume: bool) -> None:
        if not name or name.startswith(".") or Path(name).name != name:
            raise ConfigError(f"name: {name!r} cannot name a folder in '{root}'; write one without '/', like 'first'")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"name: '{self.path}' is a file; use another --name")
        if resume:
            if not (self.checkpoints / "latest").exists():
                raise CheckpointError(
                    f"resume: '{self.checkpoints / 'latest'}' does not exist, so there is nothing to go on from; check "
                    f"--name ({name!r}), or start without --resume"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        hold_folder(self.path)
        if resume:
            return
        found = [path.name for path in (self.metrics, self.summary, self.checkpoints) if path.exists()]
        if found:
            raise ConfigError(
                f"name: '{self.path}' already holds a run ({', '.join(found)}); use --resume to go on with it, or "
                f"another --name"
            )

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.csv and flush it. Floats are written so that reading gives the same bits; None or a
        missing column is left empty. Raises ValueError for a column that does not exist or a row without a step."""
        unknown = set(row) - set(COLUMNS)
        if unknown or row.get("step") is None:
            raise ValueError(f"a row of metrics.csv has a step and columns of {COLUMNS}, got {dict(row)}")
        if self._stream is None:
            new = not self.metrics.exists()
            self._stream = open(self.metrics, "a", encoding="utf-8", buffering=1)  # each whole line goes out at once
            if new:
                self._stream.write(",".join(COLUMNS) + "\n")
        self._stream.write(",".join(_cell(name, row.get(name)) for name in COLUMNS) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop the rows above `step`, the step a resumed run goes on from, and a last line that was not finished.

        Those steps will be trained and logged again. The file is replaced as a whole. Raises DataError when metrics.csv
        is not one of this program's.
        """
        self.close()
        if not self.metrics.exists():
            return
        rows = [row for row in _rows(self.metrics) if int(row[0]) <= step]
        lines = [",".join(row) + "\n" for row in [list(COLUMNS), *rows]]
        atomic_write(self.metrics, lambda path: path.write_text("".join(lines), encoding="utf-8"))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json as a whole. Paths become strings; NaN is written as Python's json writes it."""
        text = json.dumps(dict(summary), indent=2, default=str) + "\n"
        atomic_write(self.summary, lambda path: path.write_text(text, encoding="utf-8"))

    def close(self) -> None:
        """Close metrics.csv; the next append opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def read_metrics(path: Path) -> dict[str, list]:
    """Read a metrics.csv: for each column a list of int or float, None where nothing was measured.

    A last line without its line end (the writer was killed, or is at it) is left out. Raises DataError when the file
    does not exist or is damaged.
    """
    rows = _rows(Path(path))
    return {
        name: [None if row[i] == "" else (int if name in INT_COLUMNS else float)(row[i]) for row in rows]
        for i, name in enumerate(COLUMNS)
    }


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    # float() first: repr of a numpy or torch number is not a plain number
    return repr(int(value)) if name in INT_COLUMNS else repr(float(value))


def _rows(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"metrics: '{path}' does not exist; give the metrics.csv of a run") from error
    finished = text[: text.rfind("\n") + 1]
    header, *rows = list(csv.reader(finished.splitlines())) or [[]]
    if finished and tuple(header) != COLUMNS:
        raise DataError(f"metrics: '{path}' has the columns {header}, expected {list(COLUMNS)}; move it away")
    for line, row in enumerate(rows, start=2):
        try:
            int(row[0])
            [float(cell) for cell in row if cell]
            damaged = len(row) != len(COLUMNS)
        except (ValueError, IndexError):
            damaged = True
        if damaged:
            raise DataError(f"metrics: line {line} of '{path}' is damaged ({','.join(row)!r}); remove that line")
    return rows
