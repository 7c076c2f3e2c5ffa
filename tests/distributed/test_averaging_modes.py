"""Modes, skipped snapshots, memory, resume and restart on real engines: bit for bit against whole, gathered weights."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.core.errors import CheckpointError, ConfigError, PluginError, StateError
from ds_plugin.deepspeed_engine import readings
from ds_plugin.weight_averaging import restart, window
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots import memory
from tests.distributed import plain
from tests.harness import slow
from tests.reference import averaging as reference

BLOCK = {"enabled": True, "mode": "block", "window": 3, "interval": 1}
EMA = {"enabled": True, "mode": "ema", "horizons": [2, 5], "interval": 1}
WEIGHTS = [0.5, 1.0, 3.25]


def _different(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def _low(tensors, precision):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return {name: value.to(dtype) for name, value in tensors.items()}


LAYOUTS = [(3, 0, "fp32"), (3, 1, "fp32"), (3, 3, "fp32"), (2, 0, "bf16"), (2, 1, "bf16"), (2, 3, "bf16")]


def _modes(zero, precision):
    """Every mode from the same snapshots of one run of 8 steps."""
    engine = plain.make(plain.deepspeed_config(zero, precision, weight_averaging=BLOCK))
    plugin = ds_plugin.get_plugin(engine)
    sections = {
        "wma": {"window": 3, "weights": "wma"},
        "minus-sqrt": {"window": 3, "weights": "minus-sqrt"},
        "list": {"window": 3, "weights": WEIGHTS},
        "ema": {"mode": "ema", "horizons": [2, 5]},
    }
    others = {
        name: WeightAverager(WeightAveragingConfig.model_validate({"interval": 1, **section}), plugin.averager.shards)
        for name, section in sections.items()
    }
    held = []

    def after_step(engine):
        held.append(reference.full_masters(engine))
        for other in others.values():
            other.snapshot(engine.global_steps, finite=True)

    plain.train(engine, 8, after_step)
    expected = {
        ("block", None): reference.last_block(held, 3),  # steps 4, 5, 6
        ("wma", None): reference.weighted_mean(held[-3:], [1, 2, 3]),
        ("minus-sqrt", None): reference.weighted_mean(held[-3:], window.read_weights("minus-sqrt", 3)),
        ("list", None): reference.weighted_mean(held[-3:], WEIGHTS),
        ("ema", None): reference.ema(held, 2),
        ("ema", 5): reference.ema(held, 5),
    }
    before, wrong = reference.full_masters(engine), {}
    for (name, horizon), average in expected.items():
        with plugin.averaged_weights() if name == "block" else others[name].averaged_weights(horizon):
            wrong[name, horizon] = _different(reference.full_parameters(engine), _low(average, precision))
    assert len({str(average["head.weight"]) for average in expected.values()}) == len(expected)
    return wrong, _different(reference.full_masters(engine), before), plugin.averager.steps


@pytest.mark.parametrize(
    ("ranks", "zero", "precision"), [slow(*of) if of in [(3, 0, "fp32"), (2, 1, "bf16")] else of for of in LAYOUTS]
)
def test_every_mode_equals_gathered_snapshots(workers, ranks, zero, precision):
    for wrong, after, steps in workers(ranks).run(_modes, zero, precision):
        assert not any(wrong.values()), wrong
        assert len(wrong) == 6 and after == [] and steps == [4, 5, 6]


def _poisoned(zero, precision, section):
    """After two good steps, one rank's loss is NaN, and DeepSpeed applies the step."""
    config = plain.deepspeed_config(zero, precision, weight_averaging=section)
    if precision == "bf16":
        config["bf16"]["check_grad_overflow"] = False
    engine = plain.make(config)
    plugin = ds_plugin.get_plugin(engine)
    plain.train(engine, 2)
    with plugin.averaged_weights():
        expected = reference.full_parameters(engine)
    loss = engine(*plain.micro_batch(2))
    engine.backward(loss * (float("nan") if dist.get_rank() == 0 else 1.0))
    engine.step()
    applied = engine.was_step_applied()
    plain.train(engine, 2)
    finite = all(torch.isfinite(value).all() for value in reference.full_masters(engine).values())
    with plugin.averaged_weights():
        wrong = _different(reference.full_parameters(engine), expected)
    return applied, finite, plugin.averager.steps, wrong


