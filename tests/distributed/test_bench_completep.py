"""The benchmark of CompleteP's cost runs, and its memory figure sees what it should. Times are for a quiet machine."""

import json

from tests import harness


def _run(out, *arguments):
    small = ["--width", "64", "--depth", "2", "--length", "32", "--batch", "2", "--rounds", "4"]
    return harness.benchmark("bench_completep").main([*small, *arguments, "--out", out])


def test_variants_are_measured_side_by_side(workers, tmp_path):
    assert workers(1).run(_run, str(tmp_path / "plain.json")) == [0]
    found = json.loads((tmp_path / "plain.json").read_text())
    assert list(found["time"]) == ["unpatched", "unpatched again", "forward", "folded"]
    assert set(found["time"]["unpatched"].values()) == {1.0}
    assert all(0.2 < row["low"] <= row["ratio"] <= row["high"] < 5 for row in found["time"].values())
    memory = found["memory"]
    tensor = 32 * 2 * 64 * 4  # one activation: tokens x width x 4 bytes
    assert memory["unpatched"] > 20 * tensor
    assert memory["unpatched again"] == memory["folded"] == memory["unpatched"]


def _peaks(scaled_before):
    """Bytes at the peak of a step of a model whose last MLP's matrices dominate it: unpatched, and forward."""
    import argparse

    from ds_plugin.sweeps import builders
    from megatron_patches.completep import layers

    if not scaled_before:
        layers.scale_before = lambda layer, multiplier: None
    benchmark = harness.benchmark("bench_completep")
    builders.start_megatron()
    size = argparse.Namespace(width=64, depth=4, length=32, batch=4, dropout=0.0, fused=False, llama=False)
    peaks = []
    for variant in ("unpatched", "forward"):
        step = benchmark.build(variant, size)
        step()
        peaks.append(benchmark.peak_memory(step))
    return peaks


def test_the_forward_mode_holds_no_more_than_megatron(workers):
    """And would, if the last layer were multiplied where the others are: by a branch's gradient beside the stream's."""
    [(unpatched, forward)] = workers(1).run(_peaks, True)
    assert forward == unpatched
    [(unpatched, forward)] = workers(1).run(_peaks, False)
    assert 0 < forward - unpatched <= 32 * 4 * 64 * 4
