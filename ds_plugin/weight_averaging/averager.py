"""The averager: snapshots of this rank's fp32 masters, and the swap that puts their average in place.

A snapshot goes to CPU memory: no collective, no accelerator memory. From an accelerator it does so while training goes
on (`copies`). What is kept and what is read is the mode's (`modes`), where it lies the storage's (`storage`); the
average has the same bits under every sharding (`window`).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ds_plugin.core.errors import ConfigError, StateError, raise_on_all_ranks
from ds_plugin.weight_averaging import modes, window
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.finite import is_sound
from ds_plugin.weight_averaging.snapshots import stager
from ds_plugin.weight_averaging.snapshots.stager import SnapshotStager
from ds_plugin.weight_averaging.snapshots.storage import Storage
from ds_plugin.weight_averaging.state.fragments import Fragment
from ds_plugin.weight_averaging.swap import Exchange, KeptBuffers


class MasterShards(Protocol):
    """What the averager needs of a framework.

    ``layout`` says how the weights are divided: ``"replicated"`` (every data-parallel rank holds all) or ``"sharded"``.
    Where it has ``models``, this rank's parts of the model, a swap leaves their buffers as they were.
    """

    layout: str

    def tensors(self) -> list[torch.Tensor]:
        """This rank's fp32 masters, the live tensors (never copies), in a fixed order; some may be empty."""

    def refresh(self) -> None:
        """Make the model compute with the masters' present values. May hold collectives: every rank calls it."""

    def fragments(self) -> list[Fragment]:
        """Which parameters' elements lie where in `tensors`; the rest is padding."""


