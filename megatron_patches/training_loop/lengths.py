"""Sequence length warmup in Megatron-LM's loop: the length of each iteration, and what has been trained."""

from typing import Any

from ds_plugin.core.errors import CheckpointError, ConfigError
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.plan import plan
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule

_FREE = {"preflight", "report_interval"}  # fields of the section that a resumed run may have otherwise


class Lengths:
    """The schedule on one run. Tokens are of all ranks together; every rank counts the same, asking no other."""

    def __init__(self, config: SequenceLengthWarmupConfig, *, full: int, layout_multiple: int):
        """``full``: ``--seq-length``. ``layout_multiple``: into how many equal parts the layout cuts a sample. Raises
        ConfigError: the section does not fit the run, or asks for what this loop does not offer."""
        elsewhere = "is not supported in Megatron-LM's training loop, only with DeepSpeed"
        for name, offered, why in (
            ("end_length", full, f"is not --seq-length {full}"),
            ("mode", "truncate", elsewhere),
            ("pacing", "schedule", elsewhere),
        ):
            if (given := getattr(config, name)) != offered:
                raise ConfigError(f"sequence_length_warmup.{name}: {given!r} {why}; write {offered!r}")
        self.config, self.full = config, full
        self.schedule = LengthSchedule(config, layout_multiple=layout_multiple)
        self.iterations = 0  # that have been trained
        self.trained = 0  # tokens

    @property
    def length(self) -> int:
        """Tokens of a sample in the next iteration."""
        done = self.iterations if self.config.duration.unit == "steps" else self.trained
        return self.schedule.length_at(done + 1)

    def booked(self, samples: int, length: int, applied: bool) -> None:
        """An iteration is over: ``samples`` are over all ranks."""
        self.iterations += 1
        self.trained += samples * length * applied

    def increment(self, samples: int, length: int) -> int:
        """By how many samples of full length the learning rate's schedule moves on for ``length`` tokens of each.
        Megatron-LM counts whole ones; what is left over is not lost."""
        return (self.trained + samples * length) // self.full - self.trained // self.full

    def describe(self, *, batch: int, iterations: int) -> str:
        c, run = self.config, plan(self.schedule, batch, steps=iterations)
        return (
            f"sequence length warmup: {c.start_length} to {c.end_length} tokens, {c.schedule}, over {c.duration.total} "
            f"{c.duration.unit}, in multiples of {self.schedule.multiple_of}; {iterations} iterations from the first "
            f"on train {run.trained} tokens of {run.read} read"
        )

    def state(self) -> dict[str, Any]:
        return {"iterations": self.iterations, "trained": self.trained, **self._fixed()}

    def load_state(self, state: dict[str, Any] | None, *, iteration: int, samples: int) -> None:
        """Take over a saved state; None: ``iteration`` iterations were trained at full length, of ``samples`` in all.
        Raises CheckpointError: it was saved under another schedule."""
        if state is None:
            self.iterations, self.trained = iteration, samples * self.full
            return
        saved = {**state, "section": {name: v for name, v in state["section"].items() if name not in _FREE}}
        for name, value in self._fixed().items():
            if saved[name] != value:
                what = f"the checkpoint was trained with {name} {saved[name]!r}, this run has {value!r}"
                raise CheckpointError(f"sequence_length_warmup: {what}; give the same section and layout")
        self.iterations, self.trained = state["iterations"], state["trained"]

    def _fixed(self) -> dict[str, Any]:
        return {"section": self.config.model_dump(mode="json", exclude=_FREE), "multiple_of": self.schedule.multiple_of}
