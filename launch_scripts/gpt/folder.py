"""The folder of one run: metrics.csv, summary.json, report.png and checkpoints/."""

import contextlib
import csv
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_plugin.core.errors import CheckpointError, ConfigError, DataError, raise_on_all_ranks
from ds_plugin.core.files import write_text
from launch_scripts.gpt.hold import hold_folder, sweep_temporaries

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

_HEADER = ",".join(COLUMNS) + "\n"


class _Lines:
    """How many rows of metrics.csv there are, the first, and a hash of all."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.rows, self.first, self._hash = 0, "", hashlib.sha256()
        for line in lines:
            self.add(line)

    def add(self, line: str) -> None:
        self.first = self.first or line
        self.rows += 1
        self._hash.update(line.encode())

    def seal(self) -> dict[str, Any]:
        return {"rows": self.rows, "first": self.first, "sha256": self._hash.hexdigest()}


class RunFolder:
    """Paths and files of a run. Only rank 0 may call the methods that write."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.figure = self.path / "report.png"
        self.checkpoints = self.path / "checkpoints"
        self._stream: FileIO | None = None
        self._written = _Lines()
        self._kept: list[str] | None = None  # what a resume leaves of metrics.csv, until it writes a row

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
        if not name.isprintable() or not name or name.startswith(".") or Path(name).name != name:
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
        """Add a row to metrics.csv at once. Floats are written so that reading gives the same bits; None or a missing
        column is left empty.

        Raises:
            ValueError: a column that does not exist, or a row without a step.
            OSError: such as on a full disk; nothing of the row is in the file then.
        """
        unknown = set(row) - set(COLUMNS)
        if unknown or row.get("step") is None:
            raise ValueError(f"a row of metrics.csv has a step and columns of {COLUMNS}, got {dict(row)}")
        self.settle()
        if self._stream is None:
            self._stream = open(self.metrics, "ab", buffering=0)
        line = ",".join(_cell(name, row.get(name)) for name in COLUMNS) + "\n"
        begins = self._stream.seek(0, os.SEEK_END)
        text = (line if begins else _HEADER + line).encode()
        try:
            if self._stream.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # half a line goes again, so that the row can be added later
                self._stream.truncate(begins)
            raise
        self._written.add(line)

    def seal(self) -> dict[str, Any]:
        """What the rows of metrics.csv were at a save, JSON types only; they are on disk then. See `go_on_from`."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())
        return self._written.seal()

    def go_on_from(self, step: int, seal: Mapping[str, Any]) -> str | None:
        """Look whether metrics.csv is what it was when a checkpoint was saved at `step`, from where the run goes on.

        Nothing is written yet: `settle` drops the later rows, which will be trained and logged again, and a last line
        that was not finished. Returns a sentence when rows are missing, which nothing depends on.

        Raises:
            DataError: metrics.csv is damaged, or not this run's.
        """
        rows = _rows(self.metrics) if self.metrics.exists() else []
        kept = [",".join(row) + "\n" for row in rows if int(row[0]) <= step]
        found = _Lines(kept)
        lost = seal["rows"] - found.rows
        if (kept and found.first != seal["first"]) or (lost <= 0 and found.seal() != seal):
            raise DataError(
                f"metrics: '{self.metrics}' is not what it was when step {step} was saved ({found.rows} of "
                f"{seal['rows']} rows up to there): of another run, or changed since; put the run's own back, or move "
                "this one away to go on without the earlier rows"
            )
        self._kept, self._written = kept, found
        return f"metrics.csv lacks {lost} of the {seal['rows']} rows up to step {step}" if lost > 0 else None

    def settle(self) -> None:
        """Make metrics.csv what `go_on_from` has found, once; the file is replaced as a whole."""
        if self._kept is not None:
            write_text(self.metrics, _HEADER + "".join(self._kept))
            self._kept = None

    def sweep(self) -> None:
        """What a killed run was about to write goes. While no rank of this one writes."""
        for folder in filter(Path.is_dir, (self.path, self.checkpoints, *self.checkpoints.glob("*"))):
            sweep_temporaries(folder)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json as a whole. Paths become strings; NaN is written as Python's json writes it."""
        text = json.dumps(dict(summary), indent=2, default=str) + "\n"
        write_text(self.summary, text)

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
        finished = text[: text.rfind("\n") + 1]
        header, *rows = list(csv.reader(finished.splitlines())) or [[]]
    except FileNotFoundError as error:
        raise DataError(f"metrics: '{path}' does not exist; give the metrics.csv of a run") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"metrics: '{path}' cannot be read ({error}); move it away") from error
    if finished and tuple(header) != COLUMNS:
        raise DataError(f"metrics: '{path}' has the columns {header}, expected {list(COLUMNS)}; move it away")
    before = 0
    for line, row in enumerate(rows, start=2):
        try:
            step = int(row[0])
            [float(cell) for cell in row if cell]
            damaged = len(row) != len(COLUMNS)
        except (ValueError, IndexError):
            damaged = True
        if damaged:
            raise DataError(f"metrics: line {line} of '{path}' is damaged ({','.join(row)!r}); remove that line")
        if step <= before:
            what = f"line {line} of '{path}' is of step {step}, the one before of step {before}"
            raise DataError(f"metrics: {what}: two runs have written it; keep the rows of one")
        before = step
    return rows
