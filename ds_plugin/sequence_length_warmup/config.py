"""The ``sequence_length_warmup`` section of the JSON."""

from typing import Literal

from pydantic import Field, model_validator

from ds_plugin.config_model import SectionConfig


class Duration(SectionConfig):
    """How long the warmup lasts."""

    steps: int = Field(ge=1, description="the number of optimizer steps until the full length, e.g. 150")


class SequenceLengthWarmupConfig(SectionConfig):
    """Lengths are in tokens of one sample, the duration in optimizer steps."""

    enabled: bool = False
    start_length: int = Field(8, ge=1, description="the length of the first step in tokens, e.g. 8")
    end_length: int = Field(ge=1, description="the full sample length in tokens, e.g. 1024")
    schedule: Literal["linear"] = "linear"
    duration: Duration = Field(description='{"steps": N}, the optimizer steps until the full length')
    multiple_of: int = Field(8, ge=1, description="lengths are floored to a multiple of this (8 suits tensor cores)")
    mode: Literal["truncate"] = "truncate"

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
