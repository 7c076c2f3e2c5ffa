"""The arithmetic of averaging, in place, on lists of fp32 tensors. Nothing here knows a host.

Every function works element by element, in an order that is fixed, and never leaves a product and a sum to one kernel:
a fused multiply-add rounds once, plain code twice, and a kernel may use one in the middle of a tensor and the other at
its end. So each element's bits do not depend on which rank holds it or where its shard begins.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch

Tensors = Sequence[torch.Tensor]

#: elements worked on at a time: 2 MiB of fp32 stay in the cache while every snapshot is added to them, so that a mean
#: reads each snapshot once and writes the result once; much smaller pieces would spend their time in Python
PIECE = 512 * 1024
#: the smallest number that fp32 holds with all its digits; a share of the mean below it is none
_TINY = float(np.finfo(np.float32).tiny)


def read_weights(kind: str | Sequence[float], count: int) -> list[float]:
    """Relative weights of ``count`` snapshots, oldest first; only their ratios count (`normalised`).

    ``"mean"``: 1, 1, ... ``"wma"``: 1, 2, ..., count, the newer the heavier (PMA, arXiv 2505.12082).

    ``"minus-sqrt"`` and ``"cosine"``: a learning rate decay emulated after the fact (WSM, arXiv 2507.17634). With a
    constant learning rate the j-th of k snapshots is ``x_j = x_0 + d_1 + ... + d_j``, d_i being what the interval
    before snapshot i added. A mean with weights c_j that add up to 1 is ``x_0 + sum_i (c_i + ... + c_{k-1}) d_i``:
    interval i enters scaled by ``w_i = c_i + ... + c_{k-1}``, as under a learning rate decayed by w_i, as long as the
    decay would not have changed the gradients. Turned around, ``c_j = w_j - w_{j+1}``, with w_0 = 1 and w_k = 0. The
    decay ``w_i = 1 - sqrt(i / k)`` gives ``c_j = sqrt((j + 1) / k) - sqrt(j / k)``: the oldest is the heaviest, since
    the decay falls steeply at first. The cosine ``w_i = (1 + cos(pi i / k)) / 2`` gives ``c_j = sin(pi / 2k) sin(pi (2j
    + 1) / 2k)``: those in the middle are the heaviest; its first factor, the same for all, is left out here. The linear
    decay ``w_i = 1 - i / k`` gives the plain mean, which WSM and Megatron-LM's ``weighted_merge`` call ``linear``.

    A sequence of numbers: the last belongs to the newest snapshot; while there are fewer snapshots, its last ``count``
    are used. The named kinds are worked out for the snapshots there are.
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
    """Relative weights, finite, none negative and one positive, divided by their sum: each rounded once, to fp64.

    By fractions, so that nothing overflows or is lost on the way: three weights of 1e-300 or of 1e308 give the bits of
    three weights of 1.
    """
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    return [float(weight / total) for weight in exact]


def factors(weights: Sequence[float]) -> tuple[list[float], int]:
    """How a mean with relative ``weights`` is made: of snapshot times factor, added up and divided once by the number.

    A factor of 0 leaves its snapshot out; times 0 an infinity would be NaN. Where all that are in it weigh the same,
    the factors are 1 and the number is how many there are: the bits of `mean_`. Else they add up to 1, divided by 1.
    """
    shares = [share if share >= _TINY else 0.0 for share in normalised(weights)]
    kept = [share for share in shares if share]
    if len(set(kept)) == 1:
        return [1.0 if share else 0.0 for share in shares], len(kept)
    return shares, 1


def mean_(out: Tensors, snapshots: Sequence[Tensors]) -> None:
    """Write the mean of ``snapshots`` (oldest first, all fp32 of ``out``'s shapes, in host memory) into ``out``.

    The order is fixed - add oldest to newest, then divide once - so that every sharding of the same weights gives the
    same bits, and equals ``sum(snapshots) / len(snapshots)`` on gathered weights. By numpy, whose calls and slices take
    less time than torch's: about 5 % of the whole.
    """
    if len(snapshots) == 1:
        copy_(out, snapshots[0])
        return
    for tensors in zip(out, *snapshots, strict=True):
        pieces = [[t.numpy() for t in tensors]]
        if all(t.is_contiguous() for t in tensors):
            flat = [array.reshape(-1) for array in pieces[0]]
            pieces = [[array[start : start + PIECE] for array in flat] for start in range(0, flat[0].size, PIECE)]
        with np.errstate(all="ignore"):  # infinity and NaN are results like others, as they are to torch
            for target, *sources in pieces:
                np.add(sources[0], sources[1], out=target)
                for source in sources[2:]:
                    np.add(target, source, out=target)
                np.divide(target, np.float32(len(sources)), out=target)


def weighted_mean_(out: Tensors, snapshots: Sequence[Tensors], weights: Sequence[float]) -> None:
    """`mean_` with relative weights: add ``snapshot * factor`` oldest to newest, with the `factors` of ``weights``.

    Equal weights give the bits of `mean_`, whatever their size; a snapshot of weight 0 is not looked at.
    """
    numbers, count = factors(weights)
    terms = [(snapshot, number) for snapshot, number in zip(snapshots, numbers, strict=True) if number]
    if count == len(terms):
        mean_(out, [snapshot for snapshot, _ in terms])
        return
    (_, first), *others = terms
    for target, oldest, *sources in _pieces(out, *(snapshot for snapshot, _ in terms)):
        torch.mul(oldest, first, out=target)
        for source, (_, number) in zip(sources, others, strict=True):
            target.add_(source * number)


def add_(total: Tensors, snapshot: Tensors) -> None:
    """Add a snapshot to a running sum."""
    for target, source in _pieces(total, snapshot):
        target.add_(source)


def mean_of_sum_(out: Tensors, total: Tensors, count: int) -> None:
    """Write a running sum of ``count`` snapshots, divided once, into ``out`` (which may be ``total``)."""
    for target, source in _pieces(out, total):
        torch.div(source, count, out=target)


def move_(average: Tensors, snapshot: Tensors, divisor: int) -> None:
    """Move a running average towards a snapshot: ``average + (snapshot - average) / divisor``."""
    for target, source in _pieces(average, snapshot):
        target.add_((source - target).div_(divisor))


def copy_(out: Tensors, source: Tensors) -> None:
    """Copy tensor by tensor, across devices if need be."""
    for target, tensor in zip(out, source, strict=True):
        target.copy_(tensor)


def all_finite(tensors: Tensors) -> bool:
    """Whether no element is infinite or NaN. One pass: a sum cannot be finite if an element is not."""
    return all(bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all()) for t in tensors)


def _pieces(*lists: Tensors) -> Iterator[tuple[torch.Tensor, ...]]:
    """The lists' tensors side by side, cut into pieces that fit the cache (whole, if one of them has strides)."""
    for tensors in zip(*lists, strict=True):
        if all(t.is_contiguous() for t in tensors):
            yield from zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True)
        else:
            yield tensors
