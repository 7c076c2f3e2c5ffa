"""The ``completep`` section of the JSON."""

from typing import Literal

from pydantic import Field

from ds_plugin.config_model import SectionConfig


class CompletePConfig(SectionConfig):
    """The base model, whose hyperparameters the JSON holds, and the depth exponent."""

    enabled: bool = False
    base_width: int = Field(
        ge=1, description="the hidden size of the model the hyperparameters were tuned on, e.g. 256"
    )
    base_depth: int = Field(
        ge=1, description="the number of layers of the model the hyperparameters were tuned on, e.g. 2"
    )
    base_head_dim: int | None = Field(
        None, ge=1, description="its head size, e.g. 64; null when this model's heads have the same size"
    )
    alpha: float = Field(1.0, ge=0.5, le=1.0, description="depth exponent; CompleteP is 1, 0.5 the best before it")
    eps_scope: Literal["table", "all"] = Field(
        "table",
        description="which parameters get the scaled AdamW eps: those of Table 1, or all, as the reference code",
    )
