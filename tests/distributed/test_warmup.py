"""Sequence length warmup on the plain engine, past truncation: carry, tokens, mask, preflight, instruments."""

import json
import logging
import warnings
import weakref

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin.core import loss_statistics
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.loss_statistics import LossRatio
from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt
from tests.distributed import plain
from tests.harness import slow

MICROS = 3  # accumulation steps
# 4 + 12 * t / 8, floored to 4: 4 4 8 8 8 12 12 16; then full


def section(**changes):
    return {"sequence_length_warmup": {**plain.WARMUP, **changes}}


def source(first):
    """This rank's full-length micro-batches from the ``first``-th on; every token is a number of its own."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    micro = first
    while True:
        sample = (micro * ranks + rank) * plain.MICRO + torch.arange(plain.MICRO)
        numbers = sample[:, None] * plain.LENGTH + torch.arange(plain.LENGTH)
        yield {"input_ids": numbers % plain.VOCAB, "labels": numbers}
        micro += 1


def run(engine, batches, steps, crash_after=None):
    """Train; every step's length, the loss of each micro-batch, and the number of every token that was trained."""
    plugin, rows = ds_plugin.get_plugin(engine), []
    engine.train()
    for _ in range(steps):
        length, seen, losses = plugin.length, [], []
        for _ in range(engine.gradient_accumulation_steps()):
            batch = next(batches)
            assert batch["input_ids"].shape == (plain.MICRO, length)
            seen += batch["labels"].flatten().tolist()
            loss = engine(batch["input_ids"], batch["labels"] % plain.VOCAB)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        ledger = plugin.ledger
        rows.append((length, losses, seen, ledger.read, ledger.trained, ledger.carried, engine.get_lr()[0]))
    return rows


def carry(zero=0, **changes):
    changes = {"mode": "carry", "interleave": 2, "learning_rate": {"by": "tokens"}, **changes}
    engine = plain.make(plain.deepspeed_config(zero, accumulation=MICROS, **section(**changes)))
    return engine, ds_plugin.get_plugin(engine).batches(source)


def _carried_run(steps):
    return run(*carry(), steps)


def _killed_and_resumed(folder, zero, before, steps):
    """``before`` steps, a checkpoint, two steps that a crash loses; then an engine of its own goes on."""
    engine, batches = carry(zero)
    rows = run(engine, batches, before)
    engine.save_checkpoint(folder)
    run(engine, batches, 2)
    engine, batches = carry(zero)
    engine.load_checkpoint(folder)
    rows += run(engine, batches, steps - before)
    # once more, into an engine that has been training: what it held must be forgotten
    engine.load_checkpoint(folder)
    assert run(engine, batches, steps - before) == rows[before:]
    return rows


def _whole(zero, steps):
    return run(*carry(zero), steps)


@pytest.mark.parametrize("ranks", [1, slow(2), 4])
def test_every_token_read_is_trained_exactly_once(workers, ranks):
    by_rank = workers(ranks).run(_carried_run, 24)
    samples = ranks * plain.MICRO * MICROS
    trained = sorted(token for rows in by_rank for _, _, seen, *_ in rows for token in seen)
    _, _, _, read, booked, carried, _ = by_rank[0][-1]
    assert carried == 0 and read == booked == len(trained)  # the warmup is over, nothing is left
    assert trained == list(range(read))
    lengths = [rows[0] for rows in by_rank[0]]
    assert lengths[0] == 4 and lengths[-1] == 16 and len(set(lengths)) >= 3
    total = 0
    for length, _, seen, read, booked, carried, _ in by_rank[0]:
        total += length * samples
        assert len(seen) == length * plain.MICRO * MICROS
        assert booked == total and read - booked == carried and read % (samples * plain.LENGTH) == 0
    assert [[row[0] for row in rows] for rows in by_rank] == [lengths] * ranks


@pytest.mark.parametrize(("zero", "before"), [(0, 1), slow(1, 4), (3, 6), slow(2, 12)])
def test_killed_and_resumed_it_trains_the_same(workers, tmp_path, zero, before):
    pool, steps = workers(2), before + 5
    resumed = pool.run(_killed_and_resumed, str(tmp_path), zero, before, steps)
    assert resumed == pool.run(_whole, zero, steps)


class TinyForCausalLM(plain.TinyLM):
    """Given its tokens as labels, it shifts them; counts the targets that it has trained."""

    targets = 0

    def forward(self, input_ids, labels):
        assert torch.equal(input_ids, labels)
        self.targets += input_ids[:, 1:].numel()
        return super().forward(input_ids[:, :-1], labels[:, 1:])


