"""What is kept of the snapshots, and what is read from it: a sliding window, blocks, or a bank of running averages. No
communication, and no average's bits depend on the sharding."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ds_plugin.weight_averaging import deltas, window
from ds_plugin.weight_averaging.config import WeightAveragingConfig

Tensors = list[torch.Tensor]


@dataclass
class Held:
    """Which snapshots a mode holds; a checkpoint has it as JSON. The lists are replaced, never changed."""

    steps: list[int] = field(default_factory=list)  # of those in the window or the open block; ema: the first, the last
    finished: list[int] = field(default_factory=list)  # block: of those in the last finished one
    count: int = 0  # ema: how many there were


class Mode:
    """What the averager needs of a mode. ``kept``: a list of this rank's shape in CPU memory for each of `buffers`."""

    def __init__(self, config: WeightAveragingConfig, kept: Sequence[Tensors]):
        self._config, self._buffers = config, list(kept)
        self.reset()

    def reset(self) -> None:
        self._held = Held()

    def steps(self) -> list[int]:
        return self._held.steps

    def add(self, step: int, snapshot: Tensors) -> None:
        """Fold in the masters as they are after ``step``; ``snapshot`` is read, never kept."""
        raise NotImplementedError

    def take(self, step: int, buffer: Tensors) -> Tensors:
        """`add` a contiguous buffer of the mode's own kind; returns one that is free now: that one, or another where
        the mode keeps it and is spared a copy."""
        self.add(step, buffer)
        return buffer

    def read_(self, out: Tensors, horizon: int | None) -> None:
        """Write the average into ``out``. ``horizon``: which of the bank, in mode ema."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return asdict(self._held)

    def tensors(self, held: Held | None = None) -> dict[str, torch.Tensor]:
        """What is held, or what ``held`` would be, ``<what>.<shard>``: the live buffers."""
        places = self._places(held or self._held)
        return {f"{what}.{i}": t for what, buffer in places.items() for i, t in enumerate(buffer)}

    def load(self, state: dict[str, Any], read_: Callable[[str, torch.Tensor], None]) -> None:
        """Take over a saved `state`; ``read_`` writes a saved tensor into a buffer. If it fails, nothing is held."""
        held = Held(**state)
        if self._config.mode == "sliding":  # of a larger window the newest
            held.steps = held.steps[-self._config.window :]
        self.reset()
        for name, tensor in self.tensors(held).items():
            read_(name, tensor)
        self._held = held

    def _places(self, held: Held) -> dict[str, Tensors]:
        """The buffers in use, by ``<what>``."""
        raise NotImplementedError


class Sliding(Mode):
    """The last ``window`` snapshots, whole: their mean, worked out when it is read, never drifts. The buffers in use
    come first, newest first."""

    def add(self, step: int, snapshot: Tensors) -> None:
        self._make_room(snapshot)
        window.copy_(self._buffers[0], snapshot)
        self._held.steps = [*self._held.steps, step][-self._config.window :]

    def take(self, step: int, buffer: Tensors) -> Tensors:
        self._make_room(buffer)
        self._buffers[0], free = buffer, self._buffers[0]
        self._held.steps = [*self._held.steps, step][-self._config.window :]
        return free

    def _make_room(self, newest: Tensors, place: int = 0) -> None:
        """Move to ``place`` a free buffer, or the oldest's; the first one gives way to the ``newest`` snapshot."""
        last = min(len(self._held.steps), self._config.window - 1)
        self._buffers.insert(place, self._buffers.pop(last))

    def forget_from(self, step: int) -> None:
        while self._held.steps and self._held.steps[-1] >= step:
            self._forget_newest()
            self._held.steps = self._held.steps[:-1]

    def _forget_newest(self) -> None:
        self._buffers.append(self._buffers.pop(0))

    def snapshots(self) -> list[Tensors]:
        """What is held, oldest first; of older ones perhaps the differences."""
        return self._buffers[: len(self._held.steps)][::-1]

    def read_(self, out: Tensors, horizon: int | None) -> None:
        weights = window.read_weights(self._config.weights, len(self._held.steps))
        self._mean_(out, weights, *self.snapshots())

    def _mean_(self, out: Tensors, weights: list[float], *held: Tensors) -> None:
        window.weighted_mean_(out, held, weights)

    def _places(self, held: Held) -> dict[str, Tensors]:
        return {f"snapshot.{age}": self._buffers[age] for age in range(len(held.steps))}


