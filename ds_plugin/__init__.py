"""Sequence length warmup, CompleteP and early weight averaging for DeepSpeed, from one JSON file.

    import ds_plugin
    engine, optimizer, loader, scheduler = ds_plugin.initialize(model=model, config="config.json")
    with ds_plugin.get_plugin(engine).averaged_weights():
        evaluate()

Importing this package is cheap: DeepSpeed is imported when one of the names below is first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_plugin.config import PluginConfig
    from ds_plugin.deepspeed_engine.attach import attach, detach, get_plugin, initialize
    from ds_plugin.deepspeed_engine.engine import Plugin
    from ds_plugin.deepspeed_engine.json_check import split_config

__all__ = ["Plugin", "PluginConfig", "attach", "detach", "get_plugin", "initialize", "split_config"]
__version__ = "0.1.0"

_HOME = {
    "PluginConfig": "ds_plugin.config",
    "split_config": "ds_plugin.deepspeed_engine.json_check",
    "Plugin": "ds_plugin.deepspeed_engine.engine",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ds_plugin' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME.get(name, "ds_plugin.deepspeed_engine.attach")), name)
