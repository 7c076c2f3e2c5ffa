"""What is kept of the snapshots, and what is read from it: a sliding window, blocks, or a bank of running averages.

Each mode owns buffers of this rank's shape in CPU memory, allocated once (`storage`). It folds a snapshot in without
any communication, and reads an average whose bits do not depend on the sharding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_plugin.weight_averaging import deltas, window
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.state.reshard import Resharded

Tensors = list[torch.Tensor]
Allocate = Callable[[torch.dtype], Tensors]
State = Mapping[str, Any]


class Mode(ABC):
    """What the averager needs of a mode."""

    def __init__(self, config: WeightAveragingConfig, allocate: Allocate):
        self._config = config
        self._buffers = [allocate(dtype) for dtype in buffers(config)]
        self.reset()

    def reset(self) -> None:
        """Forget everything, as at the start of a run."""
        self._steps: list[int] = []

    def steps(self) -> list[int]:
        """Steps of the snapshots in the average that `read_` gives, oldest first (ema: the first and the latest)."""
        return self._steps

    @abstractmethod
    def add(self, step: int, snapshot: Tensors) -> None:
        """Fold in the masters as they are after ``step``; ``snapshot`` is read, never kept."""

    def take(self, step: int, buffer: Tensors) -> Tensors:
        """`add` a snapshot in a contiguous buffer of the mode's own kind; returns a buffer that is free now.

        That is the same one, or another where the mode keeps it and is spared a copy.
        """
        self.add(step, buffer)
        return buffer

    @abstractmethod
    def read_(self, out: Tensors, horizon: int | None) -> None:
        """Write the average into ``out``. ``horizon``: which of the bank, in mode ema."""

    def state(self) -> dict[str, Any]:
        """What `load` needs beside the tensors, in JSON types."""
        return {"steps": self._steps}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is held, ``<what>.<shard>``: the live buffers."""
        return _named(self._held(self.state()))

    def load(self, state: State, saved: Resharded) -> None:
        """Take over a saved `state` and its tensors, or raise what `Resharded.check` does and hold what it held before.

        They are read straight into the buffers. Should that fail half-way, after all checks, nothing is held.
        """
        tensors = _named(self._held(state))
        for name in tensors:
            saved.check(name)
        self.reset()
        for name, tensor in tensors.items():
            saved.read_(name, tensor)
        self._adopt(state)

    @abstractmethod
    def _held(self, state: State) -> dict[str, Tensors]:
        """What a mode in ``state`` holds, ``<what>``, and the buffers for it."""

    def _adopt(self, state: State) -> None:
        self._steps = list(state["steps"])


class Sliding(Mode):
    """The last ``window`` snapshots, whole. The mean is worked out from them when it is read, so it never drifts.

    The buffers in use come first, oldest first.
    """

    _oldest = 0  # where its buffer is

    def _advance(self, step: int) -> None:
        """Count the snapshot of ``step``; when the window is full, the oldest one's buffer becomes the last."""
        self._steps = [*self._steps, step]
        if len(self._steps) > self._config.window:
            older = self._buffers[self._oldest :]
            self._steps, self._buffers[self._oldest :] = self._steps[1:], [*older[1:], *older[:1]]

    def add(self, step: int, snapshot: Tensors) -> None:
        self._advance(step)
        window.copy_(self.snapshots()[-1], snapshot)

    def take(self, step: int, buffer: Tensors) -> Tensors:
        self._advance(step)
        newest = len(self._steps) - 1
        self._buffers[newest], free = buffer, self._buffers[newest]
        return free

    def forget_from(self, step: int) -> None:
        """Forget the snapshots of ``step`` and later ones."""
        self._steps = [held for held in self._steps if held < step]

    def snapshots(self) -> list[Tensors]:
        """The snapshots held, oldest first."""
        return self._buffers[: len(self._steps)]

    def _weights(self) -> list[float]:
        return window.read_weights(self._config.weights, len(self._steps))

    def read_(self, out: Tensors, horizon: int | None) -> None:
        window.weighted_mean_(out, self.snapshots(), self._weights())

    def _kept(self, state: State) -> range:
        """Which of a larger window's snapshots this one can hold: the newest."""
        return range(len(state["steps"]))[-self._config.window :]

    def _held(self, state: State) -> dict[str, Tensors]:
        return {f"snapshot.{i}": buffer for i, buffer in zip(self._kept(state), self._buffers, strict=False)}

    def _adopt(self, state: State) -> None:
        self._steps = [state["steps"][i] for i in self._kept(state)]


