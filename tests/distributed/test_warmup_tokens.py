"""Sequence length warmup by tokens: samples of several lengths, learning rates that follow, steps that are skipped."""

import warnings

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_plugin
from tests.distributed import plain
from tests.distributed.warmup import LINEAR, section
from tests.harness import slow

# -- samples of several lengths ---------------------------------------------------------------------------------------

# (longest sample of rank 0's micro-batch, of rank 1's), by step: padding to the longest of a batch is no longer
RAGGED = [(16, 3), (5, 16), (16, 16), (2, 9), (16, 7), (12, 16), (16, 16), (10, 11)]
# 4 + 12 * position / 128, rounded down; the position is 1 and 4 tokens more for every token of a step's length
RAGGED_LENGTHS = [4, 5, 7, 10, 13, 16, 16, 16]


def ragged(engine, steps, read=None):
    """Train on; every step's length, losses, ledger, rate and shapes. An evaluation without eval() is in between."""
    rank, plugin, rows = dist.get_rank(), ds_plugin.get_plugin(engine), []
    seen = []
    hook = engine.module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batches = ds_plugin.get_plugin(engine).batches(read) if read is not None else None
    engine.train()
    for _ in range(steps):
        step, length = engine.global_steps, plugin.length
        batch = next(batches) if batches is not None else padded(step, rank)
        with torch.no_grad():
            engine(**batch)
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        shapes = [tuple(given["input_ids"].shape) for given in seen[-2:]]
        ledger = plugin.ledger
        rows.append((length, loss.item(), shapes, (ledger.read, ledger.trained), engine.get_lr()[0]))
    hook.remove()
    return rows


def padded(step, rank):
    tokens, labels = plain.micro_batch(step, rank)
    longest = RAGGED[step][rank]
    return {"input_ids": tokens[:, :longest], "labels": labels[:, :longest]}


def _ragged(folder):
    def make():
        changes = {"report_interval": 3, "learning_rate": {"by": "tokens"}, "preflight": False, "multiple_of": 1}
        duration = {"tokens": 4 * plain.MICRO * dist.get_world_size() * 8}
        return plain.make({**plain.deepspeed_config(1, **section(duration=duration, **changes)), "scheduler": LINEAR})

    rank = dist.get_rank()
    engine = make()
    rows = ragged(engine, 4)
    engine.save_checkpoint(folder)
    saved = ds_plugin.get_plugin(engine).ledger
    rows += ragged(engine, 4)
    resumed = make()
    resumed.load_checkpoint(folder)
    again = ds_plugin.get_plugin(resumed).ledger, ragged(resumed, 4)
    read = ragged(make(), 8, lambda first: (padded(step, rank) for step in range(first, 8)))
    plain_engine = plain.make({**plain.deepspeed_config(1), "scheduler": {}}, initialize=deepspeed.initialize)
    plain_engine.train()
    by_hand = []
    for step, row in enumerate(rows):
        for group in plain_engine.optimizer.param_groups:
            group["lr"] = rows[step - 1][-1] if step else row[-1]
        loss = plain_engine(**{name: value[:, : row[0]] for name, value in padded(step, rank).items()})
        plain_engine.backward(loss)
        plain_engine.step()
        by_hand.append(loss.item())
    return rows, (saved.read, saved.trained), again, read, by_hand


def test_samples_of_any_length_are_cut_and_counted(workers, tmp_path):
    results = workers(2).run(_ragged, str(tmp_path))
    cut = [[min(longest, length) for longest in both] for both, length in zip(RAGGED, RAGGED_LENGTHS, strict=True)]
    read = [sum(sum(both) for both in RAGGED[: n + 1]) * plain.MICRO for n in range(8)]
    trained = [sum(sum(both) for both in cut[: n + 1]) * plain.MICRO for n in range(8)]
    nominal = [sum(RAGGED_LENGTHS[:n]) / plain.LENGTH for n in range(8)]
    for rank, (rows, saved, again, from_batches, by_hand) in enumerate(results):
        assert [row[0] for row in rows] == RAGGED_LENGTHS
        assert [row[1] for row in rows] == by_hand
        assert [row[2] for row in rows] == [[(plain.MICRO, both[rank])] * 2 for both in cut]
        exact = {2, 5}  # where a report comes; after the fourth step it is the save that exchanges
        assert {n for n, row in enumerate(rows) if row[3] == (read[n], trained[n])} >= exact
        assert saved == (read[3], trained[3])
        assert rows[6][3] == (read[6], trained[6])  # both ranks read the same since the report
        mine = [2 * plain.MICRO * n for n in (RAGGED[0][rank], cut[0][rank])]
        assert rows[0][3] == tuple(mine)  # in between, the others are taken to have read as much
        assert [row[4] for row in rows] == pytest.approx([0.01 * min(n / 4, 1) for n in nominal], rel=1e-12)
        ledger, resumed = again
        assert (ledger.read, ledger.trained) == saved
        assert [row[:3] + row[4:] for row in resumed] == [row[:3] + row[4:] for row in rows[4:]]
        assert [resumed[n][3] for n in (1, 2)] == [rows[n][3] for n in (5, 6)]
        assert [row[:3] + row[4:] for row in from_batches] == [row[:3] + row[4:] for row in rows]
        assert [from_batches[n][3] for n in exact] == [rows[n][3] for n in exact]


