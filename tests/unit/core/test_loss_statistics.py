"""Loss ratios worked out by hand, the running correlation against numpy, and exact states."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_plugin.core.errors import StateError
from ds_plugin.core.loss_statistics import Correlation, LossRatio, StabilityMonitor
from ds_plugin.deepspeed_engine.readings import EngineReadings
from tests.reference import stability as reference

INF, NAN = math.inf, math.nan

TABLE = [
    # losses, ratios (None: there is none), highest, steps above 1.2, steps above 1.5
    ([4.0], [None], None, 0, 0),
    # 2/4, 3/2, 2.4/2, 1/2, 1.5/1, 4/1: 1.5 and 1.2 themselves are not above
    ([4.0, 2.0, 3.0, 2.4, 1.0, 1.5, 4.0], [None, 0.5, 1.5, 1.2, 0.5, 1.5, 4.0], 4.0, 3, 1),
    # a step is compared with the lowest, not with the one before it: 3/2, 2.5/2
    ([2.0, 3.0, 2.5], [None, 1.5, 1.25], 1.5, 2, 0),
    # not finite: infinite, counted, never the lowest (-inf would be)
    ([2.0, NAN, 1.0, -INF, 2.0, INF], [None, INF, 0.5, INF, 2.0, INF], INF, 4, 4),
    ([NAN, 2.0, 1.0], [INF, None, 0.5], INF, 1, 1),
    # not known, zero and negative: no ratio, and the lowest stays
    ([2.0, None, 1.0, 0.0, -3.0, 2.0], [None, None, 0.5, None, None, 2.0], 2.0, 1, 1),
]


@pytest.mark.parametrize(("losses", "ratios", "highest", "above_12", "above_15"), TABLE)
def test_loss_ratio(losses, ratios, highest, above_12, above_15):
    meter = LossRatio()
    assert [meter.feed(loss) for loss in losses] == ratios
    assert meter.highest == highest
    assert meter.above == [above_12, above_15]


LENGTHS = [
    # (length, loss), ratios: a step is compared with those that were not longer
    ([(8, 4.0), (16, 2.0), (8, 3.0), (16, 3.0)], [None, 0.5, 0.75, 1.5]),
    # after a long step with a low loss a short one is no spike, a long one is; 3/2 is of the shorter step's 2
    ([(8, 2.0), (16, 1.0), (8, 2.0), (16, 1.5), (24, 1.5)], [None, 0.5, 1.0, 1.5, 1.5]),
    ([(16, 1.0), (8, 3.0), (8, 6.0), (16, 3.0), (8, 0.5), (16, 1.0)], [None, None, 2.0, 3.0, 0.5 / 3, 2.0]),
]


@pytest.mark.parametrize(("steps", "ratios"), LENGTHS)
def test_a_step_is_compared_with_those_that_were_not_longer(steps, ratios):
    meter = LossRatio()
    for (length, loss), ratio in zip(steps, ratios, strict=True):
        resumed = LossRatio(json.loads(json.dumps(meter.state())))
        assert resumed.feed(loss, length) == meter.feed(loss, length) == ratio
    assert min(low for _, low, _ in meter.state()["lowest"]) == min(loss for _, loss in steps)


def test_noise_is_taken_off_the_loss_and_put_on_the_lowest():
    meter = LossRatio()
    # 4 +- 0.25 and 6 +- 0.5: (6 - 1) / (4 + 0.5); then 8, exact, against the same lowest
    assert [meter.feed(4.0, error=0.25), meter.beyond_noise] == [None, None]
    assert [meter.feed(6.0, error=0.5), meter.beyond_noise] == [1.5, 5 / 4.5]
    resumed = LossRatio(json.loads(json.dumps(meter.state())))
    assert [resumed.feed(8.0), resumed.beyond_noise] == [2.0, 8 / 4.5]
    assert [meter.feed(INF, error=0.0), meter.beyond_noise] == [INF, INF]


@pytest.mark.parametrize("cut", range(7))
@pytest.mark.parametrize("losses", [TABLE[1][0], [2.0, NAN, 1 / 3, None, 0.7, 0.1, 0.3]])
def test_loss_ratio_resumes_exactly(losses, cut):
    whole, first = LossRatio(), LossRatio()
    expected = [whole.feed(loss) for loss in losses]
    found = [first.feed(loss) for loss in losses[:cut]]
    second = LossRatio(json.loads(json.dumps(first.state())))
    found += [second.feed(loss) for loss in losses[cut:]]
    assert found == expected and second.state() == whole.state()


def pairs(n, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=n)
    return x + offset, 0.3 * x + generator.normal(size=n) + offset


def correlate(x, y):
    correlation = Correlation()
    for a, b in zip(x, y, strict=True):
        correlation.add(float(a), float(b))
    return correlation


@pytest.mark.parametrize(("n", "offset"), [(2, 0.0), (3, 0.0), (50, 0.0), (1000, 1e6)])
def test_correlation_is_numpys(n, offset):
    """The offset makes sums of squares cancel: 1e12 beside variances of 1."""
    x, y = pairs(n, offset=offset)
    assert correlate(x, y).value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-8)


def test_correlation_by_hand():
    # means 2 and 4: products (-1)(-2) + 0 * 1 + 1 * 1 = 3; squares 2 and 6; 3 / sqrt(12)
    assert correlate([1, 2, 3], [2, 5, 5]).value == pytest.approx(3 / math.sqrt(12), rel=1e-15)
    assert correlate([1, 2, 3], [6, 4, 2]).value == pytest.approx(-1, rel=1e-15)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [2.0]), ([0.1] * 5, [1, 2, 3, 4, 5]), ([1, 2, 3], [0.3] * 3)])
def test_correlation_is_undefined(x, y):
    assert correlate(x, y).value is None


def test_pairs_that_are_not_finite_are_left_out():
    x, y = pairs(20)
    expected = correlate(x, y)
    for at, (a, b) in zip((0, 5, 9, 20), [(INF, 1.0), (1.0, NAN), (None, 1.0), (1.0, None)], strict=True):
        x, y = np.insert(x.astype(object), at, a), np.insert(y.astype(object), at, b)
    found = Correlation()
    for a, b in zip(x, y, strict=True):
        found.add(a, b)
    assert found.count == 20 and found.state() == expected.state()


@pytest.mark.parametrize("cut", [0, 1, 13, 30])
def test_correlation_resumes_exactly(cut):
    x, y = pairs(30)
    resumed = Correlation(*json.loads(json.dumps(correlate(x[:cut], y[:cut]).state())))
    for a, b in zip(x[cut:], y[cut:], strict=True):
        resumed.add(float(a), float(b))
    assert resumed.state() == correlate(x, y).state() and resumed.count == 30


# -- the table of all ranks --------------------------------------------------------------------------------------------

SLOTS, RANKS = 5, 301
VARIANCE = slice(3 * SLOTS, 3 * SLOTS + 2)  # where a vector has it


def exchange(monkeypatch, table):
    """A monitor whose job has sent ``table``, [ranks, numbers]: the losses it fed, and what it made of the rest."""
    readings = SimpleNamespace(device=torch.device("cpu"), step=12, gradient_norm=lambda: None, adam_variances=list)
    monitor = StabilityMonitor(readings, SLOTS, lambda: {"length": 16, "tokens": 10**11 + 1}, variance=True)
    losses = []
    monkeypatch.setattr(monitor.loss_ratio, "feed", lambda loss, length, error: losses.append(loss))
    monkeypatch.setattr(dist, "get_world_size", lambda: len(table))
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda into, _: into.copy_(table.reshape(-1)))
    *before, report = [monitor.close_step() for _ in range(SLOTS)]
    assert not any(before)
    return losses, report.variance_l1, report.variance_max


def test_between_reports_nothing_is_read_from_the_device():
    """Tensors without contents, whose reading raises."""
    device = torch.device("meta")
    engine = SimpleNamespace(
        device=device, global_steps=1, fp16_enabled=lambda: False, get_global_grad_norm=lambda: norm
    )
    norm, monitor = torch.empty((), device=device), StabilityMonitor(EngineReadings(engine), 3)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(norm > 0)
    for _ in range(2):
        monitor.record(torch.empty(2, device=device))
        assert monitor.close_step(16) is None
    with pytest.raises(ValueError, match="process group"):  # the third step's report asks the other ranks
        monitor.close_step(16)


def sent(ranks=RANKS):
    """Vectors of ranks some of which have no loss in a slot, and no state of Adam's."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.rand(ranks, 4 * SLOTS + 5, dtype=torch.float64, generator=generator) * 1e3
    counts = torch.randint(0, 3, (ranks, SLOTS), generator=generator)
    counts[:, 2] = 0  # nobody has a loss
    finite = counts.clone()
    counts[0, 3:] += 1
    finite[:, 4] = 0  # nobody has a finite one
    numbers[:, :SLOTS] *= finite > 0
    numbers[:, 2 * SLOTS : 3 * SLOTS] = finite
    numbers[:, 3 * SLOTS + 2 : -3] = counts
    numbers[1::2, VARIANCE] = torch.tensor([0.0, -1.0], dtype=torch.float64)
    numbers[:, -3:] = torch.tensor([12, 16, 10**11 + 1])
    return numbers


