"""Copies from an accelerator to the host behind the training's back: neither waits for the other on the host.

What happens on which stream, for a snapshot after optimizer step n::

    training   step n | stepped | forward, backward of step n + 1 ...            | wait for done | step n + 1
    side                wait for stepped | copy to pinned memory | done
    worker                                                      (thread) wait for done, then fold the snapshot in

Both fences are between streams, on the device. Without the first, the copy could begin before step n has ended;
without the second, step n + 1 could overwrite what is not copied yet.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ds_plugin.errors import StateError

Tensors = Sequence[torch.Tensor]


class Copies:
    """One copy under way at a time, and a thread that goes on with what it brought.

    Lifetimes. The sources are the masters, which the host allocates once - ZeRO 3's sub-groups, too - and changes in
    its optimizer step. A reference to each is held until its copy has ended, so that one the host lets go meanwhile
    (moved to the host between steps, say) is not given to someone else by the allocator while it is read; that takes
    the place of ``record_stream``. It does not help against a change in place: whoever changes masters other than in a
    step that `wait_before_step` was called for must `drain` first. The targets are pinned, or the copy would block.

    ``streams``: `torch.cuda`, or what has its ``Stream``, ``Event``, ``stream`` and ``current_stream``.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda):
        self._device, self._streams = device, streams
        self._side = streams.Stream(device=device)
        self._stepped = streams.Event()
        self._done = streams.Event(blocking=True)  # the thread that waits for it sleeps
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weight_averaging")
        self._job: Future[None] | None = None
        self._fence_due = False

    def begin(self, dst: Tensors, src: Tensors, then: Callable[[], None]) -> None:
        """Copy ``src``, as the training stream will have left it, to ``dst``; returns at once.

        ``then`` is called in the worker thread when all of it has arrived. A source in host memory is copied before
        this returns. Waits for the previous ``then``, and raises what it raised.

        Raises:
            StateError: there was no `wait_before_step` since the last copy, which a step may have torn.
        """
        self.drain()
        if self._fence_due:
            raise StateError(
                "weight_averaging: a second snapshot, and before_step() was not called since the first; call it before "
                "every optimizer step, which else overwrites weights that are being copied"
            )
        self._stepped.record(self._streams.current_stream(self._device))
        self._side.wait_event(self._stepped)
        with self._streams.stream(self._side):
            for target, source in zip(dst, src, strict=True):
                target.copy_(source, non_blocking=True)
            self._done.record(self._side)
        self._fence_due = True
        self._job = self._worker.submit(self._finish, src, then)

    def wait_before_step(self) -> None:
        """Have the training stream wait for the copy, if there is one: call it before a step that writes the sources.

        The host does not wait. Raises what the last ``then`` raised, if it has ended.
        """
        if self._fence_due:
            self._fence_due = False
            self._streams.current_stream(self._device).wait_event(self._done)
        if self._job is not None and self._job.done():
            self.drain()

    def drain(self) -> None:
        """Wait on the host until the last copy has arrived and its ``then`` has ended; raises what that raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """`drain`, and end the thread: no copy can begin afterwards."""
        try:
            self.drain()
        finally:
            self._worker.shutdown()

    def _finish(self, src: Tensors, then: Callable[[], None]) -> None:
        """In the worker thread; the executor holds ``src`` until it ends."""
        self._done.synchronize()
        then()


def copies_from(tensors: Tensors) -> Copies | None:
    """`Copies` for tensors that are in a GPU's memory, some or all of them; None if none is."""
    return next((Copies(t.device) for t in tensors if t.device.type == "cuda"), None)
