"""Sequence length warmup's instruments, the pacing that follows them, and what they cost a step."""

import logging

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.core import loss_statistics
from ds_plugin.core.loss_statistics import LossRatio
from ds_plugin.deepspeed_engine import warmup as core_warmup
from tests.distributed import plain
from tests.distributed.warmup import section


def _reported(folder):
    """Losses of every micro-batch, the reports, and what a resume in the middle of an interval goes on to."""
    engine = plain.make(plain.deepspeed_config(1, accumulation=2, **section(report_interval=4, variance=True)))
    warmup, reports = ds_plugin.get_plugin(engine).warmup, []
    after = lambda e: reports.append(warmup.report if warmup.report and warmup.report.step == e.global_steps else None)  # noqa: E731
    losses = plain.train(engine, 6, after)
    engine.save_checkpoint(folder)
    losses += plain.train(engine, 6, after)
    summary = warmup.monitor.summary()
    again = plain.make(plain.deepspeed_config(1, accumulation=2, **section(report_interval=4, variance=True)))
    again.load_checkpoint(folder)
    plain.train(again, 6)
    assert ds_plugin.get_plugin(again).warmup.report == warmup.report
    assert ds_plugin.get_plugin(again).warmup.monitor.summary() == summary
    return losses, reports, summary


def test_reports_hold_the_global_loss_ratio(workers, tmp_path):
    (mine, reports, summary), (other, *_) = workers(2).run(_reported, str(tmp_path))
    micro = torch.tensor([mine, other], dtype=torch.float64).view(2, 12, 2)
    expected = LossRatio()
    ratios = [expected.feed(loss) for loss in micro.mean(dim=(0, 2)).tolist()]
    assert [report is not None for report in reports] == [step % 4 == 0 for step in range(1, 13)]
    assert [report.loss_ratio for report in reports if report] == pytest.approx([ratios[3], ratios[7], ratios[11]])
    assert summary["max_loss_ratio"] == pytest.approx(max(ratios[1:]))
    assert all(report.variance_l1 > 0 for report in reports if report)


BOUNDED = {"pacing": "adaptive", "adaptive": {"variance_max": 1e-12}}
# (the section's changes, how often two reports read Adam's second moments, whether the length is held for them)
READERS = [({}, 0, False), ({"variance": True}, 2, False), ({"pacing": "adaptive"}, 0, False), (BOUNDED, 2, True)]


def _read_by():
    found, original = [], loss_statistics.adam_variance
    for changes, *_ in READERS:
        reads = []
        loss_statistics.adam_variance = lambda engine, reads=reads: reads.append(1) or original(engine)
        engine = plain.make(plain.deepspeed_config(1, **section(report_interval=2, **changes)))
        plain.train(engine, 4)
        warmup = ds_plugin.get_plugin(engine).warmup
        found.append((len(reads), warmup.report.variance_max is not None, warmup.hold.lag > 0))
        assert warmup.report.loss_ratio > 0
    return found


def test_adams_variance_is_read_where_it_is_asked_for(workers):
    assert workers(1).run(_read_by) == [[(reads, reads > 0, held) for _, reads, held in READERS]]


def spiking(steps):
    """Losses that go down, but for steps 5 to 8."""
    return [3.0 if 5 <= step <= 8 else 2.0 - 0.01 * step for step in range(1, steps + 1)]


def _held(unit, folder):
    duration = {"steps": 8} if unit == "steps" else {"tokens": 8 * 4 * plain.MICRO}
    changes = {"pacing": "adaptive", "report_interval": 1, "duration": duration}

    def make():
        return plain.make(plain.deepspeed_config(**section(**changes)))

    def go(engine, steps):
        lengths, plugin = [], ds_plugin.get_plugin(engine)
        record = plugin.warmup.monitor.record
        plugin.warmup.monitor.record = lambda loss: record(torch.tensor(spiking(20)[engine.global_steps]))
        for _ in range(steps):
            lengths.append(plugin.length)
            plain.train(engine, 1)
        return lengths

    engine = make()
    lengths = go(engine, 6)
    engine.save_checkpoint(folder)
    lengths += go(engine, 10)
    resumed = make()
    resumed.load_checkpoint(folder)
    assert go(resumed, 10) == lengths[6:]
    return lengths


def test_adaptive_pacing_holds_the_length_while_the_loss_spikes(workers, tmp_path):
    # steps 5 to 8 spike: after each of them the next step stands where it stood, at position 5 (length 8)
    lengths = workers(1).run(_held, "steps", str(tmp_path))[0]
    assert lengths == [4, 4, 8, 8, 8, 8, 8, 8, 8, 12, 12, 16, 16, 16, 16, 16]
    # in tokens: the spike's own tokens do not move the schedule
    by_tokens = workers(1).run(_held, "tokens", str(tmp_path / "tokens"))[0]
    assert len(set(by_tokens[4:9])) == 1 and by_tokens[9] >= by_tokens[8] and by_tokens[-1] == 16


