"""Weight averaging in DeepSpeed's pipeline engine: every stage averages its own masters, equal to the gathered mean."""

import deepspeed
import pytest
import torch

import ds_plugin
from ds_plugin.core.errors import StateError
from ds_plugin.deepspeed_engine.readings import step_was_finite
from tests.distributed import pipelined, plain
from tests.distributed.pipelined import LENGTH, Layout
from tests.harness import slow
from tests.reference import averaging as reference

AVERAGING = {"weight_averaging": {"enabled": True, "interval": 2, "window": 2}}
WARMUP = {
    "sequence_length_warmup": {
        "enabled": True,
        "start_length": 8,
        "end_length": LENGTH,
        "duration": {"steps": 4},
        "multiple_of": 4,
    }
}
LAYOUTS = [
    (Layout(pipe=2), 0, "fp32", {}),
    (Layout(pipe=2, data=2), 1, "fp32", WARMUP),
    (Layout(pipe=2), 0, "bf16", {}),  # DeepSpeed's BF16_Optimizer
    slow(Layout(pipe=2, data=2, tensor=2), 1, "bf16", {}),
]


def masters(engine):
    """This stage's fp32 masters, whole (but for tensor parallelism), by name."""
    return reference.full_masters(engine)


def different(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def averaged(layout, zero, precision, sections, late=False):
    if late:
        plain.copy_late()
    engine = pipelined.make(layout, ds_plugin.initialize, zero, precision, {**AVERAGING, **sections})
    plugin, snapshots = ds_plugin.get_plugin(engine), []

    def after_step(engine):
        if engine.global_steps % 2 == 0:
            snapshots.append(masters(engine))

    pipelined.train(engine, 7, after_step)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    expected = {name: value.to(dtype) for name, value in reference.mean(snapshots[-2:]).items()}
    before, parameters = masters(engine), reference.full_parameters(engine)
    raw = pipelined.evaluate(engine)
    with plugin.averaged_weights():
        wrong = different(reference.full_parameters(engine), expected)
        mean = pipelined.evaluate(engine)
        with pytest.raises(StateError, match=r"engine.train_batch\(\) while the averaged weights are swapped in"):
            engine.train_batch(pipelined.batches(engine))
    wrong += different(reference.full_parameters(engine), parameters) + different(masters(engine), before)
    return wrong, list(plugin.averager.steps), (raw, mean, pipelined.evaluate(engine)), pipelined.train(engine, 2)


def undisturbed(layout, zero, precision, sections):
    engine = pipelined.make(layout, ds_plugin.initialize, zero, precision, sections)
    pipelined.train(engine, 7)
    raw = pipelined.evaluate(engine)
    return raw, pipelined.train(engine, 2)


@pytest.mark.parametrize(("layout", "zero", "precision", "sections"), LAYOUTS)
def test_every_stage_equals_the_mean_of_gathered_snapshots(workers, layout, zero, precision, sections):
    without = workers(layout.ranks).run(undisturbed, layout, zero, precision, sections)[0]
    for wrong, steps, (raw, mean, again), after in workers(layout.ranks).run(
        averaged, layout, zero, precision, sections
    ):
        assert wrong == [] and steps == [4, 6]
        assert raw == again != mean
        assert (raw, after) == without


@pytest.mark.parametrize("zero", [slow(0), 1])
def test_a_batch_waits_for_the_copy_of_the_last_snapshot(workers, zero):
    for wrong, steps, *_ in workers(2).run(averaged, Layout(pipe=2), zero, "fp32", {}, late=True):
        assert wrong == [] and steps == [4, 6]


def one_stage_not_finite(zero):
    engine = pipelined.make(Layout(pipe=2), deepspeed.initialize, zero)
    pipelined.train(engine, 1)
    verdicts = []
    for poison in (False, True):
        if poison and engine.is_last_stage():
            next(engine.module.parameters()).data.view(-1)[0] = float("nan")
        verdicts.append(step_was_finite(engine, [p.data for p in engine.module.parameters()]))
    return verdicts


def test_all_stages_hear_that_one_is_not_finite(workers):
    assert workers(2).run(one_stage_not_finite, 0) == [[True, False]] * 2


def resumed(layout, zero, folder):
    def make():
        return pipelined.make(layout, ds_plugin.initialize, zero, sections={**AVERAGING, **WARMUP})

    whole = make()
    pipelined.train(whole, 5)
    whole.save_checkpoint(folder)
    cut = make()
    cut.load_checkpoint(folder)
    found = []
    for engine in (whole, cut):
        losses = pipelined.train(engine, 4)
        plugin = ds_plugin.get_plugin(engine)
        with plugin.averaged_weights():
            found.append(
                (losses, list(plugin.averager.steps), reference.full_parameters(engine), pipelined.evaluate(engine))
            )
    (losses, steps, weights, loss), (*again, other_weights, other_loss) = found
    return [losses, steps] == again and loss == other_loss, different(weights, other_weights)


@pytest.mark.parametrize("layout", [Layout(pipe=2), slow(Layout(pipe=2, data=2))])
def test_a_resumed_pipeline_averages_on(workers, tmp_path, layout):
    assert workers(layout.ranks).run(resumed, layout, 1, str(tmp_path)) == [(True, [])] * layout.ranks
