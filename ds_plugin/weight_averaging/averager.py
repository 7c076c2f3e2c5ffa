"""The sliding-window averager: snapshots of this rank's fp32 masters, and the swap that puts their mean in place.

A snapshot copies the local masters to host memory: no collective, no accelerator memory. The mean is recomputed from
the snapshots whenever it is read, so it never drifts, and is exact under every sharding (see `window.mean_`).
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch

from ds_plugin.errors import CheckpointError, ConfigError, StateError
from ds_plugin.weight_averaging import window
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.zero_shards import MasterShards

#: elements exchanged at a time during a swap: 16 MiB of fp32, so that a swap needs no second copy of the masters
EXCHANGE_ELEMENTS = 4 * 1024 * 1024


class WeightAverager:
    """Averages the last ``window`` snapshots, one every ``interval`` applied steps from ``start_step`` on.

    Host memory per rank: (window + 1) x 4 bytes x local parameters, allocated here, once: a window of snapshots, and
    one buffer that holds the average, or the training weights while the average is swapped in.
    """

    def __init__(self, config: WeightAveragingConfig, shards: MasterShards):
        """
        Raises:
            ConfigError: a master weight is not fp32.
        """
        self.config = config
        self.shards = shards
        self.swapped = False
        self.steps: list[int] = []  # steps of the snapshots held, oldest first
        self._masters_checked()
        self._slots = [self._allocate() for _ in range(config.window)]  # slot order is self._order
        self._order: list[int] = []  # slots holding self.steps, oldest first
        self._other = self._allocate()

    def describe(self) -> str:
        """Window and memory in one line."""
        size = sum(t.numel() * t.element_size() for t in self._other)
        c = self.config
        return (
            f"weight averaging: the last {c.window} of one snapshot every {c.interval} steps from step {c.start_step} "
            f"on, {size * (c.window + 1) / 1e6:,.1f} MB of host memory on this rank"
        )

    def due(self, step: int) -> bool:
        """Whether a snapshot is taken after optimizer step ``step`` (counted from 1)."""
        return step >= max(1, self.config.start_step) and step % self.config.interval == 0

    def first_step(self) -> int:
        """The step of the first snapshot."""
        return -(-max(1, self.config.start_step) // self.config.interval) * self.config.interval

    def snapshot(self, step: int) -> None:
        """Copy the masters as they are after step ``step``; the oldest snapshot gives way when the window is full."""
        free = len(self._order) < len(self._slots)
        slot = len(self._order) if free else self._order.pop(0)
        if not free:
            self.steps.pop(0)
        for kept, master in zip(self._slots[slot], self.shards.tensors(), strict=True):
            kept.copy_(master)
        self._order.append(slot)
        self.steps.append(step)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Train's weights out, the average in; on leaving, everything is bit for bit as before. Every rank enters it.

        Raises:
            StateError: no snapshot has been taken yet, or the average is already swapped in.
        """
        if self.swapped:
            raise StateError("weight_averaging: the averaged weights are already swapped in; leave that block first")
        if not self._order:
            raise StateError(
                f"weight_averaging: there is no snapshot to average yet; the first is taken at step {self.first_step()}"
            )
        window.mean_(self._other, self.snapshots())
        self.swapped = True  # before the exchange: should its refresh fail, the finally must still undo it
        try:
            self._exchange()
            yield
        finally:
            self._exchange()
            self.swapped = False

    def snapshots(self) -> list[list[torch.Tensor]]:
        """The snapshots held, oldest first; each a list of fp32 host tensors in the order of the shards' tensors."""
        return [self._slots[slot] for slot in self._order]

    def load(self, steps: list[int], snapshots: list[list[torch.Tensor]]) -> None:
        """Take over saved snapshots (oldest first); a smaller window keeps the newest.

        Raises:
            CheckpointError: a tensor's size is not that of this rank's shard.
        """
        keep = slice(max(0, len(steps) - self.config.window), None)
        for step, saved in zip(steps[keep], snapshots[keep], strict=True):
            for index, (tensor, master) in enumerate(zip(saved, self._other, strict=True)):
                if tensor.shape != master.shape:
                    raise CheckpointError(
                        f"weight_averaging: the snapshot of step {step} holds a shard {index} of {list(tensor.shape)} "
                        f"elements, this rank's has {list(master.shape)}; resume with the model, ZeRO stage and ranks "
                        "it was saved with"
                    )
        self.steps, self._order = list(steps[keep]), list(range(len(steps[keep])))
        for slot, saved in zip(self._order, snapshots[keep], strict=True):
            for kept, tensor in zip(self._slots[slot], saved, strict=True):
                kept.copy_(tensor)

    def reset(self) -> None:
        """Forget every snapshot: the window starts empty, as in a new run."""
        self.steps, self._order = [], []

    def _exchange(self) -> None:
        masters = self.shards.tensors()
        largest = max((t.numel() for t in masters), default=0)
        device = masters[0].device if masters else torch.device("cpu")
        scratch = torch.empty(max(1, min(largest, EXCHANGE_ELEMENTS)), dtype=torch.float32, device=device)
        window.exchange_(masters, self._other, scratch)
        self.shards.refresh()

    def _allocate(self) -> list[torch.Tensor]:
        pin = torch.cuda.is_available()  # pageable memory would halve the copy's rate
        return [torch.empty(t.shape, dtype=torch.float32, device="cpu", pin_memory=pin) for t in self.shards.tensors()]

    def _masters_checked(self) -> None:
        for tensor in self.shards.tensors():
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"weight_averaging: the optimizer's master weights are {tensor.dtype}; averaging needs fp32 "
                    'masters (remove "fp16_master_weights_and_grads" / "bf16_master_weights_and_grads" from the JSON)'
                )


def as_tensors(averager: WeightAverager) -> Mapping[str, torch.Tensor]:
    """The window by name, ``snapshot.<i>.<shard>`` with i oldest first: what a checkpoint stores."""
    return {
        f"snapshot.{i}.{j}": tensor
        for i, snapshot in enumerate(averager.snapshots())
        for j, tensor in enumerate(snapshot)
    }
