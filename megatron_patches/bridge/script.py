"""``ds-plugin run --config FILE SCRIPT.py ...`` for a script that calls Megatron-Bridge's ``pretrain``."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.patch import Patch
from megatron_patches.bridge.plugin import attach
from megatron_patches.training_loop import script

PRETRAIN = "megatron.bridge.training.pretrain.pretrain"


def run(arguments: Sequence[str]) -> int:
    """`script.run`, for a script of Megatron-Bridge's."""
    return script.run(arguments, install)


def install(sections: PluginConfig, *, verify: bool = True) -> Patch:
    """Attach the methods to each run of ``pretrain``, whoever calls it; also of ``finetune``, which goes by it. Raises
    ConfigError: Megatron-Bridge cannot be imported."""
    try:
        manager = importlib.import_module("megatron.bridge.training.callbacks").CallbackManager
        importlib.import_module("megatron.bridge.training.pretrain")
    except ImportError as error:
        raise ConfigError(
            f"megatron.bridge: {error}; install megatron-bridge 0.6 (Python 3.12) and its needs"
        ) from None

    def pretrain(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(patch.original).bind(*args, **kwargs)
        theirs = call.arguments.get("callbacks")
        plugin = attach(call.arguments["config"], sections, verify=verify)
        ours = {"manager": theirs} if isinstance(theirs, manager) else {}
        call.arguments["callbacks"] = plugin.callbacks(*(() if ours else theirs or ()), **ours)
        try:
            return patch.original(*call.args, **call.kwargs)
        finally:
            plugin.detach()

    patch = Patch(PRETRAIN, pretrain, reason="the methods in each run")
    patch.apply()
    return patch
