"""The benchmark of larger batches: its arithmetic by hand, and a miniature of it. Losses are for the real one."""

import functools
import math
from pathlib import Path

import pytest

from tests import harness


def _sweep(out, text, cache):
    """Two batches, two rates, one seed; what is compared."""
    bench = harness.benchmark("larger_batch")
    bench.small_runs.common.start()
    scale = bench.Scale(tokens=12 * 4 * 32, layers=1, width=32, length=32, eval_samples=16, data=text)
    train = functools.partial(bench.stability.train, scale=scale, cache=Path(cache))
    sweep = bench.Sweep(Path(out), bench.FILES, train, settings=vars(scale))
    sweep.train(bench.Setting(arm, batch, lr, 1) for arm in bench.ARMS for batch in (4, 8) for lr in (1e-2, 3e-3))
    runs, points = sweep.rows[bench.Run], sweep.rows[bench.Point]
    best = bench.best_rates(runs, 1)
    times = bench.reached(points, best)
    bench.draw(points, best, Path(out) / "figure.png")
    bench.draw(
        [p for p in points if p.batch == 4], {of: lr for of, lr in best.items() if of[0] == 4}, Path(out) / "one.png"
    )
    return [vars(run) for run in runs], best, [vars(time) for time in times], bench.table(runs, times, best)


def test_every_batch_trains_as_much(workers, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}\n" for i in range(5000)))
    out = tmp_path / "out"
    [(runs, best, times, lines)] = workers(1).run(_sweep, str(out), str(text), str(tmp_path / "cache"))
    assert {(run["batch"], run["arm"]): run["steps"] for run in runs if run["arm"] != "carry"} == {
        (batch, arm): 48 // batch for batch in (4, 8) for arm in ("plain", "slow_rate")
    }
    assert all(run["steps"] > 48 // run["batch"] for run in runs if run["arm"] == "carry")
    assert all(1536 <= run["tokens_trained"] < 1536 + 256 for run in runs)
    assert set(best) == {(batch, arm) for batch in (4, 8) for arm in ("plain", "carry", "slow_rate")}
    for (batch, arm), lr in best.items():
        losses = {run["lr"]: run["final_eval_loss"] for run in runs if (run["batch"], run["arm"]) == (batch, arm)}
        assert losses[lr] == min(losses.values()) and len(losses) == 2
    own = [
        t
        for t in times
        if (t["arm"], t["lr"]) == ("plain", best[t["batch"], "plain"]) and t["target_batch"] == t["batch"]
    ]
    assert [t["gain_tokens"] for t in own] == [1.0, 1.0]
    assert {(t["batch"], t["target_batch"]) for t in times} == {(4, 4), (8, 4), (8, 8)}
    assert len(lines) == 2 + 2 * 3 * 2
    assert (out / "figure.png").is_file() and (out / "one.png").is_file()


def test_targets_by_hand():
    bench = harness.benchmark("larger_batch")

    def curve(arm, batch, losses):
        return [
            bench.Point(arm, batch, 0.1, 1, step * 8 // batch, 100 * step, 1.0 * step, 1.0 * step, loss)
            for step, loss in enumerate(losses, start=1)
        ]

    points = [*curve("plain", 8, [4, 3, 2]), *curve("plain", 4, [3, 2, 1]), *curve("carry", 8, [3, 1.5, 1.5])]
    best = {(batch, "plain"): 0.1 for batch in (4, 8)}
    found = {(row.arm, row.batch, row.target_batch): row for row in bench.reached(points, best)}
    # the target of 8 samples, 2, lies two thirds of the way between carry's first two evaluations
    carry = found["carry", 8, 8]
    assert (carry.tokens, carry.steps, carry.gain_tokens) == (pytest.approx(166.67), 1.67, 1.8)
    assert found["carry", 8, 4].tokens == math.inf and found["carry", 8, 4].gain_tokens == 0
    assert found["plain", 4, 4].gain_steps == found["plain", 8, 8].gain_steps == 1.0
    assert ("plain", 4, 8) not in found
