"""Adaptive pacing: the length stands still while the instruments say that training is unstable."""

import math
from collections.abc import Mapping
from typing import Any

from ds_plugin.core.errors import CheckpointError, warn
from ds_plugin.core.loss_statistics import Report
from ds_plugin.sequence_length_warmup.config import Adaptive, SequenceLengthWarmupConfig


class Hold:
    """Whether the length is held, and how far positions lag behind for it, in the unit of the duration. Without
    ``"pacing": "adaptive"`` it never is."""

    def __init__(self, config: SequenceLengthWarmupConfig):
        self.on, self._unit = config.pacing == "adaptive", config.duration.unit
        self._bounds = config.adaptive or Adaptive()
        self.lag, self.holding = 0, False

    def judge(self, report: Report, length: int, full: int) -> None:
        """Begin or end a hold by a report, and say so. The full length is not held: there is nothing to go on to."""
        if not self.on:
            return
        unstable = _instability(report, self._bounds) if length < full else ""
        if bool(unstable) != self.holding:
            said = f"length is held at {length}: {unstable}" if unstable else f"schedule goes on from {length}"
            warn("sequence length warmup: step %d, the %s", report.step, said)
        self.holding = bool(unstable)

    def step(self, tokens: int) -> None:
        """An optimizer step of ``tokens`` tokens is over: while it holds, the next stands where this one stood."""
        if self.holding:
            self.lag += 1 if self._unit == "steps" else tokens

    def state(self) -> dict[str, Any]:
        """JSON types only."""
        return {"unit": self._unit, "held": self.lag, "holding": self.holding}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError for a lag in another unit."""
        if self.on and state.get("held") and (saved := state.get("unit") or self._unit) != self._unit:
            held = f"has been held for {state['held']} {saved}"
            what = f"the checkpoint's length {held}, and this run's is in {self._unit}"
            raise CheckpointError(f"sequence_length_warmup.duration: {what}; resume with a duration in {saved}")

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over a saved state; None, or a run that is not adaptive, starts afresh."""
        self.lag, self.holding = (state["held"], state["holding"]) if state and self.on else (0, False)


def _instability(report: Report, bounds: Adaptive) -> str:
    """Which bound was exceeded since the report before, in words; empty: none."""
    ratio = max((ratio for ratio in report.beyond_noise if ratio is not None), default=0.0)
    if ratio == math.inf:
        return "a step had no finite loss, or no finite gradient norm"
    if ratio > bounds.loss_ratio:
        what = f"a loss was {ratio:.3g} times the lowest before it, without noise"
        return f"{what}, above adaptive.loss_ratio {bounds.loss_ratio:g}"
    variance, most = report.variance_max, bounds.variance_max
    if most is not None and variance is not None and not variance <= most:  # a NaN is above
        return f"Adam's sqrt(v) reached {variance:.3g}, above adaptive.variance_max {most:g}"
    return ""
