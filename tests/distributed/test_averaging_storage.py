"""Where snapshots lie, and differences in bf16, on real ranks: no setting changes a bit, no failure is one rank's."""

import gc
import os
import resource
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.core.errors import CheckpointError, ConfigError
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots import memory
from tests.distributed import plain
from tests.reference import averaging as reference
from tests.reference import deltas as reference_deltas

WEIGHTS = [0.5, 1.0, 3.25]
SECTIONS = {
    "sliding": {"window": 3},
    "block": {"mode": "block", "window": 3},
    "ema": {"mode": "ema", "horizons": [2, 5]},
    "deltas": {"window": 3, "deltas": "bf16"},
    "weighted deltas": {"window": 3, "deltas": "bf16", "weights": WEIGHTS},
}


def _different(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def _every_storage(zero, precision, folder):
    """Every mode in every storage, from one run of 7 steps; what differs from gathered weights."""
    kinds = {"default": {}, "memory": {"storage": "memory"}, "files": {"storage": "files", "storage_path": folder}}
    engine = plain.make(plain.deepspeed_config(zero, precision, weight_averaging={**plain.AVERAGING, "interval": 1}))
    shards = ds_plugin.get_plugin(engine).averager.shards
    averagers = {
        (name, kind): WeightAverager(WeightAveragingConfig.model_validate({"interval": 1, **section, **where}), shards)
        for name, section in SECTIONS.items()
        for kind, where in kinds.items()
        if kind != "default" or "deltas" in name  # the others' default is compared elsewhere
    }
    held = []

    def after_step(engine):
        held.append(reference.full_masters(engine))
        for averager in averagers.values():
            averager.snapshot(engine.global_steps, finite=True)

    plain.train(engine, 7, after_step)
    restored = reference_deltas.restored(held[-3:])
    expected = {
        "sliding": reference.mean(held[-3:]),
        "block": reference.last_block(held, 3),
        "ema": reference.ema(held, 2),
        "deltas": reference.mean(restored),
        "weighted deltas": reference.weighted_mean(restored, WEIGHTS),
    }
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    before, wrong = reference.full_masters(engine), {}
    for (name, kind), averager in averagers.items():
        with averager.averaged_weights():
            found = reference.full_masters(engine), reference.full_parameters(engine)
        low = {key: value.to(dtype) for key, value in expected[name].items()}
        wrong[name, kind] = _different(found[0], expected[name]) + _different(found[1], low)
    rounded = len(_different(expected["deltas"], expected["sliding"]))
    return wrong, rounded, _different(reference.full_masters(engine), before), os.listdir(folder)


@pytest.mark.parametrize(("ranks", "zero", "precision"), [(1, 1, "fp32"), (2, 1, "bf16"), (3, 3, "fp32")])
def test_every_storage_and_mode_equals_gathered_snapshots(workers, tmp_path, ranks, zero, precision):
    for wrong, rounded, after, files in workers(ranks).run(_every_storage, zero, precision, str(tmp_path)):
        assert len(wrong) == 12 and not any(wrong.values()), wrong
        assert rounded > 5  # of 9 parameters: differences are not whole snapshots
        assert after == [] and files == []


def _mapped(folder):
    gc.collect()
    with open("/proc/self/maps") as file:
        return sum(f"{folder}/" in line for line in file)


def _resumed(folder, files):
    """Averages with and without a save and resume after step 4; what is in the folder and mapped, before and after."""
    section = {**plain.AVERAGING, "interval": 1, "deltas": "bf16", "storage": "files", "storage_path": files}

    def averaged(engine, out):
        with ds_plugin.get_plugin(engine).averaged_weights():
            out.append(plain.evaluate(engine))

    config = plain.deepspeed_config(1, "bf16", weight_averaging=section)
    engine, whole, again = plain.make(config), [], []
    plain.train(engine, 4)
    engine.save_checkpoint(folder)
    plain.train(engine, 4, lambda e: averaged(e, whole))
    mapped, described = [_mapped(files)], ds_plugin.get_plugin(engine).describe()[0]
    ds_plugin.detach(engine)
    mapped.append(_mapped(files))
    resumed = plain.make(config)
    resumed.load_checkpoint(folder)
    plain.train(resumed, 4, lambda e: averaged(e, again))
    changed = plain.make(plain.deepspeed_config(1, "bf16", weight_averaging={**section, "deltas": "fp32"}))
    before = reference.full_masters(changed)
    try:
        changed.load_checkpoint(folder)
        message = None
    except CheckpointError as error:
        message = str(error)
    unchanged = _different(reference.full_masters(changed), before) == []
    return whole, again, mapped, os.listdir(files), described, message, unchanged


def test_differences_in_files_are_resumed_and_the_files_go(workers, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for whole, again, mapped, left, described, message, unchanged in workers(2).run(
        _resumed, str(tmp_path / "checkpoints"), str(files)
    ):
        assert whole == again and len(set(whole)) > 2
        assert mapped == [3, 0] and left == []  # the newest snapshot and two differences, until it is detached
        assert f"of files in {files} on this rank" in described and "for the 2 ranks of this node" in described
        assert "deltas 'bf16', this run has 'fp32'" in message and unchanged


def _refused(folder):
    """What is wrong on one rank is said on both: a limit on its files, its disk, its folder. And then it works."""
    engine, messages, rank = plain.make(plain.deepspeed_config(1), initialize=deepspeed.initialize), {}, dist.get_rank()

    def attempt(name, path=folder):
        section = {**plain.AVERAGING, "storage": "files", "storage_path": path}
        try:
            ds_plugin.attach(engine, {"weight_averaging": section})
            messages[name] = None
        except ConfigError as error:
            messages[name] = str(error)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes
    attempt("limit")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    original = memory.shutil.disk_usage
    memory.shutil.disk_usage = lambda path: SimpleNamespace(free=10**12 if rank == 0 else 20_000)
    attempt("disk")
    memory.shutil.disk_usage = original
    attempt("folder", folder if rank == 0 else f"{folder}/absent")
    mapped = _mapped(folder)
    attempt("works")
    plain.train(engine, 2)
    return messages, (mapped, _mapped(folder)), ds_plugin.get_plugin(engine).averager.steps, os.listdir(folder)


def test_too_little_disk_ends_all_ranks_alike(workers, tmp_path):
    for messages, mapped, steps, left in (found := workers(2).run(_refused, str(tmp_path))):
        assert messages == found[0][0]
        assert "storage_path: no file of" in messages["limit"] and "File too large" in messages["limit"]
        assert "2 rank(s)" in messages["disk"] and f"of files in {tmp_path}" in messages["disk"]
        assert "absent' is not a folder that can be written to" in messages["folder"]
        assert messages["works"] is None and mapped == (0, 3) and steps == [2] and left == []


def _order(by_user):
    """What comes before what in two steps of three micro-batches each."""
    order = []
    WeightAverager.before_step = lambda averager: order.append("wait")  # this process ends with the test
    engine = plain.make(plain.deepspeed_config(1, accumulation=3, weight_averaging=plain.AVERAGING))
    their_step = engine.optimizer.step
    engine.optimizer.step = lambda *a, **k: (order.append("step"), their_step(*a, **k))[1]
    for index in range(6):
        if by_user:  # two micro-batches a step, whatever the JSON says
            engine.set_gradient_accumulation_boundary(index % 2 == 1)
        engine.backward(engine(*plain.micro_batch(index)))
        order.append("micro-batch")
        engine.step()
    return order


@pytest.mark.parametrize("by_user", [False, True])
def test_a_step_waits_for_the_last_snapshot_and_no_micro_batch_does(workers, by_user):
    for order in workers(1).run(_order, by_user):
        micro_batches = 2 if by_user else 3
        assert order == (["micro-batch"] * micro_batches + ["wait", "step"]) * (6 // micro_batches)
