"""The benchmark of all three methods: its arithmetic by hand, and a miniature of it. Losses are for the real one."""

import functools
import json
from pathlib import Path

import pytest

from ds_plugin.core.errors import DataError
from tests import harness


def _sweep(out, text, cache):
    """Every arm at one or two rates; what the runs, factors and tables say."""
    bench = harness.benchmark("end_to_end")
    bench.small_runs.common.start()
    small = {"layers": 2, "width": 64, "heads": 2, "base_layers": 1, "base_width": 32, "length": 32, "eval_samples": 16}
    scale = bench.Scale(tokens=12 * 4 * 32, batch=4, data=text, **small)
    train = functools.partial(bench.train, scale=scale, cache=Path(cache))
    sweep = bench.Sweep(Path(out), bench.FILES, train, settings=vars(scale))
    sweep.train(bench.Setting(arm, lr, 1) for arm in ("base", *bench.RIVALS) for lr in (1e-2, 3e-3))
    sweep.train(bench.Setting(arm, 1e-2, 1) for arm in ("ours", "no_warmup", "slow_rate", "no_completep", "tuned"))
    again = bench.Sweep(Path(out), bench.FILES, None, workers=1, settings=vars(scale))
    assert again.rows == sweep.rows
    runs, points = again.rows[bench.Run], again.rows[bench.Point]
    rows = [row for against in bench.RIVALS for row in bench.factors(runs, points, against)]
    bench.draw(runs, points, Path(out) / "figure.png")
    lines = bench.sweep_table(runs) + bench.factor_table(rows)
    return [vars(run) for run in runs], [(p.arm, p.weights) for p in points], [vars(row) for row in rows], lines


def test_every_arm_trains_as_much(workers, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}\n" for i in range(5000)))
    out = tmp_path / "out"
    [(runs, points, rows, lines)] = workers(1).run(_sweep, str(out), str(text), str(tmp_path / "cache"))
    by_arm = {run["arm"]: run for run in runs}
    assert by_arm["rival"]["steps"] == by_arm["no_warmup"]["steps"] == 12
    assert all(1536 <= run["tokens"] < 1536 + 128 for run in runs)
    # 2 layers of 12 x 64^2 weights with 13 x 64 gains and biases, the final norm's 2 x 64, the output's 256 x 64
    multiplying = 2 * (12 * 64**2 + 13 * 64) + 2 * 64 + 256 * 64
    assert by_arm["rival"]["flops"] == 1536 * (6 * multiplying + 12 * 2 * 64 * 32)
    assert by_arm["ours"]["steps"] > 12 and by_arm["ours"]["flops"] < by_arm["rival"]["flops"]
    assert by_arm["base"]["flops"] < by_arm["ours"]["flops"] / 3
    assert {arm for arm, weights in points if weights == "average"} == set(by_arm) - {"rival", "slow_rival"}
    assert by_arm["no_completep"]["final"] == by_arm["tuned"]["final"] != by_arm["ours"]["final"]
    assert by_arm["slow_rival"]["steps"] == 12 and by_arm["slow_rival"]["final"] != by_arm["rival"]["final"]
    assert by_arm["slow_rate"]["steps"] == 12 and by_arm["slow_rate"]["final"] != by_arm["no_warmup"]["final"]
    assert by_arm["rival"]["final_average"] == by_arm["rival"]["final"] != by_arm["no_warmup"]["final"]
    assert {(row["against"], row["arm"], row["weights"]) for row in rows} >= {
        (rival, "ours", weights) for rival in ("rival", "slow_rival") for weights in ("average", "last weights")
    }
    assert len(lines) == 2 + 11 + 2 + len(rows)
    kept = json.loads((out / "sweep.json").read_text())
    assert kept["settings"]["tokens"] == 1536 and "torch" in kept["versions"]