class SlidingDeltas(Sliding):
    """`Sliding` with the newest snapshot whole and older ones as bf16 differences: see `deltas` for what that costs.

    The newest one's buffer is the first, then come those of the older ones, oldest first.
    """

    _oldest = 1

    def _deltas(self) -> list[Tensors]:
        return self._buffers[1 : max(1, len(self._steps))]

    def _quantize_newest(self, step: int, snapshot: Tensors) -> None:
        """Keep the newest snapshot as its difference to ``snapshot``, that of ``step``."""
        self._advance(step)
        if older := self._deltas():
            deltas.quantize_delta_(older[-1], self._buffers[0], snapshot)

    def add(self, step: int, snapshot: Tensors) -> None:
        self._quantize_newest(step, snapshot)
        window.copy_(self._buffers[0], snapshot)

    def take(self, step: int, buffer: Tensors) -> Tensors:
        self._quantize_newest(step, buffer)
        self._buffers[0], free = buffer, self._buffers[0]
        return free

    def forget_from(self, step: int) -> None:
        while self._steps and self._steps[-1] >= step:
            if older := self._deltas():
                deltas.grow_(self._buffers[0], older[-1])
            self._steps = self._steps[:-1]

    def snapshots(self) -> list[Tensors]:
        """The snapshots held, oldest first, as they are read: in new memory, but for the newest."""
        return deltas.restored(self._buffers[0], self._deltas()) if self._steps else []

    def read_(self, out: Tensors, horizon: int | None) -> None:
        deltas.mean_(out, self._buffers[0], self._deltas(), self._weights())

    def _held(self, state: State) -> dict[str, Tensors]:
        kept = self._kept(state)
        newest = {"newest": self._buffers[0]} if kept else {}
        return newest | {f"delta.{i}": buffer for i, buffer in zip(kept[:-1], self._buffers[1:], strict=False)}


class Block(Mode):
    """Blocks of ``window`` snapshots that do not overlap, as in the code published with LAWA. Two buffers.

    Read is the mean of the last finished block; before the first is finished, that of the open one so far. The sums
    are of ``window`` numbers at most, so they do not drift. The first buffer is the open block's sum, the other one the
    mean of the last finished block; ``_steps`` are the open block's.
    """

    def reset(self) -> None:
        super().reset()
        self._finished: list[int] = []

    def steps(self) -> list[int]:
        return self._finished or self._steps

    def add(self, step: int, snapshot: Tensors) -> None:
        total = self._buffers[0]
        (window.add_ if self._steps else window.copy_)(total, snapshot)
        self._steps = [*self._steps, step]
        if len(self._steps) == self._config.window:
            window.mean_of_sum_(total, total, self._config.window)
            self._buffers.reverse()
            self._steps, self._finished = [], self._steps

    def read_(self, out: Tensors, horizon: int | None) -> None:
        if self._finished:
            window.copy_(out, self._buffers[1])
        else:
            window.mean_of_sum_(out, self._buffers[0], len(self._steps))

    def state(self) -> dict[str, Any]:
        return {"window": self._config.window, "open": self._steps, "finished": self._finished}

    def _held(self, state: State) -> dict[str, Tensors]:
        return {what: buffer for what, buffer in zip(("open", "finished"), self._buffers, strict=True) if state[what]}

    def _adopt(self, state: State) -> None:
        self._steps, self._finished = list(state["open"]), list(state["finished"])


class Ema(Mode):
    """A bank of exponential averages, one buffer for each horizon, all from the same snapshots.

    The n-th snapshot moves the average of horizon h by ``1 / min(n, h)`` of the way: decay ``1 - 1/h`` in the long run.
    Up to the h-th it is the plain mean of all snapshots, so that the first one weighs no more than the others (with the
    final decay from the start it would, by a factor of h). ``_steps`` are the first one's and the latest's.
    """

    def reset(self) -> None:
        super().reset()
        self._count = 0

    def _bank(self) -> dict[int, Tensors]:
        return dict(zip(self._config.horizons or (), self._buffers, strict=True))

    def add(self, step: int, snapshot: Tensors) -> None:
        self._count += 1
        for horizon, average in self._bank().items():
            if self._count == 1:
                window.copy_(average, snapshot)
            else:
                window.move_(average, snapshot, min(self._count, horizon))
        self._steps = [*self._steps[:1], step]

    def read_(self, out: Tensors, horizon: int | None) -> None:
        window.copy_(out, self._buffers[0] if horizon is None else self._bank()[horizon])

    def state(self) -> dict[str, Any]:
        return {"horizons": self._config.horizons, "count": self._count, "steps": self._steps}

    def _held(self, state: State) -> dict[str, Tensors]:
        return {f"ema.{horizon}": average for horizon, average in self._bank().items()} if state["count"] else {}

    def _adopt(self, state: State) -> None:
        super()._adopt(state)
        self._count = int(state["count"])


def make(config: WeightAveragingConfig, allocate: Allocate) -> Mode:
    """The mode that ``config`` asks for; ``allocate`` is called once for each of `buffers`."""
    if config.mode == "sliding":
        return SlidingDeltas(config, allocate) if config.deltas == "bf16" else Sliding(config, allocate)
    return Block(config, allocate) if config.mode == "block" else Ema(config, allocate)


def buffers(config: WeightAveragingConfig) -> list[torch.dtype]:
    """The copies of this rank's masters that a mode allocates, in this order."""
    if config.deltas == "bf16":
        return [torch.float32] + [torch.bfloat16] * (config.window - 1)
    count = {"sliding": config.window, "block": 2, "ema": len(config.horizons or ())}[config.mode]
    return [torch.float32] * count


def _named(held: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    return {f"{what}.{j}": t for what, buffer in held.items() for j, t in enumerate(buffer)}
