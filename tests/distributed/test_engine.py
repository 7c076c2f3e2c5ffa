"""The seam: plain DeepSpeed when all is off, a plain torch model when nothing is Megatron, resume, attach, detach."""

import itertools
import json

import deepspeed
import pytest
import torch

import ds_plugin
from ds_plugin.core.errors import ConfigError, StateError
from tests.distributed import plain
from tests.harness import slow

BOTH = {"sequence_length_warmup": plain.WARMUP, "weight_averaging": plain.AVERAGING}
OFF = {name: {**section, "enabled": False} for name, section in BOTH.items()}


def _losses(zero, precision, sections, steps, initialize=None):
    engine = plain.make(plain.deepspeed_config(zero, precision, **sections), initialize=initialize)
    return plain.train(engine, steps)


def _plain_deepspeed(zero, precision, steps):
    return plain.train(plain.make(plain.deepspeed_config(zero, precision), initialize=deepspeed.initialize), steps)


@pytest.mark.parametrize(("zero", "precision"), [slow(0, "fp32"), (1, "fp32"), slow(2, "bf16"), (3, "fp32")])
def test_switched_off_it_is_plain_deepspeed(workers, zero, precision):
    pool = workers(2)
    expected = pool.run(_plain_deepspeed, zero, precision, 6)
    assert pool.run(_losses, zero, precision, {}, 6) == expected
    assert pool.run(_losses, zero, precision, OFF, 6) == expected
    assert pool.run(_losses, zero, precision, BOTH, 6) != expected  # and switched on it is not


def _shortened_run(accumulation):
    engine = plain.make(plain.deepspeed_config(1, accumulation=accumulation, **BOTH))
    plugin = ds_plugin.get_plugin(engine)
    lengths, seen, evaluated = [], [], []
    engine.module.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    engine.train()
    for _ in range(9):
        lengths.append(plugin.length)
        plain.train(engine, 1)
        trained = len(seen)
        plain.evaluate(engine)
        evaluated += seen[trained:]
        del seen[trained:]
    ledger = plugin.ledger
    return {
        "lengths": lengths,
        "seen": seen,
        "evaluation": evaluated,
        "read": ledger.read,
        "trained": ledger.trained,
    }


# 4 + 12 * t / 8, floored to 4: t = 1..9
LENGTHS = [4, 4, 8, 8, 8, 12, 12, 16, 16]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_rank_trains_on_the_scheduled_prefix(workers, accumulation):
    for found in workers(2).run(_shortened_run, accumulation):
        assert found["lengths"] == LENGTHS
        # the preflight comes first, at full length, accumulating as a step does, and is not booked
        full = [plain.LENGTH] * min(accumulation, 2)
        assert found["seen"] == full + [length for length in LENGTHS for _ in range(accumulation)]
        assert found["evaluation"] == [plain.LENGTH] * 9
        samples = 2 * plain.MICRO * accumulation  # ranks, micro-batch, accumulation
        assert found["read"] == 9 * samples * plain.LENGTH
        assert found["trained"] == sum(LENGTHS) * samples
        assert found["read"] - found["trained"] == sum(plain.LENGTH - length for length in LENGTHS) * samples


CONSTANT = {"sequence_length_warmup": {**plain.WARMUP, "tokens_per_step": "constant", "variance": True}}
FOLDED = [4, 4, 8, 8, 8, 8, 8, 16, 16]  # of the lengths below, those that divide 16


