"""The ``sequence_length_warmup`` section of the JSON."""

import importlib
from typing import Any, Literal

from pydantic import Field, model_validator

from ds_plugin.core.settings_model import SectionConfig
from ds_plugin.sequence_length_warmup.pacing import Custom

INTERLEAVE = 8  # consecutive steps then train different samples, and a host holds eight batches
SCHEDULES = ("linear", "root", "discrete")


class Duration(SectionConfig):
    """How long the warmup lasts: in optimizer steps or in trained tokens, all data-parallel ranks together."""

    steps: int | None = Field(None, ge=1, description="the number of optimizer steps until the full length, e.g. 150")
    tokens: int | None = Field(None, ge=1, description="the trained tokens until the full length, e.g. 1000000")

    @model_validator(mode="after")
    def _one_of_them(self) -> "Duration":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"needs one of steps and tokens, got steps {self.steps} and tokens {self.tokens}; write "
                '{"steps": N} or {"tokens": N}'
            )
        return self

    @property
    def total(self) -> int:
        """The duration in its own unit."""
        return self.steps if self.steps is not None else self.tokens  # type: ignore[return-value]

    @property
    def unit(self) -> Literal["steps", "tokens"]:
        """What positions are counted in."""
        return "steps" if self.steps is not None else "tokens"


class LearningRate(SectionConfig):
    """What the JSON's learning-rate scheduler follows."""

    by: Literal["steps", "tokens"] = "steps"


class Adaptive(SectionConfig):
    """When ``"pacing": "adaptive"`` holds the length."""

    loss_ratio: float = Field(
        default=1.2, gt=1.0, description="hold while a loss is above this times the lowest before it"
    )
    variance_max: float | None = Field(
        default=None, gt=0.0, description="hold while an element of Adam's sqrt(v) is above"
    )


