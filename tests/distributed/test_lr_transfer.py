"""The learning-rate sweep: its arithmetic by hand, and a tiny sweep that is interrupted and goes on."""

import contextlib
import io
import json
import math

import pytest

from ds_plugin.cli.main import main
from ds_plugin.core.errors import DataError
from ds_plugin.sweeps.builders import Megatron
from ds_plugin.sweeps.lr_transfer import Run, schedule, summary, train, transfer
from ds_plugin.sweeps.mixtures import Mixture
from ds_plugin.sweeps.records import read_records, write_records
from ds_plugin.sweeps.trial import Base, Shape


def runs(recipe, width, depth, losses, seeds=(1,)):
    """``losses`` by exponent of the rate."""
    return [Run(recipe, width, depth, seed, 2.0**n, loss) for n, loss in losses.items() for seed in seeds]


SWEEP = [
    *runs("completep", 64, 2, {-8: 2.5, -7: 2.4, -6: 2.6}),
    *runs("completep", 64, 32, {-8: 2.2, -7: 2.211, -6: 2.3}),
    *runs("standard", 64, 2, {-8: 2.4, -7: 2.3, -6: 2.5}),
    *runs("standard", 64, 32, {-8: 2.5, -7: math.inf, -6: math.inf}),
]


def test_transfer_is_measured_from_the_base_shape():
    found = {(t.shape.recipe, t.shape.depth): t for t in transfer(SWEEP, Base(width=64, depth=2))}
    assert found["completep", 2].moved == 0 and found["completep", 2].cost == 0
    assert found["completep", 32].best_lr == 2.0**-8 and found["completep", 32].moved == -1
    assert found["completep", 32].cost == pytest.approx(2.211 / 2.2 - 1)
    assert found["standard", 32].cost == math.inf  # the base model's rate diverges there
    lines = summary(transfer(SWEEP, Base()))
    assert lines[2] == "completep: the optimum moves by up to 1 steps of 2x and costs up to 0.50%"


@pytest.mark.parametrize("step", [1, -1])
def test_a_shape_that_diverged_at_every_rate_or_lacks_the_bases_is_not_free(step):
    diverged = runs("mup", 64, 32, dict.fromkeys((-8, -7, -6), math.inf))
    lacking = runs("mup", 64, 8, {-6: 2.6})
    for others in (diverged, lacking):
        swept = [*runs("mup", 64, 2, {-8: 2.5, -7: 2.4, -6: 2.6}), *others]
        assert summary(transfer(swept[::step], Base()))[-1].endswith("costs up to nan%")


def test_seeds_are_averaged_before_the_minimum_is_taken():
    noisy = [Run("mup", 64, 2, 1, 0.1, 1.0), Run("mup", 64, 2, 2, 0.1, 3.0)]
    noisy += [Run("mup", 64, 2, seed, 0.2, 1.9) for seed in (1, 2)]
    assert transfer(noisy, Base())[0].best_lr == 0.2


def test_without_the_base_shape_the_smallest_is_the_origin():
    swept = [*runs("mup", 256, 4, {-8: 1.0, -7: 2.0}), *runs("mup", 64, 4, {-8: 2.0, -7: 1.0})]
    moved = {t.shape: t.moved for t in transfer(swept, Base(width=64, depth=2))}
    assert moved == {Shape("mup", 256, 4): -1, Shape("mup", 64, 4): 0}


def test_schedule():
    """20 steps: warmup over 2, then to zero over 18."""
    assert [schedule(step, 20) for step in (1, 2, 11, 20)] == [0.5, 1.0, 0.5, 0.0]
    assert schedule(1, 5) == 1.0


def test_records_read_back_equal(tmp_path):
    odd = [Run("mup", 64, 2, 1, 0.1 + 0.2, math.inf), *SWEEP]
    write_records(Run, odd, tmp_path / "runs.csv")
    assert read_records(Run, tmp_path / "runs.csv") == odd
    for text in ("recipe,width\nmup,64", "recipe,nothing\nmup,64", "recipe,width,depth,seed,lr,loss\nmup,x,2,1,1,1"):
        (tmp_path / "runs.csv").write_text(text)
        with pytest.raises(DataError, match="runs.csv does not hold the records of a sweep"):
            read_records(Run, tmp_path / "runs.csv")


