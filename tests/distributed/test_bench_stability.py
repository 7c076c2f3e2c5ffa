"""The stability benchmark: its arithmetic by hand, and a miniature of it. Losses and times are for the real one."""

import functools
import math
from pathlib import Path

import pytest

from tests import harness


def _sweep(out, text, cache):
    """Every arm for 10 full-length batches, and a second time from the files; the rows as plain values."""
    bench = harness.benchmark("stability")
    bench.small_runs.common.start()
    scale = bench.Scale(tokens=10 * 4 * 32, layers=1, width=32, length=32, eval_samples=16, data=text)
    train = functools.partial(bench.train, scale=scale, cache=Path(cache))
    sweep = bench.Sweep(Path(out), bench.FILES, train, settings=vars(scale))
    settings = [bench.Setting(arm, 4, 1e-2, 1) for arm in bench.ARMS]
    sweep.train(settings)
    again = bench.Sweep(Path(out), bench.FILES, None, workers=1, settings=vars(scale))
    again.train(settings)  # nothing is missing: it would take a pool of processes
    assert again.rows == sweep.rows
    runs, points = again.rows[bench.Run], again.rows[bench.Point]
    times = bench.reached(points, 1e-2)
    bench.draw(again, 4, 1e-2, Path(out) / "figure.png")
    losses = {row.arm: row.values for row in again.rows[bench.Losses]}
    at = [(point.arm, point.tokens) for point in points]
    return [vars(run) for run in runs], at, losses, [vars(t) for t in times], bench.table(runs, times)


def test_all_arms_train_the_same_tokens(workers, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}\n" for i in range(5000)))
    [(runs, points, losses, times, lines)] = workers(1).run(
        _sweep, str(tmp_path / "out"), str(text), str(tmp_path / "cache")
    )
    by_arm = {run["arm"]: run for run in runs}
    # 4 samples a step; duration 5 steps of lengths 8 + 24 * t / 5, floored to multiples of 8: 8, 16, 16, 24, 32
    assert (
        by_arm["plain"]["steps"] == 10 and by_arm["plain"]["tokens_trained"] == by_arm["plain"]["tokens_read"] == 1280
    )
    assert by_arm["truncate"]["tokens_trained"] == 4 * (8 + 16 + 16 + 24 + 8 * 32) == 1280
    assert by_arm["truncate"]["steps"] == 12 and by_arm["truncate"]["tokens_read"] == 12 * 128
    assert 1280 <= by_arm["carry"]["tokens_trained"] < 1280 + 128
    assert by_arm["carry"]["tokens_read"] - by_arm["carry"]["tokens_trained"] < 128
    for arm in ("mask", "constant"):  # steps as large as plain ones, on the same samples: fragments tell them apart
        assert [by_arm[arm][name] for name in ("steps", "tokens_trained", "tokens_read")] == [10, 1280, 1280]
        assert losses[arm] != losses["plain"]
    assert losses["mask"] != losses["constant"]
    assert by_arm["slow_rate"]["steps"] == 10 and losses["slow_rate"] != losses["plain"]
    for arm, run in by_arm.items():
        assert len(losses[arm]) == run["steps"] and all(map(math.isfinite, losses[arm]))
        assert [tokens for name, tokens in points if name == arm][-1] == run["tokens_trained"]
    assert {time["arm"]: time["gain_tokens"] for time in times}["plain"] == 1.0
    assert len(lines) == 2 + 6
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "stability.csv",
        "curves.csv",
        "training_losses.csv",
        "sweep.json",
        "figure.png",
    }


def test_slow_rate_warms_up_over_as_many_steps_as_carry():
    bench = harness.benchmark("stability")
    scale = bench.Scale(tokens=40 * 4 * 32, length=32, eval_samples=16)
    found = {
        arm: bench.json_of(bench.Setting(arm, 4, 1e-2, 1), scale)["scheduler"]["params"]["warmup_num_steps"]
        for arm in bench.ARMS
    }
    # 2 plain steps of 4 x 32 tokens; over 20 steps 8 + 24 * t / 20 is below 16 for 6 steps, then 2 of 16: 4 x 80, and
    # the sixth is where 256 are full: 4 x (6 x 8 + 16)
    assert found == dict.fromkeys(bench.ARMS, 2) | {"slow_rate": 7}


def test_target_is_reached_between_two_evaluations():
    bench = harness.benchmark("stability")

    def curve(arm, losses, seconds):
        return [
            bench.Point(arm, 4, 0.1, 1, step, 100 * step, seconds * step, 2 * seconds * step, loss)
            for step, loss in enumerate(losses, start=1)
        ]

    plain = curve("plain", [4.0, 3.0, 2.5, 2.6], 1.0)
    warm = curve("truncate", [3.5, 2.75, 2.25, 2.0], 0.5)
    never = curve("carry", [3.5, 3.0, 2.9, 2.8], 0.5)
    found = {time.arm: time for time in bench.reached([*plain, *warm, *never], 0.1)}
    # the target is 2.5, half-way between warm's second and third evaluation
    assert found["truncate"].tokens == 250 and found["truncate"].cpu_seconds == pytest.approx(1.25)
    assert (found["truncate"].gain_tokens, found["truncate"].gain_cpu) == (1.2, 2.4)
    assert found["carry"].tokens == math.inf and found["carry"].gain_cpu == 0
