"""What transformers' ``from_pretrained`` wants beside the weights of a model of its own."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.weight_averaging.state.fragments import WRAPPERS


def write_config(module: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``config.json``, and ``generation_config.json`` where the model generates, as `save_pretrained` does; for a
    model that is not transformers' (nor for a PEFT wrapper, which has other names) nothing. ``dtype``: of the tensors;
    None: the widest of the parameters. Raises ConfigError: transformers refuses to save the configuration."""
    for wrapper in WRAPPERS:
        module = getattr(module, wrapper, module)
    transformers = sys.modules.get("transformers.modeling_utils")  # who has such a model has imported it
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return
    config = copy.deepcopy(module.config)
    own = max((p.dtype for p in module.parameters() if p.is_floating_point()), key=lambda d: d.itemsize, default=None)
    if (written := dtype or own) is not None:
        config.dtype = str(written).removeprefix("torch.")
    config.architectures = [type(module).__name__]
    try:
        if module._auto_class is not None:  # its code is not transformers'
            sys.modules["transformers.dynamic_module_utils"].custom_object_save(module, folder, config=config)
        config.save_pretrained(folder)
        if module.can_generate():
            module.generation_config.save_pretrained(folder)
    except ValueError as error:
        what = f"transformers does not save the model's configuration ({error})"
        raise ConfigError(f"publish: {what}; change model.config or model.generation_config") from error
