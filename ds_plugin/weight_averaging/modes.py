"""What is kept of the snapshots, and what is read from it: a sliding window, blocks, or a bank of running averages.

Each mode owns host buffers of this rank's shape, allocated once (`storage`). All of them fold a snapshot in without
any communication, and read an average whose bits do not depend on the sharding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging import deltas, window
from ds_plugin.weight_averaging.config import WeightAveragingConfig

Tensors = list[torch.Tensor]
Allocate = Callable[[torch.dtype], Tensors]
Place = tuple[Tensors, str, str]  # a buffer, the ``<what>`` that is loaded into it, and how an error calls that


class Saved(Protocol):
    """Saved tensors, ``<what>.<shard>``. What can be refused is refused by `shape`, before anything is read."""

    def shape(self, name: str) -> torch.Size:
        """The shape of one of them.

        Raises:
            KeyError: it is not there.
        """

    def read_(self, name: str, out: torch.Tensor) -> None:
        """Read one of them into ``out``, which is contiguous and has its shape."""


class Whole(Saved):
    """Tensors in memory, or in a file that is mapped into it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    def read_(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self._tensors[name])


class Mode(Protocol):
    """What the averager needs of a mode."""

    def steps(self) -> list[int]:
        """Steps of the snapshots in the average that `read_` gives, oldest first (ema: the first and the latest)."""

    def add(self, step: int, snapshot: Tensors) -> None:
        """Fold in the masters as they are after ``step``; ``snapshot`` is read, never kept."""

    def take(self, step: int, buffer: Tensors) -> Tensors:
        """`add` a snapshot in a contiguous buffer of the kind the mode has itself; returns one that is free now.

        That is the same one, or another where the mode can keep it and be spared a copy.
        """
        self.add(step, buffer)
        return buffer

    def read_(self, out: Tensors, horizon: int | None) -> None:
        """Write the average into ``out``. ``horizon``: which of the bank, in mode ema."""

    def reset(self) -> None:
        """Forget everything, as at the start of a run."""

    def state(self) -> dict[str, Any]:
        """What `load` needs beside the tensors, in JSON types."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What is held, by name; ``<what>.<shard>``. The live buffers."""

    def load(self, state: Mapping[str, Any], saved: Saved) -> None:
        """Take over a saved `state` and its tensors, or raise and hold what it held before.

        They are read straight into the buffers. Should that fail half-way, after all checks, nothing is held.

        Raises:
            CheckpointError: a tensor's size is not that of this rank's shard.
            KeyError: a tensor is not there.
        """


class Sliding(Mode):
    """The last ``window`` snapshots, whole. The mean is worked out from them when it is read, so it never drifts."""

    def __init__(self, config: WeightAveragingConfig, allocate: Allocate):
        self._window, self._weights = config.window, config.weights
        self._slots = [allocate(torch.float32) for _ in range(config.window)]
        self._order: list[int] = []  # slots in use, oldest first
        self._steps: list[int] = []  # their steps

    def steps(self) -> list[int]:
        return self._steps

    def add(self, step: int, snapshot: Tensors) -> None:
        window.copy_(self._slots[self._next(step)], snapshot)

    def take(self, step: int, buffer: Tensors) -> Tensors:
        slot = self._next(step)
        self._slots[slot], free = buffer, self._slots[slot]
        return free

    def _next(self, step: int) -> int:
        """The slot of the snapshot of ``step``, the oldest one's when all are in use."""
        full = len(self._order) == self._window
        slot = self._order.pop(0) if full else _free(self._order)
        if full:
            self._steps.pop(0)
        self._order.append(slot)
        self._steps.append(step)
        return slot

    def forget_from(self, step: int) -> None:
        """Forget the snapshots of ``step`` and later ones."""
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._order.pop()

    def read_(self, out: Tensors, horizon: int | None) -> None:
        snapshots = self.snapshots()
        window.weighted_mean_(out, snapshots, window.read_weights(self._weights, len(snapshots)))

    def snapshots(self) -> list[Tensors]:
        """The snapshots held, oldest first."""
        return [self._slots[slot] for slot in self._order]

    def reset(self) -> None:
        self._steps, self._order = [], []

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {f"snapshot.{i}.{j}": t for i, snapshot in enumerate(self.snapshots()) for j, t in enumerate(snapshot)}

    def load(self, state: Mapping[str, Any], saved: Saved) -> None:
        steps = state["steps"]
        newest = range(max(0, len(steps) - self._window), len(steps))  # all that a smaller window can hold
        places = zip(self._slots, newest, strict=False)
        _load(self, saved, [(slot, f"snapshot.{i}", f"the snapshot of step {steps[i]}") for slot, i in places])
        self._steps, self._order = [steps[i] for i in newest], list(range(len(newest)))