def _folded(zero, folder, through_batches):
    """Losses of each step by the section, then those after a resume, and by hand; the ledger."""

    def batch(number):
        return plain.micro_batch(number)

    def trained(engine, steps):
        read = lambda first: ({"input_ids": t, "labels": y} for t, y in map(batch, itertools.count(first)))  # noqa: E731
        batches, losses = ds_plugin.get_plugin(engine).batches(read) if through_batches else None, []
        engine.train()
        for _ in range(steps):
            number = engine.global_steps
            loss = engine(**next(batches)) if batches is not None else engine(*batch(number))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    engine = plain.make(plain.deepspeed_config(zero, **CONSTANT))
    losses = trained(engine, 4)
    engine.save_checkpoint(folder)
    losses += trained(engine, 5)
    ledger = ds_plugin.get_plugin(engine).ledger
    engine = plain.make(plain.deepspeed_config(zero, **CONSTANT))
    engine.load_checkpoint(folder)
    resumed = trained(engine, 5)

    engine, by_hand = plain.make(plain.deepspeed_config(zero), initialize=deepspeed.initialize), []
    engine.train()
    for step, length in enumerate(FOLDED):
        tokens, labels = (torch.cat(t.split(length, dim=1)) for t in batch(step))
        loss = engine(tokens, labels)
        engine.backward(loss)
        engine.step()
        by_hand.append(loss.item())
    return losses, resumed, by_hand, (ledger.read, ledger.trained)


@pytest.mark.parametrize(("zero", "through_batches"), [(1, False), (3, True), slow(3, False), slow(0, True)])
def test_a_step_keeps_its_tokens_in_more_samples(workers, tmp_path, zero, through_batches):
    for losses, resumed, by_hand, counted in workers(2).run(_folded, zero, str(tmp_path), through_batches):
        assert losses == by_hand and resumed == losses[4:]
        assert counted == (9 * 2 * plain.MICRO * plain.LENGTH,) * 2


def _share_of_the_run():
    section = {**plain.WARMUP, "duration": {"share": 0.25}}
    engine = plain.make(plain.deepspeed_config(1, sequence_length_warmup=section))
    by_tokens = plain.make(
        plain.deepspeed_config(1, sequence_length_warmup={**section, "learning_rate": {"by": "tokens"}})
    )
    config = {**plain.deepspeed_config(1, sequence_length_warmup=section)}
    del config["scheduler"]
    with pytest.raises(ConfigError) as caught:
        plain.make(config)
    durations = [ds_plugin.get_plugin(each).warmup.config.duration for each in (engine, by_tokens)]
    return durations[0].steps, durations[1].tokens, by_tokens.train_batch_size(), str(caught.value)


def test_a_share_is_of_the_schedulers_steps(workers):
    """Or of the tokens of so many steps at full length, where the schedule goes by tokens."""
    steps, tokens, batch, refused = workers(1).run(_share_of_the_run)[0]
    assert tokens == 10 * batch * plain.LENGTH
    assert steps == 10 and "duration.share: 0.25 of a run whose length is not known here" in refused


def _truncated_by_hand(zero):
    """The same run without the plugin, shortened by the caller."""
    engine = plain.make(plain.deepspeed_config(zero), initialize=deepspeed.initialize)
    engine.train()
    losses = []
    for length in LENGTHS:
        tokens, labels = plain.micro_batch(engine.global_steps)
        loss = engine(tokens[:, :length], labels[:, :length])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("zero", [0, 3])
def test_warmup_equals_truncation_by_hand(workers, zero):
    pool = workers(2)
    assert pool.run(_losses, zero, "fp32", BOTH, 9) == pool.run(_truncated_by_hand, zero)


def _train_save(zero, folder, first, rest):
    engine = plain.make(plain.deepspeed_config(zero, **BOTH))
    losses = plain.train(engine, first)
    engine.save_checkpoint(folder)
    ds_plugin.get_plugin(engine).sealer.wait()
    return losses, _record(engine, rest)


def _resume(zero, folder, rest):
    engine = plain.make(plain.deepspeed_config(zero, **BOTH))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    return _record(engine, rest)


def _record(engine, steps):
    """Losses, averaged losses, lengths and tokens of the next steps."""
    plugin, rows = ds_plugin.get_plugin(engine), []

    def after(engine):
        with plugin.averaged_weights():
            averaged = plain.evaluate(engine)
        rows.append((averaged, plugin.length, plugin.ledger.trained, plugin.ledger.read, engine.get_lr()[0]))

    return plain.train(engine, steps, after), rows, list(plugin.averager.steps)