class SequenceLengthWarmupConfig(SectionConfig):
    """Lengths are in tokens of one sample."""

    enabled: bool = False
    start_length: int = Field(8, ge=1, description="the length of the first step in tokens, e.g. 8")
    end_length: int = Field(ge=1, description="the full sample length in tokens, e.g. 1024")
    schedule: str = "linear"
    duration: Duration = Field(description='{"steps": N} or {"tokens": N}, until the full length')
    root_degree: int | None = Field(None, ge=1, description="of the root schedule: (t/T) ** (1 / root_degree), e.g. 2")
    lengths: list[int] | None = Field(None, description="of the discrete schedule, e.g. [64, 256, 1024]")
    boundaries: list[int] | None = Field(None, description="the last step (or token) of each length but the last")
    multiple_of: int = Field(8, ge=1, description="lengths are floored to a multiple of this (8 suits tensor cores)")
    max_distinct_lengths: int | None = Field(None, ge=2, description="the most shapes a compiler may see, e.g. 8")
    mode: Literal["truncate", "carry", "mask"] = "truncate"
    interleave: int | None = Field(None, ge=1, description="of the carry mode: batches that are open at a time, e.g. 8")
    shifts_labels: bool | None = Field(
        None, description="of the carry mode: the model shifts its labels itself; null: as its class's name tells"
    )
    learning_rate: LearningRate = LearningRate()
    pacing: Literal["schedule", "adaptive"] = "schedule"
    adaptive: Adaptive | None = None
    report_interval: int = Field(20, ge=1, description="steps between two readings of the stability instruments")
    variance: bool = Field(False, description="reports read Adam's second moments, too: one pass over them each")
    preflight: bool = True

    @model_validator(mode="after")
    def _lengths_fit(self) -> "SequenceLengthWarmupConfig":
        if self.start_length > self.end_length:
            raise ValueError(
                f"sequence_length_warmup.start_length: {self.start_length} is above end_length {self.end_length}; "
                f"write a start_length of at most {self.end_length}"
            )
        if self.end_length % self.multiple_of:
            below = self.end_length // self.multiple_of * self.multiple_of
            fits = f"{below} or {below + self.multiple_of}" if below else f"{self.multiple_of}"
            raise ValueError(
                f"sequence_length_warmup.end_length: {self.end_length} is not divisible by multiple_of "
                f"{self.multiple_of}; write {fits}, or another multiple_of"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> "SequenceLengthWarmupConfig":
        if self.schedule not in SCHEDULES and ":" not in self.schedule:
            raise ValueError(
                f"sequence_length_warmup.schedule: {self.schedule!r} is none of "
                f"{', '.join(map(repr, SCHEDULES))} and no function; write one of them or 'package.module:function'"
            )
        belongs: dict[str, tuple[str, ...]] = {"root": ("root_degree",), "discrete": ("lengths", "boundaries")}
        for schedule, fields in belongs.items():
            for field in fields:
                given = getattr(self, field) is not None
                if given and self.schedule != schedule:
                    raise ValueError(
                        f"sequence_length_warmup.{field}: {getattr(self, field)!r} is of the {schedule!r} schedule and "
                        f'schedule is {self.schedule!r}; remove it, or write "schedule": "{schedule}"'
                    )
                if not given and self.schedule == schedule and field != "root_degree":
                    example = "[64, 256, 1024]" if field == "lengths" else "[1000, 5000]"
                    raise ValueError(
                        f"sequence_length_warmup.{field}: missing for the discrete schedule; write e.g. {example}"
                    )
        if self.schedule == "discrete":
            self._check_discrete()
        bounded = {"discrete": self.schedule == "discrete", "carry": self.mode == "carry"}
        for what in (name for name, chosen in bounded.items() if chosen and self.max_distinct_lengths is not None):
            raise ValueError(
                f"sequence_length_warmup.max_distinct_lengths: {self.max_distinct_lengths} and {what!r}, whose lengths "
                "follow otherwise; remove it, and write a discrete schedule of lengths that divide end_length: the "
                "carry mode keeps to those"
            )
        if self.interleave is not None and self.mode != "carry":
            raise ValueError(
                f"sequence_length_warmup.interleave: {self.interleave} is of the carry mode and mode is {self.mode!r}; "
                'remove it, or write "mode": "carry"'
            )
        if self.shifts_labels is not None and self.mode != "carry":
            raise ValueError(
                f"sequence_length_warmup.shifts_labels: {self.shifts_labels} is of the carry mode and mode is "
                f'{self.mode!r}; remove it, or write "mode": "carry"'
            )
        if self.adaptive is not None and self.pacing != "adaptive":
            raise ValueError(
                'sequence_length_warmup.adaptive: given, but pacing is "schedule", which never holds the length; '
                'write "pacing": "adaptive", or remove it'
            )
        return self

    def _check_discrete(self) -> None:
        lengths, boundaries = self.lengths or [], self.boundaries or []
        if len(boundaries) != len(lengths) - 1:
            raise ValueError(
                f"sequence_length_warmup.boundaries: {boundaries} are {len(boundaries)} for {len(lengths)} lengths "
                f"{lengths}; write one less than lengths, the last {self.duration.unit[:-1]} of each but the last"
            )
        for name, values in (("lengths", lengths), ("boundaries", boundaries)):
            if any(b <= a for a, b in zip([0, *values], values, strict=False)):
                raise ValueError(
                    f"sequence_length_warmup.{name}: {values} do not rise from 1 or more; put them in order"
                )
        odd = [length for length in lengths if length % self.multiple_of]
        if odd:
            raise ValueError(
                f"sequence_length_warmup.lengths: {odd} are not divisible by multiple_of {self.multiple_of}; write "
                "multiples, or another multiple_of"
            )
        for name, value, wanted in (
            ("start_length", self.start_length, lengths[0]),
            ("end_length", self.end_length, lengths[-1]),
            (
                f"duration.{self.duration.unit}",
                self.duration.total,
                boundaries[-1] if boundaries else self.duration.total,
            ),
        ):
            if value != wanted:
                raise ValueError(
                    f"sequence_length_warmup.{name}: {value}, but the discrete schedule's lengths {lengths} and "
                    f"boundaries {boundaries} say {wanted}; write {wanted}"
                )

    @property
    def reads_variance(self) -> bool:
        """Whether somebody wants to know Adam's variance: reports, or a bound of adaptive pacing."""
        return self.variance or (self.adaptive is not None and self.adaptive.variance_max is not None)

    @property
    def windows(self) -> int:
        """How many batches the carry mode keeps open at a time."""
        return self.interleave or INTERLEAVE

    def function(self) -> Custom | None:
        """The user's schedule, imported; None for the built-in ones.

        Raises:
            ValueError: there is no such module or function.
        """
        if self.schedule in SCHEDULES:
            return None
        module, _, name = self.schedule.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"sequence_length_warmup.schedule: {self.schedule!r} cannot be imported ({error}); write "
                "'package.module:function' of a function (share, start, end) -> length that Python can import here"
            ) from None
        if not callable(found):
            raise ValueError(f"sequence_length_warmup.schedule: {self.schedule!r} is not a function but {found!r}")
        return found