class SlidingDeltas(Mode):
    """`Sliding` with the newest snapshot whole and older ones as bf16 differences: see `deltas` for what that costs."""

    def __init__(self, config: WeightAveragingConfig, allocate: Allocate):
        self._window, self._weights = config.window, config.weights
        self._newest = allocate(torch.float32)
        self._slots = [allocate(torch.bfloat16) for _ in range(config.window - 1)]
        self._order: list[int] = []  # slots in use, oldest first: one fewer than snapshots
        self._steps: list[int] = []

    def steps(self) -> list[int]:
        return self._steps

    def add(self, step: int, snapshot: Tensors) -> None:
        self._shrink(step, snapshot)
        window.copy_(self._newest, snapshot)

    def take(self, step: int, buffer: Tensors) -> Tensors:
        self._shrink(step, buffer)
        self._newest, free = buffer, self._newest
        return free

    def _shrink(self, step: int, snapshot: Tensors) -> None:
        """Replace the newest snapshot by its difference to ``snapshot``, in the oldest's slot when all are in use."""
        if self._steps and self._slots:
            slot = self._order.pop(0) if len(self._order) == len(self._slots) else _free(self._order)
            deltas.quantize_delta_(self._slots[slot], self._newest, snapshot)
            self._order.append(slot)
        self._steps = [*self._steps, step][-self._window :]

    def forget_from(self, step: int) -> None:
        """Forget the snapshots of ``step`` and later ones."""
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            if self._order:
                deltas.grow_(self._newest, self._slots[self._order.pop()])

    def read_(self, out: Tensors, horizon: int | None) -> None:
        deltas.mean_(out, self._newest, self._deltas(), window.read_weights(self._weights, len(self._steps)))

    def snapshots(self) -> list[Tensors]:
        """The snapshots held, oldest first, as they are read: in new memory, but for the newest."""
        return deltas.restored(self._newest, self._deltas()) if self._steps else []

    def _deltas(self) -> list[Tensors]:
        return [self._slots[slot] for slot in self._order]

    def reset(self) -> None:
        self._steps, self._order = [], []

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        newest = {f"newest.{j}": t for j, t in enumerate(self._newest if self._steps else [])}
        return newest | {f"delta.{i}.{j}": t for i, delta in enumerate(self._deltas()) for j, t in enumerate(delta)}

    def load(self, state: Mapping[str, Any], saved: Saved) -> None:
        steps = state["steps"]
        kept = range(max(0, len(steps) - self._window), len(steps))  # all that a smaller window can hold
        places = [(self._newest, "newest", f"the snapshot of step {steps[-1]}")] if steps else []
        for slot, i in zip(self._slots, kept[:-1], strict=False):
            places.append((slot, f"delta.{i}", f"the difference of step {steps[i]}"))
        _load(self, saved, places)
        self._steps, self._order = [steps[i] for i in kept], list(range(len(kept[:-1])))


class Block(Mode):
    """Blocks of ``window`` snapshots that do not overlap, as in the code published with LAWA. Two buffers.

    Read is the mean of the last finished block; before the first is finished, that of the open one so far. The sums
    are of ``window`` numbers at most, so they do not drift.
    """

    def __init__(self, config: WeightAveragingConfig, allocate: Allocate):
        self._window = config.window
        self._sum, self._mean = (
            allocate(torch.float32),
            allocate(torch.float32),
        )  # of the open block, of the last finished one
        self._open: list[int] = []
        self._finished: list[int] = []

    def steps(self) -> list[int]:
        return self._finished or self._open

    def add(self, step: int, snapshot: Tensors) -> None:
        (window.add_ if self._open else window.copy_)(self._sum, snapshot)
        self._open.append(step)
        if len(self._open) == self._window:
            window.mean_of_sum_(self._sum, self._sum, self._window)
            self._sum, self._mean = self._mean, self._sum
            self._open, self._finished = [], self._open

    def read_(self, out: Tensors, horizon: int | None) -> None:
        if self._finished:
            window.copy_(out, self._mean)
        else:
            window.mean_of_sum_(out, self._sum, len(self._open))

    def reset(self) -> None:
        self._open, self._finished = [], []

    def state(self) -> dict[str, Any]:
        return {"window": self._window, "open": self._open, "finished": self._finished}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        held = {"open": self._sum if self._open else [], "finished": self._mean if self._finished else []}
        return {f"{what}.{j}": t for what, tensors in held.items() for j, t in enumerate(tensors)}

    def load(self, state: Mapping[str, Any], saved: Saved) -> None:
        opened, finished = list(state["open"]), list(state["finished"])
        places = [(self._sum, "open", "the open block")] if opened else []
        places += [(self._mean, "finished", "the finished block")] if finished else []
        _load(self, saved, places)
        self._open, self._finished = opened, finished