def _sweep(out, exponents, *more):
    arguments = ["lr-transfer", "--shapes", "32x1,32x2", f"--exponents={exponents}", "--recipes", "completep"]
    arguments += ["--seeds", "1", *more]
    small = ["--steps", "20", "--batch", "4", "--length", "16", "--base-width", "32", "--base-depth", "1", "--out", out]
    return main(arguments + small + ["--data", __file__])


def test_a_second_start_goes_on(workers, tmp_path):
    path = tmp_path / "lr_transfer.csv"
    assert workers(1).run(_sweep, str(tmp_path), "-7,-6") == [0]
    first = read_records(Run, path)
    assert len(first) == 4 and all(2 < run.loss < 6 for run in first)
    assert len({run.loss for run in first}) == 4
    # runs that are there are not trained again
    write_records(Run, [*first[:3], Run(**{**vars(first[3]), "loss": 9.0})], path)
    assert workers(1).run(_sweep, str(tmp_path), "-7,-6,-5") == [0]
    second = read_records(Run, path)
    assert len(second) == 6 and set(first[:3]) < set(second)
    assert [run.loss for run in second if vars(run) == {**vars(first[3]), "loss": run.loss}] == [9.0]
    assert (tmp_path / "lr_transfer.png").stat().st_size > 10_000
    # a narrower grid later does not lose what is there
    assert workers(1).run(_sweep, str(tmp_path), "-5") == [0]
    assert read_records(Run, path) == second
    # another recipe's runs of the base model are there already, and are kept as its own
    shared = ("--recipes", "completep,standard", "--shapes", "32x1")
    assert workers(1).run(_sweep, str(tmp_path), "-5", *shared) == [0]
    [added] = set(read_records(Run, path)) - set(second)
    assert vars(added) in [{**vars(run), "recipe": "standard"} for run in second]


def test_settings_for_every_run(workers, tmp_path):
    """A multiplier of one changes nothing, half a role's rate does; a folder of other settings is not gone on with."""
    one, other = '{"output_multiplier": 1}', '{"lr_multipliers": {"unembedding": 0.5}}'
    for name, section in (("plain", "{}"), ("same", one), ("other", other)):
        assert workers(1).run(_sweep, str(tmp_path / name), "-6", "--section", section) == [0]
    losses = {
        n: [r.loss for r in read_records(Run, tmp_path / n / "lr_transfer.csv")] for n in ("plain", "same", "other")
    }
    assert losses["plain"] == losses["same"] and all(
        a != b for a, b in zip(losses["plain"], losses["other"], strict=True)
    )
    plain, kept = (json.loads((tmp_path / n / "lr_transfer.json").read_text()) for n in ("plain", "other"))
    assert kept == {**plain, "section": json.loads(other)} and "section" not in plain
    assert workers(1).run(_sweep, str(tmp_path / "plain"), "-6", "--section", other) == [2]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("[1]", "--section: [1] is not a JSON object, settings of completep"),
        ("{no}", "--section: {no} is not a JSON object, settings of completep"),
        ('{"alpha": 0.5}', "--section: alpha is the sweep's own; leave it out, or use its option"),
        ('{"output_multipliers": 2}', "completep.output_multipliers: unknown key (value 2)"),
        ('{"lr_multipliers": {"outputs": 2}}', "completep.lr_multipliers: 'outputs' is no role"),
        ('{"residual": "folded"}', '--section: residual is "folded"'),
    ],
)
def test_a_section_that_cannot_be(tmp_path, capsys, section, said):
    assert _sweep(str(tmp_path / "out"), "-6", "--section", section) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


