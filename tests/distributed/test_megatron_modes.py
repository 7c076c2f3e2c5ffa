"""Warmup's modes, its instruments and restarts in Megatron-LM's loop, on the stand-in of `test_pretrain_megatron`."""

import functools

import pytest
import torch

from ds_plugin.sequence_length_warmup.carry import CarryOrder
from tests.distributed.megatron_stand_in import (
    ALL_THREE,
    BATCH,
    FULL,
    LAYOUTS,
    LENGTHS,
    STEPS,
    WARMUP,
    read_through,
    run,
    same,
)
from tests.harness import slow
from tests.reference import averaging

CARRY = {**WARMUP, "mode": "carry", "interleave": 3}
MASK = {**WARMUP, "mode": "mask"}


def sample(number):
    """As the script's data have it."""
    drawn = torch.randint(0, 8, (FULL + 1,), generator=torch.Generator().manual_seed(1000 + number))
    drawn[0] = number % 32
    return drawn[:-1].tolist()


def spans_by_hand():
    """(window, offset, length) of each iteration: up to three windows open, in turn, what is left divided evenly."""
    order, found = CarryOrder(full=FULL, multiple_of=8, interleave=3), []
    for length in LENGTHS:
        found.append(span := order.peek(length))
        order.advance(span)
    return found, order.carried


