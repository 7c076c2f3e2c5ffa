"""The averager: snapshots of this rank's fp32 masters, and the swap that puts their average in place.

A snapshot goes to CPU memory: no collective, no accelerator memory; from an accelerator while training goes on.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch

from ds_plugin.core.errors import ConfigError, StateError, raise_on_all_ranks
from ds_plugin.weight_averaging import modes, window
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.finite import is_sound
from ds_plugin.weight_averaging.snapshots import stager
from ds_plugin.weight_averaging.snapshots.storage import Storage
from ds_plugin.weight_averaging.state.fragments import Fragment
from ds_plugin.weight_averaging.swap import Exchange, KeptBuffers

_LOG = logging.getLogger("ds_plugin")
Finite = bool | torch.Tensor | None  #: whether a step was; None: nobody knows


class MasterShards(Protocol):
    """What the averager needs of a framework. Where it has ``models``, a swap leaves their buffers as they were."""

    layout: str  # "replicated": every data-parallel rank holds all weights; or "sharded"

    def tensors(self) -> list[torch.Tensor]:
        """This rank's fp32 masters, the live tensors (never copies), in a fixed order; some may be empty."""

    def refresh(self) -> None:
        """Make the model compute with the masters' present values. May hold collectives: every rank calls it."""

    def fragments(self) -> list[Fragment]:
        """Which parameters' elements lie where in `tensors`; the rest is padding."""