def _said_while_held():
    """What is logged on this rank, and the losses of a model some of whose micro-batches have no label."""
    config = plain.deepspeed_config(1, accumulation=2, **section(pacing="adaptive", report_interval=2))
    engine, said = plain.make(config), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ds_plugin").addHandler(handler)
    warmup, alone = ds_plugin.get_plugin(engine).warmup, dist.get_rank() == 1
    rows = []
    for step in range(1, 9):
        without = step in (3, 4)  # of labels: there a loss is NaN, its gradient 0
        for micro in range(2):
            tokens, labels = plain.micro_batch(2 * step + micro)
            everything = step == 4 and micro == 1 or not alone and micro == 0
            labels = torch.full_like(labels, -100) if without and (everything or alone and micro == 1) else labels
            engine.backward(engine(tokens, labels) * (5.0 if step == 5 else 1.0))
            engine.step()
        rows.append((warmup.length, warmup.hold.lag))
    finite = all(parameter.isfinite().all() for parameter in engine.module.parameters())
    return rows, said, finite


def test_a_hold_is_said_and_micro_batches_without_labels_are_no_reason(workers):
    (rows, said, finite), (others, nothing, _) = workers(2).run(_said_while_held)
    # in step 3 rank 0's first and rank 1's second micro-batch have no label, in step 4 also rank 0's second; step 5
    # spikes, which the report of step 6 sees: the length stays for two steps
    assert [length for length, _ in rows] == [4, 8, 8, 8, 12, 12, 12, 12]
    assert [held for _, held in rows] == [0, 0, 0, 0, 0, 1, 2, 2] and others == rows and finite
    assert len(said) == 2 and nothing == []
    assert "step 6, the length is held at 12: a loss was" in said[0] and "adaptive.loss_ratio 1.2" in said[0]
    assert said[1] == "sequence length warmup: step 8, the schedule goes on from 12"


def _noisy():
    """Micro-batches scaled apart, as means over a handful of labels are: (ratio, beyond noise, held)."""
    config = plain.deepspeed_config(1, accumulation=2, **section(pacing="adaptive", report_interval=1))
    engine, rows = plain.make(config), []
    warmup = ds_plugin.get_plugin(engine).warmup
    for scales in [(0.6, 1.4), (1.0, 1.8), (5.0, 5.2)]:
        for micro, scale in enumerate(scales):
            engine.backward(engine(*plain.micro_batch(micro)) * scale)
            engine.step()
        rows.append((warmup.report.loss_ratio, *warmup.report.beyond_noise, warmup.hold.lag))
    return rows


def test_noise_between_micro_batches_is_no_instability(workers):
    # means 1 and 1.4 times the loss, 0.4 apart on either side: four of them have a standard error of 0.23
    for _, (ratio, beyond_noise, held), (_, spike, held_then) in workers(2).run(_noisy):
        assert ratio > 1.2 and beyond_noise < 1.0 and held == 0
        assert spike > 2 and held_then == 1


def _counted(enabled):
    """Device syncs and collectives of steps 3 to 8, preflight and reports aside."""
    config = plain.deepspeed_config(0, **(section(report_interval=1000) if enabled else {}))
    engine = plain.make(config, initialize=ds_plugin.initialize if enabled else deepspeed.initialize)
    batches = [plain.micro_batch(n) for n in range(8)]
    lengths = [4, 4, 8, 8, 8, 12, 12, 16]
    counts = {"sync": 0, "collective": 0}

    def counting(owner, name, kind):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            counts[kind] += 1
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    engine.train()
    for step, (tokens, labels) in enumerate(batches):
        if step == 2:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                counting(torch.Tensor, name, "sync")
            for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "all_gather_object"):
                counting(dist, name, "collective")
        if not enabled:
            tokens, labels = tokens[:, : lengths[step]], labels[:, : lengths[step]]
        engine.backward(engine(tokens, labels))
        engine.step()
    return counts


def test_a_step_adds_no_device_sync_and_no_collective(workers):
    pool = workers(2)
    assert pool.run(_counted, True) == pool.run(_counted, False)


def _without_variances():
    config = plain.deepspeed_config(**section(pacing="adaptive", report_interval=1, adaptive={"variance_max": 1e-30}))
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.01}}
    said, kept = [], core_warmup.warn
    core_warmup.warn = lambda text, *values: said.append(text % values)
    try:
        plain.train(plain.make(config), 4)
    finally:
        core_warmup.warn = kept
    return said


def test_a_bound_on_a_variance_that_nobody_knows_is_said_once(workers):
    for said in workers(2).run(_without_variances):
        [line] = said
        assert "no second moments of Adam are in memory" in line and "adaptive.variance_max" in line


def _unheld(folder):
    def make(pacing):
        return plain.make(plain.deepspeed_config(**section(pacing=pacing, report_interval=1)))

    engine = make("adaptive")
    plain.train(engine, 2)
    warmup = ds_plugin.get_plugin(engine).warmup
    warmup.hold.lag, warmup.hold.holding = 1, True
    engine.save_checkpoint(folder)
    engine = make("schedule")
    engine.load_checkpoint(folder)
    lengths = []
    plain.train(engine, 7, lambda e: lengths.append(ds_plugin.get_plugin(e).length))
    return lengths


def test_a_hold_ends_with_adaptive_pacing(workers, tmp_path):
    assert workers(1).run(_unheld, str(tmp_path))[0] == [8, 8, 12, 12, 16, 16, 16]  # of steps 4 to 10
