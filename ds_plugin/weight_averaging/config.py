"""The ``weight_averaging`` section of the JSON."""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ds_plugin.config_model import SectionConfig

KINDS = ("uniform", "linear", "1-sqrt")


class WeightAveragingConfig(SectionConfig):
    """Which snapshots are averaged, and how. Steps are the host's.

    A snapshot that falls on a step that was skipped, or was not finite, is left out.
    """

    enabled: bool = False
    mode: Literal["sliding", "block", "ema"] = "sliding"
    window: int = Field(5, ge=1, description="how many snapshots are averaged, e.g. 5")
    interval: int = Field(ge=1, description="optimizer steps between two snapshots, e.g. 10")
    start_step: int = Field(
        0, ge=0, description="no snapshot before this step; averages that reach into the LR warmup are worse than raw"
    )
    weights: str | list[float] = Field(
        "uniform", description='"uniform", "linear", "1-sqrt", or one number for each snapshot of the window'
    )
    horizons: list[int] | None = Field(None, description="mode ema: averages over about so many snapshots, [10, 100]")

    @field_validator("weights", mode="before")
    @classmethod
    def _known_weights(cls, value: Any) -> Any:
        if value in KINDS:
            return value
        numbers = isinstance(value, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and v >= 0 for v in value
        )
        if not numbers or not value or not value[-1] > 0:
            raise ValueError(
                f"got {value!r}; write {', '.join(repr(kind) for kind in KINDS)}, or a list of numbers of at least 0, "
                "oldest first, whose last (the newest snapshot's) is above 0"
            )
        return [float(v) for v in value]

    @field_validator("horizons")
    @classmethod
    def _distinct_horizons(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or min(value) < 1 or len(set(value)) < len(value)):
            raise ValueError(f"got {value!r}; write different numbers of snapshots, at least 1 each, e.g. [10, 100]")
        return value

    @model_validator(mode="after")
    def _belongs_to_the_mode(self) -> "WeightAveragingConfig":
        name = "weight_averaging"
        if isinstance(self.weights, list) and len(self.weights) != self.window:
            raise ValueError(
                f"{name}.weights: {len(self.weights)} numbers for a window of {self.window}; write one for each of its "
                "snapshots"
            )
        if self.mode != "sliding" and self.weights != "uniform":
            raise ValueError(
                f"{name}.weights: {self.weights!r} needs the snapshots one by one, which mode {self.mode!r} does not "
                'keep; write "mode": "sliding", or leave "weights" out'
            )
        if self.mode == "ema" and self.horizons is None:
            raise ValueError(
                f'{name}.horizons: missing; with mode "ema" write e.g. "horizons": [10, 100], in snapshots'
            )
        if self.mode == "ema" and self.window != type(self).model_fields["window"].default:
            raise ValueError(f'{name}.window: {self.window} has no meaning with mode "ema"; write "horizons" instead')
        if self.mode != "ema" and self.horizons is not None:
            raise ValueError(
                f'{name}.horizons: {self.horizons} belongs to mode "ema", this is {self.mode!r}; leave it out'
            )
        return self
