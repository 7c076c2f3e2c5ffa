"""The benchmark of early averaging: its arithmetic by hand, and a miniature of it. Losses are for the real one."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import harness


def _miniature(out, text, cache):
    """Every run of a miniature, published, and what it takes to compare runs with and without averagers watching."""
    bench = harness.benchmark("early_averaging")
    bench.common.start()
    plan, out, cache = replace(bench.SMOKE, data=text), Path(out), Path(cache)
    settings = bench.settings_of(plan, [1]) + bench.spiked(plan, [1])
    sweep = bench.Sweep(
        out, {bench.Point: "curves.csv"}, functools.partial(bench.train, plan=plan, cache=cache), settings=plan.shared
    )
    sweep.train(settings)
    points = sweep.rows[bench.Point]
    bench.report(points, plan, out)
    again = bench.Sweep(out, {bench.Point: "curves.csv"}, None, settings=plan.shared)
    again.train(settings)  # everything is there
    assert again.rows[bench.Point] == points
    return [vars(p) for p in points], [vars(r) for r in bench.summary(points)]


def _watched(text, cache):
    """Training losses of the same run: without averagers, with three, and with three and a spike in the middle; the
    learning rates of the last; and what the plain means of the masters after steps 4 and 6, and 4 to 10, evaluate to.
    """
    bench = harness.benchmark("early_averaging")
    bench.common.start()
    plan, cache = replace(bench.SMOKE, data=text), Path(cache)
    constant = bench.Setting("constant", 1e-2, 1, "")
    unwatched = replace(plan, regimes={"constant": replace(plan.regimes["constant"], averages={})})
    alone, watched, spiked = [], [], []
    bench.train(constant, unwatched, cache, alone)
    points = bench.train(constant, plan, cache, watched)
    small = bench.small_runs
    rates, masters, build = [], [], small.build

    def built(*args):
        engine, text = build(*args)
        step = engine.step

        def recording():
            rates.append(engine.optimizer.param_groups[0]["lr"])
            step()
            masters.append([p.data.clone() for p in engine.module.parameters()])

        engine.step = recording
        built.engine = engine
        return engine, text

    small.build = built
    bench.train(replace(constant, after="on"), plan, cache, spiked)
    small.build = build
    engine, expected = built.engine, {}
    text = small.corpus.prepare(text, tokenizer=None, cache_dir=cache)
    evaluation = small.Samples(plan, text, cache, count=24 * 4, seed=1).evaluation
    for name, steps in (("lawa", (8, 10)), ("swa", (4, 6, 8, 10))):  # start 3, interval 2, window 2
        for parameter, *found in zip(engine.module.parameters(), *(masters[step - 1] for step in steps), strict=True):
            parameter.data.copy_(torch.stack(found).mean(0))
        expected[name] = small.evaluate(engine, evaluation)
    found = {p.average: p.eval_loss for p in points if p.step == 10}
    return alone, watched, spiked, rates, expected, found


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}\n" for i in range(5000)))
    return path


def test_averagers_watch_without_disturbing(workers, text):
    [(alone, watched, spiked, rates, expected, found)] = workers(1).run(_watched, str(text), str(text.parent / "cache"))
    assert len(alone) == 24 and alone == watched
    assert spiked[:13] == alone[:13] and spiked[13] != alone[13]  # step 13 is the first of ten times the rate
    assert rates == pytest.approx([0, 0, 5e-3, *[1e-2] * 9, *[1e-1] * 3, *[1e-2] * 5])
    for name, loss in expected.items():
        assert found[name] == pytest.approx(loss, abs=2e-5), name
    assert len({*found.values()}) == 4


def test_a_miniature_is_published(workers, text, tmp_path):
    [(points, rows)] = workers(1).run(_miniature, str(tmp_path / "out"), str(text), str(text.parent / "cache"))
    curve = {(p["regime"], p["after"], p["average"]): [q["step"] for q in points if _key(q) == _key(p)] for p in points}
    names, even = ("raw", "lawa", "ema", "swa"), list(range(2, 25, 2))
    assert all(curve["constant", "", name] == even[0 if name == "raw" else 1 :] for name in names)
    assert curve["cosine", "", "raw"] == even[:6]
    assert all(curve["constant", "on", name] == [4, 6, 8, 10, 12, 14, 15, 16, 18, 20] for name in names)
    # A restart after 15 forgets the snapshots, of every averager: that of 16 is the only one then.
    at_16 = {
        after: {p["eval_loss"] for p in points if (p["after"], p["step"]) == (after, 16)} for after in ("on", "keep")
    }
    assert len(at_16["keep"]) == 1 and len(at_16["on"]) == 4
    assert all(math.isfinite(p["eval_loss"]) for p in points)
    ends = {
        p["after"]: p["eval_loss"] for p in points if (p["regime"], p["average"], p["step"]) == ("constant", "raw", 20)
    }
    assert len(set(ends.values())) == 4  # no spike, going on, restarted with moments kept and reset
    assert {(r["average"], r["against"]) for r in rows} == {
        *((name, "raw") for name in names[1:]),
        *(("lawa", name) for name in names[2:]),
    }
    assert len(rows) == 2 * 5 * 4
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"curves.csv", "summary.csv", "sweep.json", "spike.csv", "early_averaging.png"}


def _key(point):
    return point["regime"], point["after"], point["average"]


def test_steps_saved_by_hand():
    bench = harness.benchmark("early_averaging")
    raw = [(10, 6.0), (20, 5.0), (30, 4.0), (40, 3.0), (50, 2.0)]
    # 3.0 lies half-way between steps 20 and 30: 15 of 40 steps saved, and the loss at step 40 is 0.75 lower
    assert bench.saved([(20, 4.0), (30, 2.0), (40, 2.25)], raw, 40) == (3.0, 0.375, 0.75)
    assert bench.saved([(20, 3.0), (40, 1.0)], raw, 40) == (3.0, 0.5, 2.0)  # there from the beginning
    assert bench.saved([(40, 3.5), (50, 3.0)], raw, 40) == (3.0, -0.25, -0.5)  # later
    assert bench.saved([(40, 3.5)], raw, 40)[1] == -math.inf
    # where the other was there before, at step 20, its steps are counted from there
    assert bench.saved([(10, 3.0), (40, 2.0)], [(20, 3.0), (30, 2.0), (40, 3.0)], 40) == (3.0, 0.5, 1.0)
    assert bench.largest_rise([(10, 3.0), (20, 2.0), (30, 2.5), (40, 1.5), (50, 1.75)]) == 0.5
    assert bench.smooth([(1, 0.0), (2, 3.0), (3, 9.0), (4, 0.0), (5, 3.0), (6, 5.0)]) == [
        (1, 0.0),  # alone
        (2, 4.0),  # with its neighbours
        (3, 3.0),  # five
        (4, 4.0),
        (5, pytest.approx(8 / 3)),
        (6, 5.0),
    ]


def test_recovery_from_a_spike_by_hand():
    bench = harness.benchmark("early_averaging")
    spike = bench.Spike(lr=0.1, after=20, steps=5, factor=30.0, until=50)
    losses = {
        ("on", "raw"): [(10, 2.5), (20, 2.0), (25, 6.0), (30, 4.0), (40, 2.5), (50, 1.5)],
        ("on", "lawa"): [(20, 1.8), (25, 1.8), (30, 2.2), (40, 2.1), (50, 2.0)],
        ("keep", "raw"): [(20, 2.0), (25, 6.0), (30, 1.9), (40, 1.8), (50, 1.7)],
        ("reset", "raw"): [(20, 2.0), (25, 6.0), (30, 3.0), (40, 2.4), (50, 2.2)],
    }
    points = [
        bench.Point("constant", 0.1, 1, after, name, step, loss)
        for (after, name), curve in losses.items()
        for step, loss in curve
    ]
    rows = {(r.after, r.average): r for r in bench.recoveries(points, spike)}
    assert {r.before for r in rows.values()} == {2.0}
    assert {key: (r.highest, r.steps, r.last) for key, r in rows.items()} == {
        ("on", "raw"): (6.0, 20.0, 1.5),  # 2.0 is half-way from 40 to 50
        ("on", "lawa"): (2.2, 25.0, 2.0),  # it was below at 25, before the spike was in it
        ("keep", "raw"): (1.9, 0.0, 1.7),  # never above it after the restart
        ("reset", "raw"): (3.0, math.inf, 2.2),
    }
    lines = bench.spike_table(rows.values())
    assert len(lines) == 2 + 4 and "never" in lines[-1] and lines[3].startswith("| 0.1 | on | raw | 2.000 | 6.000")
