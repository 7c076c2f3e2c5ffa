"""The benchmark of CompleteP's cost runs, and its memory figure sees what it should. Times are for a quiet machine."""

import json
import runpy
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_completep.py"


def _run(out, *arguments):
    main = runpy.run_path(str(BENCHMARK))["main"]
    small = ["--width", "64", "--depth", "2", "--length", "32", "--batch", "2", "--rounds", "4"]
    return main([*small, *arguments, "--out", out])


def test_variants_are_measured_side_by_side(workers, tmp_path):
    assert workers(1).run(_run, str(tmp_path / "plain.json")) == [0]
    found = json.loads((tmp_path / "plain.json").read_text())
    assert list(found["time"]) == ["unpatched", "unpatched again", "forward", "folded"]
    assert found["time"]["unpatched"] == [1.0, 1.0, 1.0]
    assert all(0.2 < low <= middle <= high < 5 for middle, low, high in found["time"].values())
    memory = found["memory"]
    tensor = 32 * 2 * 64 * 4  # one activation: tokens x width x 4 bytes
    assert memory["unpatched"] > 20 * tensor
    assert abs(memory["folded"] - memory["unpatched"]) < tensor / 2
    assert memory["forward"] - memory["unpatched"] < 1.5 * tensor  # a branch's gradient beside the stream's
