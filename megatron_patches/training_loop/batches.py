"""What lies between Megatron-LM's data loaders and its training loop: batches cut to a length, batches seen again."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError, DataError
from ds_plugin.sequence_length_warmup.batches import Batches
from ds_plugin.sequence_length_warmup.slicing import cut_batch, fold_batch
from megatron_patches.training_loop.lengths import Lengths

_KNOWN = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "dataset_id")
_SECTION, _NAMES = "sequence_length_warmup", ", ".join(_KNOWN)


def cut(batch: Any, length: int, offset: int = 0, *, fold: int | None = None) -> dict[str, Any]:
    """``length`` positions from ``offset`` on of every sample of a micro-batch, contiguous, as broadcasts need them;
    with ``fold`` all of its so many positions, in samples of ``length``. Raises DataError for an entry that is not
    known, and for shorter samples."""
    if not isinstance(batch, Mapping):
        raise DataError(f"{_SECTION}: the data are {type(batch).__name__} objects; give dictionaries, {_NAMES}")
    for name, value in batch.items():
        if torch.is_tensor(value) and name not in _KNOWN:
            what = f"the data hold {name!r} of shape {list(value.shape)}, known are {_NAMES}"
            raise DataError(f"{_SECTION}: {what}; leave it out, train packed samples (--sft, THD) without {_SECTION}")
    try:
        if fold is not None:
            return dict(fold_batch(batch, length, full=fold)[0])
        found, _, tokens = cut_batch(batch, length, offset)
    except ConfigError as error:
        raise DataError(str(error)) from None
    rows, own = batch["tokens"].shape
    if tokens < rows * length:  # the loop gives its models one shape
        raise DataError(f"{_SECTION}: tokens has {own} positions, {length} are to be trained; give samples as long")
    return dict(found)


class Cut(Iterator[Any]):
    """The batches of ``source``, cut to ``length()`` tokens of a sample, asked for each batch anew."""

    def __init__(self, source: Iterator[Any], length: Callable[[], int], *, fold: int | None = None):
        self._source, self._length, self._fold = source, length, fold
        self._ahead: list[Any] = []

    def whole(self) -> Iterator[Any]:
        """The batches that come, at full length."""
        while True:
            try:
                yield self._ahead.pop() if self._ahead else next(self._source)
            except StopIteration:
                return

    def check_first(self, full: int) -> None:
        """Read one batch ahead, to raise DataError as `cut` does at the longest of the lengths."""
        with contextlib.suppress(StopIteration):  # a run that has reached its end reads nothing
            cut(self.ahead(), full)

    def ahead(self) -> Any:
        """The batch that comes next, whole; it still comes. Raises StopIteration if there is none."""
        if not self._ahead:
            self._ahead.append(next(self._source))
        return self._ahead[0]

    def __next__(self) -> Any:
        return cut(self._ahead.pop() if self._ahead else next(self._source), self._length(), fold=self._fold)


class Carry(Cut):
    """The carry mode's: the iteration's span of the samples of its window. ``source`` begins with the first window that
    is still needed (`Lengths.first_window`)."""

    def __init__(self, source: Iterator[Any], lengths: Lengths, micro_batches: Callable[[], int]):
        """``micro_batches()``: of an iteration on this rank, the same in all of them."""
        super().__init__(source, lambda: lengths.length)
        read = Batches(_Steps(lengths, micro_batches), lambda _: _sharing_all(self.whole()))
        self._lengths, self._whole = lengths, read.whole()

    def __next__(self) -> Any:
        return cut(next(self._whole), self._lengths.length, self._lengths.span.offset)


@dataclass(eq=False)
class _Steps:
    """A training as `Batches` reads for it."""

    lengths: Lengths
    gradient_accumulation_steps: Callable[[], int]
    loads: int = 0  # of checkpoints, since its batches are read: none

    @property
    def engine(self) -> "_Steps":
        return self

    @property
    def global_steps(self) -> int:
        return self.lengths.iterations

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lengths, name)  # span, open_windows


class Replay(Iterator[Any]):
    """The batches of ``source``; those read since `record` come again after each `replay`, until `forget`. A batch that
    it gives is the loop's own: from core 0.18 on, forward steps write the device's tensors into it, or parts of them.
    """

    def __init__(self, source: Iterator[Any]):
        self._source = source
        self.forget()

    def __next__(self) -> Any:
        for batch in self._again:
            return _copied(batch)
        batch = next(self._source)
        if self._recording:
            batch = _sharing(batch, self._kept[-1] if self._kept else None)
            self._kept.append(batch)
        return _copied(batch)

    def record(self) -> None:
        self.forget()
        self._recording = True

    def replay(self) -> None:
        self._recording, self._again = False, iter(self._kept)

    def forget(self) -> None:
        self._kept: list[Any] = []
        self.replay()


def _copied(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def _sharing_all(batches: Iterator[Any]) -> Iterator[Any]:
    before = None
    for batch in batches:
        yield (before := _sharing(batch, before))


def _sharing(batch: Any, before: Any) -> Any:
    """The batch; entries equal to those of the batch before are kept once: attention masks, length x length for each
    sample, are mostly the same in all batches, gigabytes in an evaluation."""
    if not (isinstance(batch, Mapping) and isinstance(before, Mapping)):
        return batch

    def equal(one: Any, other: Any) -> bool:
        return torch.is_tensor(one) and torch.is_tensor(other) and one.dtype == other.dtype and torch.equal(one, other)

    return {name: before[name] if equal(value, before.get(name)) else value for name, value in batch.items()}
