"""The ``sequence_length_warmup`` section of the JSON."""

import pkgutil
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import Length, LossRatio, SectionConfig, Steps, Tokens, Waiting, parse_section
from ds_plugin.sequence_length_warmup.pacing import Custom

INTERLEAVE = 8  # consecutive steps then train different samples, and CPU memory holds eight batches
MOST_STEPS = 10**6  # of a warmup: what plans a run walks over each of them
SCHEDULES = ("linear", "root", "sinusoidal", "exponential", "discrete")
#: what a section with this ``"preset"`` has where it says nothing itself. ``skyladder``: arXiv 2503.15450, the best of
#: its start lengths, the middle of the shares that were best at every budget, the schedule that was best at 32K
PRESETS: dict[str, dict[str, Any]] = {
    "skyladder": {"mode": "mask", "schedule": "sinusoidal", "start_length": 8, "duration": {"share": 0.62}},
}
#: field -> the setting that it belongs to
_BELONGS = {
    "root_degree": ("schedule", "root"),
    "lengths": ("schedule", "discrete"),
    "boundaries": ("schedule", "discrete"),
    "interleave": ("mode", "carry"),
    "shifts_labels": ("mode", "carry"),
    "adaptive": ("pacing", "adaptive"),
}


class Duration(SectionConfig):
    """How long the warmup lasts: one of optimizer steps, trained tokens, and a share of the run, which is put into
    steps before it is used."""

    steps: Steps | None = Field(None, le=MOST_STEPS, description="optimizer steps, e.g. 3000")
    tokens: Tokens | None = Field(None, description="trained tokens of all data-parallel ranks together")
    share: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="of the run, e.g. 0.6: of its optimizer steps, or of its tokens where these say how long it is",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> "Duration":
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            what = " and ".join(f"{name} {value}" for name, value in given.items()) or "none"
            remedy = 'write {"steps": N} or {"tokens": N}, or {"share": S} of the run'
            raise ValueError(f"needs one of steps, tokens and share, got {what}; {remedy}")
        return self

    @property
    def total(self) -> int:
        """The duration in its own unit."""
        return self.steps or self.tokens or 0

    @property
    def unit(self) -> Literal["steps", "tokens"]:
        """What positions are counted in."""
        return "steps" if self.steps else "tokens"


class LearningRate(SectionConfig):
    """What the JSON's learning-rate scheduler follows."""

    by: Literal["steps", "tokens"] = Field(
        default="steps", description="what moves the scheduler; tokens: one step of it for each full-length batch"
    )


class Adaptive(SectionConfig):
    """When ``"pacing": "adaptive"`` holds the length."""

    loss_ratio: LossRatio = Field(default=1.2, description="while a loss exceeds this times the lowest before it")
    variance_max: float | None = Field(
        default=None, gt=0.0, le=1e38, description="while an element of sqrt(v), Adam's second moments, exceeds it"
    )


