"""The checkpoint manager that Megatron-Bridge makes by its name, while a plugin is attached.

``Manager`` is made when it is asked for: its base is Bridge's, and this module can be imported without.
"""

import functools
import importlib
from typing import Any

from megatron_patches.bridge import plugin


def __getattr__(name: str) -> Any:
    if name != "Manager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _manager()


@functools.cache
def _manager() -> type:
    base: Any = importlib.import_module("megatron.bridge.training.checkpointing").DefaultCheckpointManager

    class Manager(base):  # type: ignore[misc]
        """Bridge's own, with the methods' state beside what it saves."""

        def __init__(self, checkpoint_config: Any) -> None:
            super().__init__(checkpoint_config)
            self._plugin = plugin.attached(checkpoint_config)
            self._plugin.start()

        def save(self, ctx: Any, callback_manager: Any = None) -> None:
            """Save a checkpoint."""

            def save_average() -> None:
                with self._plugin.weights_alone(ctx) as alone:
                    # one of its own: nothing of what the run's keeps from one save to the next
                    base(self.checkpoint_config).save(alone, None)

            save = super().save
            self._plugin.saved(ctx.state.train_state.step, lambda: save(ctx, callback_manager), save_average)

        def load(self, ctx: Any) -> tuple[int, int]:
            """Load one; iteration and floating-point operations so far."""
            return self._plugin.load(ctx, super().load)

    return Manager