@pytest.mark.parametrize("layout", ["pipeline", slow("tensor"), slow("data")])
def test_carry_trains_every_token_once_and_resumes(workers, tmp_path, layout):
    """Which tokens each iteration trains, on every rank; stopped while batches are open, and gone on with."""
    spans, carried = spans_by_hand()
    assert {span.window for span in spans[4:]} & {span.window for span in spans[:4]}  # open where it is stopped
    sections = {**ALL_THREE, "sequence_length_warmup": {**CARRY, "learning_rate": {"by": "tokens"}, "preflight": True}}
    options = {**LAYOUTS[layout], "save": str(tmp_path / "run"), "save_interval": 2}
    whole = workers(2).run(run, str(tmp_path), sections, options)
    load = {**options, "load": options["save"], "ckpt_step": 4, "save": None}
    again = workers(2).run(run, str(tmp_path), sections, load)
    later = workers(2).run(run, str(tmp_path), sections, {**load, "ckpt_step": 6})  # fewer windows read than iterations
    assert [one["losses"] for one in later] == [one["losses"][6:] for one in whole]
    assert [[seen for _, *seen in one["trained"]] for one in later] == [
        [seen for _, *seen in one["trained"]][-len(two["trained"]) :] for one, two in zip(whole, later, strict=True)
    ]
    for rank, (found, resumed) in enumerate(zip(whole, again, strict=True)):
        assert found["code"] == resumed["code"] == 0, found["said"] + resumed["said"]
        seen, ranks, first = {}, 2 if layout == "data" else 1, rank if layout == "data" else 0
        for (step, tokens, positions), (at, index) in of_training(found, STEPS, ranks):
            span, size = spans[at], 2
            assert step == at
            numbers = [span.window * BATCH + (index * ranks + first) * size + i for i in range(size)]
            window = slice(span.offset, span.offset + span.length)
            assert tokens == [sample(number)[window] for number in numbers]
            assert positions == [list(range(span.length))] * size
            for number in numbers:
                taken = seen.setdefault(number, set())
                assert taken.isdisjoint(range(*window.indices(FULL)))  # no token twice
                taken |= set(range(*window.indices(FULL)))
        trained_tokens = sum(map(len, seen.values())) * ranks
        assert trained_tokens == sum(span.length for span in spans) * BATCH
        assert len(seen) * ranks * FULL - trained_tokens == carried * BATCH  # of what was read
        assert resumed["losses"] == found["losses"][4:] and resumed["lr"] == found["lr"][4:]
        assert of_training(resumed, 4, ranks, 4) == of_training(found, STEPS, ranks)[4 * (2 // ranks) :]
        assert [same(a, b) for a, b in zip(resumed["weights"], found["weights"][4:], strict=True)] == [[]] * 4


def of_training(found, steps, ranks, first=0):
    """What was recorded of the iterations, each with its number and the micro-batch's; the preflight comes first."""
    count = 2 // ranks
    entries = found["trained"][-steps * count :]
    return [(entry, (first + i // count, i % count)) for i, entry in enumerate(entries)]


def masks_by_hand(training):
    """The fragments' mask put into the data: the twin of the hooks."""

    def confined(batches):
        for number, batch in enumerate(batches):
            length = LENGTHS[number // (2 // training.get_args().data_parallel_size)]
            allowed = torch.zeros(FULL, FULL, dtype=torch.bool)
            for start in range(0, FULL, length):
                allowed[start : start + length, start : start + length] = True
            batch["attention_mask"] = (batch["attention_mask"] | ~allowed).contiguous()
            yield batch

    read_through(training, confined)


@pytest.mark.parametrize("layout", ["pipeline", slow("tensor"), slow("data")])
def test_mask_confines_attention_on_every_stage(workers, tmp_path, layout):
    options = {**LAYOUTS[layout], "save": str(tmp_path / "run")}
    hooked = workers(2).run(run, str(tmp_path), {"sequence_length_warmup": MASK}, options)
    plain = workers(2).run(run, str(tmp_path), {}, {**options, "save": str(tmp_path / "plain")}, twin=masks_by_hand)
    full = workers(2).run(run, str(tmp_path), {}, {**options, "save": None, "train_iters": 2})
    for found, expected, uncut in zip(hooked, plain, full, strict=True):
        assert found["code"] == 0, found["said"]
        assert {shape for shape, _ in found["train"]} == {(2, FULL)}
        assert found["losses"] == expected["losses"] and found["eval"] == expected["eval"]
        assert [same(a, b) for a, b in zip(found["weights"], expected["weights"], strict=True)] == [[]] * STEPS
        assert same(found["weights"][1], uncut["weights"][1]) != []
        assert [e[1] for e in found["evaluations"]] == [e[1] for e in expected["evaluations"]]
    lines = [line for line in hooked[-1]["printed"] if "sequence length" in line]
    assert [int(line.split("sequence length:")[1].split("|")[0]) for line in lines] == LENGTHS
    load = {**options, "load": options["save"], "ckpt_step": 4, "save": None}
    again = workers(2).run(run, str(tmp_path), {"sequence_length_warmup": MASK}, load)
    assert [one["losses"] for one in again] == [one["losses"][4:] for one in hooked]


def folded_by_hand(training):
    """More, shorter samples put into the data and into Megatron-LM's sizes: the twin of the hooks."""
    train_step = training.train_step

    @functools.wraps(train_step)
    def shorter(*args, iteration):
        options = training.get_args()
        parts = FULL // FOLDED[iteration]
        options.seq_length, options.micro_batch_size = FOLDED[iteration], 2 * parts
        scheduler = args[4]
        step = scheduler.step
        scheduler.step = lambda increment: step(increment=increment // parts)
        result = train_step(*args, iteration=iteration)
        scheduler.step = step
        options.seq_length, options.micro_batch_size = FULL, 2
        return result

    def narrowed(batches):
        for batch in batches:
            length = training.get_args().seq_length
            starts = range(0, FULL, length)
            for name in ("tokens", "labels", "loss_mask"):
                batch[name] = torch.cat([batch[name][:, at : at + length] for at in starts])
            batch["position_ids"] = torch.arange(length).expand(len(batch["tokens"]), -1).contiguous()
            causal = torch.ones(length, length, dtype=torch.bool).triu(1)
            batch["attention_mask"] = causal.expand(len(batch["tokens"]), 1, -1, -1).contiguous()
            batch["dataset_id"] = batch["dataset_id"].repeat(len(starts))
            yield batch

    training.train_step = shorter
    read_through(training, narrowed)


FOLDED = [8, 16, 16, 16, 32, 32, 32, 32]  # the lengths that divide 32: 24 is 16


@pytest.mark.parametrize("layout", ["pipeline", slow("tensor"), slow("data")])
def test_a_step_keeps_its_tokens_in_more_samples(workers, tmp_path, layout):
    """Losses, weights, rates and counts as by hand; a resumed run is the uninterrupted one."""
    constant = {**WARMUP, "tokens_per_step": "constant"}
    options = {**LAYOUTS[layout], "save": str(tmp_path / "run")}
    hooked = workers(2).run(run, str(tmp_path), {"sequence_length_warmup": constant}, options)
    by_tokens = {"sequence_length_warmup": {**constant, "learning_rate": {"by": "tokens"}}}
    counted = workers(2).run(run, str(tmp_path), by_tokens, {**options, "save": None})
    assert [one["lr"] for one in counted] == [one["lr"] for one in hooked]  # every step has as many tokens
    plain = workers(2).run(run, str(tmp_path), {}, {**options, "save": str(tmp_path / "plain")}, twin=folded_by_hand)
    for found, expected in zip(hooked, plain, strict=True):
        assert found["code"] == 0, found["said"]
        shapes = [shape for shape, _ in found["train"]]
        assert shapes[:: len(shapes) // STEPS] == [(2 * FULL // length, length) for length in FOLDED]
        for name in ("train", "losses", "lr", "eval", "trained"):
            assert found.get(name) == expected.get(name), name
        assert [same(a, b) for a, b in zip(found["weights"], expected["weights"], strict=True)] == [[]] * STEPS
        assert found["tokens of the log"] == [BATCH * FULL] * STEPS
        operations = [BATCH * FULL // n * (1000 * n + n * n) for n in FOLDED]
        assert found["operations"] == [sum(operations)]
        assert [tokens for _, tokens, _ in found["progress"]] == [4 * BATCH * FULL, 8 * BATCH * FULL]
    load = {**options, "load": options["save"], "ckpt_step": 4, "save": None}
    again = workers(2).run(run, str(tmp_path), {"sequence_length_warmup": {**constant, "preflight": True}}, load)
    assert [one["losses"] for one in again] == [one["losses"][4:] for one in hooked]


def spiking(training, at=3):
    """Before iteration ``at`` (counted from 0) the model becomes another, far worse one."""
    train_step = training.train_step

    @functools.wraps(train_step)
    def spoiled(*args, iteration):
        if iteration == at:
            with torch.no_grad():
                for chunk in args[2]:
                    for name, parameter in chunk.named_parameters():
                        if "output_layer" in name or "word_embeddings" in name:
                            parameter.mul_(300.0)
        return train_step(*args, iteration=iteration)

    training.train_step = spoiled


def spiking_later(training):
    spiking(training, at=4)


def test_the_length_is_held_while_the_loss_is_high(workers, tmp_path):
    """And the log, TensorBoard and W&B have the loss ratio; a resumed run stands where it stood."""
    adaptive = {**WARMUP, "pacing": "adaptive", "report_interval": 1, "variance": True}
    options = {**LAYOUTS["pipeline"], "save": str(tmp_path / "run")}
    whole = workers(2).run(run, str(tmp_path), {"sequence_length_warmup": adaptive}, options, twin=spiking)
    assert [found["code"] for found in whole] == [0, 0], whole[0]["said"]
    load = {**options, "load": options["save"], "ckpt_step": 4, "save": None}
    again = workers(2).run(run, str(tmp_path), {"sequence_length_warmup": adaptive}, load, twin=spiking)
    for found, resumed in zip(whole, again, strict=True):
        assert found["code"] == resumed["code"] == 0, found["said"]
        lengths = [shape[1] for shape, _ in found["train"]][::2]
        assert lengths[:4] == LENGTHS[:4] and lengths[4] == lengths[3] < LENGTHS[4]
        assert [shape[1] for shape, _ in resumed["train"]][::2] == lengths[4:]
        assert resumed["losses"] == found["losses"][4:]
    assert "step 4, the length is held at 24: a loss was" in whole[0]["warned"].replace("\n", " ")
    last = whole[-1]
    ratios = [value for name, value, _ in last["tensorboard"] if name == "loss ratio"]
    losses = last["losses"]
    assert len(ratios) == STEPS - 1 and max(ratios[:2]) < 1.2 < ratios[2]  # the first step has none before it
    assert ratios[2] == pytest.approx(losses[3] / min(losses[:3]), rel=1e-6)
    assert f"loss ratio: {ratios[2]:.4f} |" in next(line for line in last["printed"] if "iteration 4 |" in line)
    logged = [values for values, _ in last["wandb"] if "loss ratio" in values]
    assert [values["loss ratio"] for values in logged] == ratios
    assert all(values["variance l1"] > values["variance max"] > 0 for values in logged)
    assert "tensorboard" not in whole[0]


def test_training_goes_back_to_the_average_after_a_spike(workers, tmp_path):
    """Steps 5 and 6 are above; a snapshot of step 5 was taken by then, and is forgotten."""
    found = {}
    for moments in ("keep", "reset"):
        restart = {"loss_ratio": 1.2, "patience": 2, "moments": moments}
        sections = {"weight_averaging": {"enabled": True, "interval": 1, "window": 3, "restart": restart}}
        options = {**LAYOUTS["pipeline"], "save": str(tmp_path / moments)}
        found[moments] = whole = workers(2).run(run, str(tmp_path), sections, options, twin=spiking_later)
        for one in whole:
            assert one["code"] == 0, one["said"]
            assert same(one["weights"][5], averaging.mean(one["weights"][2:4])) == []
        said = whole[0]["warned"].replace("\n", " ")
        assert "step 6, the loss is above 1.2" in said and "goes back to the average of steps 3 to 4" in said
    for keeps, resets in zip(found["keep"], found["reset"], strict=True):
        assert keeps["losses"][:7] == resets["losses"][:7]
        assert same(keeps["weights"][6], resets["weights"][6]) != []  # by the first step from the average
    load = {**options, "load": options["save"], "ckpt_step": 4, "save": None}
    again = workers(2).run(run, str(tmp_path), sections, load, twin=spiking_later)
    for one, resumed in zip(whole, again, strict=True):
        assert resumed["losses"] == one["losses"][4:]
        assert [same(a, b) for a, b in zip(resumed["weights"], one["weights"][4:], strict=True)] == [[]] * 4