class SlidingDeltas(Sliding):
    """`Sliding` with the newest snapshot whole and older ones as bf16 differences: see `deltas` for what that costs."""

    def _make_room(self, newest: Tensors, place: int = 0) -> None:
        if self._held.steps and self._config.window > 1:
            super()._make_room(newest, 1)
            deltas.quantize_delta_(self._buffers[1], self._buffers[0], newest)

    def _forget_newest(self) -> None:
        if len(self._held.steps) > 1:
            deltas.grow_(self._buffers[0], self._buffers[1])
            self._buffers.append(self._buffers.pop(1))

    def _mean_(self, out: Tensors, weights: list[float], *held: Tensors) -> None:
        deltas.mean_(out, held[-1], held[:-1], weights)


class Block(Mode):
    """Blocks of ``window`` snapshots that do not overlap, as in the code published with LAWA. Read is the mean of the
    last finished block, in the second buffer; before there is one, that of the open one, whose sum the first holds."""

    def steps(self) -> list[int]:
        return self._held.finished or self._held.steps

    def add(self, step: int, snapshot: Tensors) -> None:
        held, total = self._held, self._buffers[0]
        (window.add_ if held.steps else window.copy_)(total, snapshot)
        held.steps = [*held.steps, step]
        if len(held.steps) == self._config.window:
            window.mean_of_sum_(total, total, self._config.window)
            self._buffers.reverse()
            held.steps, held.finished = [], held.steps

    def read_(self, out: Tensors, horizon: int | None) -> None:
        if self._held.finished:
            window.copy_(out, self._buffers[1])
        else:
            window.mean_of_sum_(out, self._buffers[0], len(self._held.steps))

    def _places(self, held: Held) -> dict[str, Tensors]:
        used = {"open": held.steps, "finished": held.finished}
        return {what: buffer for (what, steps), buffer in zip(used.items(), self._buffers, strict=True) if steps}


class Ema(Mode):
    """A bank of exponential averages, one buffer for each horizon. The n-th snapshot moves that of horizon h by
    ``1 / min(n, h)`` of the way: up to the h-th it is the plain mean, so that the first weighs no more than others."""

    def _bank(self) -> dict[int, Tensors]:
        return dict(zip(self._config.horizons or (), self._buffers, strict=True))

    def add(self, step: int, snapshot: Tensors) -> None:
        held = self._held
        held.count += 1
        for horizon, average in self._bank().items():
            if held.count == 1:
                window.copy_(average, snapshot)
            else:
                window.move_(average, snapshot, min(held.count, horizon))
        held.steps = [*held.steps[:1], step]

    def read_(self, out: Tensors, horizon: int | None) -> None:
        window.copy_(out, self._buffers[0] if horizon is None else self._bank()[horizon])

    def _places(self, held: Held) -> dict[str, Tensors]:
        return {f"ema.{horizon}": average for horizon, average in self._bank().items()} if held.count else {}


def make(config: WeightAveragingConfig, kept: Sequence[Tensors]) -> Mode:
    """The mode that ``config`` asks for, upon its `buffers`."""
    sliding = SlidingDeltas if config.deltas == "bf16" else Sliding
    return {"sliding": sliding, "block": Block, "ema": Ema}[config.mode](config, kept)


def buffers(config: WeightAveragingConfig) -> list[torch.dtype]:
    """The copies of this rank's masters that a mode needs, in this order."""
    if config.deltas == "bf16":
        return [torch.float32] + [torch.bfloat16] * (config.window - 1)
    count = {"sliding": config.window, "block": 2, "ema": len(config.horizons or ())}[config.mode]
    return [torch.float32] * count
