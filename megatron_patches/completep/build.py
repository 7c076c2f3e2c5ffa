"""CompleteP around the building of a model, in one line: ``with building("config.json"): model = GPTModel(...)``.

Not called building.py: a package holds a module that was imported under its name, in place of the function.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.config import split_config
from ds_plugin.core.errors import StateError
from ds_plugin.core.patch import Patch, active
from megatron_patches.completep.layers import finish, prepared, scaled_spec

GPT_MODEL_INIT = "megatron.core.models.gpt.gpt_model.GPTModel.__init__"


def scaled_builds(section: CompletePConfig, built: Callable[[Any], object]) -> Patch:
    """A patch of ``GPTModel.__init__``: what is built while it is on is scaled, and its config handed to ``built``."""

    def build(self: Any, config: Any, transformer_layer_spec: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(patch.original).bind(self, config, transformer_layer_spec, *args, **kwargs)
        with prepared(config, transformer_layer_spec, section) as spec:
            given.arguments["transformer_layer_spec"] = spec
            if (prediction := given.arguments.get("mtp_block_spec")) is not None:
                given.arguments["mtp_block_spec"] = scaled_spec(config, prediction, section)
            patch.original(*given.args, **given.kwargs)
            finish(self, section)
        built(config)

    patch = Patch(GPT_MODEL_INIT, build, reason="completep: init and forward pass")
    return patch


@contextlib.contextmanager
def building(source: str | Path | Mapping[str, Any] | CompletePConfig | None) -> Iterator[CompletePConfig | None]:
    """Every GPTModel that is built in the block is scaled, as `prepare` and `finish` do; yields the section.
    ``source``: the JSON file, what is in it, or its ``completep`` section; without one, or if it is off, nothing is.
    The given TransformerConfig is changed itself: the model holds that object. Raises ConfigError as these two do;
    StateError: a recipe is in force already, or no GPTModel was built in the block."""
    section = source if isinstance(source, CompletePConfig | None) else split_config(source)[1].completep
    if section is None or not section.enabled:
        yield None
        return
    if any(patch.name == GPT_MODEL_INIT for patch in active()):
        raise StateError("completep.building: a recipe is in force for every GPTModel already; use one of them")
    built: list[bool] = []
    patch = scaled_builds(section, lambda config: built.append(True))
    patch.apply()
    try:
        yield section
    finally:
        patch.revert()
    if not built:
        raise StateError("completep.building: no megatron-core GPTModel was built in the block; build one inside it")
