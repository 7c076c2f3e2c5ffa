"""The arithmetic of averaging: against plain formulas, and the same bits however the weights are cut into shards."""

import math
import threading
import warnings

import pytest
import torch

from ds_plugin.weight_averaging import deltas, window
from ds_plugin.weight_averaging.config import KINDS
from tests.reference import averaging as reference


def test_read_weights():
    """Shares of the mean, oldest first, worked out by hand.

    sqrt of 0, 1/4, 2/4, 3/4, 1: 0, 0.5, 0.70711, 0.86603, 1. cos of 0, 45, 90, 135, 180 degrees: 1, 0.70711, 0,
    -0.70711, -1; their halved differences are 0.14645 and 0.35355.
    """
    for kind, count, shares in [
        ("mean", 4, [0.25, 0.25, 0.25, 0.25]),
        ("wma", 4, [0.1, 0.2, 0.3, 0.4]),
        ("minus-sqrt", 4, [0.5, 0.20711, 0.15892, 0.13397]),
        ("cosine", 4, [0.14645, 0.35355, 0.35355, 0.14645]),
        ("cosine", 3, [0.25, 0.5, 0.25]),
        ("cosine", 2, [0.5, 0.5]),
        ([0.1, 0.3, 0.4, 1.2], 4, [0.05, 0.15, 0.2, 0.6]),
        ([5.0, 0.0, 1.0, 3.0], 2, [0.25, 0.75]),  # the newest ones, while the window fills
    ]:
        found = window.normalised(window.read_weights(kind, count))
        assert found == pytest.approx(shares, abs=1e-5) and sum(found) == pytest.approx(1, abs=1e-15), kind
    assert all(window.normalised(window.read_weights(kind, 1)) == [1] for kind in KINDS)


def test_weights_that_are_equal_are_so_to_the_last_bit():
    for count in range(1, 30):
        cosine = window.read_weights("cosine", count)
        assert cosine == cosine[::-1]


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize(
    ("kind", "decay"),
    [
        ("minus-sqrt", lambda t: 1 - math.sqrt(t)),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
        ("mean", lambda t: 1 - t),  # what WSM and Megatron-LM call linear
    ],
)
def test_a_decay_is_emulated(kind, decay, count):
    """The weighted mean of a path is the path walked with each interval scaled by the decay at its beginning."""
    torch.manual_seed(0)
    deltas = torch.randn(count, 10, dtype=torch.float64)
    weights = torch.tensor(window.normalised(window.read_weights(kind, count)), dtype=torch.float64)
    decayed = sum(decay(i / count) * deltas[i] for i in range(count))
    assert torch.allclose((weights[:, None] * deltas.cumsum(0)).sum(0), decayed)


WEIGHTS = [0.3, 1.7, 0.11, 0.9, 2.3]


def average(kind, snapshots):
    """One list of averaged tensors of a list of snapshots, by the functions of `window`."""
    out = [torch.empty_like(t) for t in snapshots[0]]
    if kind == "mean":
        window.weighted_mean_(out, snapshots, [1.0] * len(snapshots))
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


def differences(snapshots):
    """The mean of a window kept as bf16 differences, by the functions of `deltas`."""
    out = [torch.empty_like(t) for t in snapshots[0]]
    kept = [[t.bfloat16() for t in snapshot] for snapshot in snapshots[:-1]]
    for target, older, newer in zip(kept, snapshots[:-1], snapshots[1:], strict=True):
        deltas.quantize_delta_(target, older, newer)
    deltas.mean_(out, snapshots[-1], kept, WEIGHTS)
    newest = [t.clone() for t in snapshots[-1]]
    deltas.grow_(newest, kept[-1])
    return [torch.stack(pair) for pair in zip(out, newest, strict=True)]


def naive_differences(snapshots):
    """Its mean, and the newest snapshot but one."""
    whole = [snapshots[-1]]
    for older, newer in zip(snapshots[-2::-1], snapshots[:0:-1], strict=True):
        whole.append(whole[-1] + (older - newer).bfloat16())
    return torch.stack([naive("weighted", whole[::-1]), whole[1]])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", ["mean", "weighted", "sum", "move", "differences"])
