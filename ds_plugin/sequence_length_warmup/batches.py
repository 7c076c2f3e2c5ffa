"""Micro-batches of the scheduled length, cut where they are read.

    batches = plugin.batches(from_micro_batch)      # from_micro_batch(n) -> iterator that begins with micro-batch n
    loss = engine(**next(batches))

Needed in the carry mode, whose tails are trained later, and where each rank is given a part of every sample (context
parallelism, Ulysses).
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from ds_plugin.core.errors import StateError
from ds_plugin.sequence_length_warmup.nested import leaves
from ds_plugin.sequence_length_warmup.slicing import POSITION_NAMES, cut_batch
from ds_plugin.sequence_length_warmup.spoiled import refuse_restarts

#: n -> this rank's micro-batches from the n-th of the whole run on (counted from 0), each at full length
Source = Callable[[int], Iterator[Any]]


class Batches(Iterator[Any]):
    """This rank's micro-batches, each as long as its step. Give it to `engine.train_batch`, or call ``next``.

    A micro-batch is a mapping of arguments by name, or nested tensors, as pipelines take them. After a checkpoint was
    loaded, it reads on from the right place by itself.
    """

    def __init__(self, warmup: Any, source: Source):
        """``warmup`` has ``full``, the length of a sample, ``samples``, keyword arguments of `cut_batch`, the optimizer
        ``step``, its ``micro_batches`` on this rank, its `TokenSpan` ``span``, ``open_windows``, of which a part is
        still to be trained, ``carries``, whether there are any, and ``count(read, trained)`` for tokens."""
        self._warmup, self._source = warmup, source
        self._next_window = 0  # what the iterator gives next
        self._closed = False
        self.forget()

    def __next__(self) -> Any:
        """The next micro-batch of the step that runs.

        Raises:
            StateError: more than the step's micro-batches are asked for: their length is not known yet.
            ConfigError: a micro-batch holds what cannot be cut, or, in the carry mode, has not the full length.
        """
        warmup, span, whole = self._warmup, self._warmup.span, self._next_whole()
        # a span from within samples, and what is left of them, are counted from samples of one length
        exact = warmup.carries
        cut, read, trained = cut_batch(whole, span.length, span.offset, full=warmup.full, exact=exact, **warmup.samples)
        refuse_restarts(leaves(whole), POSITION_NAMES, look=False)
        warmup.count(read if span.offset == 0 else 0, trained)
        return cut

    def whole(self) -> Iterator[Any]:
        """The same micro-batches as `__next__` gives, in the same turn, before they are cut."""
        return map(lambda _: self._next_whole(), itertools.repeat(None))

    def close(self) -> None:
        """The method was taken off the engine: there are no lengths any more."""
        self._closed = True
        self.forget()

    def forget(self) -> None:
        """A checkpoint was loaded: read anew."""
        self._iterator: Iterator[Any] | None = None
        self._held: dict[int, list[Any]] = {}  # windows that are open, by number
        self._step, self._pulled = -1, 0

    def _next_whole(self) -> Any:
        warmup = self._warmup
        if self._closed:
            raise StateError("sequence_length_warmup: it was detached from the engine; read the batches anew")
        if self._step != warmup.step:
            self._step, self._pulled = warmup.step, 0
        if self._pulled == warmup.micro_batches:
            said = f"micro-batch {self._pulled + 1} asked for in a step of {self._pulled}, before the next has a length"
            raise StateError(f"sequence_length_warmup: {said}; do not read ahead of the optimizer")
        batch = self._window(warmup.span.window)[self._pulled]
        self._pulled += 1
        return batch

    def _window(self, window: int) -> list[Any]:
        if window not in self._held:
            if self._iterator is None or window < self._next_window:
                self._iterator, self._next_window = self._source(window * self._warmup.micro_batches), window
            wanted = {window, *self._warmup.open_windows}
            while self._next_window <= window:
                read = [next(self._iterator) for _ in range(self._warmup.micro_batches)]
                if self._next_window in wanted:
                    self._held[self._next_window] = read
                self._next_window += 1
            self._held = {number: read for number, read in self._held.items() if number in wanted}
        return self._held[window]


class WholeBatches(Iterator[Any]):
    """Full-length micro-batches from the engine's step on; it goes back (or ahead) when a checkpoint was loaded."""

    def __init__(self, engine: Any, source: Source):
        self._engine, self._source = engine, source
        self._iterator: Iterator[Any] | None = None
        self._step = -1  # the engine's, when the last was read

    def __next__(self) -> Any:
        """The next micro-batch. Reading ahead of the step is allowed: every step is of the same length."""
        step = self._engine.global_steps
        if self._iterator is None or step not in (self._step, self._step + 1):
            self._iterator = self._source(step * self._engine.gradient_accumulation_steps())
        self._step = step
        return next(self._iterator)
