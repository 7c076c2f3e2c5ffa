"""The ``weight_averaging`` section of the JSON."""

from typing import Literal

from pydantic import Field

from ds_plugin.config_model import SectionConfig


class WeightAveragingConfig(SectionConfig):
    """Which snapshots are averaged. Steps are the host's; a snapshot that falls on a skipped step is left out."""

    enabled: bool = False
    mode: Literal["sliding"] = "sliding"
    window: int = Field(5, ge=1, description="how many snapshots are averaged, e.g. 5")
    interval: int = Field(ge=1, description="optimizer steps between two snapshots, e.g. 10")
    start_step: int = Field(
        0, ge=0, description="no snapshot before this step; averages that reach into the LR warmup are worse than raw"
    )