def test_what_is_counted():
    bench = harness.benchmark("end_to_end")

    def run(arm, lr, seed, final, flops=100.0):
        return bench.Run(arm, lr, seed, 10, 1000, flops, flops / 10, final, final, 1.0)

    def curve(arm, lr, seed, weights, losses, each):
        return [
            bench.Point(arm, lr, seed, weights, n, n, n * each, n * each / 10, loss) for n, loss in enumerate(losses, 1)
        ]

    runs = [run("rival", lr, seed, 3 - lr) for lr in (0.1, 0.2) for seed in (1, 2)]
    runs += [run("base", lr, seed, 4 + lr, flops=5.0) for lr in (0.1, 0.2) for seed in (1, 2)]
    points = [p for seed in (1, 2) for p in curve("rival", 0.2, seed, "last weights", [4, 3.5, 3.2, 3.0], 25.0)]
    points += curve("ours", 0.1, 1, "average", [3.5, 2.5], 20.0) + curve("ours", 0.1, 2, "average", [4, 3.5], 20.0)
    runs += [run("slow_rival", 0.2, seed, 9.0, flops=50.0) for seed in (1, 2)]
    points += [p for seed in (1, 2) for p in curve("slow_rival", 0.2, seed, "last weights", [4, 3.5], 30.0)]
    first, second = bench.factors(runs, points)
    # the target is 3.0, after 100 of the rival; ours is there halfway between 20 and 40
    assert (first.arm, first.target, first.flops, first.cpu) == ("ours", 3.0, round(100 / 30, 3), round(100 / 30, 3))
    assert first.flops_tuned == 400 / (20 + 30) and first.flops_tuned_by_one_seed == 400 / (20 + 2 * 30)
    assert (second.flops, second.flops_tuned) == (0.0, 0.0)  # never there
    # the slow rival's target is 3.5, after 60: ours is there with its first evaluation, after 20
    slow, never = bench.factors(runs, points, "slow_rival")
    assert (slow.target, slow.flops, slow.flops_tuned) == (3.5, 3.0, 100 / (20 + 20)) and never.flops == 60 / 40
    assert bench.best_rate(runs, "rival") == 0.2 and bench.best_rate(runs, "base") == 0.1


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.1, 0.2], [0.1, 0.2, 0.4, 0.8]),
        ([1.0, 2.0], [1.0, 2.0, 0.5, 0.25, 0.125]),
        ([0.125, 0.25, 1.0], [0.125, 0.25, 1.0]),
    ],
)
def test_a_sweep_goes_beyond_its_best_edge(tmp_path, rates, expected):
    """Losses fall towards the rate 0.35 from either side: what is trained, in which order."""
    bench = harness.benchmark("end_to_end")
    trained = []

    def train(setting):
        trained.append(setting.lr)
        return [bench.Run(*vars(setting).values(), 1, 1, 1.0, 1.0, *[abs(setting.lr - 0.35)] * 2, 1.0)]

    sweep = bench.Sweep(tmp_path, {bench.Run: "runs.csv"}, train, settings={})
    best = lambda: [bench.best_rate(sweep.rows[bench.Run], "rival")]  # noqa: E731
    sweep.widen(rates, lambda lr: [bench.Setting("rival", lr, 1)], best)
    assert trained == expected


def test_a_folder_of_others_is_refused(tmp_path):
    bench = harness.benchmark("end_to_end")
    bench.Sweep(tmp_path / "out", bench.FILES, None, settings={"tokens": 5})
    bench.Sweep(tmp_path / "out", bench.FILES, None, settings={"tokens": 5})
    with pytest.raises(DataError, match=r"its runs are of tokens 5, these would be of 6; give another --out"):
        bench.Sweep(tmp_path / "out", bench.FILES, None, settings={"tokens": 6})
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    kept["versions"]["torch"] = "1.0"
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(kept))
    with pytest.raises(DataError, match=r"its runs are of torch '1\.0', these would be of "):
        bench.Sweep(tmp_path / "out", bench.FILES, None, settings={"tokens": 5})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "runs.csv").touch()
    with pytest.raises(DataError, match="its runs are of tokens None"):
        bench.Sweep(tmp_path / "old", bench.FILES, None, settings={"tokens": 5})