@pytest.mark.parametrize(("zero", "ranks"), [slow(0, 2), slow(1, 2), (2, 2), slow(3, 2), (3, 3)])
def test_interrupted_and_resumed_equals_uninterrupted(workers, tmp_path, zero, ranks):
    pool = workers(ranks)
    uninterrupted = pool.run(_train_save, zero, str(tmp_path), 5, 6)
    resumed = pool.run(_resume, zero, str(tmp_path), 6)
    assert [rest for _, rest in uninterrupted] == resumed
    assert (tmp_path / "latest").read_text() == "global_step5"
    manifest = json.loads((tmp_path / "global_step5" / "ds_plugin.json").read_text())
    assert manifest["state"]["weight_averaging"]["steps"] == [2, 4]
    assert manifest["world_size"] == ranks and manifest["zero_stage"] == zero


def _resume_other(folder, config, width=13):
    plain.make(config, width=width).load_checkpoint(folder)


CHANGED = [
    # another model, another number of ranks, another stage, a damaged or missing file
    ("model", ["positions", "[16, 13]", "[16, 15]"]),
    ("ranks", ["world_size", "2", "3", "to-universal"]),
    ("stage", ["zero_stage", "1", "3"]),
    ("missing", ["weight_averaging_rank_00001.safetensors", "missing", "no-verify"]),
    ("damaged", ["weight_averaging_rank_00001.safetensors", "bytes", "no-verify"]),
    ("manifest", ["ds_plugin.json", "damaged"]),
    ("mixed", ["ds_plugin.json", "no-verify"]),
    ("stateless", ["ds_plugin.json", "no state of sequence_length_warmup"]),
    ("absent", ["no checkpoint", "global_step5"]),
]


@pytest.mark.parametrize(("change", "parts"), CHANGED)
def test_a_checkpoint_that_does_not_fit_is_refused_on_every_rank(workers, tmp_path, change, parts):
    workers(2).run(_train_save, 1, str(tmp_path), 5, 0)
    tag = tmp_path / "global_step5"
    shard = tag / "weight_averaging_rank_00001.safetensors"
    config, width, ranks = plain.deepspeed_config(1, **BOTH), 13, 2
    if change == "model":
        width = 15
    elif change == "ranks":
        ranks = 3
    elif change == "stage":
        config = plain.deepspeed_config(3, **BOTH)
    elif change == "missing":
        shard.unlink()
    elif change == "damaged":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif change == "mixed":
        manifest = json.loads((tag / "ds_plugin.json").read_text())
        (tag / "ds_plugin.json").write_text(json.dumps({**manifest, "global_steps": 4}))
    elif change == "stateless":
        manifest = json.loads((tag / "ds_plugin.json").read_text())
        del manifest["state"]["sequence_length_warmup"]
        (tag / "ds_plugin.json").write_text(json.dumps(manifest))
    elif change == "absent":
        tag.rename(tmp_path / "elsewhere")
    else:
        (tag / "ds_plugin.json").write_text('{"format": 2}')
    for error in workers(ranks).run(_resume_other, str(tmp_path), config, width, expect="errors", timeout=60):
        assert error is not None and error.type.endswith("CheckpointError"), error
        assert all(part in error.message for part in parts), error.message


def _resume_without_our_state(folder):
    plain_engine = plain.make(plain.deepspeed_config(1), initialize=deepspeed.initialize)
    plain.train(plain_engine, 5)
    plain_engine.save_checkpoint(folder)
    engine = plain.make(plain.deepspeed_config(1, **BOTH))
    engine.load_checkpoint(folder)
    plugin = ds_plugin.get_plugin(engine)
    return engine.global_steps, plugin.length, plugin.has_average, plugin.ledger.read


def test_a_plain_checkpoint_can_be_taken_over(workers, tmp_path):
    for found in workers(2).run(_resume_without_our_state, str(tmp_path)):
        # the steps before count as full-length ones
        assert found == (5, LENGTHS[5], False, 5 * 2 * plain.MICRO * plain.LENGTH)


def _without_optimizer_states(folder):
    other = plain.make(plain.deepspeed_config(1, **BOTH))
    other.load_checkpoint(folder, load_optimizer_states=False)
    plugin = ds_plugin.get_plugin(other)
    return other.global_steps, plugin.length, plugin.averager.steps, plugin.ledger.read


