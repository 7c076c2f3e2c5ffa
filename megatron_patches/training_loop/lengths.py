"""Sequence length warmup in Megatron-LM's loop: the length of each iteration, and what has been trained."""

from collections.abc import Mapping
from typing import Any

from ds_plugin.core.errors import CheckpointError, ConfigError
from ds_plugin.core.loss_statistics import Readings, Report, StabilityMonitor
from ds_plugin.sequence_length_warmup.carry import CarryOrder, TokenSpan
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.hold import Hold
from ds_plugin.sequence_length_warmup.plan import plan
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule

_FREE = {"preflight", "report_interval", "variance"}  # fields of the section that a resumed run may have otherwise


class Lengths:
    """The schedule on one run. Tokens are of all ranks together; every rank counts the same, asking no other."""

    def __init__(self, config: SequenceLengthWarmupConfig, *, full: int, layout_multiple: int, batch: int):
        """``full``: ``--seq-length``. ``layout_multiple``: into how many equal parts the layout cuts a sample.
        ``batch``: samples of an iteration. Raises ConfigError: the section does not fit the run."""
        if config.end_length != full:
            what = f"{config.end_length!r} is not --seq-length {full}"
            raise ConfigError(f"sequence_length_warmup.end_length: {what}; write {full!r}")
        self.config, self.full, self.batch = config, full, batch
        self.schedule = LengthSchedule(config, layout_multiple=layout_multiple)
        self.iterations = 0  # that have been trained
        self.trained = 0  # tokens
        self.last = full  # length of the iteration before; in the mask mode, of its fragments
        order = {"full": full, "multiple_of": self.schedule.multiple_of, "interleave": config.windows}
        self.order = CarryOrder(**order) if config.mode == "carry" else None
        self.hold = Hold(config)
        self.monitor: StabilityMonitor | None = None
        self.ratio: float | None = None  # the newest report's loss ratio, for the log
        self._span: TokenSpan | None = None

    def watch(self, readings: Readings) -> None:
        """Begin to read the instruments, once there are a model and an optimizer."""
        c, equal = self.config, lambda: {"length": self.length}
        self.monitor = StabilityMonitor(readings, c.report_interval, equal, c.reads_variance)

    @property
    def span(self) -> TokenSpan:
        """What each sample of the next iteration is trained on. A window is an iteration's samples."""
        if self._span is None:
            done = self.iterations if self.config.duration.unit == "steps" else self.trained
            length = self.schedule.length_at(done + 1 - self.hold.lag)
            whole = TokenSpan(self.iterations, 0, length)
            self._span = whole if self.order is None else self.order.peek(length)
        return self._span

    @property
    def length(self) -> int:
        """Tokens of a sample in the next iteration; in the mask mode, of a fragment."""
        return self.span.length

    @property
    def tokens(self) -> int:
        """Tokens of a sample that the next iteration's model is given."""
        return self.full if self.config.mode == "mask" else self.length

    @property
    def parts(self) -> int:
        """Into how many samples each one is cut, where a step keeps its tokens."""
        return self.full // self.length if self.config.tokens_per_step == "constant" else 1

    @property
    def open_windows(self) -> list[int]:
        """Of which a part is still to be trained."""
        return [window for window, _ in self.order.open] if self.order is not None else []

    @property
    def first_window(self) -> int | None:
        """With which the loader begins, the first that is still needed: fewer are read than iterations were made.
        None: where Megatron-LM's own count says."""
        if self.order is None:
            return None
        first = min([*self.open_windows, self.order.windows_read])
        return first if first != self.iterations else None

    def booked(self, samples: int, applied: bool) -> Report | None:
        """The iteration is over: ``samples`` are over all ranks. A report, if it is time for one."""
        span, length, tokens = self.span, self.length, samples * self.tokens * self.parts
        self.iterations += 1
        self.trained += tokens * applied
        if self.order is not None:
            self.order.advance(span)
        self._span, self.last = None, length
        report = self.monitor.close_step(length) if self.monitor is not None else None
        if report is not None:
            self.ratio = report.loss_ratio if report.loss_ratio is not None else self.ratio
            self.hold.judge(report, length, self.full)
        self.hold.step(tokens * applied)
        self._span = None  # the report has asked for the length already
        return report

    def increment(self, samples: int) -> int:
        """By how many samples of full length the learning rate's schedule moves on for this iteration's ``samples``.
        Megatron-LM counts whole ones; what is left over is not lost."""
        return (self.trained + samples * self.tokens * self.parts) // self.full - self.trained // self.full

    def describe(self, *, iterations: int) -> str:
        c, run = self.config, plan(self.schedule, self.batch, steps=iterations)
        held = ", held while unstable" if self.hold.on else ""
        return (
            f"sequence length warmup: {c.start_length} to {c.end_length} tokens, {c.schedule}, over {c.duration.total} "
            f"{c.duration.unit}, in multiples of {self.schedule.multiple_of}, mode {c.mode}{held}; {iterations} "
            f"iterations from the first on train {run.trained} tokens of {run.read} read"
        )

    def state(self) -> dict[str, Any]:
        """JSON types. It holds a collective: every rank calls it."""
        stability = self.monitor.state() if self.monitor is not None else None
        counts = {"iterations": self.iterations, "trained": self.trained, "stability": stability, "ratio": self.ratio}
        order = self.order.state() if self.order is not None else None
        return {**counts, **self.hold.state(), "order": order, **self._fixed()}

    def load_state(self, state: Mapping[str, Any] | None, *, iteration: int, samples: int) -> None:
        """Take over a saved state; None: ``iteration`` iterations were trained at full length, of ``samples`` in all.
        Raises CheckpointError: it was saved under another schedule."""
        self._span = None
        if state is None:
            self.iterations, self.trained = iteration, samples * self.full
            if self.order is not None:
                self.order.windows_read = iteration
            return
        saved = {**state, "section": {name: v for name, v in state["section"].items() if name not in _FREE}}
        for name, value in self._fixed().items():
            if saved[name] != value:
                what = f"the checkpoint was trained with {name} {saved[name]!r}, this run has {value!r}"
                raise CheckpointError(f"sequence_length_warmup: {what}; give the same section, batch and layout")
        self.iterations, self.trained, self.ratio = state["iterations"], state["trained"], state["ratio"]
        self.hold.load_state(state)
        if self.order is not None:
            self.order.load_state(state["order"])
        if self.monitor is not None:
            self.monitor.load_state(state["stability"])

    def _fixed(self) -> dict[str, Any]:
        section = self.config.model_dump(mode="json", exclude=_FREE)
        carried = {"global_batch_size": self.batch} if self.order is not None else {}
        return {"section": section, "multiple_of": self.schedule.multiple_of, **carried}
