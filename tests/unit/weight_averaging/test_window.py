"""The arithmetic of averaging: against plain formulas, and the same bits however the weights are cut into shards."""

import math
import warnings

import pytest
import torch

from ds_plugin.weight_averaging import window
from tests.reference import averaging as reference


def test_read_weights():
    """Worked out by hand: sqrt of 0, 1/4, 2/4, 3/4, 1 is 0, 0.5, 0.70711, 0.86603, 1."""
    assert window.read_weights("uniform", 3) == [1, 1, 1]
    assert window.read_weights("linear", 3) == [1, 2, 3]
    assert window.read_weights("1-sqrt", 4) == pytest.approx([0.5, 0.20711, 0.15892, 0.13397], abs=1e-5)
    assert window.read_weights("1-sqrt", 1) == [1]
    assert window.read_weights([0.1, 0.2, 0.7], 3) == [0.1, 0.2, 0.7]
    assert window.read_weights([0.1, 0.2, 0.7], 2) == [0.2, 0.7]  # the newest ones, while the window fills


@pytest.mark.parametrize("count", [2, 5])
def test_one_minus_sqrt_emulates_the_decay(count):
    """The weighted mean of a path is the path walked with each interval scaled by 1 - sqrt(i / count)."""
    torch.manual_seed(0)
    deltas = torch.randn(count, 10, dtype=torch.float64)
    path = deltas.cumsum(0)
    weights = torch.tensor(window.read_weights("1-sqrt", count), dtype=torch.float64)
    decayed = deltas[0] + sum((1 - math.sqrt(i / count)) * deltas[i] for i in range(1, count))
    assert torch.allclose((weights[:, None] * path).sum(0), decayed)


WEIGHTS = [0.3, 1.7, 0.11, 0.9, 2.3]


def average(kind, snapshots):
    """One list of averaged tensors of a list of snapshots, by the functions of `window`."""
    out = [torch.empty_like(t) for t in snapshots[0]]
    if kind == "mean":
        window.mean_(out, snapshots)
    elif kind == "weighted":
        window.weighted_mean_(out, snapshots, WEIGHTS)
    elif kind == "sum":
        window.copy_(out, snapshots[0])
        for snapshot in snapshots[1:]:
            window.add_(out, snapshot)
        window.mean_of_sum_(out, out, len(snapshots))
    else:
        window.copy_(out, snapshots[0])
        for n, snapshot in enumerate(snapshots[1:], start=2):
            window.move_(out, snapshot, n)
    return out


def naive(kind, snapshots):
    named = [{"x": tensor} for tensor in snapshots]
    if kind == "weighted":
        return reference.weighted_mean(named, WEIGHTS)["x"]
    return reference.ema(named, 9)["x"] if kind == "move" else reference.mean(named)["x"]


@pytest.mark.parametrize("kind", ["mean", "weighted", "sum", "move"])
def test_every_sharding_gives_the_same_bits(kind, monkeypatch):
    monkeypatch.setattr(window, "PIECE", 333)  # pieces that divide no shard
    torch.manual_seed(1)
    snapshots = [torch.randn(1009) for _ in WEIGHTS]
    expected = naive(kind, snapshots)
    for cuts in ([1009], [1, 1008], [337, 336, 336], [500, 0, 13, 496]):
        shards = average(kind, [list(s.split(cuts)) for s in snapshots])
        assert torch.equal(torch.cat(shards), expected), (kind, cuts)
    strided = average(kind, [[s[1:].view(28, 36).t()] for s in snapshots])[0]
    assert torch.equal(strided.t().reshape(-1), expected[1:])


def test_weights_of_one_are_the_uniform_mean():
    snapshots = [[torch.randn(100)] for _ in range(3)]
    out, other = [torch.empty(100)], [torch.empty(100)]
    window.mean_(out, snapshots)
    window.weighted_mean_(other, snapshots, [1.0, 1.0, 1.0])
    assert torch.equal(out[0], other[0])


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1, 2], True),
        ([], True),
        ([3e38, 3e38], True),  # the sum overflows, no element does
        ([1, math.nan], False),
        ([math.inf, -math.inf], False),
        ([-math.inf, 0], False),
    ],
)
def test_all_finite(values, finite):
    assert window.all_finite([torch.zeros(3), torch.tensor(values, dtype=torch.float32)]) is finite


def test_extreme_values_are_torchs_and_silent():
    """The largest numbers overflow, the smallest stay subnormal, zeros keep their sign; nobody is warned."""
    big, tiny, inf = torch.finfo(torch.float32).max, 1e-45, math.inf
    snapshots = [torch.tensor(values) for values in ([big, tiny, -0.0, inf, 1.0], [big, tiny * 2, -0.0, -inf, inf])]
    out = torch.empty(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        window.mean_([out], [[s] for s in snapshots])
    expected = (snapshots[0] + snapshots[1]) / 2
    assert torch.equal(out[:3].view(torch.int32), expected[:3].view(torch.int32))
    assert out[0] == inf and out[1] != 0 and out[3].isnan() and out[4] == inf
