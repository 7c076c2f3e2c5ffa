"""A sliding window in about half the memory: the newest snapshot whole, older ones as bf16 differences. In place.

``s_i`` is kept as ``d_i = bf16(s_i - s_{i+1})``, its difference to the next newer snapshot, and read back from the
newest one down: ``r_k = s_k``, ``r_i = r_{i+1} + d_i``. Every d_i is made from two exact snapshots, when the newer one
arrives, and never touched again, so that errors reach back over the window and no further, whatever the run's length.

The bound. bf16 keeps 8 significant bits and fp32 24: a rounding moves a number by at most ``u = 2^-8`` and
``v = 2^-24`` of itself. Of the exact difference, d_i is off by at most ``(u + v + uv) |s_i - s_{i+1}|``, and adding it
rounds once, by at most ``v |r_{i+1} + d_i|``. Summed from the newest down::

    |r_i - s_i|  <=  sum over j = i .. k-1 of  (u + v + uv) |s_j - s_{j+1}|  +  v |r_{j+1} + d_j|

(but for differences below 2^-126, which bf16 has as subnormal numbers): 1/256 of the path that the weight went since,
beside fp32's own rounding - where a raw bf16 snapshot would be off by 1/256 of the weight itself. The mean is off by
no more than the mean of these.

All of it works element by element, in a fixed order, so it is the same under every sharding, as in `window`.
"""

from collections.abc import Iterator, Sequence

import torch

from ds_plugin.weight_averaging import window

Tensors = Sequence[torch.Tensor]


def shrink_(out: Tensors, older: Tensors, newer: Tensors) -> None:
    """Write ``older - newer``, rounded to ``out``'s bf16, into ``out``."""
    for target, left, right in _pieces(out, older, newer):
        target.copy_(left - right)


def restored(newest: Tensors, deltas: Sequence[Tensors]) -> list[list[torch.Tensor]]:
    """The snapshots, oldest first, in fp32: new tensors, but for the newest. ``deltas``: oldest first."""
    found = [list(newest)]
    for delta in reversed(deltas):
        found.append([newer + d for newer, d in zip(found[-1], delta, strict=True)])
    return found[::-1]


def mean_(out: Tensors, newest: Tensors, deltas: Sequence[Tensors], weights: Sequence[float]) -> None:
    """Write the mean of the `restored` snapshots into ``out``, with `window`'s bits, a piece at a time.

    ``weights``: relative, oldest first, as `window.weighted_mean_` takes them.
    """
    for target, *kept in _pieces(out, newest, *deltas):
        window.weighted_mean_([target], restored(kept[:1], [[d] for d in kept[1:]]), weights)


def _pieces(out: Tensors, *sources: Tensors) -> Iterator[tuple[torch.Tensor, ...]]:
    """Side by side, cut as `window` cuts them. A source with strides is copied first: such shards are small."""
    for target, *tensors in zip(out, *sources, strict=True):
        flat = [target.view(-1), *(t.reshape(-1) for t in tensors)]
        yield from zip(*(t.split(window.PIECE) for t in flat), strict=True)