class SequenceLengthWarmupConfig(SectionConfig):
    """Lengths are in tokens of one sample."""

    enabled: bool = Field(False, description="whether the method is on")
    preset: Literal["skyladder"] | None = Field(
        None, description="a paper's settings for the fields that are not given; skyladder: arXiv 2503.15450"
    )
    start_length: Length = Field(8, description="of the first step: 8 for millions of parameters, 64 for billions")
    end_length: Length = Field(description="the full sample length in tokens, e.g. 1024")
    schedule: str = Field(
        "linear", description="how lengths grow: one of the built-in schedules, or package.module:function of your own"
    )
    duration: Duration = Field(
        description='{"steps": N}, {"tokens": N} or {"share": S} of the run, until the full length'
    )
    root_degree: int | None = Field(None, ge=1, le=1000, description="schedule root: (t/T) ** (1 / root_degree)")
    lengths: list[Length] | None = Field(None, max_length=1000, description="schedule discrete: e.g. [64, 256, 1024]")
    boundaries: list[Tokens] | None = Field(
        None, max_length=1000, description="schedule discrete: the last step (or token) of each length but the last"
    )
    multiple_of: Length = Field(8, description="lengths are floored to a multiple of this; 8 suits tensor cores")
    max_distinct_lengths: int | None = Field(None, ge=2, le=1000, description="the most shapes that a compiler may see")
    mode: Literal["truncate", "carry", "mask"] = Field(
        "truncate", description="what becomes of a sample's rest: discarded, trained later, or hidden from attention"
    )
    tokens_per_step: Literal["by_length", "constant"] = Field(
        "by_length", description="constant: a short step trains all tokens of its samples, cut into shorter ones"
    )
    interleave: int | None = Field(
        None, ge=1, le=1000, description=f"mode carry: batches that are open at a time, in memory; null is {INTERLEAVE}"
    )
    shifts_labels: bool | None = Field(
        None, description="carry, constant tokens: whether the model shifts labels; null: as its class's name tells"
    )
    learning_rate: LearningRate = Field(LearningRate(), description="whether the scheduler follows steps or tokens")
    pacing: Literal["schedule", "adaptive"] = Field(
        "schedule", description="adaptive: the length is held while training is not stable"
    )
    adaptive: Adaptive | None = Field(None, description="pacing adaptive: when the length is held")
    report_interval: Waiting = Field(20, description="steps between two readings of losses, lengths and token counts")
    variance: bool = Field(False, description="reports read Adam's second moments, too: one pass over them each")
    preflight: bool = Field(True, description="full-length passes before the first short step, to find out-of-memory")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        return {**PRESETS[preset], **given} if isinstance(preset, str) and preset in PRESETS else given

    @model_validator(mode="after")
    def _fields_fit(self) -> "SequenceLengthWarmupConfig":
        for trouble in self._troubles():
            raise ValueError(f"sequence_length_warmup.{trouble}")
        return self

    def _troubles(self) -> Iterator[str]:
        """Each as field, value and remedy."""
        if self.start_length > self.end_length:
            full = self.end_length
            yield f"start_length: {self.start_length} is above end_length {full}; write a length of at most {full}"
        if self.end_length % self.multiple_of:
            below = self.end_length // self.multiple_of * self.multiple_of
            fits = f"{below} or {below + self.multiple_of}" if below else f"{self.multiple_of}"
            yield f"end_length: {self.end_length} is not divisible by multiple_of {self.multiple_of}; write {fits}"
        if self.schedule not in SCHEDULES and ":" not in self.schedule:
            known = ", ".join(map(repr, SCHEDULES))
            yield f"schedule: {self.schedule!r} is unknown; write one of {known}, or 'package.module:function'"
        for field, (owner, wanted) in _BELONGS.items():
            value, chosen = getattr(self, field), getattr(self, owner)
            folds = field == "shifts_labels" and self.tokens_per_step == "constant"  # which cuts samples as well
            if value is not None and chosen != wanted and not folds:
                remedy = f'remove it, or write "{owner}": "{wanted}"'
                yield f"{field}: {value!r} is not for {owner} {chosen!r}; {remedy}"
        if self.schedule == "discrete" and self.duration.share is not None:
            yield 'duration.share: the boundaries of a discrete schedule are steps or tokens; write {"steps": N}'
        elif self.schedule == "discrete":
            yield from self._troubles_of_discrete()
        if self.tokens_per_step == "constant":
            others = {"mode": "truncate", "max_distinct_lengths": None}
            for field in (field for field, fits in others.items() if getattr(self, field) != fits):
                what = f'"constant" cuts samples into equal parts, and {field} is {getattr(self, field)!r}'
                yield f"tokens_per_step: {what}; leave one of the two out"
        ruled = "discrete" if self.schedule == "discrete" else self.mode
        if self.max_distinct_lengths is not None and ruled in ("discrete", "carry"):
            remedy = "remove it, and write a discrete schedule of lengths that divide end_length, which carry keeps to"
            yield f"max_distinct_lengths: {self.max_distinct_lengths} is not for {ruled!r}; {remedy}"

    def _troubles_of_discrete(self) -> Iterator[str]:
        for field, example in (("lengths", [64, 256, 1024]), ("boundaries", [1000, 5000])):
            if getattr(self, field) is None:
                yield f"{field}: missing for the discrete schedule; write e.g. {example}"
        lengths, boundaries = self.lengths or [], self.boundaries or []
        if len(boundaries) != len(lengths) - 1:
            yield f"boundaries: {boundaries} for lengths {lengths}; write one less: the last length does not end"
        for field, values in (("lengths", lengths), ("boundaries", boundaries)):
            if any(b <= a for a, b in zip([0, *values], values, strict=False)):
                yield f"{field}: {values} do not rise from 1 or more; put them in order"
        if odd := [length for length in lengths if length % self.multiple_of]:
            yield f"lengths: {odd} are not divisible by multiple_of {self.multiple_of}; write multiples, or another one"
        if self.tokens_per_step == "constant" and (odd := [length for length in lengths if self.end_length % length]):
            yield f"lengths: {odd} do not divide end_length {self.end_length}, as constant tokens need; write divisors"
        ends = [("start_length", self.start_length, lengths[0]), ("end_length", self.end_length, lengths[-1])]
        ends += [(f"duration.{self.duration.unit}", self.duration.total, last) for last in boundaries[-1:]]
        for field, value, wanted in ends:
            if value != wanted:
                given = f"lengths {lengths} and boundaries {boundaries}"
                yield f"{field}: {value} does not fit the discrete schedule's {given}; write {wanted}"

    def in_run(self, *, steps: int | None = None, tokens: int | None = None) -> "SequenceLengthWarmupConfig":
        """The section with a ``duration.share`` put into steps or tokens, of a run of so many in all; as it is, where
        neither is known, or no share is given. Raises ConfigError: it comes to more steps than a warmup may have."""
        share, unit, whole = self.duration.share, "steps" if steps else "tokens", steps or tokens
        if share is None or not whole:
            return self
        duration = {unit: max(1, round(share * whole))}
        return self.model_copy(
            update={"duration": parse_section(Duration, "sequence_length_warmup.duration", duration)}
        )

    @property
    def keeps_tokens(self) -> bool:
        """Whether a short step trains as many tokens as one at full length."""
        return self.mode == "mask" or self.tokens_per_step == "constant"

    @property
    def reads_variance(self) -> bool:
        """Whether somebody wants to know Adam's variance: reports, or a bound of adaptive pacing."""
        return self.variance or (self.adaptive is not None and self.adaptive.variance_max is not None)

    @property
    def windows(self) -> int:
        """How many batches the carry mode keeps open at a time."""
        return self.interleave or INTERLEAVE

    def function(self) -> Custom | None:
        """The user's schedule, imported; None for the built-in ones. Raises ConfigError: there is none."""
        if self.schedule in SCHEDULES:
            return None
        try:
            found: Any = pkgutil.resolve_name(self.schedule)
        except Exception as error:  # importing runs the module, which may raise anything
            what = f"{self.schedule!r} cannot be imported ({error})"
            remedy = "write 'package.module:function' of a function (share, start, end) -> length found here"
            raise ConfigError(f"sequence_length_warmup.schedule: {what}; {remedy}") from None
        if not callable(found):
            raise ConfigError(f"sequence_length_warmup.schedule: {self.schedule!r} is not a function but {found!r}")
        return found
