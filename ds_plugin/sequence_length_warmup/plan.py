"""What a schedule comes to over a whole run: steps and tokens, worked out before the first step."""

from dataclasses import dataclass

from ds_plugin.sequence_length_warmup.carry import CarryOrder
from ds_plugin.sequence_length_warmup.scheduler import SequenceLengthScheduler


@dataclass(frozen=True)
class Plan:
    """A run of ``steps`` optimizer steps; tokens over all data-parallel ranks."""

    steps: int
    trained: int
    read: int


def plan(
    scheduler: SequenceLengthScheduler,
    batch: int,
    *,
    steps: int | None = None,
    tokens: int | None = None,
) -> Plan:
    """The run of ``steps`` steps, or the shortest one that trains at least ``tokens`` tokens; ``batch`` is in samples.

    Adaptive pacing is planned as if it never held.
    """
    config, full = scheduler.config, scheduler.config.end_length
    assert (steps is None) != (tokens is None)
    order = CarryOrder(full=full, multiple_of=scheduler.multiple_of, interleave=config.windows)
    step = trained = read = 0
    while (step < steps) if steps is not None else (trained < (tokens or 0)):
        position = (step if config.duration.unit == "steps" else trained) + 1
        if position > config.duration.total and not order.open:  # all that follows is at full length
            left = steps - step if steps is not None else -(-((tokens or 0) - trained) // (batch * full))
            return Plan(step + left, trained + left * batch * full, read + left * batch * full)
        length = scheduler.length_at(position)
        if config.mode == "mask":
            trained, read = trained + batch * full, read + batch * full
        elif config.mode == "truncate":
            trained, read = trained + batch * length, read + batch * full
        else:
            stretch = order.next(length)
            order.take(stretch)
            trained, read = trained + batch * stretch.length, read + (batch * full if stretch.offset == 0 else 0)
        step += 1
    return Plan(step, trained, read)