def test_loading_without_optimizer_states_goes_on_with_the_run(workers, tmp_path):
    workers(2).run(_train_save, 1, str(tmp_path), 5, 0)
    for found in workers(2).run(_without_optimizer_states, str(tmp_path)):
        assert found == (5, LENGTHS[5], [2, 4], 5 * 2 * plain.MICRO * plain.LENGTH)


def _weights_elsewhere(folder, zero):
    plain.make(plain.deepspeed_config(zero, **BOTH)).load_checkpoint(folder, load_module_only=True)


def test_weights_alone_load_in_another_layout(workers, tmp_path):
    workers(2).run(_train_save, 1, str(tmp_path), 5, 0)
    assert workers(1).run(_weights_elsewhere, str(tmp_path), 0, expect="errors") == [None]


def _yes():
    return True


def _attach_pretending(attribute, value, sections):
    """An engine under a setting that cannot be had on two CPU ranks."""
    engine = plain.make(plain.deepspeed_config(1), initialize=deepspeed.initialize)
    setattr(engine, attribute, value)
    ds_plugin.attach(engine, sections)


@pytest.mark.parametrize(
    ("attribute", "value", "section", "part"),
    [
        ("zero_nvme_offload_optimizer", _yes, "weight_averaging", "'nvme'"),
        ("zenflow", True, "weight_averaging", "zenflow"),
        ("super_offload", _yes, "weight_averaging", "super_offload"),
    ],
)
def test_engines_that_cannot_be_served_are_refused(workers, attribute, value, section, part):
    sections = {section: BOTH[section]}
    for error in workers(2).run(_attach_pretending, attribute, value, sections, expect="errors"):
        assert error.type == "ConfigError" and part in error.message, error


def _weights_only(folder):
    engine = plain.make(plain.deepspeed_config(1, **BOTH))
    plain.train(engine, 5)
    engine.save_checkpoint(folder)
    other = plain.make(plain.deepspeed_config(1, **BOTH))
    other.load_checkpoint(folder, load_module_only=True)
    plugin = ds_plugin.get_plugin(other)
    return plugin.length, plugin.has_average, plugin.ledger.read


def test_loading_weights_only_starts_another_run(workers, tmp_path):
    for found in workers(2).run(_weights_only, str(tmp_path)):
        assert found == (LENGTHS[0], False, 0)


def _attach_and_detach():
    engine = plain.make(plain.deepspeed_config(1), initialize=deepspeed.initialize)
    with pytest.raises(StateError, match="no plugin"):
        ds_plugin.get_plugin(engine)
    plugin = ds_plugin.attach(engine, {**plain.deepspeed_config(1), **BOTH})
    with pytest.raises(StateError, match="already has a plugin"):
        ds_plugin.attach(engine, BOTH)
    with pytest.raises(ConfigError, match=r"completep.*initialize"):
        ds_plugin.attach(engine, {"completep": {"enabled": True, "base_width": 8, "base_depth": 2}})
    first = plain.train(engine, 2)
    steps = list(plugin.averager.steps)
    ds_plugin.detach(engine)
    shadowed = [name for name in ("step", "save_checkpoint", "load_checkpoint") if name in engine.__dict__]
    second = plain.train(engine, 2)
    return first, second, steps, shadowed, len(engine._forward_pre_hooks)


def test_attach_and_detach(workers):
    reference = [_shortened for _shortened in workers(2).run(_losses, 1, "fp32", BOTH, 2)]
    for (first, second, steps, shadowed, hooks), expected in zip(
        workers(2).run(_attach_and_detach), reference, strict=True
    ):
        assert first == expected and steps == [2]
        assert shadowed == [] and hooks == 0
        assert len(second) == 2


def _bypassing_the_engine():
    engine = plain.make(plain.deepspeed_config(0, sequence_length_warmup=plain.WARMUP))
    engine.train()
    loss = engine.module(*plain.micro_batch(0))
    engine.backward(loss)
    engine.step()


