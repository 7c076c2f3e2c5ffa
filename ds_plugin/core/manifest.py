"""What a folder of ours says of itself."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ds_plugin.core.settings_model import Ranks

#: beside DeepSpeed's own files, in a checkpoint's tag folder
MANIFEST = "ds_plugin.json"


@with_config(ConfigDict(extra="allow"))
class Manifest(TypedDict, total=False):
    """For `json_files.read_json`. Which of the keys are there depends on the framework, and on what was saved."""

    format: Any
    save_id: str
    global_steps: int
    iteration: int
    world_size: Ranks
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    sections: dict[str, dict[str, Any]]
    model: dict[str, list[int]]
    state: dict[str, dict[str, Any] | list[Any]]
    lengths: dict[str, Any] | None
