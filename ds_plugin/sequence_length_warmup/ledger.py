"""What became of the tokens: each rank counts its own, and all are added up in the report's exchange."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Ledger:
    """What became of the tokens since the start of training, over all data-parallel ranks. ``trained`` leaves out steps
    the framework skipped (an fp16 overflow): their tokens were read and had no effect."""

    read: int = 0
    trained: int = 0
    carried: int = 0  # read, and to be trained later
    untrained_targets: int = 0  # trained as inputs only: the first of a carried span, if the model shifts labels

    @property
    def discarded(self) -> int:
        """Tokens that were read and will not be trained: cut off, or in a skipped step."""
        return self.read - self.trained - self.carried


class TokenCounts:
    """Counts of one rank since the last exchange, and of all of them until then. Ranks may read different numbers of
    tokens, where samples are padded to the longest of each micro-batch. The schedule and learning rates follow
    **nominal** tokens, the step's length times its samples: equal on all ranks in every step, without asking."""

    def __init__(self, *, replicas: int, copies: int):
        """``replicas``: ranks that read data of their own; ``copies``: ranks that read the same as each of them."""
        self.replicas, self.copies = replicas, copies
        self.start_at(0, 0)

    def start_at(self, read: int, trained: int) -> None:
        """Take steps that were made without us as so many tokens of all ranks."""
        self.nominal, self._all = trained, Ledger(read, trained)
        self._mine, self._open = Ledger(), Ledger()  # since the exchange; of it the accumulation step that is open

    def add(self, read: int, trained: int) -> None:
        """Note one micro-batch on this rank."""
        self._open.read += read
        self._open.trained += trained

    def close(self, nominal: int, applied: bool) -> None:
        """The optimizer step is over; it stood for ``nominal`` tokens of all ranks."""
        self._mine.read += self._open.read
        if applied:
            self.nominal += nominal
            self._mine.trained += self._open.trained
        self._open = Ledger()

    def ledger(self, carried: int = 0) -> Ledger:
        """Over all ranks; exact right after an exchange. In between, the others are taken to have read as much."""
        read, trained = (n * self.replicas for n in self.mine())
        return Ledger(self._all.read + read, self._all.trained + trained, carried)

    def mine(self) -> Sequence[int]:
        """What this rank has to tell the others."""
        return self._mine.read, self._mine.trained

    def exchanged(self, totals: Sequence[float]) -> None:
        """The sums of `mine` over all ranks, on every one of them."""
        read, trained = (round(total) // self.copies for total in totals)
        self._all = Ledger(self._all.read + read, self._all.trained + trained)
        self._mine = Ledger()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over ``ledger`` and ``nominal`` as they were saved, right after an exchange."""
        self.start_at(state["ledger"]["read"], state["ledger"]["trained"])
        self.nominal = state["nominal"]
