"""Micro-batches of the scheduled length, cut where they are read: what the carry mode needs, and long layouts.

    batches = plugin.batches(from_micro_batch)      # from_micro_batch(n) -> iterator that begins with micro-batch n
    loss = engine(**next(batches))

Needed where the engine's hook comes too late: in the carry mode, whose tails are trained later, and where each rank is
given a part of every sample (context parallelism, Ulysses).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ds_plugin.errors import ConfigError, StateError
from ds_plugin.sequence_length_warmup.batch import restarted, shorten_arguments

if TYPE_CHECKING:
    from ds_plugin.sequence_length_warmup.warmup import SequenceLengthWarmup

#: n -> this rank's micro-batches from the n-th of the whole run on (counted from 0), each at full length
Source = Callable[[int], Iterator[Any]]


class Batches(Iterator[Any]):
    """This rank's micro-batches, each as long as its step. Give it to `engine.train_batch`, or call ``next``.

    A micro-batch is a mapping of arguments by name, or tensors nested in tuples and lists, as pipelines take them.
    It reads on from the right place by itself after a checkpoint was loaded.
    """

    def __init__(self, warmup: "SequenceLengthWarmup", source: Source):
        self._warmup, self._source = warmup, source
        self._iterator: Iterator[Any] | None = None
        self._next_window = 0  # what the iterator gives next
        self._held: dict[int, list[Any]] = {}  # windows that are open, by number
        self._step, self._pulled = -1, 0
        self._closed = False

    def __next__(self) -> Any:
        """The next micro-batch of the step that runs.

        Raises:
            StateError: more than the step's micro-batches are asked for: their length is not known yet.
            ConfigError: a micro-batch has not the full length, or holds what cannot be cut.
        """
        stretch = self._warmup.stretch
        return cut_batch(self._next_whole(), self._warmup.full, stretch.offset, stretch.length)

    def whole(self) -> Iterator[Any]:
        """The same micro-batches as `__next__` gives, in the same turn, before they are cut."""
        return map(lambda _: self._next_whole(), itertools.repeat(None))

    def close(self) -> None:
        """The method was taken off the engine: there are no lengths any more."""
        self._closed = True
        self.forget()

    def forget(self) -> None:
        """A checkpoint was loaded: read anew."""
        self._iterator, self._held, self._step = None, {}, -1

    def _next_whole(self) -> Any:
        warmup = self._warmup
        if self._closed:
            raise StateError("sequence_length_warmup: the method was detached from the engine; read the batches anew")
        if self._step != warmup.engine.global_steps:
            self._step, self._pulled = warmup.engine.global_steps, 0
        if self._pulled == warmup.micro_batches:
            raise StateError(
                f"sequence_length_warmup: micro-batch {self._pulled + 1} asked for in a step of {self._pulled}; the "
                "length of the next step is known after this one: do not read ahead of the optimizer"
            )
        batch = self._window(warmup.stretch.window)[self._pulled]
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


def cut_batch(batch: Any, full: int, offset: int, length: int) -> Any:
    """Tokens ``offset`` to ``offset + length`` of a micro-batch of samples of ``full`` tokens.

    Of a mapping, arguments are known by name, as the engine's hook knows them. Nested tuples and lists have no names:
    every tensor [batch, full, ...] is cut along its second dimension, [..., full, full] along its last two, and an
    integer one that counts from 0 in every row is position ids, which begin at 0 again.
    """
    if isinstance(batch, Mapping):
        cut, before, _ = shorten_arguments(batch, length, offset)
        rows = next(value.shape[0] for value in cut.values() if torch.is_tensor(value) and value.dim() >= 2)
        if before != rows * full:
            raise ConfigError(_WRONG_LENGTH.format(full=full, found=before // rows))
        return cut
    found = [0]
    cut = _cut_nested(batch, full, offset, length, found)
    if not found[0]:
        shapes = ", ".join(str(list(t.shape)) for t in _tensors(batch)) or "none"
        raise ConfigError(_WRONG_LENGTH.format(full=full, found=f"tensors of shape {shapes}"))
    return cut


_WRONG_LENGTH = (
    "sequence_length_warmup.end_length: {full}, and a micro-batch was read with {found}; read samples of exactly "
    "end_length tokens, or write that end_length"
)


def _cut_nested(part: Any, full: int, offset: int, length: int, found: list[int]) -> Any:
    if isinstance(part, Mapping):
        return {name: _cut_nested(inner, full, offset, length, found) for name, inner in part.items()}
    if isinstance(part, (tuple, list)):
        parts = [_cut_nested(inner, full, offset, length, found) for inner in part]
        named = hasattr(part, "_fields")  # a named tuple takes its parts one by one
        return type(part)(*parts) if named else type(part)(parts)
    if not torch.is_tensor(part) or part.dim() < 2:
        return part
    if part.dim() >= 3 and part.shape[-2:] == (full, full):  # an attention mask
        return part[..., offset : offset + length, offset : offset + length].contiguous()
    if part.shape[1] != full:
        return part
    found[0] += 1
    cut = part[:, offset : offset + length].contiguous()  # loss functions like to see labels as one row: view(-1)
    whole = not part.is_floating_point() and part.dim() == 2
    if offset and whole and bool((part == torch.arange(full, device=part.device)).all()):
        return restarted(cut)
    return cut


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, Mapping):
        part = tuple(part.values())
    if isinstance(part, (tuple, list)):
        for inner in part:
            yield from _tensors(inner)
    elif torch.is_tensor(part):
        yield part