def _targets(shifts, folder):
    """(Targets trained on this rank, the ledger's count of others and tokens read), also after a resume."""
    changes = {"mode": "carry", "interleave": 2, "preflight": False, "shifts_labels": shifts}

    def make():
        torch.manual_seed(7)
        config = plain.deepspeed_config(1, accumulation=MICROS, **section(**changes))
        engine = ds_plugin.initialize(model=TinyForCausalLM(), config=config)[0]
        engine.train()
        return engine, ds_plugin.get_plugin(engine).batches(source)

    def go(engine, batches, steps):
        for _ in range(steps * MICROS):
            tokens = next(batches)["input_ids"]
            engine.backward(engine(input_ids=tokens, labels=tokens))
            engine.step()

    engine, batches = make()
    go(engine, batches, 5)
    before = engine.module.targets
    engine.save_checkpoint(folder)
    resumed, batches = make()
    resumed.load_checkpoint(folder)
    go(resumed, batches, 19)
    plugin = ds_plugin.get_plugin(resumed)
    ledger = plugin.ledger
    assert ledger.carried == 0
    return before + resumed.module.targets, ledger.untrained_targets, ledger.read, plugin.describe()[0]


@pytest.mark.parametrize("shifts", [None, False])
def test_targets_that_are_lost_at_cuts_are_counted(workers, tmp_path, shifts):
    found = workers(2).run(_targets, shifts, str(tmp_path))
    trained, (_, lost, read, said) = sum(targets for targets, *_ in found), found[0]
    whole = read // plain.LENGTH * (plain.LENGTH - 1)  # the first token of a sample is nobody's target
    assert found[1][1:] == found[0][1:]
    if shifts is None:
        assert trained + lost == whole and lost > 0 and "one target of a sample lost at each cut" in said
    else:
        assert lost == 0 and trained < whole and "lost" not in said


def _engine_without_batches():
    engine = plain.make(plain.deepspeed_config(accumulation=MICROS, **section(mode="carry")))
    engine.train()
    engine(*plain.micro_batch(0))


def _own_batches():
    engine, _ = carry()
    engine.train()
    engine(*plain.micro_batch(0))


def _reads_ahead():
    engine, batches = carry()
    for _ in range(MICROS + 1):
        next(batches)


def _short_samples():
    engine, _ = carry()
    batches = ds_plugin.get_plugin(engine).batches(lambda n: iter([{"input_ids": torch.zeros(2, 12).long()}] * 9))
    next(batches)


def _grows():
    engine, _ = carry()
    engine.set_train_batch_size(48)


def _no_scheduler():
    config = plain.deepspeed_config(**section(learning_rate={"by": "tokens"}))
    del config["scheduler"]
    plain.make(config)


def _other_mode(folder):
    engine, batches = carry()
    run(engine, batches, 2)
    engine.save_checkpoint(folder)
    plain.make(plain.deepspeed_config(accumulation=MICROS, **section())).load_checkpoint(folder)


def _section_removed(folder):
    engine, batches = carry()
    run(engine, batches, 2)
    engine.save_checkpoint(folder)
    plain.make(plain.deepspeed_config(accumulation=MICROS, weight_averaging=plain.AVERAGING)).load_checkpoint(folder)


def _other_end(folder):
    engine, batches = carry()
    run(engine, batches, 2)
    engine.save_checkpoint(folder)
    carry(end_length=8)[0].load_checkpoint(folder)


def _held_in_other_units(folder):
    changes = {"pacing": "adaptive", "report_interval": 1}
    engine = plain.make(plain.deepspeed_config(**section(**changes)))
    plain.train(engine, 2)
    ds_plugin.get_plugin(engine).warmup.held = 3
    engine.save_checkpoint(folder)
    plain.make(plain.deepspeed_config(**section(**changes, duration={"tokens": 99}))).load_checkpoint(folder)


def _detached():
    engine, batches = carry()
    run(engine, batches, 1)
    ds_plugin.detach(engine)
    next(batches)


def _broken_on_one_rank():
    schedule = "math:floor" if dist.get_rank() else "no.such.module:f"
    plain.make(plain.deepspeed_config(**section(schedule=schedule)))


def _sequence_first_on_one_rank():
    engine = plain.make(plain.deepspeed_config(**section()))
    engine.train()
    tokens, labels = plain.micro_batch(0)
    engine(*((tokens.T, labels.T) if dist.get_rank() else (tokens, labels)))


