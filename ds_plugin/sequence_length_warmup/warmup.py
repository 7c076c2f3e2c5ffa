"""Sequence length warmup on a DeepSpeed engine: shortens each training forward pass and counts the tokens."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ds_plugin import compat
from ds_plugin.errors import ConfigError, StateError
from ds_plugin.sequence_length_warmup.batch import Shorten, by_name
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.scheduler import SequenceLengthScheduler, layout_multiple


@dataclass
class Ledger:
    """Tokens over all data-parallel ranks since the start of training; ``read - trained`` is what truncation cut.

    ``trained`` leaves out steps the host skipped (an fp16 overflow): their tokens were read and had no effect.
    """

    read: int = 0
    trained: int = 0


class SequenceLengthWarmup:
    """The method's state on one engine: the scheduler, the ledger and the forward hook.

    The hook sits on the engine, outside the module, so that ``torch.compile`` never traces the schedule. It reads
    shapes only: no host sync, no collective.
    """

    def __init__(self, engine: Any, config: SequenceLengthWarmupConfig, shorten: Shorten | None = None):
        """
        Raises:
            ConfigError: the engine is one whose batches cannot be shortened here, or the layout does not divide the
                length.
        """
        if compat.sequence_parallel_size(engine) > 1:
            raise ConfigError(
                f"sequence_length_warmup: sequence_parallel_size is {compat.sequence_parallel_size(engine)}: each rank "
                "holds a part of every sample, so a prefix cannot be cut on one rank; write sequence_parallel_size 1"
            )
        context = getattr(getattr(engine.module, "config", None), "context_parallel_size", 1)
        if context > 1:
            raise ConfigError(
                f"sequence_length_warmup: context_parallel_size is {context}: each rank holds a part of every sample, "
                "so a prefix cannot be cut on one rank; write context_parallel_size 1"
            )
        self.engine = engine
        self.config = config
        self.scheduler = SequenceLengthScheduler(config, layout_multiple=layout_multiple(engine.module))
        self.ledger = Ledger()
        self._shorten = shorten or by_name(engine.module.forward)
        self._window = Ledger()  # this rank's tokens in the accumulation window that is open
        self._handle = engine.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)

    @property
    def length(self) -> int:
        """Length in tokens of the optimizer step that comes next (constant within its accumulation window)."""
        return self.scheduler.update_difficulty(self.engine.global_steps + 1)

    def describe(self) -> str:
        """The schedule in one line."""
        lengths = [self.scheduler.length_at(step) for step in range(1, self.config.duration.steps + 2)]
        return (
            f"sequence length warmup: {lengths[0]} to {lengths[-1]} tokens over {self.config.duration.steps} steps, in "
            f"{len(set(lengths))} lengths, multiples of {self.scheduler.multiple_of}"
        )

    def remove(self) -> None:
        """Take the hook off the engine."""
        self._handle.remove()

    def _before_forward(
        self, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.engine.module.training:
            return None  # evaluation is always at full length
        args, kwargs, read, trained = self._shorten(args, kwargs, self.length)
        self._window.read += read
        self._window.trained += trained
        return args, kwargs

    def after_step(self, applied: bool) -> None:
        """Close an accumulation window: the host has finished an optimizer step, applied or skipped."""
        if self._window.read == 0:
            raise StateError(
                "sequence_length_warmup: an optimizer step ended without a forward pass through the engine, so "
                "nothing was shortened; call engine(...) in training mode, not engine.module(...)"
            )
        ranks = self.engine.dp_world_size
        self.ledger.read += self._window.read * ranks
        self.ledger.trained += self._window.trained * ranks if applied else 0
        self._window = Ledger()

    def state(self) -> dict[str, Any]:
        """What a resume needs: the ledger. The length follows from the host's step counter."""
        return {"ledger": asdict(self.ledger)}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over a saved state; None (a checkpoint without one) starts the ledger at zero."""
        self.ledger = Ledger(**state["ledger"]) if state else Ledger()
        self._window = Ledger()
