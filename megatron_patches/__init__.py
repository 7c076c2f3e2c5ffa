"""The NVIDIA Megatron side of the plugin; importing it imports neither megatron, deepspeed nor torch.

`active()` lists every change that is on, `revert()` undoes them.
"""

from pathlib import Path

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.config import PluginConfig, load_json
from ds_plugin.core.patch import active, revert

__all__ = ["active", "apply", "revert"]


def apply(section: CompletePConfig | PluginConfig | str | Path | None) -> None:
    """What is built from now on follows the section; again is a no-op. A `CompletePConfig` reaches every GPTModel and
    its optimizer: `apply_completep`. A JSON file, or all its sections, apply to Megatron-LM's own training loop:
    `training_loop.script.install`. None changes nothing. Raises as these two do, and ConfigError for a wrong file."""
    if isinstance(section, CompletePConfig):
        from megatron_patches.apply_completep import apply_completep

        apply_completep(section)
    elif section is not None:
        from megatron_patches.training_loop.script import install

        install(section if isinstance(section, PluginConfig) else PluginConfig.from_dict(load_json(section)))
