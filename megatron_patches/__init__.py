"""The NVIDIA Megatron side of the plugin.

Importing this package is cheap: it imports neither megatron nor deepspeed. `active()` lists every change the plugin has
made to the host in this process and `revert()` undoes them all.
"""

from megatron_patches.patch import active, revert

__all__ = ["active", "revert"]
