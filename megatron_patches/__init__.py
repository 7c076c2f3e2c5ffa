"""The NVIDIA Megatron side of the plugin; importing it imports neither megatron, deepspeed nor torch.

`apply(section)` gives a script that builds its own model and optimizer the CompleteP recipe, `apply("methods.json")`
gives Megatron-LM's training loop all three methods; `active()` lists every change that is on, `revert()` undoes them.
"""

from typing import TYPE_CHECKING, Any

from ds_plugin.core.patch import active, revert

if TYPE_CHECKING:
    from megatron_patches.training_loop.script import apply

__all__ = ["active", "apply", "revert"]


def __getattr__(name: str) -> Any:
    if name != "apply":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_patches.training_loop.script import apply

    return apply
