"""The arithmetic of averaging, in place, on lists of fp32 tensors in CPU memory.

Every function works element by element, in a fixed order, and never leaves a product and a sum to one kernel, which may
fuse them (one rounding, not two) in the middle of a tensor and not at its end. So an element's bits do not depend on
which rank holds it, where its shard begins, or how many threads work. They take pieces that stay in a core's cache
(`in_pieces`), by numpy: torch's own wait for the slowest at each call's end, on shared cores dozens of times the work.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import torch

Tensors = Sequence[torch.Tensor]
Array = np.ndarray[Any, np.dtype[Any]]
Work = Callable[..., None]

PIECE = 64 * 1024  # elements at a time: several of 256 KiB stay in a core's cache; smaller ones spend time in Python
_SHARED = 2 * PIECE  # where threads share the work: each call has to get Python's lock back from the others
_TURN = 8  # pieces that a thread takes at a time
_COPIED = 8 * PIECE  # what is copied is read once and needs no cache
_THREADS = 4  # at most: more do not read memory faster, and each takes Python's lock from the training now and then
_TINY = float(np.finfo(np.float32).tiny)  # a share of the mean below what fp32 holds with all its digits is none


def read_weights(kind: str | Sequence[float], count: int) -> list[float]:
    """Relative weights of ``count`` snapshots, oldest first; of a list the last are used. ``"wma"``: the newer the
    heavier (PMA, arXiv 2505.12082). ``"minus-sqrt"`` and ``"cosine"`` emulate a learning rate decay (WSM, arXiv
    2507.17634).

    With a constant learning rate the j-th of k snapshots is ``x_j = x_0 + d_1 + ... + d_j``, d_i being what the
    interval before snapshot i added. A mean with weights c_j that add up to 1 scales d_i by ``w_i = c_i + ... +
    c_{k-1}``, as a learning rate decayed by w_i would if it changed no gradient. So ``c_j = w_j - w_{j+1}``, with w_0 =
    1 and w_k = 0:

        ``w_i = 1 - sqrt(i / k)``: ``c_j = sqrt((j + 1) / k) - sqrt(j / k)``, the oldest is the heaviest
        ``w_i = (1 + cos(pi i / k)) / 2``: ``c_j = sin(pi / 2k) sin(pi (2j + 1) / 2k)``, but for the first factor
        ``w_i = 1 - i / k``: the plain mean, which WSM and Megatron-LM's ``weighted_merge`` call ``linear``
    """
    if kind == "mean":
        return [1.0] * count
    if kind == "wma":
        return [float(i + 1) for i in range(count)]
    if kind == "minus-sqrt":
        return [math.sqrt((i + 1) / count) - math.sqrt(i / count) for i in range(count)]
    if kind == "cosine":  # by the nearer end: what is equal must be so to the last bit
        return [math.sin(math.pi * (2 * min(i, count - 1 - i) + 1) / (2 * count)) for i in range(count)]
    assert not isinstance(kind, str), kind
    return list(kind[-count:])


def normalised(weights: Sequence[float]) -> list[float]:
    """Relative weights, none negative, divided by their sum, each rounded once: 1e-300 and 1e308 are as good as 1."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    return [float(weight / total) for weight in exact]


def factors(weights: Sequence[float]) -> tuple[list[float], int]:
    """How a mean is made: of snapshot times factor, added up and divided once by the number. Equal ``weights`` have
    factors of 1; others add up to 1, and the number is 1. Factor 0 leaves a snapshot out: times 0 infinity is NaN."""
    shares = [share if share >= _TINY else 0.0 for share in normalised(weights)]
    kept = [share for share in shares if share]
    if len(set(kept)) == 1:
        return [1.0 if share else 0.0 for share in shares], len(kept)
    return shares, 1


def weighted_mean_(out: Tensors, snapshots: Sequence[Tensors], weights: Sequence[float]) -> None:
    """Write the mean of ``snapshots`` (oldest first, all of ``out``'s shapes) with relative weights into ``out``. They
    are added oldest to newest, times their `factors`: equal weights give the bits of ``sum(snapshots) / count``."""
    in_pieces(mean_of(weights), out, *snapshots)


def mean_of(weights: Sequence[float]) -> Work:
    """`weighted_mean_` as work for `in_pieces`, on one scratch, an out and the snapshots."""
    numbers, count = factors(weights)
    (first, share), *others = [(i, np.float32(number)) for i, number in enumerate(numbers) if number]

    def weighted(scratch: Array, out: Array, *snapshots: Array) -> None:
        np.multiply(snapshots[first], share, out=out)
        for i, number in others:
            np.multiply(snapshots[i], number, out=scratch)
            np.add(out, scratch, out=out)

    def plain(_: Array, out: Array, *snapshots: Array) -> None:
        total = snapshots[first]
        for i, _number in others:
            total = np.add(total, snapshots[i], out=out)
        np.divide(total, np.float32(count), out=out)

    return plain if count == len(others) + 1 else weighted