MIXTURE = Mixture.of("3:2")
SHARED = {  # base 32 x 1: what the recipe does not scale, a plainer one trains just as well
    Shape("mup", 32, 1): "standard",
    Shape("completep", 32, 1): "standard",
    Shape("mup", 32, 2): "standard",
    Shape("completep", 64, 1): "mup",
    Shape("completep", 32, 2): "completep",
    Shape("completed_p", 32, 1): "completed_p",
    Shape("completep", 32, 1, experts="4:2:4"): "mup",  # other experts are a change of width's kind
    Shape("standard", 64, 2, experts="4:2:4"): "standard",
}


def _trained(*shapes):
    builder = Megatron(MIXTURE, moe="mue") if shapes[0].experts else Megatron()
    builder.start()
    given = {"seed": 1, "steps": 3, "lr": 0.01}
    return [train(builder, shape, Base(width=32, depth=1, length=16, batch=2), **given).loss for shape in shapes]


def test_runs_that_two_recipes_share_are_the_same_bit_for_bit(workers):
    for shape, plain in SHARED.items():
        same = shape.same_as(Base(width=32, depth=1))
        assert same == Shape(plain, shape.width, shape.depth, experts=shape.experts)
        if same != shape:
            [(found, expected)] = workers(1).run(_trained, shape, same)
            assert found == expected


def test_with_settings_of_its_own_a_run_is_shared_with_no_plainer_recipe():
    """Which may refuse them, or not react."""
    base = Base(width=32, depth=1, section={"embedding_lr_exponent": 0.5})
    assert all(shape.same_as(base) is shape for shape in SHARED)


def _of_experts(out):
    arguments = ["lr-transfer", "--shapes", "32x1,32x1:4:2:4,32x1:3:2:2", "--experts", "3:2", "--moe", "mue"]
    arguments += ["--exponents=-7", "--recipes", "completep,standard", "--seeds", "1", "--steps", "3", "--batch", "2"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([*arguments, "--length", "16", "--base-width", "32", "--base-depth", "1", "--out", out])
    return code, printed.getvalue()


def test_shapes_with_experts_of_their_own(workers, tmp_path):
    [(code, printed)] = workers(1).run(_of_experts, str(tmp_path))
    runs = read_records(Run, tmp_path / "lr_transfer.csv")
    # 4 / ACTIVE is the ratio that is not given, so that 3:2:2 is the base's
    assert code == 0 and sorted(run.experts for run in runs) == ["", "", "4:2:4", "4:2:4"]
    losses = {(run.recipe, run.experts): run.loss for run in runs}
    assert losses["completep", ""] == losses["standard", ""]
    assert len(set(losses.values())) == 3
    assert "completep width 32 depth 1 experts 4:2:4: best loss" in printed


def _shared(out, workers):
    arguments = ["lr-transfer", "--shapes", "32x1,32x2", "--exponents=-7", "--recipes", "completep,mup", "--seeds", "1"]
    small = ["--steps", "3", "--batch", "2", "--length", "16", "--base-width", "32", "--base-depth", "1", "--out", out]
    return main([*arguments, *small, "--data", __file__, "--workers", str(workers)])


@pytest.mark.slow  # the processes are fresh ones
def test_two_workers_train_what_one_does(workers, tmp_path):
    found = []
    for number in (1, 2):
        assert workers(1).run(_shared, str(tmp_path / str(number)), number) == [0]
        found.append(read_records(Run, tmp_path / str(number) / "lr_transfer.csv"))
    assert found[0] == found[1]
    losses = {(run.recipe, run.depth): run.loss for run in found[0]}
    assert losses["completep", 1] == losses["mup", 1]  # the base model, trained once
    assert losses["completep", 2] != losses["mup", 2]


def _refused(out):
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        return main(["lr-transfer", "--out", out, "--data", __file__]), printed.getvalue()


def test_another_sweeps_folder_is_refused(workers, tmp_path):
    (tmp_path / "lr_transfer.json").write_text("{}")
    [(code, message)] = workers(1).run(_refused, str(tmp_path))  # it starts megatron-core: not in pytest's own process
    assert code == 2 and "other settings" in message and message.count("\n") == 1
