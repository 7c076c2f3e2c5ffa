"""The methods in Megatron-Bridge's training loop; it needs Python 3.12 and megatron-bridge 0.6."""

from megatron_patches.bridge.plugin import Plugin, attach

__all__ = ["Plugin", "attach"]
