"""What a run shows while it works: a bar on a terminal, plain lines in a log, nothing on ranks that are not enabled."""

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

_MEGABYTE = 1e6
_LOG_SECONDS = 5.0  # in a log, the shortest time between lines that report nothing but another step
_RATE_STEPS = 50


class Progress:
    """Shows the stages of a run and the state of its training, from the first second on.

    A context manager. `total_steps` is the step the run ends with; `enabled` is true on rank 0 alone, elsewhere every
    method does nothing. On a terminal the last lines are redrawn in place and messages appear above them; otherwise
    every report is a line of its own, at most one in 5 seconds unless it says something besides another step.
    """

    def __init__(self, total_steps: int, enabled: bool, *, console: Console | None = None) -> None:
        self.total_steps = total_steps
        self.enabled = enabled
        self._console = console or Console(highlight=False)
        self._drawn = enabled and self._console.is_terminal
        self._started = self._last_line = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RATE_STEPS)
        self._evaluated: dict[str, float] = {}
        self._stage = ""
        self._first_step = True
        self._live: Live | None = None
        if self._drawn:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[times]}"),
                console=self._console,
                expand=True,
            )
            self._task: TaskID | None = None
            self._numbers = Text(no_wrap=True, overflow="ellipsis")
            self._live = Live(self._numbers, console=self._console, refresh_per_second=8)

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, text: str) -> None:
        """Name what begins now, such as "building the model"."""
        self._stage = text
        if self._live is not None:
            self._numbers.plain = f"{text} ..."
            self._show()
        else:
            self._line(f"{text} ...")

    def data(self, done: int, total: int) -> None:
        """How far the data is prepared, in bytes. Fits `prepare(progress=...)`."""
        text = f"preparing data {done / _MEGABYTE:.1f}/{total / _MEGABYTE:.1f} MB"
        if self._live is not None:
            self._numbers.plain = text
            self._show()
        elif done in (0, total) or self._due():
            self._line(text)

    def step(self, row: Mapping[str, Any]) -> None:
        """Report a finished step: a row of metrics.csv (see folder.COLUMNS); what is missing is not shown."""
        if not self.enabled:
            return
        now = time.monotonic()
        self._recent.append((now, row["step"]))
        new = {name: row[name] for name in ("eval_loss", "eval_loss_averaged") if row.get(name) is not None}
        self._evaluated |= new
        elapsed, left = _clock(now - self._started), _clock(self._seconds_left())
        # a line of a log shows what this step measured; the bar keeps the last evaluation in sight
        numbers = self._numbers_of({**row, **self._evaluated} if self._live is not None else row)
        if self._live is not None:
            if self._task is None:
                self._task = self._bar.add_task("training", total=self.total_steps, times="")
            self._bar.update(self._task, completed=row["step"], times=f"{elapsed} elapsed, {left} left")
            self._numbers.plain = numbers
            self._show()
        elif new or self._first_step or row["step"] == self.total_steps or self._due():
            self._line(f"step {row['step']}/{self.total_steps}  {numbers}  {elapsed} elapsed, {left} left")
        self._first_step = False

    def message(self, text: str) -> None:
        """Say something that stays: above the bar on a terminal, a line in a log."""
        text = text.encode(errors="backslashreplace").decode()  # a file's name need not be UTF-8
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def _show(self) -> None:
        assert self._live is not None
        self._live.update(self._numbers if self._task is None else Group(self._bar, self._numbers))

    def _line(self, text: str) -> None:
        if self.enabled:
            self._last_line = time.monotonic()
            # Not through the console: it would wrap at 80 columns, which makes a log hard to search.
            self._console.file.write(text + "\n")
            self._console.file.flush()

    def _due(self) -> bool:
        return time.monotonic() - self._last_line >= _LOG_SECONDS

    def _seconds_left(self) -> float | None:
        (then, first), (now, last) = self._recent[0], self._recent[-1]
        if last <= first:
            return None
        return (now - then) / (last - first) * max(0, self.total_steps - last)

    def _numbers_of(self, row: Mapping[str, Any]) -> str:
        formats = {
            "length": "length {:d}",
            "lr": "lr {:.2e}",
            "train_loss": "loss {:.4f}",
            "eval_loss": "eval {:.4f}",
            "eval_loss_averaged": "averaged {:.4f}",
            "tokens_per_second": "{:,.0f} tokens/s",
        }
        return "  ".join(form.format(row[name]) for name, form in formats.items() if row.get(name) is not None)


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds: 5025 is 1:23:45, 83 is 1:23."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
