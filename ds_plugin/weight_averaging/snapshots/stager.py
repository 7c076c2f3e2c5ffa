"""Copies from an accelerator to CPU memory behind the training's back: neither waits for the other on the CPU.

What happens on which stream, for a snapshot after optimizer step n::

    training   step n | stepped | forward, backward of step n + 1 ...            | wait for done | step n + 1
    side                wait for stepped | copy to pinned memory | done
    worker                                                      (thread) wait for done, then fold the snapshot in

Both fences are between streams, on the device: the copy begins when step n has ended, and step n + 1 when it is made.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ds_plugin.core.errors import StateError, warn

Tensors = Sequence[torch.Tensor]
_LOOK = 0.001  # seconds between two looks at whether a copy has arrived


class Streams:
    """What `SnapshotStager` uses of an accelerator, of any kind."""

    Stream, Event = torch.Stream, torch.Event
    current_stream = staticmethod(torch.accelerator.current_stream)
    set_device_index = staticmethod(torch.accelerator.set_device_index)


class SnapshotStager:
    """One copy under way at a time, and a thread that goes on with what it brought. Each source is held until its copy
    has ended: that takes the place of ``record_stream``. Whoever changes masters in place other than in a step that
    `wait_before_step` was called for must `drain` first. The targets are pinned, or the copy would block."""

    def __init__(self, device: torch.device, streams: Any = Streams):
        self._device, self._streams = device, streams
        self._side = streams.Stream(device=device)
        self._stepped, self._done = streams.Event(device=device), streams.Event(device=device)
        # a thread that has not said which device is its own is on the first, and would open a context there
        self._worker = ThreadPoolExecutor(
            1, thread_name_prefix="weight_averaging", initializer=streams.set_device_index, initargs=(device,)
        )
        self._job: Future[None] | None = None
        self._fence_due = False

    def begin(self, dst: Tensors, src: Tensors, then: Callable[[], None]) -> None:
        """After `drain`, copy ``src``, as the training stream will have left it, to ``dst``, and call ``then`` in the
        worker thread. Raises StateError: no `wait_before_step` since the last copy, which a step may have torn."""
        self.drain()
        if self._fence_due:
            why = "before_step() was not called since the last snapshot; call it before each optimizer step"
            raise StateError(f"weight_averaging: {why}, which else overwrites weights that are being copied")
        self._stepped.record(self._streams.current_stream(self._device))
        self._side.wait_event(self._stepped)
        with self._side:
            for target, source in zip(dst, src, strict=True):
                target.copy_(source, non_blocking=True)
            self._done.record(self._side)
        self._fence_due = True
        self._job = self._worker.submit(self._finish, src, then)  # which holds src until it ends

    def wait_before_step(self) -> None:
        """Have the training stream, not the CPU, wait for the copy. Raises what the last ``then`` did, if it ended."""
        if self._fence_due:
            self._fence_due = False
            self._streams.current_stream(self._device).wait_event(self._done)
        if self._job is not None and self._job.done():
            self.drain()

    def drain(self) -> None:
        """Wait until the last ``then`` has ended; raises what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """End the thread when the last ``then`` has ended; raises what it raised. No copy can begin afterwards."""
        self._worker.shutdown()
        self.drain()

    def _finish(self, src: Tensors, then: Callable[[], None]) -> None:
        while not self._done.query():  # to wait for an event of torch's keeps a core busy
            time.sleep(_LOOK)
        then()


def copies_from(tensors: Tensors) -> SnapshotStager | None:
    """A `SnapshotStager` where some of the tensors are in the memory of an accelerator that has streams."""
    return next((SnapshotStager(t.device) for t in tensors if has_streams(t.device.type)), None)


@functools.cache
def has_streams(kind: str) -> bool:
    """Whether this kind of device has streams to copy on. Says so once if an accelerator has none."""
    if kind == "cpu":
        return False
    why = f"torch's accelerator here is {(current := torch.accelerator.current_accelerator())}"
    try:
        if current is not None and current.type == kind:
            torch.Stream(device=kind), torch.Event(device=kind)
            return True
    except RuntimeError as error:  # NotImplementedError is one
        why = str(error)
    warn("weight averaging: no streams on %s (%s): training waits while a snapshot is copied", kind, why)
    return False