# -- learning rates by tokens -----------------------------------------------------------------------------------------


def _rates(by, scheduler, steps):
    config = plain.deepspeed_config(**section(learning_rate={"by": by}))
    if scheduler is not None:
        config["scheduler"] = scheduler
    engine = plain.make(config)
    rates, tokens = [], []
    plain.train(engine, steps, lambda e: (rates.append(e.get_lr()[0]), tokens.append(ds_plugin.get_plugin(e).ledger)))
    return rates, engine.lr_scheduler.state_dict(), [group["lr"] for group in engine.optimizer.param_groups]


def test_learning_rates_follow_tokens(workers):
    rates, state, groups = workers(2).run(_rates, "tokens", LINEAR, 12)[0]
    lengths = [4, 4, 8, 8, 8, 12, 12, 16, 16, 16, 16, 16]  # of steps 1 to 12
    before = [sum(lengths[:n]) / plain.LENGTH for n in range(12)]  # full batches trained before step n + 1
    assert rates == pytest.approx([0.01 * min(done / 4, 1.0) for done in before], rel=1e-12)
    assert state["last_batch_iteration"] == before[-1] and groups[0] == rates[-1]


def test_learning_rates_by_steps_are_deepspeeds(workers):
    assert workers(2).run(_rates, "steps", LINEAR, 6)[0][0] == pytest.approx([0.01 * min(n / 4, 1) for n in range(6)])


@pytest.mark.parametrize(
    "scheduler",
    [
        slow({"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 2}}),
        {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 2, "warmup_max_lr": 0.01}},
        slow({"type": "CosineAnnealingLR", "params": {"T_max": 9}}),
    ],
)
def test_at_full_length_both_are_one(workers, scheduler):
    def rates(by):
        return workers(1).run(_full_length_rates, by, scheduler)[0]

    assert rates("tokens") == pytest.approx(rates("steps"), rel=1e-9)


def _full_length_rates(by, scheduler):
    config = plain.deepspeed_config(**section(learning_rate={"by": by}, start_length=plain.LENGTH))
    engine = plain.make({**config, "scheduler": scheduler})
    rates, said = [], []
    warnings.showwarning = lambda message, *_: said.append(str(message))

    def after(engine):
        rates.append(engine.get_lr()[0])
        warnings.warn("once", stacklevel=1)

    plain.train(engine, 9, after)
    # torch's own about positions is not shown, and nobody has Python forget what it has shown
    assert said.count("once") == 1 and not any("epoch parameter" in text for text in said), said
    return rates


def _with_skipped_steps():
    """Steps 2 and 3 are skipped, as fp16 skips them when gradients overflow: the counter goes on, nothing else does."""
    changes = {"duration": {"tokens": 8 * 2 * plain.MICRO}, "learning_rate": {"by": "tokens"}}
    engine = plain.make({**plain.deepspeed_config(**section(**changes)), "scheduler": LINEAR})
    plugin, rows, take_step = ds_plugin.get_plugin(engine), [], engine._take_model_step

    def skipping(lr_kwargs, *args, **kwargs):
        if engine.global_steps in (1, 2):
            engine._step_applied = False
            engine.optimizer.zero_grad()
            engine.skipped_steps += 1
            engine.global_steps += 1
        else:
            take_step(lr_kwargs, *args, **kwargs)

    engine._take_model_step = skipping
    for _ in range(4):
        length = plugin.length
        plain.train(engine, 1)
        ledger = plugin.ledger
        rows.append((length, ledger.read, ledger.trained, ledger.discarded, engine.get_lr()[0]))
    return rows


def test_skipped_steps_are_read_and_not_trained(workers):
    rows = workers(1).run(_with_skipped_steps)[0]
    whole = plain.MICRO * plain.LENGTH
    # 32 tokens of warmup: step 1 trains 8, steps 2 and 3 none: position 9 (4 + 12 * 9 / 32 = 7.4) stays
    assert [row[0] for row in rows] == [4, 4, 4, 4]
    assert [row[1] for row in rows] == [whole, 2 * whole, 3 * whole, 4 * whole]
    assert [row[2] for row in rows] == [8, 8, 8, 16]
    assert [row[3] for row in rows] == [whole - 8, 2 * whole - 8, 3 * whole - 8, 4 * whole - 16]
    assert [row[4] for row in rows] == pytest.approx([0.0, 0.0, 0.0, 0.01 * (8 / 32) / 4])
