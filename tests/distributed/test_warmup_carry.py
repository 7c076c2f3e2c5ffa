"""Sequence length warmup that carries tokens: each is trained once, also when a run is killed; and late beginnings."""

import json

import deepspeed
import pytest
import torch

import ds_plugin
from ds_plugin.core.errors import CheckpointError, ConfigError
from tests.distributed import plain
from tests.distributed.warmup import MICROS, carry, run, section, source
from tests.harness import slow


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


def _ended(folder):
    """A run in which nothing is carried any more is saved; what other runs that load it say."""
    engine, batches = carry()
    run(engine, batches, 14)
    order = ds_plugin.get_plugin(engine).warmup.order.state()
    engine.save_checkpoint(folder)
    said = []
    truncate = section(learning_rate={"by": "tokens"})
    for sections in ({"weight_averaging": plain.AVERAGING}, truncate):
        other = plain.make(plain.deepspeed_config(accumulation=MICROS, **sections))
        with pytest.raises(CheckpointError) as refused:
            other.load_checkpoint(folder)
        said.append(str(refused.value))
    again, batches = carry()
    again.load_checkpoint(folder)
    return order, next(batches)["labels"][0, 0].item() // plain.LENGTH // plain.MICRO, said


def test_what_carry_has_read_ahead_is_read_by_no_other_mode(workers, tmp_path):
    """The others would begin at the step that was reached, and leave out what carry has yet to read."""
    order, read, (without, truncate) = workers(1).run(_ended, str(tmp_path))[0]
    assert order["open"] == [] and read < 14 * MICROS
    assert "has read" in without and "give the same section" in without
    assert "trained with mode 'carry'" in truncate and "resume with 'carry'" in truncate


def _own_function():
    """What is said of a function that shortens, where samples are cut by their tensors' names."""
    said = []

    def shorten(args, kwargs, length):
        raise AssertionError("is not called")

    for changes in ({"mode": "carry", "learning_rate": {"by": "tokens"}}, {}):
        config = plain.deepspeed_config(accumulation=MICROS, **section(**changes))
        with pytest.raises(ConfigError) as refused:
            ds_plugin.get_plugin(plain.make(config, shorten=shorten)).batches(source)
        said.append(str(refused.value))
    return said


def test_a_function_that_shortens_is_refused_where_it_would_not_be_called(workers):
    carried, read = workers(1).run(_own_function)[0]
    assert 'mode: "carry" cuts samples by their tensors\' names' in carried and read.startswith("shorten: batches(...)")
