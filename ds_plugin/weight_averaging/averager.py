"""The averager: snapshots of this rank's fp32 masters, and the swap that puts their average in place.

A snapshot is folded into host memory: no collective, no accelerator memory. What is kept and what is read is the
mode's (`modes`); the average has the same bits under every sharding (`window`).
"""

import contextlib
import logging
from collections.abc import Iterator

import torch

from ds_plugin.errors import ConfigError, StateError
from ds_plugin.weight_averaging import memory, modes, window
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.zero_shards import MasterShards

#: elements exchanged at a time during a swap: 16 MiB of fp32, so that a swap needs no second copy of the masters
EXCHANGE_ELEMENTS = 4 * 1024 * 1024


class WeightAverager:
    """Averages snapshots of the masters, one every ``interval`` applied steps from ``start_step`` on.

    Host memory per rank: (b + 1) x 4 bytes x local parameters, allocated here, once: the mode's buffers (b = `window`
    for sliding, 2 for block, the number of horizons for ema), and one that holds the average, or the training weights
    while the average is swapped in.
    """

    def __init__(self, config: WeightAveragingConfig, shards: MasterShards):
        """Every rank calls it alike.

        Raises:
            ConfigError: a master weight is not fp32, or a node has too little memory for the snapshots.
        """
        self.config = config
        self.shards = shards
        self.swapped = False
        self._masters_checked()
        self._pin = torch.cuda.is_available()  # pageable memory would halve the copy's rate
        need = memory.needed(shards.tensors(), modes.buffers(config) + 1, pinned=self._pin)
        self.memory = memory.reserve(need, _SMALLER[config.mode])
        self.mode = modes.MODES[config.mode](config, self._allocate)
        self._other = self._allocate()
        self._said = False

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots in the average, oldest first; empty when there is none. ema: the first and latest."""
        return self.mode.steps()

    def describe(self) -> str:
        """What is averaged and the memory it takes, in one line."""
        c = self.config
        weights = "" if c.weights == "uniform" else f" weighted {c.weights}"
        what = {
            "sliding": f"the last {c.window}{weights}",
            "block": f"blocks of {c.window}",
            "ema": f"exponential averages over {' and '.join(map(str, c.horizons or ()))} snapshots",
        }[c.mode]
        when = f"of one snapshot every {c.interval} steps from step {c.start_step} on"
        return f"weight averaging: {what} {when}, {self.memory}"

    def due(self, step: int) -> bool:
        """Whether a snapshot is taken after optimizer step ``step`` (counted from 1)."""
        return step >= max(1, self.config.start_step) and step % self.config.interval == 0

    def first_step(self) -> int:
        """The step of the first snapshot."""
        return -(-max(1, self.config.start_step) // self.config.interval) * self.config.interval

    def snapshot(self, step: int, *, finite: bool | None = None) -> None:
        """Fold in the masters as they are after step ``step``.

        ``finite``: whether the step was, if that is known and the same on all ranks; a snapshot that is not is left
        out. None: look at the masters, which costs a pass over them (and is the same on all ranks where each holds
        all of them).
        """
        masters = self.shards.tensors()
        if finite is None:
            finite = window.all_finite(masters)
        if finite:
            self.mode.add(step, masters if self.config.mode == "sliding" else self._on_host(masters))
        elif not self._said:
            self._said = True
            logging.getLogger("ds_plugin").warning(
                "weight averaging: step %d is not finite, no snapshot is taken of it (said once)", step
            )

    @contextlib.contextmanager
    def averaged_weights(self, horizon: int | None = None) -> Iterator[None]:
        """Train's weights out, the average in; on leaving, everything is bit for bit as before. Every rank enters it.

        Raises:
            StateError: no snapshot has been taken yet, the average is already swapped in, or there is no such horizon.
        """
        self._read(horizon)
        self.swapped = True  # before the exchange: should its refresh fail, the finally must still undo it
        try:
            self._exchange()
            yield
        finally:
            self._exchange()
            self.swapped = False

    def restart(self, horizon: int | None = None) -> None:
        """Train's weights are replaced by the average, for good; what was averaged is forgotten. Every rank calls it.

        Raises:
            StateError: as `averaged_weights` does; nothing has changed then.
        """
        self._read(horizon)
        window.copy_(self.shards.tensors(), self._other)
        self.shards.refresh()
        self.reset()

    def snapshots(self) -> list[list[torch.Tensor]]:
        """Mode sliding: the snapshots held, oldest first; each a list of fp32 host tensors in the shards' order."""
        assert isinstance(self.mode, modes.Sliding)
        return self.mode.snapshots()

    def reset(self) -> None:
        """Forget every snapshot, as in a new run."""
        self.mode.reset()

    def _read(self, horizon: int | None) -> None:
        """Write the average into the spare buffer."""
        if self.swapped:
            raise StateError("weight_averaging: the averaged weights are already swapped in; leave that block first")
        if horizon is not None and horizon not in (self.config.horizons or ()):
            known = f"has the horizons {self.config.horizons}" if self.config.horizons else "has none"
            raise StateError(
                f"weight_averaging: there is no horizon {horizon}; mode {self.config.mode!r} here {known}: give one of "
                "those, or leave it out"
            )
        if not self.steps:
            raise StateError(
                f"weight_averaging: there is no snapshot to average yet; the first is taken at step {self.first_step()}"
            )
        self.mode.read_(self._other, horizon)

    def _exchange(self) -> None:
        masters = self.shards.tensors()
        largest = max((t.numel() for t in masters), default=0)
        device = masters[0].device if masters else torch.device("cpu")
        scratch = torch.empty(max(1, min(largest, EXCHANGE_ELEMENTS)), dtype=torch.float32, device=device)
        window.exchange_(masters, self._other, scratch)
        self.shards.refresh()

    def _on_host(self, masters: list[torch.Tensor]) -> list[torch.Tensor]:
        """The masters in host memory, where the modes add: themselves, or in the spare buffer, free between swaps."""
        if all(m.device.type == "cpu" for m in masters):
            return masters
        window.copy_(self._other, masters)
        return self._other

    def _allocate(self) -> list[torch.Tensor]:
        return [
            torch.empty(t.shape, dtype=torch.float32, device="cpu", pin_memory=self._pin) for t in self.shards.tensors()
        ]

    def _masters_checked(self) -> None:
        for tensor in self.shards.tensors():
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"weight_averaging: the optimizer's master weights are {tensor.dtype}; averaging needs fp32 "
                    'masters (remove "fp16_master_weights_and_grads" / "bf16_master_weights_and_grads" from the JSON)'
                )


_SMALLER = {
    "sliding": 'write a smaller "window", or "mode": "block", which keeps two copies whatever the window',
    "block": "use more ranks under ZeRO, or fewer on a node",
    "ema": 'write fewer "horizons"',
}
