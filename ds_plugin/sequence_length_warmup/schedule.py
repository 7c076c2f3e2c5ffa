"""The length schedule: which length comes at which position of a run, as a pure function. Knows no framework."""

import math
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup import pacing
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig

_BUILT_IN = {"linear": pacing.linear, "sinusoidal": pacing.sinusoidal, "exponential": pacing.exponential}


class LengthSchedule:
    """Length of a sample by position: the optimizer step or the trained token that comes next, counted from 1."""

    def __init__(self, config: SequenceLengthWarmupConfig, *, layout_multiple: int = 1):
        """``layout_multiple``: what the parallel layout divides a sample by (`layout_multiple()` below finds it).
        Raises ConfigError: it does not divide the full length, the duration is a share of a run of unknown length, or
        the user's schedule cannot be imported or called."""
        if (share := config.duration.share) is not None:
            what = f"{share} of a run whose length is not known here (a scheduler's total_num_steps would say it)"
            raise ConfigError(f'sequence_length_warmup.duration.share: {what}; write {{"steps": N}} or {{"tokens": N}}')
        self.config = config
        self.multiple_of = math.lcm(config.multiple_of, layout_multiple)
        if config.end_length % self.multiple_of:
            what = f"{config.end_length} is not divisible by {self.multiple_of}"
            why = f"multiple_of {config.multiple_of} and the {layout_multiple} parts of the parallel layout need it"
            raise ConfigError(f"sequence_length_warmup.end_length: {what}, as {why}; write a multiple of it")
        self._bounds = {"start": config.start_length, "end": config.end_length, "multiple_of": self.multiple_of}
        count = config.max_distinct_lengths
        self._levels = pacing.levels(**self._bounds, count=count) if count is not None else None
        if config.tokens_per_step == "constant":
            self._levels = pacing.divisors(**self._bounds)
        self._function: Any = config.function()
        try:  # so that a broken one is known before training starts
            if self._function is not None:
                self.lengths()
        except Exception as error:  # a user's function may raise anything
            what = "(share of the duration in [0, 1], start_length, end_length) -> length in tokens"
            where = f"sequence_length_warmup.schedule: {config.schedule!r}"
            raise ConfigError(f"{where} {error}; write a function {what}") from error

    def length_at(self, position: int) -> int:
        """Length in tokens at a position, counted from 1 in the unit of ``duration``."""
        c, total = self.config, self.config.duration.total
        done, span = min(max(position, 0), total), {"start": c.start_length, "end": c.end_length, "duration": total}
        if c.schedule in _BUILT_IN:
            exact = _BUILT_IN[c.schedule](done, **span)
        elif c.schedule == "root":
            exact = pacing.root(done, **span, degree=c.root_degree or 2)
        elif c.schedule == "discrete":  # each length up to and including its boundary
            ends = zip(c.lengths or [], [*(c.boundaries or []), math.inf], strict=True)
            exact = next(length for length, last in ends if position <= last)
        else:
            exact = pacing.custom(done, **span, function=self._function)
        length = pacing.floored(exact, **self._bounds)
        return length if self._levels is None else max(level for level in self._levels if level <= length)

    def lengths(self) -> list[int]:
        """Every length of the schedule, rising: at each step, or at ten thousand positions of a longer duration."""
        total = self.config.duration.total
        stride = max(1, total // 10_000)
        return sorted({self.length_at(position) for position in [*range(1, total + 1, stride), total, total + 1]})


def layout_multiple(module: torch.nn.Module) -> int:
    """The number of equal parts a megatron-core model's layout cuts each sample into; 1 for any other model: one for
    each tensor-parallel rank under sequence parallelism, two for each rank under context parallelism."""
    config = getattr(module, "config", None)
    tensor = getattr(config, "tensor_model_parallel_size", 1) if getattr(config, "sequence_parallel", False) else 1
    context = getattr(config, "context_parallel_size", 1)
    return math.lcm(tensor * context, 2 * context if context > 1 else 1)