@pytest.mark.parametrize(
    ("zero", "precision", "section"),
    [(0, "fp32", BLOCK), (1, "bf16", EMA), (2, "bf16", {**BLOCK, "mode": "sliding"}), slow(2, "bf16", BLOCK)],
)
def test_a_step_that_is_applied_but_not_finite_is_not_averaged(workers, zero, precision, section):
    for applied, finite, steps, wrong in workers(2).run(_poisoned, zero, precision, section):
        assert applied and not finite  # the case is there: DeepSpeed did not skip it
        assert steps == [1, 2] and wrong == []


def _refused_setups():
    messages = {}

    def attempt(name, **changes):
        try:
            config = plain.deepspeed_config(1, "bf16", weight_averaging=BLOCK)
            config["zero_optimization"].update(changes)
            config["gradient_clipping"] = 0.0
            plain.make(config)
            messages[name] = None
        except ConfigError as error:
            messages[name] = str(error)

    attempt("no norm", compute_grad_norm=False)
    original = memory.psutil.virtual_memory
    available = 10**12 if dist.get_rank() == 0 else 20_000
    memory.psutil.virtual_memory = lambda: SimpleNamespace(available=available)
    try:
        attempt("memory")
    finally:
        memory.psutil.virtual_memory = original
    attempt("enough")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.initialize", lambda **arguments: pytest.fail("DeepSpeed was asked to build"))
        attempt("nvme", offload_optimizer={"device": "nvme", "nvme_path": "/tmp"})
    return messages


def test_too_little_memory_ends_all_ranks_alike(workers):
    """Two ranks of this machine with 3 copies of their half of the weights; one of them sees 20 kB available."""
    first, second = workers(2).run(_refused_setups)
    assert first == second and first["enough"] is None
    assert "compute_grad_norm" in first["no norm"]
    assert "offload_optimizer.device is 'nvme'" in first["nvme"]
    assert "2 rank(s)" in first["memory"] and "0.0 MB are available" in first["memory"]


def _resumed(folder, section, other):
    """Losses of averages with and without a save and resume after step 4, and what another mode says."""

    def averaged(engine, out):
        with ds_plugin.get_plugin(engine).averaged_weights():
            out.append(plain.evaluate(engine))

    config = plain.deepspeed_config(1, "bf16", weight_averaging=section)
    engine, whole, again = plain.make(config), [], []
    plain.train(engine, 4)
    engine.save_checkpoint(folder)
    plain.train(engine, 5, lambda e: averaged(e, whole))
    resumed = plain.make(config)
    resumed.load_checkpoint(folder)
    plain.train(resumed, 5, lambda e: averaged(e, again))
    changed = plain.make(plain.deepspeed_config(1, "bf16", weight_averaging=other))
    before = reference.full_masters(changed)
    try:
        changed.load_checkpoint(folder)
        message = None
    except CheckpointError as error:
        message = str(error)
    return whole, again, message, _different(reference.full_masters(changed), before)


@pytest.mark.parametrize(
    ("section", "other", "parts"),
    [(BLOCK, EMA, ["mode 'block'", "'ema'"]), (EMA, {**EMA, "horizons": [2, 7]}, ["horizons [2, 5]", "[2, 7]"])],
    ids=["block", "ema"],
)
def test_a_resume_continues_the_average(workers, tmp_path, section, other, parts):
    for whole, again, message, changed in workers(2).run(_resumed, str(tmp_path), section, other):
        assert whole == again and len(set(whole)) > 2
        assert all(part in message for part in parts), message
        assert changed == []  # refused before anything was loaded