class Ema(Mode):
    """A bank of exponential averages, one buffer for each horizon, all from the same snapshots.

    The n-th snapshot moves the average of horizon h by ``1 / min(n, h)`` of the way: decay ``1 - 1/h`` in the long run.
    Up to the h-th it is the plain mean of all snapshots, so that the first one weighs no more than the others (with the
    final decay from the start it would, by a factor of h).
    """

    def __init__(self, config: WeightAveragingConfig, allocate: Allocate):
        assert config.horizons is not None
        self._bank = {horizon: allocate(torch.float32) for horizon in config.horizons}
        self._count = 0
        self._steps: list[int] = []  # of the first and the latest

    def steps(self) -> list[int]:
        return self._steps

    def add(self, step: int, snapshot: Tensors) -> None:
        self._count += 1
        for horizon, average in self._bank.items():
            if self._count == 1:
                window.copy_(average, snapshot)
            else:
                window.move_(average, snapshot, min(self._count, horizon))
        self._steps = [*self._steps[:1], step]

    def read_(self, out: Tensors, horizon: int | None) -> None:
        window.copy_(out, self._bank[next(iter(self._bank)) if horizon is None else horizon])

    def reset(self) -> None:
        self._count, self._steps = 0, []

    def state(self) -> dict[str, Any]:
        return {"horizons": list(self._bank), "count": self._count, "steps": self._steps}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        bank = self._bank.items() if self._count else ()
        return {f"ema.{horizon}.{j}": t for horizon, average in bank for j, t in enumerate(average)}

    def load(self, state: Mapping[str, Any], saved: Saved) -> None:
        count, steps = int(state["count"]), list(state["steps"])
        bank = self._bank.items() if count else ()
        _load(self, saved, [(average, f"ema.{h}", f"the average of horizon {h}") for h, average in bank])
        self._count, self._steps = count, steps


def make(config: WeightAveragingConfig, allocate: Allocate) -> Mode:
    """The mode that ``config`` asks for; ``allocate`` is called once for each of `buffers`."""
    if config.mode == "sliding":
        return SlidingDeltas(config, allocate) if config.deltas == "bf16" else Sliding(config, allocate)
    return Block(config, allocate) if config.mode == "block" else Ema(config, allocate)


def _free(used: list[int]) -> int:
    """The lowest slot that is not in use."""
    return next(slot for slot in range(len(used) + 1) if slot not in used)


def buffers(config: WeightAveragingConfig) -> list[torch.dtype]:
    """The copies of this rank's masters that a mode allocates."""
    if config.deltas == "bf16":
        return [torch.float32] + [torch.bfloat16] * (config.window - 1)
    count = {"sliding": config.window, "block": 2, "ema": len(config.horizons or ())}[config.mode]
    return [torch.float32] * count


def _load(mode: Mode, saved: Saved, places: Sequence[Place]) -> None:
    """Read saved tensors into buffers of ``mode``, whose shapes they must have; it holds nothing then."""
    for buffer, name, what in places:
        for j, tensor in enumerate(buffer):
            if (shape := saved.shape(f"{name}.{j}")) != tensor.shape:
                raise CheckpointError(
                    f"weight_averaging: {what} holds a shard {j} of {list(shape)} elements, this rank's has "
                    f"{list(tensor.shape)}; resume with the model, ZeRO stage and ranks it was saved with"
                )
    mode.reset()
    for buffer, name, _ in places:
        for j, tensor in enumerate(buffer):
            saved.read_(f"{name}.{j}", tensor)
