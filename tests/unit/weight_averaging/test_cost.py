"""The arithmetic of averaging's cost, worked out by hand."""

import pytest

from ds_plugin.__main__ import main
from ds_plugin.weight_averaging.cost import cost, size


def test_seven_billion_on_sixty_four_ranks():
    c = cost(7e9, 64, link=25e9)
    assert c.snapshot == 437_500_000  # 7e9 / 64 * 4
    assert c.memory == 6 * 437_500_000  # five snapshots and their average
    assert c.node_memory == 8 * c.memory
    assert c.snapshot_seconds == pytest.approx(0.0175)
    # a step: 6 * 7e9 * 4e6 / (64 * 400e12) = 6.5625 s; a hundredth of a snapshot in each
    assert c.share == pytest.approx(175e-6 / 6.5625)
    assert c.swap == 875_000_000 and c.swap_seconds == pytest.approx(0.035)
    assert c.gathered == 28_000_000_000 - 437_500_000 and c.replica == 28_000_000_000


@pytest.mark.parametrize(
    ("settings", "memory"),
    [
        ({"window": 10}, 11 * 4),
        ({"window": 10, "deltas": "bf16"}, 4 + 9 * 2 + 4),
        ({"window": 1}, 2 * 4),
    ],
)
def test_memory_per_parameter(settings, memory):
    assert cost(1000, 10, **settings).memory == memory * 100


def test_fewer_ranks_than_a_node_holds_and_model_parallelism():
    c = cost(1e9, 4, ranks_per_node=8, model_parallel=2)
    assert c.node_memory == 4 * c.memory and c.replica == 2_000_000_000 and c.gathered == 1_000_000_000


def test_the_command_prints_a_row_for_each(capsys):
    assert main(["averaging-cost", "--parameters", "7e9", "--ranks", "64", "128", "--link", "5e10"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0] == "| 7e9 | 64 | 2.62 GB (21 GB) | 438 MB | 8.75 ms | 1.3e-05 | 17.5 ms | 27.6 GB |"
    assert rows[1].startswith("| 7e9 | 128 | 1.31 GB")


def test_units():
    assert [size(n) for n in (999_000, 1e6, 2.5e9, 3e12)] == ["999 kB", "1 MB", "2.5 GB", "3 TB"]