def test_a_forward_that_bypasses_the_engine_is_noticed(workers):
    for error in workers(2).run(_bypassing_the_engine, expect="errors"):
        assert "engine.module" in error.message


class _Renamed(plain.TinyLM):
    def forward(self, characters, wanted):
        return super().forward(characters, wanted)


def _custom_shorten():
    def shorten(args, kwargs, length):
        tokens, labels = args
        return (tokens[:, :length], labels[:, :length]), kwargs, tokens.numel(), tokens[:, :length].numel()

    config = plain.deepspeed_config(0, sequence_length_warmup=plain.WARMUP)
    torch.manual_seed(7)
    engine = ds_plugin.initialize(model=_Renamed(), config=config, shorten=shorten)[0]
    by_hand = plain.train(engine, 4)
    torch.manual_seed(7)
    by_shape = plain.train(ds_plugin.initialize(model=_Renamed(), config=config)[0], 4)
    unknown = ds_plugin.initialize(model=_Renamed(), config=config)[0]
    with pytest.raises(ConfigError, match="characters.*shorten="):
        unknown(*(value.float() for value in plain.micro_batch(0)))
    return by_hand, by_shape, plain.train(plain.make(config), 4)


def test_a_users_own_shorten(workers):
    for by_hand, by_shape, by_name in workers(2).run(_custom_shorten):
        assert by_hand == by_shape == by_name


def _bad(changes, model_kwargs=None):
    config = {**plain.deepspeed_config(1), **changes}
    ds_plugin.initialize(model=plain.TinyLM(), config=config, **(model_kwargs or {}))


CURRICULUM = {"enabled": True, "data_sampling": {"enabled": True, "curriculum_learning": {"enabled": True}}}
COMPLETEP = {"enabled": True, "base_width": 8, "base_depth": 2}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"weight_averaging": {"enabled": True, "window": 0, "interval": 1}}, ["weight_averaging.window", "0"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning", "sequence_length_warmup"]),
        (
            {"sequence_length_warmup": plain.WARMUP, "data_efficiency": CURRICULUM},
            ["curriculum_learning", "both set the length"],
        ),
        ({"completep": COMPLETEP}, ["completep", "this is", "TinyLM", "supported are"]),
    ],
)
def test_bad_settings_end_every_rank_alike(workers, changes, parts):
    for error in workers(2).run(_bad, changes, expect="errors", timeout=30):
        assert error is not None and error.type.endswith("ConfigError"), error
        assert all(part in error.message for part in parts), error.message


def _pipeline(section):
    from deepspeed.pipe import PipelineModule

    model = PipelineModule([torch.nn.Linear(4, 4)], num_stages=1, loss_fn=torch.nn.functional.mse_loss)
    config = {**plain.deepspeed_config(), **section}
    ds_plugin.initialize(model=model, config=config)


def test_completep_in_other_pipelines_is_refused(workers):
    section = {"completep": {"enabled": True, "base_width": 4, "base_depth": 2}}
    for error in workers(2).run(_pipeline, section, expect="errors"):
        assert error.type == "ConfigError" and "completep: DeepSpeed's pipeline engine" in error.message, error


def _two_configs():
    ds_plugin.initialize(model=plain.TinyLM(), config=plain.deepspeed_config(), config_params=plain.deepspeed_config())


def test_one_config_only(workers):
    assert "2 were given" in workers(1).run(_two_configs, expect="errors")[0].message


def _through_args(path):
    import argparse

    args = argparse.Namespace(deepspeed_config=path, local_rank=-1)
    torch.manual_seed(7)
    engine = ds_plugin.initialize(args=args, model=plain.TinyLM())[0]
    return plain.train(engine, 3), args.local_rank, args.deepspeed_config == path


def test_config_through_the_launchers_arguments(workers, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain.deepspeed_config(1, **BOTH)))
    expected = workers(2).run(_losses, 1, "fp32", BOTH, 3)
    found = workers(2).run(_through_args, str(path))
    assert [losses for losses, _, _ in found] == expected
    assert [(rank, same) for _, rank, same in found] == [(0, True), (1, True)]
