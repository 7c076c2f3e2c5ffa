"""The averager on a stand-in for a host: uneven, empty and non-contiguous shards."""

import pytest
import torch

from ds_plugin.errors import CheckpointError, ConfigError, StateError
from ds_plugin.weight_averaging import averager as averager_module
from ds_plugin.weight_averaging import checkpoint
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.window import exchange_


class Host:
    """Three shards, one of them empty; counts its refreshes."""

    layout = "sharded"

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.masters = [torch.randn(7, dtype=dtype), torch.empty(0, dtype=dtype), torch.randn(3, 5, dtype=dtype)]
        self.refreshed = 0

    def tensors(self):
        return self.masters

    def refresh(self):
        self.refreshed += 1

    def step(self):
        for master in self.masters:
            master.add_(torch.randn(master.shape) * 0.1)

    def copy(self):
        return [m.clone() for m in self.masters]


def make(host, **changes):
    settings = {"enabled": True, "window": 3, "interval": 2, **changes}
    return WeightAverager(WeightAveragingConfig.model_validate(settings), host)


def run(averager, host, steps, start=1):
    """Returns the masters after each step."""
    history = {}
    for step in range(start, start + steps):
        host.step()
        if averager.due(step):
            averager.snapshot(step)
        history[step] = host.copy()
    return history


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def mean_of(snapshots):
    return [sum(tensors[1:], start=tensors[0].clone()) / len(tensors) for tensors in zip(*snapshots, strict=True)]


@pytest.mark.parametrize(
    ("interval", "start", "expected"),
    [(1, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [2, 4, 6]), (3, 0, [3, 6]), (2, 4, [4, 6]), (2, 5, [6]), (7, 0, [])],
)
def test_due(interval, start, expected):
    averager = make(Host(), interval=interval, start_step=start)
    assert [step for step in range(1, 7) if averager.due(step)] == expected


def test_the_window_slides_and_the_mean_is_bitwise():
    host = Host()
    averager = make(host)
    history = run(averager, host, 9)  # snapshots at 2, 4, 6, 8; three are kept
    assert averager.steps == [4, 6, 8]
    assert equal(averager.snapshots()[0], history[4]) and equal(averager.snapshots()[2], history[8])
    before = host.copy()
    with averager.averaged_weights():
        assert equal(host.masters, mean_of([history[4], history[6], history[8]]))
        assert not equal(host.masters, before)
        assert host.refreshed == 1
    assert equal(host.masters, before)
    assert host.refreshed == 2


def test_a_window_that_is_not_full_averages_what_it_has():
    host = Host()
    averager = make(host, window=5)
    history = run(averager, host, 4)
    with averager.averaged_weights():
        assert equal(host.masters, mean_of([history[2], history[4]]))


def test_reading_twice_gives_the_same_bits():
    host = Host()
    averager = make(host)
    run(averager, host, 8)
    with averager.averaged_weights():
        first = host.copy()
    with averager.averaged_weights():
        assert equal(host.masters, first)


def test_weights_return_when_the_evaluation_fails():
    host = Host()
    averager = make(host)
    run(averager, host, 4)
    before = host.copy()
    with pytest.raises(ZeroDivisionError), averager.averaged_weights():
        raise ZeroDivisionError
    assert equal(host.masters, before) and not averager.swapped


def test_a_swap_in_pieces_is_the_same_swap(monkeypatch):
    monkeypatch.setattr(averager_module, "EXCHANGE_ELEMENTS", 4)  # 7 and 15 elements: pieces that do not divide them
    test_the_window_slides_and_the_mean_is_bitwise()


def test_exchange_of_non_contiguous_tensors():
    left, right = torch.randn(4, 6), torch.randn(6, 4)
    a, b = left.clone(), right.t().clone()
    exchange_([left], [right.t()], torch.empty(5))
    assert torch.equal(left, b) and torch.equal(right.t(), a)


def test_refusals():
    host = Host()
    averager = make(host, start_step=5)
    with pytest.raises(StateError, match="first is taken at step 6"), averager.averaged_weights():
        pass
    run(averager, host, 6)
    with (
        averager.averaged_weights(),
        pytest.raises(StateError, match="already swapped in"),
        averager.averaged_weights(),
    ):
        pass
    with pytest.raises(ConfigError, match="bfloat16"):
        make(Host(torch.bfloat16))


# -- on disk ---------------------------------------------------------------------------------------------------------

IDENTITY = {"rank": 0, "world_size": 2, "save_id": "abc"}


def saved(tmp_path, **changes):
    host = Host()
    averager = make(host, **changes)
    run(averager, host, 7)
    checkpoint.save(tmp_path, averager, **IDENTITY)
    return host, averager


def test_resume_continues_bitwise(tmp_path):
    host, averager = saved(tmp_path)
    other_host = Host()
    other = make(other_host)
    checkpoint.load(tmp_path, other, **IDENTITY)
    assert other.steps == averager.steps == [2, 4, 6]
    for a, b in zip(host.masters, other_host.masters, strict=True):
        b.copy_(a)
    state = torch.get_rng_state()
    run(averager, host, 5, start=8)
    torch.set_rng_state(state)
    run(other, other_host, 5, start=8)
    with averager.averaged_weights(), other.averaged_weights():
        assert equal(host.masters, other_host.masters)


def test_another_window_keeps_the_newest(tmp_path):
    _, averager = saved(tmp_path)
    smaller = make(Host(), window=2)
    checkpoint.load(tmp_path, smaller, **IDENTITY)
    assert smaller.steps == [4, 6]
    assert equal(smaller.snapshots()[1], averager.snapshots()[2])
    larger = make(Host(), window=9)
    checkpoint.load(tmp_path, larger, **IDENTITY)
    assert larger.steps == [2, 4, 6]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda p: p.unlink(), ["missing", "weight_averaging_rank_00000.safetensors"]),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), ["damaged"]),
        (lambda p: p.write_bytes(b"not safetensors"), ["damaged"]),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, parts):
    saved(tmp_path)
    damage(tmp_path / checkpoint.shard_name(0))
    averager = make(Host())
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path, averager, **IDENTITY)
    assert all(part in str(caught.value) for part in [*parts, "--tag"]), str(caught.value)
    assert averager.steps == []


@pytest.mark.parametrize(("key", "value"), [("world_size", 3), ("save_id", "xyz")])
def test_a_foreign_shard_is_named(tmp_path, key, value):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=f"{key}.*{IDENTITY[key]}.*{value}"):
        checkpoint.load(tmp_path, make(Host()), **{**IDENTITY, key: value})


def test_another_ranks_shard_is_named(tmp_path):
    saved(tmp_path)
    (tmp_path / checkpoint.shard_name(0)).rename(tmp_path / checkpoint.shard_name(1))
    with pytest.raises(CheckpointError, match="rank '0' where this run expects '1'"):
        checkpoint.load(tmp_path, make(Host()), **{**IDENTITY, "rank": 1})


def test_shards_of_another_size_are_named(tmp_path):
    saved(tmp_path)
    host = Host()
    host.masters[0] = torch.zeros(9)
    with pytest.raises(CheckpointError, match=r"\[7\] elements.*\[9\]"):
        checkpoint.load(tmp_path, make(host), **IDENTITY)
    host.masters.append(torch.zeros(1))
    with pytest.raises(CheckpointError, match="3 shards per snapshot.*4"):
        checkpoint.load(tmp_path, make(host), **IDENTITY)
