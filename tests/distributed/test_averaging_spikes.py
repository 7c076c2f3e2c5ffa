"""The automatic restart from the average; and saves that the file system refuses."""

import logging
import resource
import signal

import pytest
import torch

import ds_plugin
from ds_plugin.core.errors import CheckpointError
from tests.distributed import plain
from tests.reference import averaging as reference

RULE = {"loss_ratio": 2.0, "patience": 2}
AVERAGING = {"enabled": True, "interval": 2, "window": 3}


def make(zero, **changes):
    section = {**AVERAGING, "restart": RULE, **changes}
    return plain.make(plain.deepspeed_config(zero, weight_averaging=section))


def step(engine, scale=1.0):
    """One optimizer step, with a loss that is `scale` times as large."""
    engine.backward(engine(*plain.micro_batch(engine.global_steps)) * scale)
    engine.step()


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def spiked(zero, changes, averaged):
    """The loss is too high from step 7 on; looked at after steps 2, 4, 6, 8, 10."""
    engine = make(zero, **changes)
    plugin, snapshots = ds_plugin.get_plugin(engine), {}
    for _ in range(7):
        step(engine, 1.0 if engine.global_steps < 6 else 9.0)
        snapshots[engine.global_steps] = reference.full_masters(engine)
    before = reference.full_masters(engine)
    step(engine, 9.0)
    expected = reference.mean([snapshots[s] for s in averaged])
    found = reference.full_masters(engine)
    off, moved = furthest(found, expected), furthest(before, expected)
    at_once = list(plugin.averager.steps), list(plugin.spikes.restarts), plugin.spikes.since
    for _ in range(4):
        step(engine)
    return off, moved, at_once, list(plugin.averager.steps), engine.global_steps


SPIKED = [
    # stage, changes to the section, the snapshots whose average is gone back to, those of later
    (0, {}, (2, 4, 6), [8, 10, 12]),
    (1, {}, (2, 4, 6), [8, 10, 12]),
    (3, {}, (2, 4, 6), [8, 10, 12]),
    (1, {"deltas": "bf16"}, (2, 4, 6), [8, 10, 12]),
    # the snapshot of step 7 was taken before the look that found the spike, and is forgotten; it had displaced step 4's
    (1, {"interval": 1}, (5, 6), [10, 11, 12]),
]


@pytest.mark.parametrize(("zero", "changes", "averaged", "last"), SPIKED, ids=str)
def test_a_lasting_spike_is_undone(workers, zero, changes, averaged, last):
    for off, moved, at_once, later, steps in workers(2).run(spiked, zero, changes, averaged):
        assert off <= (moved / 50 if "deltas" in changes else 0) and moved > 0  # differences are rounded
        # after step 8: snapshots of the path that was left are gone, and the first of the new one is the average
        assert at_once == ([8], [8], None)
        assert later == last and steps == 12


def poisoned(zero, sections):
    """In step 7 the loss is finite and its gradients are not, on one rank. What is logged here, too."""
    section = {**AVERAGING, "restart": RULE}
    engine, said = plain.make(plain.deepspeed_config(zero, weight_averaging=section, **sections)), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ds_plugin").addHandler(handler)
    plugin, rows = ds_plugin.get_plugin(engine), []
    for _ in range(14):
        loss = engine(*plain.micro_batch(engine.global_steps))
        bad = engine.global_steps == 6 and torch.distributed.get_rank() == 1
        engine.backward(loss + (loss * 0).sqrt() if bad else loss)
        engine.step()
        weights = reference.full_masters(engine).values()
        rows.append(all(bool(weight.isfinite().all()) for weight in weights))
    return rows, list(plugin.spikes.restarts), list(plugin.averager.steps), said


UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}  # else DeepSpeed skips the step under ZeRO