def _reads_packed_rows():
    packed = {"input_ids": torch.zeros(1, 16).long(), "position_ids": torch.arange(16)[None] % 9}
    next(ds_plugin.get_plugin(carry()[0]).batches(lambda first: iter([packed] * 9)))


class Pairs(plain.TinyLM):
    def forward(self, input_ids, labels, decoder_input_ids=None):
        raise AssertionError("never called")


def _carried_pairs():
    ds_plugin.initialize(model=Pairs(), config=plain.deepspeed_config(**section(mode="carry")))


def _rank_dependent():
    plain.make(plain.deepspeed_config(**section(start_length=4 + 4 * dist.get_rank())))


def _nested_ulysses():
    engine = plain.make(plain.deepspeed_config(**section()))
    ds_plugin.get_plugin(engine).warmup.parts = 2
    engine.train()
    engine(*plain.micro_batch(0))


REFUSED = {
    "batches not read through us": (_engine_without_batches, "StateError", ["'carry'", "batches(from_micro_batch)"]),
    "batches of another length": (_own_batches, "StateError", ["16 tokens", "trains 4", "plugin.batches"]),
    "read ahead": (_reads_ahead, "StateError", ["micro-batch 4", "step of 3", "ahead"]),
    "short samples": (_short_samples, "ConfigError", ["end_length", "16", "12"]),
    "batch ramp-up": (_grows, "StateError", ["48", "ramp-up", "one of the two"]),
    "no scheduler": (_no_scheduler, "ConfigError", ["learning_rate.by", '"tokens"', "no scheduler"]),
    "carried tokens of another mode": (_other_mode, "CheckpointError", ["mode", "'carry'", "'truncate'"]),
    "the section removed": (_section_removed, "CheckpointError", ["carries tokens of 2 batches", "same section"]),
    "another full length": (_other_end, "CheckpointError", ["end_length", "16", "8"]),
    "held in other units": (_held_in_other_units, "CheckpointError", ["3 steps", "duration in steps", "tokens"]),
    "read after detach": (_detached, "StateError", ["detached"]),
    "a schedule broken on one rank": (_broken_on_one_rank, "ConfigError", ["'no.such.module:f'", "cannot be imported"]),
    "samples in another dimension on one rank": (
        _sequence_first_on_one_rank,
        "ConfigError",
        ["input_ids", "[16, 2, ...]", "train_micro_batch_size_per_gpu is 2"],
    ),
    "packed rows that are read": (_reads_packed_rows, "ConfigError", ["position_ids [1, 16]", "begins anew"]),
    "carried pairs": (_carried_pairs, "ConfigError", ["Pairs", "encoder-decoder", '"truncate"']),
    "ranks that disagree": (_rank_dependent, "ConfigError", ["ranks disagree", "section", "rank 1"]),
    "samples divided over ranks": (_nested_ulysses, "StateError", ["divided over 2 ranks", "batches("]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank(workers, tmp_path, case):
    function, kind, parts = REFUSED[case]
    arguments = [str(tmp_path)] if function.__code__.co_argcount else []
    for error in workers(2).run(function, *arguments, expect="errors"):
        assert error.type == kind and all(part in error.message for part in parts), error


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


LINEAR = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4, "warmup_type": "linear"}}


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


# -- preflight --------------------------------------------------------------------------------------------------------


