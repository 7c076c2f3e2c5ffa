"""A sliding window in about half the memory: the newest snapshot whole, older ones as bf16 differences. In place.

``s_i`` is kept as ``d_i = bf16(s_i - s_{i+1})``, made of two exact snapshots, and read back from the newest one down:
``r_k = s_k``, ``r_i = r_{i+1} + d_i``. A rounding moves a number by at most ``u = 2^-8`` of itself in bf16,
``v = 2^-24`` in fp32: but for differences below 2^-126 the error is 1/256 of the path that the weight went since::

    |r_i - s_i|  <=  sum over j = i .. k-1 of  (u + v + uv) |s_j - s_{j+1}|  +  v |r_{j+1} + d_j|
"""

from collections.abc import Sequence

import numpy as np
import torch

from ds_plugin.weight_averaging import window

Tensors = Sequence[torch.Tensor]

#: elements at a time: of no more torch makes bf16 and fp32 of each other without threads of its own
_PIECE = 32 * 1024


def quantize_delta_(out: Tensors, older: Tensors, newer: Tensors) -> None:
    """Write ``older - newer``, rounded to ``out``'s bf16, into ``out``."""

    def shrink(scratch: window.Array, target: window.Array, left: window.Array, right: window.Array) -> None:
        np.subtract(left, right, out=scratch)
        window.bits_of(target).copy_(torch.from_numpy(scratch))

    window.in_pieces(shrink, out, older, newer, piece=min(_PIECE, window.PIECE))


def grow_(newest: Tensors, delta: Tensors) -> None:
    """Make the newest snapshot the one before it, of which ``delta`` is the difference."""
    window.in_pieces(_add, newest, newest, delta, piece=min(_PIECE, window.PIECE))


def mean_(out: Tensors, newest: Tensors, deltas: Sequence[Tensors], weights: Sequence[float]) -> None:
    """Write the mean of the newest snapshot and of those that ``deltas``, oldest first, lead back to into ``out``."""
    count, mean = len(deltas), window.mean_of(weights)

    def restore_and_average(*arrays: window.Array) -> None:
        scratch, *older = arrays[: count + 1]
        target, newer, *differences = arrays[count + 1 :]
        snapshots = [*older, newer]
        for i in reversed(range(count)):
            _add(scratch, snapshots[i], snapshots[i + 1], differences[i])
        mean(scratch, target, *snapshots)

    window.in_pieces(restore_and_average, out, newest, *deltas, scratches=count + 1, piece=min(_PIECE, window.PIECE))


def _add(scratch: window.Array, out: window.Array, newer: window.Array, delta: window.Array) -> None:
    torch.from_numpy(scratch).copy_(window.bits_of(delta))
    np.add(newer, scratch, out=out)