def add_(total: Tensors, snapshot: Tensors) -> None:
    """Add a snapshot to a running sum in place, element by element in fp32."""
    in_pieces(lambda _, target, source: np.add(target, source, out=target), total, snapshot)


def mean_of_sum_(out: Tensors, total: Tensors, count: int) -> None:
    """Write a running sum of ``count`` snapshots, divided once, into ``out`` (which may be ``total``)."""
    in_pieces(lambda _, target, source: np.divide(source, np.float32(count), out=target), out, total)


def move_(average: Tensors, snapshot: Tensors, divisor: int) -> None:
    """Move a running average towards a snapshot: ``average + (snapshot - average) * (1 / divisor)``, in fp32."""
    rate = np.float32(1 / divisor)  # rounded once: processors multiply much faster than they divide

    def move(scratch: Array, target: Array, source: Array) -> None:
        np.subtract(source, target, out=scratch)
        np.multiply(scratch, rate, out=scratch)
        np.add(target, scratch, out=target)

    in_pieces(move, average, snapshot)


def copy_(out: Tensors, source: Tensors) -> None:
    """Copy tensor by tensor, across devices and dtypes if need be."""
    shared: list[tuple[torch.Tensor, torch.Tensor]] = []
    for target, tensor in zip(out, source, strict=True):
        if _is_shared(target) and _is_shared(tensor):
            shared.append((target, tensor))
        else:
            target.copy_(tensor)
    in_pieces(np.copyto, *zip(*shared, strict=True), scratches=0, piece=_COPIED)


def all_finite(tensors: Tensors) -> bool:
    """Whether no element is a NaN or infinite; reads CPU memory only."""
    found: list[bool] = []

    def look(_: Array, array: Array) -> None:  # a NaN is the largest and the smallest
        found.append(bool(np.isfinite(array.max()) and np.isfinite(array.min())))

    in_pieces(look, [t for t in tensors if _is_shared(t)])
    others = [t for t in tensors if not _is_shared(t)]
    # a sum is not finite if an element is not
    return all(found) and all(bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all()) for t in others)


def in_pieces(work: Work, *lists: Tensors, scratches: int = 1, piece: int | None = None) -> None:
    """Call ``work(*scratches, *arrays)`` on the lists' tensors side by side, cut into pieces of at most ``piece``
    elements, by as many threads as torch has been given, each with fp32 scratches of its own; they live as long as the
    call, so that none is lost in a fork. A bf16 tensor comes as its bits (`bits_of`), one with strides as one piece."""
    if not lists:
        return
    threads = min(torch.get_num_threads(), _THREADS)
    piece = piece or (PIECE if threads == 1 else _SHARED)
    size = piece if threads == 1 else _TURN * piece
    left, turn = _cut(lists, size), threading.Lock()

    def run() -> None:
        kept = np.empty((scratches, min(piece, max((t.numel() for t in lists[0]), default=0))), np.float32)
        with np.errstate(all="ignore"):  # infinity and NaN are results like others, as they are to torch
            while True:
                with turn:
                    arrays = next(left, None)
                if arrays is None:
                    return
                for part in _parts(arrays, piece):
                    shape, count = part[0].shape, part[0].size
                    if count > kept.shape[1]:
                        kept = np.empty((scratches, count), np.float32)
                    work(*(row[:count].reshape(shape) for row in kept), *part)

    others = min(threads, -(-sum(t.numel() for t in lists[0]) // size)) - 1
    with ThreadPoolExecutor(max(others, 1), thread_name_prefix="averaging") as pool:  # which starts none until it must
        begun = [pool.submit(run) for _ in range(others)]
        run()
        for other in begun:
            other.result()


def bits_of(array: Array) -> torch.Tensor:
    """An array of 16-bit integers seen as bfloat16; nothing is copied."""
    return torch.from_numpy(array).view(torch.bfloat16)


def _is_shared(tensor: torch.Tensor) -> bool:
    """Whether threads take turns at it; with one alone torch's copies and sums are the fastest, and wait for nobody."""
    return torch.get_num_threads() > 1 and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _cut(lists: Sequence[Tensors], piece: int) -> Iterator[list[Array]]:
    for tensors in zip(*lists, strict=True):
        arrays = [(t.view(torch.int16) if t.dtype == torch.bfloat16 else t).detach().numpy() for t in tensors]
        if any(array.shape != arrays[0].shape for array in arrays):
            raise ValueError(f"tensors of one shape are averaged, not of {' and '.join(str(a.shape) for a in arrays)}")
        if all(array.flags.c_contiguous for array in arrays):
            yield from _parts([array.reshape(-1) for array in arrays], piece)
        else:
            yield arrays


def _parts(arrays: list[Array], piece: int) -> Iterator[list[Array]]:
    if arrays[0].ndim != 1:  # with strides
        yield arrays
        return
    for start in range(0, arrays[0].size, piece):
        yield [array[start : start + piece] for array in arrays]