def test_bits_do_not_depend_on_threads_or_shards(kind, threads, monkeypatch):
    """Many pieces, some beside a vector register's end; shards that are empty, of one element, about a piece long."""
    piece, count = 1000, 200_003
    monkeypatch.setattr(window, "PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(3)
    snapshots = [torch.randn(count) * 10.0 ** torch.randint(-42, 30, (count,)) for _ in WEIGHTS]  # subnormal ones, too
    expected = naive_differences(snapshots) if kind == "differences" else naive(kind, snapshots)
    around = [0, 1, piece - 1, piece, piece + 1, 2 * piece - 1, 2 * piece + 1, 0, 7, 15, 17, 33]
    rest = count - sum(around)
    for cuts in ([count], [*around, rest], [rest // 3, *around, rest - rest // 3]):
        shards = [list(s.split(cuts)) for s in snapshots]
        found = differences(shards) if kind == "differences" else average(kind, shards)
        assert torch.equal(torch.cat(found, -1), expected), cuts


def test_pieces_are_shared_among_threads(monkeypatch):
    """Two at least are at work at once, each with scratch of its own; every element is given out once."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together, scratches, seen = threading.Barrier(2, timeout=20), set(), []

    def work(scratch, array):
        if len(seen) < 2:
            together.wait()  # breaks if nobody else comes
        scratches.add(scratch.ctypes.data)
        seen.extend(array.tolist())

    window.in_pieces(work, list(torch.arange(600.0).split([250, 0, 350])), piece=10)
    assert sorted(seen) == list(range(600)) and len(scratches) == 2


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    caller, started = threading.get_ident(), threading.Event()

    def work(scratch, array):
        if threading.get_ident() == caller:
            assert started.wait(20)
            return
        started.set()
        raise MemoryError("lost")

    with pytest.raises(MemoryError, match="lost"):
        window.in_pieces(work, [torch.zeros(400)], piece=10)


def weighted(snapshots, weights):
    out = torch.full_like(snapshots[0], math.nan)
    window.weighted_mean_([out], [[s] for s in snapshots], weights)
    return out


@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-300, 5e-324, 1e39, 1e308, 1.7976931348623157e308])
def test_equal_weights_are_the_mean_whatever_their_size(scale):
    """5e-324 is the smallest number of fp64, 1.8e308 its largest; fp32 holds neither of them, nor 1e39."""
    torch.manual_seed(2)
    snapshots = [torch.randn(100) for _ in range(3)]
    mean = sum(snapshots) / 3
    assert window.normalised([scale] * 3) == [1 / 3] * 3
    assert torch.equal(weighted(snapshots, [scale] * 3), mean)
    assert torch.equal(weighted([*snapshots, torch.full((100,), math.inf)], [scale] * 3 + [0.0]), mean)
    assert torch.equal(weighted([torch.ones(5)] * 3, [scale] * 3), torch.ones(5))


@pytest.mark.parametrize("scale", [2.0**-1060, 2.0**-300, 1.0, 2.0**1000])
def test_only_the_ratios_count(scale):
    weights = [1.0, 2.0, 5.0]
    assert window.normalised([scale * w for w in weights]) == [1 / 8, 2 / 8, 5 / 8]
    snapshots = [torch.tensor([1.0, -0.0, 8.0]) * n for n in (1, 2, 3)]
    found = weighted(snapshots, [scale * w for w in weights])
    assert torch.equal(found, torch.tensor([2.5, -0.0, 20.0])) and found[1].signbit()


@pytest.mark.parametrize("least", [0.0, -0.0, 1e-60, 5e-324, 1e-39])
def test_a_share_that_is_nothing_in_fp32_leaves_its_snapshot_out(least):
    infinite, one = torch.tensor([math.inf, -math.inf, math.nan]), torch.tensor([1.0, -0.0, 3.0])
    found = weighted([infinite, one], [least, 1.0])
    assert torch.equal(found.view(torch.int32), one.view(torch.int32))
    both = weighted([infinite, one, one * 3], [least, 1.0, 3.0])
    assert torch.equal(both, torch.tensor([2.5, 0.0, 7.5]))


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
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_finite(values, finite, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert window.all_finite([torch.zeros(3), torch.tensor(values, dtype=dtype)]) is finite


def test_tensors_of_other_shapes_are_refused():
    """One element would else be taken for all, and what is longer by whole pieces be cut."""
    for other in (torch.zeros(1), torch.zeros(2 * window.PIECE)):
        with pytest.raises(ValueError, match="one shape"):
            window.add_([torch.zeros(window.PIECE)], [other])


def test_extreme_values_are_torchs_and_silent():
    """The largest numbers overflow, the smallest stay subnormal, zeros keep their sign; nobody is warned."""
    big, tiny, inf = torch.finfo(torch.float32).max, 1e-45, math.inf
    snapshots = [torch.tensor(values) for values in ([big, tiny, -0.0, inf, 1.0], [big, tiny * 2, -0.0, -inf, inf])]
    out = torch.empty(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        window.weighted_mean_([out], [[s] for s in snapshots], [1.0, 1.0])
    expected = (snapshots[0] + snapshots[1]) / 2
    assert torch.equal(out[:3].view(torch.int32), expected[:3].view(torch.int32))
    assert out[0] == inf and out[1] != 0 and out[3].isnan() and out[4] == inf