class WeightAverager:
    """Averages snapshots of the masters, one every ``interval`` applied steps from ``start_step`` on. All memory is
    allocated here: `modes.buffers`, and a spare one, where snapshots arrive, the average is worked out, and training
    weights wait during a swap. Raises ConfigError, on every rank alike: a master is not fp32, or there is no room."""

    def __init__(self, config: WeightAveragingConfig, shards: MasterShards):
        self.config, self.shards, self.swapped = config, shards, False
        self._remedy, self._said = "leave the averaged_weights() block first", False
        masters = shards.tensors()
        if wrong := [master.dtype for master in masters if master.dtype != torch.float32]:
            remedy = 'remove "fp16_master_weights_and_grads" / "bf16_master_weights_and_grads" from the JSON'
            raise ConfigError(f"weight_averaging: the master weights are {wrong[0]}, averaging needs fp32; {remedy}")
        self._shapes = [master.shape for master in masters]
        storage = Storage(config, masters, modes.buffers(config))
        self.memory, self.files = storage.reserve()
        buffers: Any = None
        try:
            with raise_on_all_ranks():
                buffers = storage.allocate()
            kept, self._spare = buffers
        finally:
            del buffers  # else whoever holds on to an error would hold on to files
        self._mode, self._exchangeable = modes.make(config, kept), storage.exchangeable
        self._copies = stager.copies_from(masters)
        if self._copies is not None:
            self._verdict = storage.verdict()

    def close(self) -> None:
        """Let go of the snapshots' memory or files, and of the thread; the averager is of no use afterwards."""
        try:
            if self._copies is not None:
                self._copies.close()
        finally:
            del self._mode, self._spare

    @property
    def mode(self) -> modes.Mode:
        """What is kept, complete: waits for a snapshot that is still under way."""
        if self._copies is not None:
            self._copies.drain()
        return self._mode

    def masters(self) -> list[torch.Tensor]:
        """This rank's live masters. Raises StateError if their shapes have changed since the averager was made."""
        masters = self.shards.tensors()
        if [master.shape for master in masters] != self._shapes:
            here, before = sum(m.numel() for m in masters), sum(shape.numel() for shape in self._shapes)
            what = f"{len(masters)} master weights of {here} elements, and had {len(self._shapes)} of {before} before"
            raise StateError(f"weight_averaging: the optimizer has {what}; call add_param_group() before attach()")
        return masters

    @property
    def steps(self) -> list[int]:
        """Of the snapshots in the average, oldest first; empty when there is none. ema: the first and the latest."""
        return self.mode.steps()

    def describe(self) -> str:
        c = self.config
        weights = "" if c.weights == "mean" else f" weighted {c.weights}"
        older = ", the older ones as bf16 differences" if c.deltas == "bf16" else ""
        what = {
            "sliding": f"the last {c.window}{weights}{older}",
            "block": f"blocks of {c.window}",
            "ema": f"exponential averages over {' and '.join(map(str, c.horizons or ()))} snapshots",
        }[c.mode]
        when = f"of one snapshot every {c.interval} steps from step {c.start_step} on"
        return f"weight averaging: {what} {when}, {', '.join(str(m) for m in (self.memory, self.files) if m)}"

    def first_step(self) -> int:
        return -(-max(1, self.config.start_step) // self.config.interval) * self.config.interval

    def due(self, step: int) -> bool:
        """Whether a snapshot is taken after optimizer step ``step`` (counted from 1)."""
        return step >= self.first_step() and step % self.config.interval == 0

    def before_step(self) -> None:
        """Call it before the optimizer's step, which overwrites masters that may still be on their way."""
        if self._copies is not None:
            self._copies.wait_before_step()

    def snapshot(self, step: int, *, finite: Finite = None) -> None:
        """Fold in the masters as they are after step ``step``. From an accelerator: begin to, without waiting for it.
        ``finite``: whether the step was, the same on all ranks; if not, it gives no snapshot. It may be one element on
        the accelerator, read with the masters: a boolean, or the gradient norm. None: look at the masters."""
        masters = self.masters()
        if self._copies is not None and finite is not False:
            self._copies.drain()  # before the spare buffer is named: the last snapshot may have changed it for another
            src, dst = masters, self._spare
            if isinstance(finite, torch.Tensor):
                verdict = self._verdict[: finite.dtype.itemsize].view(finite.dtype)
                src, dst, finite = [*masters, finite.reshape(1)], [*self._spare, verdict], verdict
            self._copies.begin(dst, src, lambda: self._fold(step, self._spare, finite))
        elif finite is False or all(m.device.type == "cpu" for m in masters):  # nothing needs to be copied
            self._fold(step, masters, finite)
        else:
            window.copy_(self._spare, masters)
            self._fold(step, self._spare, finite)

    def _fold(self, step: int, snapshot: list[torch.Tensor], finite: Finite) -> None:
        """Fold in the masters or the spare buffer. After an asynchronous copy, not on the training's thread."""
        if window.all_finite(snapshot) if finite is None else is_sound(finite):
            if snapshot is self._spare and self._exchangeable:
                self._spare = self._mode.take(step, snapshot)
            else:
                self._mode.add(step, snapshot)
        elif not self._said:
            self._said = True
            _LOG.warning("weight averaging: step %d is not finite, no snapshot is taken of it (said once)", step)

    @contextlib.contextmanager
    def averaged_weights(self, horizon: int | None = None) -> Iterator[None]:
        """Training's weights out, the average in; on leaving, all is bit for bit as before, the model's buffers too.
        Every rank enters it. What fails on one while swapping in fails on every rank, and nothing has changed. Raises
        StateError as `read` does; on leaving, the training weights could not be put back: `swapped` stays true."""
        self.read(horizon)
        scratch, buffers = self._swap_in()
        try:
            yield
        except BaseException as error:  # said now: if this rank is alone with it, it may wait below for ever
            said = "weight averaging: the averaged_weights() block ends with %s: %s; the training weights are put back"
            _LOG.warning(f"{said}, for which the ranks may wait for each other", type(error).__name__, error)
            raise
        finally:
            # the framework may have moved the masters to other memory meanwhile
            self._put_back(lambda: Exchange(self.masters(), self._spare, scratch).forth(), buffers)

    def refuse_while_swapped(self, what: str) -> None:
        """Raise StateError if the average is in place of the training weights, naming ``what`` is refused."""
        if self.swapped:
            raise StateError(f"weight_averaging: {what} while the averaged weights are swapped in; {self._remedy}")

    def restart(self, horizon: int | None = None) -> None:
        """The average becomes the training weights, and its snapshots are forgotten; after any error nothing has."""
        self.read(horizon)
        self._swap_in()
        self.swapped = False
        self.reset()

    def read(self, horizon: int | None = None) -> list[torch.Tensor]:
        """The average, in the shards' order, in the spare buffer: good until the next snapshot or swap. Raises
        StateError: no snapshot has been taken yet, the average is swapped in, or there is no such horizon."""
        self.refuse_while_swapped("another read of the average")
        if horizon is not None and horizon not in (self.config.horizons or ()):
            known = f"mode {self.config.mode!r} here has {self.config.horizons or 'none'}"
            raise StateError(f"weight_averaging: there is no horizon {horizon}; {known}: give one, or leave it out")
        if not self.steps:
            first = f"the first is taken at step {self.first_step()}"
            raise StateError(f"weight_averaging: there is no snapshot to average yet; {first}")
        self.mode.read_(self._spare, horizon)
        return self._spare

    def snapshots(self) -> list[list[torch.Tensor]]:
        """Mode sliding: what is held, oldest first, in the shards' order; of older ones perhaps the differences."""
        return cast(modes.Sliding, self.mode).snapshots()

    def forget_from(self, step: int) -> None:
        cast(modes.Sliding, self.mode).forget_from(step)

    def reset(self) -> None:
        self.mode.reset()

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
        """The training weights are in place again, or what would take the average for them is refused from now on."""
        try:
            exchange()
            self.shards.refresh()
            buffers.restore()
        except Exception as error:
            why = f"the training weights could not be put back ({type(error).__name__}: {error})"
            self._remedy = f"{why}, so steps and checkpoints are refused: start again from the last checkpoint"
            raise StateError(f"weight_averaging: the averaged weights are still swapped in; {self._remedy}") from error
        self.swapped = False
