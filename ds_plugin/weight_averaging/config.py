"""The ``weight_averaging`` section of the JSON."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ds_plugin.core.settings_model import LossRatio, SectionConfig, Steps, Waiting

#: the weights that have a name, here and in ``merge --weights``; `window.read_weights` works them out
KINDS = ("mean", "minus-sqrt", "cosine", "wma")
_Horizon = Annotated[int, Field(ge=1, le=10**6)]  # in fp32 the weight of one snapshot is lost above it
#: names with another meaning or spelling elsewhere, and what to write for them
OTHER_KINDS = {
    "uniform": "write 'mean'",
    "linear": "write 'wma' for 1, 2, ..., k, or 'mean' for what WSM and Megatron-LM's weighted_merge call linear",
    "1-sqrt": "write 'minus-sqrt'",
}


class RestartConfig(SectionConfig):
    """When training goes back to the average by itself: the loss has risen, and stays up."""

    loss_ratio: LossRatio = Field(1.5, description="a loss above this times the lowest before it is too high")
    patience: Waiting = Field(10, description="so many steps in a row; the losses are compared as often")
    moments: Literal["keep", "reset"] = Field("keep", description="of the optimizer; reset: they start at zero")


class WeightAveragingConfig(SectionConfig):
    """Which snapshots are averaged, and how. A step that was skipped, or was not finite, gives none."""

    enabled: bool = Field(False, description="whether the method is on")
    mode: Literal["sliding", "block", "ema"] = Field(
        "sliding", description="the last snapshots, the last finished block of them, or exponential averages"
    )
    window: int = Field(5, ge=1, le=10_000, description="how many snapshots are averaged, e.g. 5")
    interval: Steps = Field(description="optimizer steps between two snapshots, e.g. 10")
    start_step: int = Field(
        0, ge=0, le=10**9, description="no snapshot before it; those that reach into the LR warmup are worse than raw"
    )
    weights: str | list[Annotated[float, Field(ge=0, le=1e9)]] = Field(
        "mean", description='"mean", "minus-sqrt", "cosine", "wma", or one number for each snapshot of the window'
    )
    horizons: list[_Horizon] | None = Field(
        None, max_length=16, description="mode ema: averages over so many snapshots, each a copy in memory, [10, 100]"
    )
    deltas: Literal["fp32", "bf16"] = Field(
        "fp32", description='mode sliding: "bf16" keeps older snapshots as differences, in about half the memory'
    )
    storage: Literal["pinned", "memory", "files"] = Field(
        "pinned", description='where the snapshots lie: CPU memory (pinned, if the masters are on a GPU), or "files"'
    )
    restart: RestartConfig | None = Field(
        None, description='mode sliding: restart from the average when the loss stays high, {"loss_ratio": 1.5}'
    )
    save_average: bool = Field(
        False, description="with every checkpoint also the average's weights, in its averaged/ (Megatron-LM: beside it)"
    )
    storage_path: str | None = Field(None, description='storage "files": a folder on a local disk, on every node')

    @field_validator("weights", mode="before")
    @classmethod
    def _known_weights(cls, value: Any) -> Any:
        if value in KINDS:
            return value
        if isinstance(value, str) and value in OTHER_KINDS:
            raise ValueError(f"got {value!r}; {OTHER_KINDS[value]}")
        numbers = isinstance(value, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= sys.float_info.max for v in value
        )
        if not numbers or not value or not value[-1] > 0:
            known = f"{', '.join(map(repr, KINDS))}, or numbers of at least 0, oldest first"
            raise ValueError(f"got {value!r}; write {known}, the last (the newest snapshot's) above 0")
        return [float(v) for v in value]

    @model_validator(mode="after")
    def _fits_together(self) -> "WeightAveragingConfig":
        for conflict in self._conflicts():
            raise ValueError(f"weight_averaging.{conflict}")
        return self

    def _conflicts(self) -> Iterator[str]:
        mode, restart, most = self.mode, self.restart, (self.window - 1) * self.interval
        each = f'each snapshot, which mode {mode!r} does not keep; write "mode": "sliding", or leave it out'
        if isinstance(self.weights, list) and len(self.weights) != self.window:
            yield f"weights: {len(self.weights)} numbers for a window of {self.window}; write one for each snapshot"
        if mode != "sliding" and self.weights != "mean":
            yield f"weights: {self.weights!r} needs {each}"
        if mode == "ema" and self.horizons is None:
            yield 'horizons: missing; with mode "ema" write e.g. "horizons": [10, 100], in snapshots'
        if mode == "ema" and self.window != type(self).model_fields["window"].default:
            yield f'window: {self.window} has no meaning with mode "ema"; write "horizons" instead'
        if self.horizons is not None and not 0 < len(self.horizons) == len(set(self.horizons)):
            yield f"horizons: got {self.horizons}; write different numbers of snapshots, e.g. [10, 100]"
        if mode != "ema" and self.horizons is not None:
            yield f'horizons: {self.horizons} belongs to mode "ema", this is {mode!r}; leave it out'
        if mode != "sliding" and self.deltas == "bf16":
            yield f'deltas: "bf16" needs {each}'
        if mode != "sliding" and restart is not None:
            yield f"restart: {restart.model_dump()} needs {each}"
        if restart is not None and restart.patience > most:
            all_ = f"in {restart.patience} steps all of a window of {self.window} x {self.interval} steps may be of the"
            yield f"restart.patience: {all_} spike; write at most {most}, or a larger window"
        if self.storage == "files" and not self.storage_path:
            yield 'storage_path: missing; with storage "files" write a folder on a local disk that all nodes have'
        if self.storage != "files" and (path := self.storage_path) is not None:
            yield f'storage_path: {path!r} belongs to storage "files", this is {self.storage!r}; leave it out'