# With ZeRO the norm tells of step 7; without, the loss of step 8 does, and two steps in a row are known at the look
# after step 10. The average of steps 2, 4 and 6 is finite, and so is all that follows.
@pytest.mark.parametrize(("zero", "sections", "at"), [(0, {}, 10), (1, UNCHECKED, 8)])
def test_moments_that_are_not_finite_are_left_behind(workers, zero, sections, at):
    for rank, (finite, restarts, steps, said) in enumerate(workers(2).run(poisoned, zero, sections)):
        assert finite == [not 7 <= step < at for step in range(1, 15)]
        assert restarts == [at] and steps == [10, 12, 14]
        about = [text for text in said if "moments were not finite: they start again at zero" in text]
        assert len(about) == (rank == 0), said


def short(scales, changes):
    engine = make(1, **changes)
    plugin = ds_plugin.get_plugin(engine)
    for scale in scales:
        step(engine, scale)
    return list(plugin.spikes.restarts), list(plugin.averager.steps), plugin.spikes.since


CASES = [
    # one step at a time is no spike that lasts; step 6 itself is too high for a snapshot
    ([1, 1, 9, 1, 1, 9, 1, 1], {}, ([], [2, 4, 8], None)),
    # in two looks: above at steps 4 and 5; patience 2 is reached within the look at 6, where it is over
    ([1, 1, 1, 9, 9, 1, 1, 1], {}, ([], [2, 6, 8], None)),
    # nothing from before to go back to, and no snapshot until the loss is down again
    ([1, 9, 9, 9, 9, 9, 1, 1, 1], {"start_step": 3}, ([], [8], None)),
]


@pytest.mark.parametrize(("scales", "changes", "expected"), CASES)
def test_what_is_no_lasting_spike(workers, scales, changes, expected):
    assert workers(2).run(short, scales, changes) == [expected] * 2


def resumed(folder):
    """Saved in the middle of the spike, between two looks."""

    def train(engine, last):
        while engine.global_steps < last:
            step(engine, 9.0 if engine.global_steps in (6, 7, 8) else 1.0)

    whole = make(1)
    train(whole, 7)
    whole.save_checkpoint(folder)
    cut = make(1)
    cut.load_checkpoint(folder)
    found = []
    for engine in (whole, cut):
        train(engine, 11)
        plugin = ds_plugin.get_plugin(engine)
        found.append((plugin.spikes.restarts, plugin.averager.steps, reference.full_parameters(engine)))
    (restarts, steps, weights), (*again, other) = found
    return restarts, [restarts, steps] == again and equal(weights, other)


def test_the_watch_is_resumed(workers, tmp_path):
    assert workers(2).run(resumed, str(tmp_path)) == [([8], True)] * 2


# -- saves that fail ---------------------------------------------------------------------------------------------------


def disk_full(folder):
    """Rank 1 may write no more than a few bytes, as on a full disk; later it may again."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    engine = plain.make(plain.deepspeed_config(1, weight_averaging=AVERAGING))
    plain.train(engine, 4)
    engine.save_checkpoint(folder, tag="before")
    plain.train(engine, 2)
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, tag="during")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    losses = plain.train(engine, 2)
    again = plain.make(plain.deepspeed_config(1, weight_averaging=AVERAGING))
    again.load_checkpoint(folder)
    restored = again.global_steps, list(ds_plugin.get_plugin(again).averager.steps)
    engine.save_checkpoint(folder, tag="after")
    return str(caught.value), restored, len(losses)


def test_a_full_disk_ends_the_save_on_all_ranks_and_nothing_else(workers, tmp_path):
    for message, restored, steps in workers(2).run(disk_full, str(tmp_path)):
        assert "during: the methods' state cannot be written" in message, message
        assert "earlier checkpoints are as they were" in message
        assert restored == (4, [2, 4]) and steps == 2
    left = [path.name for path in (tmp_path / "during").iterdir()]
    assert not any(name.endswith("rank_00001.safetensors") or "tmp" in name for name in left), left
    assert (tmp_path / "latest").read_text() == "after"