class WeightAverager:
    """Averages snapshots of the masters, one every ``interval`` applied steps from ``start_step`` on.

    Host memory per rank, allocated here, once: the mode's buffers (`modes.buffers`), in files if asked for, and a spare
    one of 4 bytes x local parameters. In it snapshots arrive, the average is worked out, and the training weights wait
    while the average is swapped in.

    What is read through `mode` and `steps` is complete: both wait for a snapshot that is still under way.
    """

    def __init__(self, config: WeightAveragingConfig, shards: MasterShards):
        """Every rank calls it alike.

        Raises:
            ConfigError: a master weight is not fp32, or a node has too little memory or disk for the snapshots.
        """
        self.config = config
        self.shards = shards
        self.swapped = False
        self._remedy = _LEAVE
        self._masters_checked()
        masters = shards.tensors()
        self._shapes = [master.shape for master in masters]
        storage = Storage(config, masters)
        self.memory, self.files = storage.reserve(modes.buffers(config), _SMALLER[config.mode])
        self._copies = stager.copies_from(masters)
        try:
            with raise_on_all_ranks():
                self._mode = modes.make(config, storage.allocate)
                self._spare = storage.spare()
        except BaseException:
            self.close()
            raise
        self._exchangeable = storage.exchangeable
        if self._copies is not None:
            self._verdict = storage.verdict()
        self._said = False

    def close(self) -> None:
        """Let go of the snapshots' memory or files, and of the thread; the averager is of no use afterwards."""
        try:
            if self._copies is not None:
                self._copies.close()
        finally:
            for name in ("_mode", "_spare"):  # as far as the constructor has come
                vars(self).pop(name, None)

    @property
    def mode(self) -> modes.Mode:
        """What is kept."""
        if self._copies is not None:
            self._copies.drain()
        return self._mode

    def masters(self) -> list[torch.Tensor]:
        """This rank's live masters, which have the shapes that the averager was made for.

        Raises:
            StateError: they have others: the optimizer's param groups were changed.
        """
        masters = self.shards.tensors()
        if [master.shape for master in masters] != self._shapes:
            raise StateError(
                f"weight_averaging: the optimizer has {len(masters)} master weights of "
                f"{sum(m.numel() for m in masters)} elements, and had {len(self._shapes)} of "
                f"{sum(shape.numel() for shape in self._shapes)} when averaging began: add_param_group() belongs "
                "before ds_plugin.attach(), or between ds_plugin.detach() and attach()"
            )
        return masters

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots in the average, oldest first; empty when there is none. ema: the first and latest."""
        return self.mode.steps()

    def describe(self) -> str:
        """What is averaged and the memory it takes, in one line."""
        c = self.config
        weights = "" if c.weights == "mean" else f" weighted {c.weights}"
        older = ", the older ones as bf16 differences" if c.deltas == "bf16" else ""
        what = {
            "sliding": f"the last {c.window}{weights}{older}",
            "block": f"blocks of {c.window}",
            "ema": f"exponential averages over {' and '.join(map(str, c.horizons or ()))} snapshots",
        }[c.mode]
        when = f"of one snapshot every {c.interval} steps from step {c.start_step} on"
        where = f"{self.memory}, {self.files}" if self.files is not None else str(self.memory)
        return f"weight averaging: {what} {when}, {where}"

    def due(self, step: int) -> bool:
        """Whether a snapshot is taken after optimizer step ``step`` (counted from 1)."""
        return step >= max(1, self.config.start_step) and step % self.config.interval == 0

    def first_step(self) -> int:
        """The step of the first snapshot."""
        return -(-max(1, self.config.start_step) // self.config.interval) * self.config.interval

    def before_step(self) -> None:
        """Call it before the optimizer's step, which overwrites masters that may still be on their way."""
        if self._copies is not None:
            self._copies.wait_before_step()

    def snapshot(self, step: int, *, finite: bool | torch.Tensor | None = None) -> None:
        """Fold in the masters as they are after step ``step``. From an accelerator: begin to, without waiting for it.

        ``finite``: whether the step was, if that is known and the same on all ranks; a snapshot that is not is left
        out. It may be one element on the accelerator, which is read when the masters have arrived: a boolean, or the
        gradient norm, see `finite.is_sound`. None: look at the masters, which costs a pass over them (and is the same
        on all ranks where each holds all of them).
        """
        masters = self.masters()
        if finite is False:
            self._leave_out(step)
        elif self._copies is not None:
            self._begin(self._copies, step, masters, finite)
        elif all(m.device.type == "cpu" for m in masters):
            if self._is_fit(step, masters, finite):
                self._mode.add(step, masters)
        else:
            window.copy_(self._spare, masters)
            self._arrived(step, finite)

    def _begin(
        self, under_way: SnapshotStager, step: int, masters: list[torch.Tensor], finite: bool | torch.Tensor | None
    ) -> None:
        under_way.drain()  # before the spare buffer is named: the snapshot before may have changed it for another
        src, dst = masters, self._spare
        if isinstance(finite, torch.Tensor):
            verdict = self._verdict[: finite.dtype.itemsize].view(finite.dtype)
            src, dst, finite = [*masters, finite.reshape(1)], [*self._spare, verdict], verdict
        under_way.begin(dst, src, lambda: self._arrived(step, finite))

    def _arrived(self, step: int, finite: bool | torch.Tensor | None) -> None:
        """Fold in what lies in the spare buffer. After an asynchronous copy, on another thread than the training's."""
        if not self._is_fit(step, self._spare, finite):
            return
        if self._exchangeable:
            self._spare = self._mode.take(step, self._spare)
        else:
            self._mode.add(step, self._spare)

    def _is_fit(self, step: int, snapshot: list[torch.Tensor], finite: bool | torch.Tensor | None) -> bool:
        fit = window.all_finite(snapshot) if finite is None else is_sound(finite)
        if not fit:
            self._leave_out(step)
        return fit

    def _leave_out(self, step: int) -> None:
        if not self._said:
            self._said = True
            logging.getLogger("ds_plugin").warning(
                "weight averaging: step %d is not finite, no snapshot is taken of it (said once)", step
            )

    @contextlib.contextmanager
    def averaged_weights(self, horizon: int | None = None) -> Iterator[None]:
        """Train's weights out, the average in; on leaving, everything is bit for bit as before. Every rank enters it.

        So are the model's buffers (the statistics of a BatchNorm that was in training mode inside). If the average
        cannot be put in place on some rank, an error says so on every rank, and nothing has changed.

        Raises:
            StateError: no snapshot has been taken yet, the average is already swapped in, or there is no such horizon;
                on leaving, the training weights could not be put back: then `swapped` stays true.
        """
        self._read(horizon)
        scratch, buffers = self._swap_in()
        try:
            yield
        except BaseException as error:  # said now: if this rank is alone with it, it may wait below for ever
            logging.getLogger("ds_plugin").warning(
                "weight averaging: the averaged_weights() block ends with %s: %s; the training weights are put back, "
                "for which the ranks may wait for each other",
                type(error).__name__,
                error,
            )
            raise
        finally:
            # of the masters as they are now: the framework may have moved them to other memory meanwhile
            self._put_back(lambda: Exchange(self.masters(), self._spare, scratch).forth(), buffers)

    def refuse_while_swapped(self, what: str) -> None:
        """Raise StateError if the average is in place of the training weights; ``what`` is what is refused."""
        if self.swapped:
            raise StateError(f"weight_averaging: {what} while the averaged weights are swapped in; {self._remedy}")

    def restart(self, horizon: int | None = None) -> None:
        """Train's weights are replaced by the average, for good; what was averaged is forgotten. Every rank calls it.

        Raises:
            StateError: as `averaged_weights` does; nothing has changed then, nor after any other error.
        """
        self._read(horizon)
        self._swap_in()
        self.swapped = False
        self.reset()

    def read(self, horizon: int | None = None) -> list[torch.Tensor]:
        """The average, in the spare buffer: in the shards' order, good until the next snapshot or swap.

        Raises:
            StateError: as `averaged_weights` does.
        """
        self._read(horizon)
        return self._spare

    def snapshots(self) -> list[list[torch.Tensor]]:
        """Mode sliding: the snapshots held, oldest first; each a list of fp32 host tensors in the shards' order."""
        mode = self.mode
        assert isinstance(mode, modes.Sliding | modes.SlidingDeltas)
        return mode.snapshots()

    def reset(self) -> None:
        """Forget every snapshot, as in a new run."""
        self.mode.reset()

    def forget_from(self, step: int) -> None:
        """Mode sliding: forget the snapshots of ``step`` and later ones."""
        mode = self.mode
        assert isinstance(mode, modes.Sliding | modes.SlidingDeltas)
        mode.forget_from(step)

    def _read(self, horizon: int | None) -> None:
        """Write the average into the spare buffer."""
        self.refuse_while_swapped("another read of the average")
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
        self.mode.read_(self._spare, horizon)

    def _swap_in(self) -> tuple[torch.Tensor, KeptBuffers]:
        """Exchange the masters with the spare buffer on all ranks, or on none."""
        with raise_on_all_ranks():  # all that is allocated is so here, while nothing has changed
            exchange = Exchange(self.masters(), self._spare)
            buffers = KeptBuffers(getattr(self.shards, "models", ()))
        self.swapped = True
        try:
            with raise_on_all_ranks():
                exchange.forth()
            with raise_on_all_ranks():  # the framework's own collectives, if any, have ended by then
                self.shards.refresh()
        except BaseException:
            self._put_back(exchange.back, buffers)
            raise
        return exchange.scratch, buffers

    def _put_back(self, exchange: Callable[[], None], buffers: KeptBuffers) -> None:
        """The training weights are in place again, or everything that would take the average for them is refused."""
        try:
            exchange()
            self.shards.refresh()
            buffers.restore()
        except Exception as error:
            self._remedy = (
                f"the training weights could not be put back ({type(error).__name__}: {error}), so steps and "
                "checkpoints are refused: start again from the last checkpoint"
            )
            raise StateError(f"weight_averaging: the averaged weights are still swapped in; {self._remedy}") from error
        self.swapped = False

    def _masters_checked(self) -> None:
        for tensor in self.shards.tensors():
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"weight_averaging: the optimizer's master weights are {tensor.dtype}; averaging needs fp32 "
                    'masters (remove "fp16_master_weights_and_grads" / "bf16_master_weights_and_grads" from the JSON)'
                )


_LEAVE = "leave the averaged_weights() block first"
_SMALLER = {
    "sliding": 'write a smaller "window", or "mode": "block", which keeps two copies whatever the window',
    "block": "use more ranks under ZeRO, or fewer on a node",
    "ema": 'write fewer "horizons"',
}
