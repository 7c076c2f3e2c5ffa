"""What a schedule comes to over a whole run: lengths, steps and tokens, worked out before the first step."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup.carry import CarryOrder
from ds_plugin.sequence_length_warmup.config import MOST_STEPS
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule


@dataclass(frozen=True)
class Plan:
    """A run of ``steps`` optimizer steps, the last at ``length``; tokens over all data-parallel ranks."""

    steps: int
    trained: int
    read: int
    length: int = 0


def walk(
    scheduler: LengthSchedule, batch: int, *, steps: int | None = None, tokens: int | None = None
) -> Iterator[Plan]:
    """The run so far, after each step while the warmup lasts, and once at the end: the run of ``steps`` steps, or the
    shortest one that trains at least ``tokens`` tokens; ``batch`` is in samples. Adaptive pacing is planned as if it
    never held. Raises ConfigError: the warmup takes more than `MOST_STEPS`."""
    config, full = scheduler.config, scheduler.config.end_length
    assert (steps is None) != (tokens is None)
    order = CarryOrder(full=full, multiple_of=scheduler.multiple_of, interleave=config.windows)
    step = trained = read = 0
    while (step < steps) if steps is not None else (trained < (tokens or 0)):
        position = (step if config.duration.unit == "steps" else trained) + 1
        if position > config.duration.total and not order.open:  # all that follows is at full length
            left = steps - step if steps is not None else -(-((tokens or 0) - trained) // (batch * full))
            yield Plan(step + left, trained + left * batch * full, read + left * batch * full, full)
            return
        length = scheduler.length_at(position)
        if config.mode == "carry":
            span = order.peek(length)
            order.advance(span)
            trained, read = trained + batch * span.length, read + (batch * full if span.offset == 0 else 0)
        else:
            trained, read = trained + batch * (full if config.keeps_tokens else length), read + batch * full
        step += 1
        if step > MOST_STEPS:
            what = f"sequence_length_warmup.duration: {config.duration.total} {config.duration.unit} take more than"
            raise ConfigError(f"{what} {MOST_STEPS:,} steps of {batch} samples; write a shorter one, or a larger batch")
        yield Plan(step, trained, read, length)


def plan(scheduler: LengthSchedule, batch: int, *, steps: int | None = None, tokens: int | None = None) -> Plan:
    """The run that `walk` comes to."""
    return functools.reduce(lambda _, then: then, walk(scheduler, batch, steps=steps, tokens=tokens), Plan(0, 0, 0))