class Dropping(plain.TinyLM):
    """With dropout, a buffer that every forward pass changes and weights that only the full length trains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.at_full_length = torch.nn.Linear(13, 13)

    def forward(self, input_ids, labels):
        self.calls += 1
        self.lengths = [*getattr(self, "lengths", []), input_ids.shape[1]]
        hidden = torch.nn.functional.dropout(self.embedding(input_ids), 0.2, self.training)
        x = hidden + self.positions[: input_ids.shape[1]]
        x = x + self.outer(torch.nn.functional.gelu(self.inner(self.norm(x))))
        if input_ids.shape[1] == plain.LENGTH:
            x = self.at_full_length(x)
        return torch.nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())


def _trained(zero, precision, preflight, mode, accumulation=1, offload=False):
    torch.manual_seed(7)
    changes = {"preflight": preflight, "mode": mode}
    config = plain.deepspeed_config(zero, precision, accumulation, **section(**changes))
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    engine = ds_plugin.initialize(model=Dropping(), config=config)[0]
    torch.manual_seed(8)
    if mode == "carry":
        batches = ds_plugin.get_plugin(engine).batches(source)
        engine.train()
        losses = []
        for _ in range(5):
            batch = next(batches)
            loss = engine(batch["input_ids"], batch["labels"] % plain.VOCAB)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    else:
        losses = plain.train(engine, 5)
    found = losses, engine.module.calls.item(), engine.module.lengths, torch.rand(3).tolist()
    scale = getattr(engine.optimizer, "loss_scale", None)
    return *found, scale, engine.skipped_steps, plain.evaluate(engine)  # at full length: all weights


@pytest.mark.parametrize(
    ("zero", "precision", "mode", "accumulation", "offload"),
    [
        slow(0, "fp32", "truncate", 2, False),
        (0, "fp16", "truncate", 1, False),
        slow(1, "bf16", "truncate", 1, False),
        slow(1, "fp32", "truncate", 2, True),
        (2, "fp32", "carry", 1, False),
        slow(2, "bf16", "truncate", 2, True),
        slow(3, "fp32", "truncate", 1, False),
        (3, "bf16", "truncate", 2, True),
    ],
)
def test_preflight_runs_the_longest_sample_and_leaves_no_trace(workers, zero, precision, mode, accumulation, offload):
    with_it, without = (
        workers(2).run(_trained, zero, precision, preflight, mode, accumulation, offload) for preflight in (True, False)
    )
    for found, expected in zip(with_it, without, strict=True):
        (losses, calls, lengths, *others), (_, _, expected_lengths, *_) = found, expected
        assert losses == expected[0] and others == list(expected[3:]) and calls == expected[1] == 5 * accumulation
        passes = 2 if accumulation > 1 or zero == 3 else 1  # over accumulated gradients, with parameters gathered ahead
        assert lengths == [plain.LENGTH] * passes + expected_lengths and plain.LENGTH not in expected_lengths


class Embedded(plain.TinyLM):
    """Its embeddings are computed by the loop, as with soft prompts."""

    def forward(self, inputs_embeds, labels):
        x = self.norm(inputs_embeds + self.positions[: inputs_embeds.shape[1]])
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def _embedded(preflight):
    torch.manual_seed(7)
    engine = ds_plugin.initialize(model=Embedded(), config=plain.deepspeed_config(2, **section(preflight=preflight)))[0]
    engine.train()
    losses = []
    for step in range(2):
        tokens, labels = plain.micro_batch(step)
        loss = engine(inputs_embeds=engine.module.embedding(tokens).tanh(), labels=labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _features_as_wide_as_samples_on_rank_1():
    engine = plain.make(plain.deepspeed_config(**section()))
    engine.train()
    tokens, features = torch.zeros(plain.MICRO, 3).long(), torch.zeros(plain.MICRO, (5, 3)[dist.get_rank()])
    with pytest.raises(ConfigError) as caught:
        engine(input_ids=tokens, labels=tokens, features=features)
    return str(caught.value)


def test_what_one_rank_cannot_lengthen_for_the_preflight_is_said_on_all(workers):
    first, second = workers(2).run(_features_as_wide_as_samples_on_rank_1)
    assert first == second and "'features' of shape [2, 3]" in first and '"preflight": false' in first


def test_the_preflight_leaves_the_graph_of_embeddings_to_the_step(workers):
    assert workers(1).run(_embedded, True) == workers(1).run(_embedded, False)


class TooLarge(plain.TinyLM):
    def forward(self, input_ids, labels):
        if input_ids.shape[1] == plain.LENGTH:
            activation = self.embedding(input_ids)
            self.activation = weakref.ref(activation)
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return super().forward(input_ids, labels)


def _out_of_memory():
    engine = ds_plugin.initialize(model=TooLarge(), config=plain.deepspeed_config(1, **section()))[0]
    try:
        plain.train(engine, 1)
    except torch.OutOfMemoryError as error:
        return error.__notes__, engine.module.activation() is None
    return None


def test_an_out_of_memory_of_the_preflight_says_so(workers):
    [(notes, freed)] = workers(1).run(_out_of_memory)
    assert freed  # though the error is still at hand
    assert f"a step at the full length of {plain.LENGTH} tokens, does not fit" in notes[0]
    assert "train_micro_batch_size_per_gpu" in notes[0]


class Checkpointing(plain.TinyLM):
    def forward(self, input_ids, labels):
        self.lengths = [*getattr(self, "lengths", []), input_ids.shape[1]]
        x = self.embedding(input_ids) + self.positions[: input_ids.shape[1]]
        x = torch.utils.checkpoint.checkpoint(lambda h: h + self.outer(self.inner(h)), x, use_reentrant=True)
        return torch.nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())


def _checkpointing(preflight):
    torch.manual_seed(7)
    config = plain.deepspeed_config(1, **section(preflight=preflight))
    engine = ds_plugin.initialize(model=Checkpointing(), config=config)[0]
    return plain.train(engine, 4), engine.module.lengths


def test_the_preflight_with_a_reentrant_checkpoint_leaves_no_trace(workers):
    (with_it, lengths), (without, _) = (workers(1).run(_checkpointing, flag)[0] for flag in (True, False))
    assert with_it == without and lengths[0] == plain.LENGTH


def _longer_samples():
    engine = plain.make(plain.deepspeed_config(**section(end_length=12)))  # read 16, never train more than 12
    seen = []
    engine.module.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    plain.train(engine, 9)
    return seen, ds_plugin.get_plugin(engine).ledger.discarded, _shorter_samples()


def _shorter_samples():
    engine = plain.make(plain.deepspeed_config(**section()))
    seen = []
    engine.module.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    tokens, labels = (value[:, :3] for value in plain.micro_batch(0))
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ds_plugin").addHandler(handler)
    engine.train()
    with torch.no_grad():
        engine(tokens, labels)
    engine(*(value[:1, :4] for value in plain.micro_batch(0)))  # the last sample of a data set: not a shorter one
    for _ in range(2):
        engine(tokens, labels)
    return seen, [line for line in said if "sequence length warmup" in line]


def test_the_preflight_is_at_the_longest_that_is_trained(workers):
    seen, discarded, shorter = workers(1).run(_longer_samples)[0]
    lengths, [said] = shorter
    assert lengths == [3, 16, 4, 3, 3]  # before the first pass that trains
    assert "holds 6 tokens where a step of length 4 has room for 8" in said
    assert seen[0] == 12 and max(seen) == 12 and discarded == sum(16 - n for n in seen[1:]) * plain.MICRO


# -- starting from a state that is not ours ---------------------------------------------------------------------------


def _joined_late(folder):
    engine = plain.make(plain.deepspeed_config(accumulation=MICROS), initialize=deepspeed.initialize)
    plain.train(engine, 3)
    engine.save_checkpoint(folder)
    engine, batches = carry()
    engine.load_checkpoint(folder)
    ledger = ds_plugin.get_plugin(engine).ledger
    rate = ds_plugin.get_plugin(engine).warmup.batches_trained(with_open_step=False)
    before = (ledger.read, ledger.trained)
    rows = run(engine, batches, 1)
    late = plain.make(plain.deepspeed_config(accumulation=MICROS), initialize=deepspeed.initialize)
    plain.train(late, 2)
    attached = ds_plugin.attach(late, section()).ledger
    return before, rate, rows, (attached.read, attached.trained)


def test_earlier_steps_count_as_full_length_ones(workers, tmp_path):
    before, rate, rows, attached = workers(1).run(_joined_late, str(tmp_path))[0]
    step = plain.MICRO * MICROS * plain.LENGTH
    assert before == (3 * step, 3 * step) and rate == 3 and attached == (2 * step, 2 * step)
    length, _, seen, *_ = rows[0]
    assert length == 8 and min(seen) == 3 * step  # position 4 of the schedule, and the fourth step's samples


def _unheld(folder):
    def make(pacing):
        return plain.make(plain.deepspeed_config(**section(pacing=pacing, report_interval=1)))

    engine = make("adaptive")
    plain.train(engine, 2)
    warmup = ds_plugin.get_plugin(engine).warmup
    warmup.held, warmup.holding = 1, True
    engine.save_checkpoint(folder)
    engine = make("schedule")
    engine.load_checkpoint(folder)
    lengths = []
    plain.train(engine, 7, lambda e: lengths.append(ds_plugin.get_plugin(e).length))
    return lengths


def test_a_hold_ends_with_adaptive_pacing(workers, tmp_path):
    assert workers(1).run(_unheld, str(tmp_path))[0] == [8, 8, 12, 12, 16, 16, 16]  # of steps 4 to 10


def _whole_batches(folder):
    engine = plain.make(plain.deepspeed_config(weight_averaging=plain.AVERAGING))
    batches, seen = ds_plugin.get_plugin(engine).batches(source), []

    def train(steps):
        for _ in range(steps):
            batch = next(batches)
            seen.append(batch["labels"][0, 0].item() // plain.LENGTH // plain.MICRO)
            engine.backward(engine(batch["input_ids"], batch["labels"] % plain.VOCAB))
            engine.step()

    engine.train()
    train(2)
    engine.save_checkpoint(folder)
    train(3)
    engine.load_checkpoint(folder)
    train(2)
    return seen


def test_whole_batches_go_back_with_a_checkpoint(workers, tmp_path):
    assert workers(1).run(_whole_batches, str(tmp_path))[0] == [0, 1, 2, 3, 4, 2, 3]


# -- the instruments and adaptive pacing ------------------------------------------------------------------------------


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
        found.append((len(reads), warmup.report.variance_max is not None, warmup.held > 0))
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
        rows.append((warmup.length, warmup.held))
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
        rows.append((warmup.report.loss_ratio, *warmup.report.beyond_noise, warmup.held))
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


# -- the mask mode ----------------------------------------------------------------------------------------------------

SIZE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "position_embedding": "rope"}


def _gpt(**changes):
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, **changes})
    gpt.initialize_parallel(cfg, 5)
    config = gpt.transformer_config(cfg, torch.float32)
    return gpt.build_gpt(cfg, 64, config, gpt.layer_spec(cfg))


def _masked():
    model = _gpt()
    warmup = {
        "enabled": True, "start_length": 8, "end_length": 32, "duration": {"steps": 4}, "mode": "mask",
        "schedule": "discrete", "lengths": [8, 16, 32], "boundaries": [2, 4],
    }  # fmt: skip
    config = {**plain.deepspeed_config(), "sequence_length_warmup": warmup}
    engine = ds_plugin.initialize(model=model, config=config)[0]
    plugin, checks = ds_plugin.get_plugin(engine), []
    engine.train()
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 64, (2, 33), generator=generator)
        tokens, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(32).expand(2, -1)
        length = plugin.length
        with torch.no_grad():  # rotary positions are relative: a fragment alone is a sample of its own
            rows = [part.reshape(-1, length) for part in (tokens, positions, labels)]
            alone = model(rows[0], rows[1], None, labels=rows[2]).reshape(2, 32)
        loss = engine(tokens, positions, None, labels=labels)
        checks.append((length, (loss - alone).abs().max().item()))
        engine.backward(loss.mean())
        engine.step()
    return checks, plugin.ledger.read, plugin.ledger.trained


def test_masked_fragments_are_samples_of_their_own(workers):
    checks, read, trained = workers(1).run(_masked)[0]
    assert [length for length, _ in checks] == [8, 8, 16, 16, 32]
    for length, difference in checks:
        assert difference < 1e-5, (length, difference)
    assert read == trained == 5 * 2 * 32


def _mask_refused(what):
    config = {**plain.deepspeed_config(), **section(mode="mask")}
    if what == "plain":
        plain.make(config)
    engine = ds_plugin.initialize(model=_gpt(), config={**config, **section(mode="mask", end_length=32)})[0]
    if what == "batches":
        ds_plugin.get_plugin(engine).warmup.batches(lambda n: iter(()))
    tokens = torch.zeros(2, 32).long()
    engine.train()
    engine(tokens, tokens, torch.zeros(1, 1, 32, 32).bool(), labels=tokens)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("plain", ["mask", "TinyLM", "shorten"]),
        ("batches", ["mask", "full-length"]),
        ("own mask", ["attention_mask of its own", "None"]),
    ],
)
def test_mask_mode_is_refused_where_it_would_not_confine(workers, what, parts):
    error = workers(1).run(_mask_refused, what, expect="errors")[0]
    assert error.type == "ConfigError" and all(part in error.message for part in parts), error


def test_manifest_holds_what_a_resume_needs(workers, tmp_path):
    workers(1).run(_saved, str(tmp_path))
    manifest = json.loads((tmp_path / "global_step3" / "ds_plugin.json").read_text())
    state = manifest["state"]["sequence_length_warmup"]
    samples = plain.MICRO * MICROS
    # 4 of window 0, 4 of window 1, 8 of window 0
    counts = {"read": 32 * samples, "trained": 16 * samples, "carried": 16 * samples}
    assert state["ledger"] == {**counts, "untrained_targets": 0}
    assert state["order"] == {"windows_read": 2, "cuts": 1, "open": [[1, 4], [0, 12]]}
    assert state["train_batch_size"] == samples and state["mode"] == "carry"


def _saved(folder):
    engine, batches = carry()
    run(engine, batches, 3)
    engine.save_checkpoint(folder)


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
