"""The benchmark of averages in place of decays: its arithmetic by hand, and a miniature of it."""

import functools
from pathlib import Path

import pytest

from tests import harness


def _sweep(out, text, cache, branch):
    bench = harness.benchmark("averaging_for_decay")
    bench.small_runs.common.start()
    small = {"layers": 1, "width": 32, "length": 32, "eval_samples": 16, "batch": 4, "warmup": 2}
    scale = bench.Scale(steps=20, data=text, branch=branch, **small)
    sweep = bench.Sweep(
        Path(out),
        {bench.Look: "looks.csv"},
        functools.partial(bench.train, scale=scale, cache=Path(cache)),
        settings=vars(scale),
    )
    sweep.train([bench.Setting(1e-2, 1)])
    looks = sweep.rows[bench.Look]
    bench.draw(looks, Path(out) / "figure.png")
    return {(row.step, row.weights, row.window): row.loss for row in looks}, bench.table(looks)


def test_branches_leave_the_run_as_it_was(workers, tmp_path):
    """Branches of no steps and of a fifth: the run itself, and so all that is read of it, is the same."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}\n" for i in range(5000)))
    cache, found = str(tmp_path / "cache"), {}
    for branch in (0.0, 0.4):
        [(found[branch], lines)] = workers(1).run(_sweep, str(tmp_path / f"{branch}"), str(text), cache, branch)
    assert {step for step, *_ in found[0.4]} == {5, 10, 15, 20} and len(found[0.4]) == 4 * (2 + 2 * 3)
    for of, loss in found[0.4].items():
        if of[1] != "decayed":
            assert loss == found[0.0][of]
        else:
            assert loss != found[0.0][of] == found[0.0][of[0], "last weights", 0.0]
    # in so short a run all windows have a snapshot at every step
    assert len({loss for of, loss in found[0.4].items() if of[0] == 20}) == 4
    assert len(lines) == 2 + 6


def test_shares_by_hand():
    bench = harness.benchmark("averaging_for_decay")
    losses = {("last weights", 0.0): 3.0, ("decayed", 0.0): 2.5, ("mean", 0.1): 2.6, ("minus-sqrt", 0.1): 2.9}
    looks = [bench.Look(0.1, 1, 50, *of, loss) for of, loss in losses.items()]
    looks += [bench.Look(0.1, 1, 100, *of, loss - 1) for of, loss in losses.items()]
    found = bench.gains(looks)
    assert [(row.look, row.weights) for row in found] == [
        (look, w) for look in (0.5, 1.0) for w in ("mean", "minus-sqrt")
    ]
    assert [row.gain for row in found] == pytest.approx([0.4, 0.1, 0.4, 0.1]) and found[0].decays == 0.5
    assert bench.share(found[:1]) == pytest.approx(0.8) and bench.share(found[:2]) == pytest.approx(0.5)
    assert bench.best(looks) == ("mean", 0.1)
