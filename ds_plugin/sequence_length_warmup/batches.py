"""Micro-batches of the scheduled length, cut where they are read: needed in the carry mode, whose tails are trained
later, and where each rank is given a part of every sample (context parallelism, Ulysses).

    batches = plugin.batches(from_micro_batch)      # from_micro_batch(n) -> iterator that begins with micro-batch n
    loss = engine(**next(batches))
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from ds_plugin.core.errors import StateError
from ds_plugin.sequence_length_warmup.nested import leaves
from ds_plugin.sequence_length_warmup.slicing import POSITION_NAMES
from ds_plugin.sequence_length_warmup.spoiled import refuse_restarts

#: n -> this rank's micro-batches from the n-th of the whole run on (counted from 0), each at full length
Source = Callable[[int], Iterator[Any]]


class Batches(Iterator[Any]):
    """This rank's micro-batches, each as long as its step: mappings of arguments by name, or nested tensors, as
    pipelines take them. Give it to `engine.train_batch`, or call ``next``. After a checkpoint was loaded, it reads on
    from the right place by itself."""

    def __init__(self, warmup: Any, source: Source):
        """``warmup`` has the ``engine``, ``cut_samples(batch, exact=)``, which cuts one for the step, its `TokenSpan`
        ``span``, ``open_windows``, of which some is still to be trained, ``carries``, whether there
        are any, ``count(read, trained)`` for tokens, and ``loads``, of checkpoints so far, None when detached."""
        self._warmup, self._source = warmup, source
        self._iterator: Iterator[Any] | None = None
        self._next_window = 0  # what it gives next
        self._held: dict[int, list[Any]] = {}  # windows that are open, by number
        self._step, self._pulled = -1, 0
        self._loads = warmup.loads

    def __next__(self) -> Any:
        """The next micro-batch of the step that runs. Raises StateError: more than the step's are asked for, and their
        length is not known yet; ConfigError: it cannot be cut, or, in the carry mode, has not the full length."""
        warmup, whole = self._warmup, self._next_whole()
        # exact: a span from within samples, and what is left of them, are counted from samples of one length
        cut, read, trained = warmup.cut_samples(whole, exact=warmup.carries)
        refuse_restarts(leaves(whole), POSITION_NAMES, look=False)
        warmup.count(read if warmup.span.offset == 0 else 0, trained)
        return cut

    def whole(self) -> Iterator[Any]:
        """The same micro-batches as `__next__` gives, in the same turn, before they are cut."""
        return map(lambda _: self._next_whole(), itertools.repeat(None))

    def _next_whole(self) -> Any:
        warmup = self._warmup
        if warmup.loads is None:  # there are no lengths any more
            raise StateError("sequence_length_warmup: it was detached from the engine; read the batches anew")
        if self._loads != warmup.loads:
            self._iterator, self._held, self._step, self._loads = None, {}, -1, warmup.loads
        if self._step != (step := warmup.engine.global_steps):
            self._step, self._pulled = step, 0
        if self._pulled == warmup.engine.gradient_accumulation_steps():
            said = f"micro-batch {self._pulled + 1} asked for in a step of {self._pulled}, before the next has a length"
            raise StateError(f"sequence_length_warmup: {said}; do not read ahead of the optimizer")
        batch = self._window(warmup.span.window)[self._pulled]
        self._pulled += 1
        return batch

    def _window(self, window: int) -> list[Any]:
        if window not in self._held:
            count = self._warmup.engine.gradient_accumulation_steps()
            wanted = {window, *self._warmup.open_windows}
            if self._iterator is None or window < self._next_window:  # from the first on: they are read once
                self._iterator, self._next_window = self._source(min(wanted) * count), min(wanted)
            while self._next_window <= window:
                read = [next(self._iterator) for _ in range(count)]
                if self._next_window in wanted:
                    self._held[self._next_window] = read
                self._next_window += 1
            self._held = {number: read for number, read in self._held.items() if number in wanted}
        return self._held[window]


class WholeBatches(Iterator[Any]):
    """Full-length micro-batches from the engine's step on; it goes back (or ahead) when a checkpoint was loaded."""

    def __init__(self, engine: Any, source: Source, loads: Callable[[], int]):
        """``loads``: of checkpoints so far."""
        self._engine, self._source, self._count = engine, source, loads
        self._iterator: Iterator[Any] | None = None
        self._step, self._loads = -1, -1  # the engine's, when the last was read, and how many loads there were

    def __next__(self) -> Any:
        """The next micro-batch. Reading ahead of the step is allowed: every step is of the same length."""
        step = self._engine.global_steps
        if self._loads != (loads := self._count()) or step not in (self._step, self._step + 1):
            self._iterator = self._source(step * self._engine.gradient_accumulation_steps())
        self._step, self._loads = step, loads
        assert self._iterator is not None
        return next(self._iterator)