def _constant(zero, precision, wrapper):
    config = plain.deepspeed_config(zero, precision, weight_averaging=plain.AVERAGING)
    del config["scheduler"]
    if wrapper == "BF16_Optimizer":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if wrapper == "offload":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _restarted(zero, precision, moments, wrapper=None):
    """Six steps, a restart, four steps; and a new engine on those weights."""
    engine = plain.make(_constant(zero, precision, wrapper))
    assert wrapper != "BF16_Optimizer" or type(engine.optimizer).__name__ == wrapper
    plugin, held = ds_plugin.get_plugin(engine), []
    plain.train(engine, 6, lambda e: held.append(reference.full_masters(e)))
    states = [v.clone() for s in engine.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    expected = reference.mean([held[1], held[3], held[5]])
    plugin.restart_from_average(moments)
    wrong = _different(reference.full_masters(engine), expected)
    wrong += _different(reference.full_parameters(engine), _low(expected, precision))
    now = [v for s in engine.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    kept = all(torch.equal(a, b) for a, b in zip(states, now, strict=True))
    zero_now = not any(v.any() for v in now)
    masters = [t.clone() for t in plugin.averager.shards.tensors()]
    has_average = plugin.has_average
    losses = plain.train(engine, 4)
    fresh = _started_from(expected, masters, zero, precision, wrapper)
    same = _different(reference.full_masters(engine), reference.full_masters(fresh[0]))
    return wrong, kept, zero_now, has_average, plugin.averager.steps, losses, fresh[1], same


def _started_from(weights, masters, zero, precision, wrapper):
    """A new engine with these weights, trained for four steps on the data from step 6 on."""

    def initialize(model, config):
        model.load_state_dict(weights)
        return ds_plugin.initialize(model=model, config=config)

    engine = plain.make(_constant(zero, precision, wrapper), initialize=initialize)
    if precision != "fp32":  # DeepSpeed makes the masters of the rounded weights
        shards = ds_plugin.get_plugin(engine).averager.shards
        window.copy_(shards.tensors(), masters)
        shards.refresh()
    if precision != "fp32" and zero == 0:  # this wrapper makes a step of zero gradients when it is built, and counts it
        restart.zero_(restart.to_reset(readings.optimizers(engine), engine.device, keep=False))
    engine.global_steps = 6
    return engine, plain.train(engine, 4)


@pytest.mark.parametrize(
    ("ranks", "zero", "precision", "wrapper"),
    [
        *(slow(*of, None) if of in [(3, 3, "fp32"), (2, 0, "bf16")] else (*of, None) for of in LAYOUTS),
        (2, 1, "bf16", "BF16_Optimizer"),
        (2, 3, "fp32", "offload"),
    ],
)
def test_training_after_a_restart_is_that_of_a_new_run_on_the_average(workers, ranks, zero, precision, wrapper):
    for wrong, kept, zero_now, average, steps, losses, fresh, same in workers(ranks).run(
        _restarted, zero, precision, "reset", wrapper
    ):
        assert wrong == [] and zero_now and not kept
        assert not average and steps == [8, 10]
        assert losses == fresh and same == []


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (3, "bf16")])
def test_a_restart_can_keep_the_moments(workers, zero, precision):
    for wrong, kept, zero_now, _, _, losses, fresh, _ in workers(2).run(_restarted, zero, precision, "keep"):
        assert wrong == [] and kept and not zero_now
        assert losses[0] == fresh[0] and losses != fresh  # the same weights, and other moments after the first step


def _refused_restarts():
    engine = plain.make(plain.deepspeed_config(1, accumulation=2, weight_averaging=plain.AVERAGING))
    plugin, messages = ds_plugin.get_plugin(engine), {}

    def attempt(name, **arguments):
        before = reference.full_masters(engine)
        try:
            plugin.restart_from_average(**arguments)
        except PluginError as error:
            messages[name] = str(error)
        assert _different(reference.full_masters(engine), before) == []

    attempt("none")
    plain.train(engine, 2)
    attempt("moments", moments="half")
    attempt("horizon", horizon=3)
    with plugin.averaged_weights():
        attempt("swapped")
    engine.backward(engine(*plain.micro_batch(0)))
    attempt("window")
    engine.step()
    ds_plugin.get_plugin(engine).averager = None
    with pytest.raises(StateError, match="not enabled"):
        plugin.restart_from_average()
    return messages


def test_restarts_that_make_no_sense_are_refused(workers):
    for messages in workers(2).run(_refused_restarts):
        assert "no snapshot to average yet" in messages["none"]
        assert "'half'" in messages["moments"]
        assert "no horizon 3" in messages["horizon"]
        assert "another read of the average while" in messages["swapped"]
        assert "accumulation step" in messages["window"]