@pytest.mark.parametrize("ranks", [1, 2, RANKS])
def test_a_report_adds_up_rank_after_rank(monkeypatch, ranks):
    table = sent(ranks)
    found = exchange(monkeypatch, table)
    assert found == reference.exchanged(table.tolist(), SLOTS) and found[0][2] is None and found[2] > 0
    assert found[0][4] == INF and (ranks < RANKS or all(0 < found[0][i] < INF for i in (0, 1, 3)))
    table[0, VARIANCE] = torch.tensor([0.0, -1.0], dtype=torch.float64)
    table[:, 0] *= float("inf") if ranks == RANKS else 1  # 0 x inf is NaN where a rank has no loss
    expected = reference.exchanged(table.tolist(), SLOTS)
    assert repr(exchange(monkeypatch, table)) == repr(expected)
    assert ranks > 2 or expected[1:] == (None, None)


@pytest.mark.parametrize("rank", [0, 1, RANKS - 1])
def test_one_maximum_that_is_not_a_number_shows(monkeypatch, rank):
    table = sent()
    table[rank, 3 * SLOTS + 1] = NAN
    found = exchange(monkeypatch, table)
    assert math.isnan(found[2]) and repr(found) == repr(reference.exchanged(table.tolist(), SLOTS))


def test_the_first_number_that_differs_is_named_with_its_rank(monkeypatch):
    table = sent()
    table[40, -1] += 1
    table[200, -2] = 8
    with pytest.raises(StateError, match="length is 8 on rank 200 and 16 on rank 0"):
        exchange(monkeypatch, table)
    table[200, -2] = 16
    with pytest.raises(StateError, match="tokens is 100000000002 on rank 40 and 100000000001 on rank 0"):
        exchange(monkeypatch, table)
