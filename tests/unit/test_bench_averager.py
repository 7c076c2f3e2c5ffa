"""The averager's benchmark: its bounds by hand, and a miniature of it. Times are for the real one."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests import harness

SMALL = ["--millions", "0.1", "--width", "64", "--depth", "1", "--length", "16", "--batch", "1", "--rounds", "3"]
SMALL += ["--processes", "1"]


THREADS = {"snapshot": 1.0, "mean": 4.0, "weighted mean": 6.0, "ema": 2.0, "block": 2.0}


def good():
    """Figures of which each keeps its bound, just."""
    row = lambda ratio: {"ratio": ratio}  # noqa: E731
    return {
        "memory": {
            "snapshot": row(1.1), "mean": row(4.35), "AveragedModel": row(1.1), "stacked mean": row(4.35),
            "floor": {"lines": 3.0, "measured": 2.9, "all traffic": 7 / 3},
        },
        "threads": {
            f"{name} on {on}{load}": row(ratio * (3 if load else 1))
            for name, ratio in {**THREADS, "stacked mean": 4.35, "foreach ema": 1.0, "foreach mean": 1.0}.items()
            for on in (1, 2)
            for load in ("", ", loaded")
        },
        "ranks": {"snapshot, 2 ranks": row(1.75), "mean, 4 ranks": row(1.75)},
        "gather": {"gathered, CPU": row(1.0), "gathered, wall": row(0.5)},
        "step": {"overhead": row(0.001), "tokens": {"trained": 512, "at 0.1 %": 512}},
    }  # fmt: skip


def broken(found):
    bench = harness.benchmark("bench_averager")
    return bench.common.broken(bench.limits(found))


@pytest.mark.parametrize(
    ("part", "figure", "key", "value", "said"),
    [
        ("memory", "snapshot", "ratio", 1.2, ["a snapshot, in memcpys: 1.2, at most 1.1", "snapshot over Av"]),
        ("memory", "mean", "ratio", 4.4, ["the mean of 5, in times its floor: 1.517", "mean over stacked mean"]),
        ("memory", "floor", "lines", 2.8, ["the mean of 5, in times its floor: 1.554"]),  # the lower floor counts
        ("memory", "mean", "ratio", float("nan"), ["the mean of 5", "mean over stacked mean"]),
        ("threads", "mean on 2", "ratio", 4.4, ["mean over stacked mean, on 2: 1.011"]),
        ("threads", "weighted mean on 1", "ratio", 6.1, ["weighted mean over mean, on 1: 1.525, at most 1.5"]),
        ("threads", "ema on 2", "ratio", 2.1, ["ema over foreach ema, on 2: 2.1, at most 2"]),
        ("threads", "block on 1", "ratio", 2.1, ["block over foreach mean, on 1: 2.1"]),
        ("threads", "ema on 2, loaded", "ratio", 6.1, ["ema on 2 under load, in times its own: 3.05, at most 3"]),
        ("threads", "snapshot on 1, loaded", "ratio", 3.1, ["snapshot on 1 under load, in times its own: 3.1"]),
        ("ranks", "mean, 4 ranks", "ratio", 2.0, ["mean, 4 ranks, in times the ideal: 2, at most 1.75"]),
        ("gather", "gathered, CPU", "ratio", 0.9, ["a snapshot over a gathered average"]),
        ("step", "overhead", "ratio", 0.002, ["overhead at interval 100, in %: 0.2, at most 0.1"]),
        ("step", "tokens", "trained", 500, ["tokens a step at which it is 0.1 %: 512, at most 500"]),
    ],
)  # fmt: skip
def test_bounds(part, figure, key, value, said):
    found = good()
    assert broken(found) == [] == broken({})
    found[part][figure][key] = value
    lines = broken(found)
    assert len(lines) == len(said) and all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_ratios_are_of_the_same_round():
    """Ratios by hand: 2 x 1/2, 2 x 4/2, 2 x 9/3, 2 x 8/2 = 1, 4, 6, 8."""
    row = harness.benchmark("bench_averager").over([1.0, 4.0, 9.0, 8.0], [2.0, 2.0, 3.0, 2.0], factor=2)
    assert row == {"ratio": 5.0, "low": 3.25, "high": 6.5, "best": 1.0}


def test_several_processes_make_one_figure():
    each = [{"mean": {"ratio": r, "low": r - 1, "high": r + 1, "best": r}, "floor": {"lines": 3}} for r in (4, 9, 5)]
    assert harness.benchmark("bench_averager").middle_of(each) == {
        "mean": {"ratio": 5, "low": 3, "high": 10, "best": 4}, "floor": {"lines": 3}
    }  # fmt: skip


def test_shards_are_uneven_and_those_of_a_rank_a_part():
    bench = harness.benchmark("bench_averager")
    args = SimpleNamespace(millions=0.1)
    assert bench.sizes(args) == [40003, 30000, 20001, 10000, 0, 4097, 13]
    assert bench.sizes(args, 4) == [10001, 7500, 5001, 2500, 0, 1025, 4]


def _run(out):
    threads = torch.get_num_threads()
    parts = "memory,threads,ranks,step"
    code = harness.benchmark("bench_averager").main([*SMALL, "--parts", parts, "--out", out])
    torch.set_num_threads(threads)
    return code


def _gathered():
    return harness.benchmark("bench_averager").gathered(SimpleNamespace(millions=0.1, rounds=2))


def test_a_miniature(workers, tmp_path):
    assert workers(1).run(_run, str(tmp_path / "found.json")) == [0]
    described = json.loads((tmp_path / "found.json").read_text())
    assert set(described["versions"]) >= {"python", "torch", "deepspeed", "megatron-core"}
    found = described["found"]
    assert described["broken"] == broken(found)
    memory, step = found["memory"], found["step"]
    assert memory["memcpy"] == {"ratio": 1.0, "low": 1.0, "high": 1.0, "best": 1.0}
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for name, row in memory.items() if name != "floor")
    assert memory["floor"]["measured"] == 1 + 4 * memory["read"]["ratio"]
    assert {"ema on 2", "ema on 2, loaded"} < set(found["threads"]) and found["threads"]["copy on 1"]["ratio"] == 1
    assert set(found["ranks"]) == {f"{what}, {n} ranks" for what in ("snapshot", "mean") for n in (2, 4)}
    assert step["tokens"]["trained"] == 16 and step["tokens"]["parameters"] > 12 * 64**2
    assert step["overhead"]["ratio"] > 0 and step["tokens"]["at 0.1 %"] > 0


def test_gathering_costs_more_than_a_snapshot(workers):
    for found in workers(2).run(_gathered):
        assert set(found) == {"gathered, CPU", "gathered, wall"}
        assert all(row["ratio"] > 1 for row in found.values())
