"""Sequence length warmup in DeepSpeed's pipeline engine, against the frameworks alone on batches cut by hand."""

import dataclasses
import functools
import random

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist

import ds_plugin
from tests.distributed import pipelined
from tests.distributed.pipelined import BATCH, LENGTH, LR, MICRO, Layout
from tests.harness import slow

# 4 + 12 * step / 6 tokens: 6, 8, 10, 12, 14, 16, 16
WARMUP = {
    "enabled": True,
    "start_length": 4,
    "end_length": LENGTH,
    "duration": {"steps": 6},
    "multiple_of": 2,
    "report_interval": 3,
    "variance": True,
    "learning_rate": {"by": "tokens"},
}
MODES = {
    "truncate": {},
    "carry": {"mode": "carry", "interleave": 2},
    "constant": {"tokens_per_step": "constant"},
}
STEPS = 7

# By hand: (the step's batch, its first token, its length). Carried: half of batch 2 waits while batch 1 is finished.
STRETCHES = {
    "truncate": [(0, 0, 6), (1, 0, 8), (2, 0, 10), (3, 0, 12), (4, 0, 14), (5, 0, 16), (6, 0, 16)],
    "carry": [(0, 0, 6), (1, 0, 8), (0, 6, 10), (2, 0, 8), (1, 8, 8), (2, 8, 8), (3, 0, 16)],
    "constant": [(step, 0, length) for step, length in enumerate([4, 8, 8, 8, 8, 16, 16])],  # that divide 16
}
# Tokens of one sample after each step: read, trained, carried.
LEDGERS = {
    "truncate": [(16, 6, 0), (32, 14, 0), (48, 24, 0), (64, 36, 0), (80, 50, 0), (96, 66, 0), (112, 82, 0)],
    "carry": [(16, 6, 10), (32, 14, 18), (32, 24, 8), (48, 32, 16), (48, 40, 8), (48, 48, 0), (64, 64, 0)],
    "constant": [(16 * step, 16 * step, 0) for step in range(1, 8)],
}
# The scheduler rises from 1/4 to 1 over 3 * 16 tokens of a sample, and DeepSpeed's count lags one step behind.
RATES = {
    "truncate": [0.25, 0.25, 0.25 + 0.25 * 6 / 16, 0.25 + 0.25 * 14 / 16, 0.25 + 0.25 * 24 / 16, 0.8125, 1.0],
    "carry": [0.25, 0.25, 0.25 + 0.25 * 6 / 16, 0.25 + 0.25 * 14 / 16, 0.25 + 0.25 * 24 / 16, 0.75, 0.875],
    "constant": [0.25, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0],
}


def section(mode="truncate", **changes):
    return {"sequence_length_warmup": {**WARMUP, **MODES.get(mode, {"mode": mode}), **changes}}


def stretch(batch, offset, length):
    (tokens, positions), labels = batch
    return (tokens[:, offset : offset + length], positions[:, :length]), labels[:, offset : offset + length]


def folded(batch, _, length):
    parts = [stretch(batch, at, length) for at in range(0, LENGTH, length)]
    inputs, labels = zip(*parts, strict=True)
    return tuple(torch.cat(tensors) for tensors in zip(*inputs, strict=True)), torch.cat(labels)


def by_hand(mode):
    """Losses of each step, and of an evaluation after it, by DeepSpeed alone on two data-parallel ranks."""
    layout = Layout(data=2)
    engine = pipelined.make(layout, deepspeed.initialize, zero=1, sections={"scheduler": {}})
    losses, evaluations = [], []
    for (window, offset, length), share in zip(STRETCHES[mode], RATES[mode], strict=True):
        for group in engine.optimizer.param_groups:
            group["lr"] = LR * share
        data = pipelined.batches(engine, window * layout.accumulation)
        cut = folded if mode == "constant" else stretch
        losses.append(engine.train_batch(cut(next(data), offset, length) for _ in range(BATCH)).item())
        evaluations.append(pipelined.evaluate(engine))
    return {"losses": losses, "evaluations": evaluations}


def lengths_seen(engine):
    """The lengths of all forward passes of this rank's stage in training mode, as they come."""
    seen = []

    def note(module, arguments):
        if module.training:
            (given,) = arguments
            seen.append(given[0].shape[1] if isinstance(given, tuple) else given.shape[0])

    engine.module.register_forward_pre_hook(note)
    return seen


def source(engine, mode):
    """What a user gives train_batch: in the carry mode the plugin's batches, else an iterator of whole ones."""
    if mode == "carry":
        return ds_plugin.get_plugin(engine).batches(lambda first: pipelined.batches(engine, first))
    return pipelined.batches(engine, engine.global_steps * engine.gradient_accumulation_steps())


def lowest(plugin):
    return min((loss for _, loss, _ in plugin.warmup.monitor.loss_ratio.state()["lowest"]), default=None)


def train(engine, data, steps, evaluations=True):
    """Train on; everything that can be told of it, by step."""
    plugin, found = ds_plugin.get_plugin(engine), []
    for _ in range(steps):
        step = {"length": plugin.length, "rate": engine.optimizer.param_groups[0]["lr"] / LR}
        step["loss"] = engine.train_batch(data).item()
        step["ledger"] = dataclasses.astuple(plugin.ledger)[:3]
        report = plugin.warmup.report
        step["report"] = report if report is not None and report.step == engine.global_steps else None
        step["lowest"] = lowest(plugin)
        step["evaluation"] = pipelined.evaluate(engine) if evaluations else None
        found.append(step)
    return found


def trained(layout, mode, evaluations=True):
    engine = pipelined.make(layout, ds_plugin.initialize, zero=1, sections=section(mode))
    seen = lengths_seen(engine)
    steps = train(engine, source(engine, mode), STEPS, evaluations)
    return {name: [step[name] for step in steps] for name in steps[0]}, seen


@pytest.fixture(scope="module")
def once(workers):
    """`once(ranks, function, *args)` is `workers(ranks).run(...)`, run once for all tests that ask for it."""
    return functools.cache(lambda ranks, function, *args: workers(ranks).run(function, *args))


LAYOUTS = [Layout(data=2), Layout(pipe=2), Layout(pipe=3), Layout(pipe=2, data=2, tensor=2)]


def name_of(layout):
    return f"pp{layout.pipe}-dp{layout.data}-tp{layout.tensor}"


CASES = [(layout, mode) for layout in LAYOUTS for mode in MODES if layout.pipe < 3 or mode == "carry"]
USUAL = {"pp1-dp2-tp1-carry", "pp2-dp1-tp1-constant", "pp2-dp1-tp1-truncate", "pp3-dp1-tp1-carry"}
NAMED = {f"{name_of(layout)}-{mode}": (layout, mode) for layout, mode in CASES}


@pytest.mark.parametrize(
    ("layout", "mode"),
    [(pytest.param if name in USUAL else slow)(*case, id=name) for name, case in NAMED.items()],
)
def test_every_layout_trains_what_the_schedule_says(once, layout, mode):
    expected = once(2, by_hand, mode)[0]
    passes = min(layout.pipe + 1, layout.accumulation)  # the preflight's
    for found, seen in once(layout.ranks, trained, layout, mode):
        lengths = [length for _, _, length in STRETCHES[mode]]
        assert found["length"] == lengths
        assert seen == [LENGTH] * passes + [n for length in lengths for n in [length] * layout.accumulation]
        assert found["loss"] == pytest.approx(expected["losses"], abs=1e-5)
        assert found["evaluation"] == pytest.approx(expected["evaluations"], abs=1e-5)
        assert found["rate"] == pytest.approx(RATES[mode], rel=1e-12)
        assert found["ledger"] == [tuple(n * BATCH * MICRO for n in ledger) for ledger in LEDGERS[mode]]


@pytest.mark.parametrize(
    ("layout", "mode"), [(Layout(pipe=2), "carry"), *(slow(Layout(pipe=2, data=2), mode) for mode in MODES)]
)
def test_evaluations_leave_training_alone(once, layout, mode):
    both = [once(layout.ranks, trained, layout, mode, *without)[0][0] for without in ((), (False,))]
    assert both[0]["loss"] == both[1]["loss"] and both[1]["evaluation"] == [None] * STEPS


@pytest.mark.parametrize("layout", [Layout(pipe=2), slow(Layout(pipe=2, data=2))], ids=name_of)
def test_reports_are_of_the_whole_model(once, layout):
    plain = [found["report"] for found, _ in once(2, trained, Layout(data=2), "truncate")]
    for found, _ in once(layout.ranks, trained, layout, "truncate"):
        losses = found["loss"]
        ratios = [None, *(losses[i] / min(losses[:i]) for i in range(1, STEPS))]
        reports = [report for report in found["report"] if report is not None]
        assert [report.step for report in reports] == [3, 6]
        assert found["lowest"][5] == pytest.approx(min(losses[:6]))  # a ratio would not show a wrong scale
        assert [report.loss_ratio for report in reports] == pytest.approx([ratios[2], ratios[5]])
        largest = [max(ratios[1:3]), max(ratios[3:6])]
        assert [report.max_loss_ratio for report in reports] == pytest.approx(largest)
        for report, other in zip(reports, (report for report in plain[0] if report is not None), strict=True):
            assert report.variance_l1 == pytest.approx(other.variance_l1, rel=1e-5)
            assert report.variance_max == pytest.approx(other.variance_max, rel=1e-5)


def _a_micro_batch_without_labels():
    """The second of every step's micro-batches: its loss is NaN, its gradient 0."""
    changes = {"pacing": "adaptive", "report_interval": 1, "preflight": False}
    engine = pipelined.make(Layout(pipe=2), ds_plugin.initialize, zero=1, sections=section(**changes))
    plugin, losses, of_all = ds_plugin.get_plugin(engine), [], engine.module.loss_fn

    def loss_fn(logits, labels):
        loss = of_all(logits, labels)
        losses.append(loss.item())
        return loss if len(losses) % BATCH != 2 else torch.where(torch.tensor(False), loss, float("nan"))

    engine.module.loss_fn = loss_fn
    data, found = pipelined.batches(engine), []
    for _ in range(4):
        mean = engine.train_batch(data).item()
        found.append((mean, plugin.length, plugin.warmup.hold.lag, lowest(plugin)))
    return losses, found


def test_a_micro_batch_without_labels_is_left_out(workers):
    (_, first), (losses, last) = workers(2).run(_a_micro_batch_without_labels)
    kept = torch.tensor(losses, dtype=torch.float64).view(4, BATCH)[:, [0, 2, 3]].mean(dim=1).tolist()
    assert repr(first) == repr(last)  # a NaN equals nothing
    assert [length for _, length, _, _ in last] == [8, 10, 12, 14] and all(held == 0 for _, _, held, _ in last)
    assert [lowest for *_, lowest in last] == pytest.approx([min(kept[: step + 1]) for step in range(4)], rel=1e-12)
    assert all(mean != mean for mean, *_ in last)  # DeepSpeed's own mean


# -- batch functions --------------------------------------------------------------------------------------------------


class Split:
    """A user's batch function: text [batch, length + 1] into inputs and labels, as Megatron-DeepSpeed has one."""

    def __init__(self):
        self.calls = {"train": 0, "evaluate": 0}

    def __call__(self, batch):
        text, kind = batch
        assert text.shape == (MICRO, LENGTH + 1)
        self.calls[kind] += 1
        return (text[:, :-1], torch.arange(LENGTH).expand(MICRO, -1)), text[:, 1:]


def texts(engine, first, kind="train"):
    for (tokens, _), labels in pipelined.batches(engine, first):
        yield torch.cat([tokens, labels[:, -1:]], dim=1), kind


def with_batch_function(mode, when):
    layout, function = Layout(pipe=2), Split()
    if when == "before":
        engine = pipelined.make(layout, deepspeed.initialize, zero=1)
        engine.set_batch_fn(function)
        ds_plugin.attach(engine, section(mode))
    else:
        engine = pipelined.make(layout, ds_plugin.initialize, zero=1, sections=section(mode))
        engine.set_batch_fn(function)
    data = texts(engine, 0)
    if mode == "carry":
        data = ds_plugin.get_plugin(engine).batches(lambda first: texts(engine, first))
    losses, evaluations = [], []
    for _ in range(STEPS):
        losses.append(engine.train_batch(data).item())
        whole = texts(engine, 10**6 // BATCH * layout.accumulation, "evaluate")
        evaluations.append(engine.eval_batch(whole).item())
    assert function.calls == {kind: STEPS * layout.accumulation for kind in ("train", "evaluate")}
    assert engine.data_iterator is data
    ds_plugin.detach(engine)
    assert engine.batch_fn is function
    return losses, evaluations


@pytest.mark.parametrize(("mode", "when"), [("truncate", "before"), slow("truncate", "after"), ("carry", "after")])
def test_a_batch_function_sees_full_length_micro_batches(workers, once, mode, when):
    expected = once(2, trained, Layout(pipe=2), mode)[0][0]
    for losses, evaluations in workers(2).run(with_batch_function, mode, when):
        assert losses == expected["loss"] and evaluations == expected["evaluation"]


def with_one_reader(layout, mode):
    """Only one rank of each tensor-parallel group reads; the others get its micro-batches by the batch function."""
    engine = pipelined.make(layout, ds_plugin.initialize, zero=1, sections=section(mode))
    group = engine.grid.get_slice_parallel_group()
    reads = engine.grid.get_slice_parallel_rank() == 0

    def share(batch):
        box = [batch]
        dist.broadcast_object_list(box, dist.get_process_group_ranks(group)[0], group=group)
        return box[0]

    engine.set_batch_fn(share)
    data = source(engine, mode) if reads else None
    return [engine.train_batch(data).item() for _ in range(STEPS)]


@pytest.mark.parametrize("mode", [slow("truncate"), "carry"])
def test_one_rank_may_read_for_its_tensor_parallel_group(workers, once, mode):
    expected = once(2, by_hand, mode)[0]["losses"]
    layout = Layout(pipe=2, tensor=2)
    assert all(found == pytest.approx(expected, abs=1e-5) for found in workers(4).run(with_one_reader, layout, mode))


# -- the preflight ----------------------------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    """The samples of `pipelined.micro_batch`, one by one, for the engine's own loader."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        (tokens, positions), labels = pipelined.micro_batch(index // MICRO)
        row = index % MICRO
        return (tokens[row], positions[row]), labels[row]


def draw_more(module, _):
    """Draw from the streams that the model itself does not draw from."""
    if module.training:
        random.random(), np.random.rand(), torch.rand(1)
        with deepspeed.checkpointing.get_cuda_rng_tracker().fork():
            torch.rand(1)


def counters(engine):
    names = ("global_steps", "global_samples", "micro_steps", "skipped_steps", "agg_train_loss", "total_loss", "loss")
    return [str(getattr(engine, name)) for name in names] + [str(engine.lr_scheduler.state_dict())]


def dropped_out(layout, zero, precision, sections, settings, preflight, reader):
    initialize = ds_plugin.initialize
    if reader == "the engine's own":
        initialize = functools.partial(initialize, training_data=Samples())
    sections = {**section("carry" if reader == "carry" else "truncate", preflight=preflight), **sections}
    settings = {"size": {"dropout": 0.1}, **settings}
    engine = pipelined.make(layout, initialize, zero, precision, sections, **settings)
    seen, at_first, read = lengths_seen(engine), [], []
    tracker = deepspeed.checkpointing.get_cuda_rng_tracker()
    tracker.add("model-parallel-rng", 5)
    engine.module.register_forward_pre_hook(draw_more)
    first_length = ds_plugin.get_plugin(engine).length

    def note(module, given):
        if seen[-1] == first_length and not at_first:  # the first pass that counts
            gradients = [name for name, p in engine.module.named_parameters() if p.grad is not None]
            slots = [slot for slots in engine.pipe_buffers.values() for slot in slots if torch.is_tensor(slot)]
            held = [list(slot.shape) for slot in slots if LENGTH in slot.shape]
            at_first.append((counters(engine), gradients, held, engine.module.micro_offset))

    engine.module.register_forward_pre_hook(note)

    def counted(data, first=0):
        for index, batch in enumerate(data, start=first):
            read.append(index)
            yield batch

    data = None
    if reader == "carry":
        data = ds_plugin.get_plugin(engine).batches(lambda n: counted(pipelined.batches(engine, n), n))
    elif reader == "an iterator" and pipelined.batches(engine) is not None:
        data = counted(pipelined.batches(engine))
    own = engine.data_iterator, engine.training_dataloader
    losses = [engine.train_batch(data).item() for _ in range(4)]
    if reader == "the engine's own":
        assert (engine.data_iterator, engine.training_dataloader) == own
    with tracker.fork():
        drawn = [torch.rand(1).item()]
    drawn += [random.random(), np.random.rand(), torch.rand(1).item()]
    weights = {name: value for name, (_, value) in pipelined.weights(engine).items()}
    return seen, (losses, weights, drawn, at_first, read)


RECOMPUTE = {"activation_checkpoint_interval": 1, "use_reentrant": False}


@pytest.mark.parametrize(
    ("layout", "zero", "precision", "sections", "settings", "reader"),
    [
        slow(Layout(pipe=2), 0, "fp32", {}, {"seed_layers": True}, "an iterator"),
        (Layout(pipe=3), 1, "fp32", {"pipeline": RECOMPUTE}, {}, "carry"),
        (Layout(pipe=2), 1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}, {}, "an iterator"),
        slow(Layout(pipe=2), 0, "bf16", {}, {"dynamic_shape": True}, "the engine's own"),
        (Layout(), 1, "bf16", {}, {}, "the engine's own"),
    ],
    ids=["zero0-fp32", "zero1-fp32-carry", "zero1-bf16-fp32", "zero0-bf16-loader", "one-stage"],
)
def test_the_preflight_leaves_no_trace(workers, layout, zero, precision, sections, settings, reader):
    runs = [
        workers(layout.ranks).run(dropped_out, layout, zero, precision, sections, settings, preflight, reader)
        for preflight in (True, False)
    ]
    for (seen, found), (expected_seen, expected) in zip(*runs, strict=True):
        passes = min(layout.pipe + 1, layout.accumulation)  # the most in flight, beside gradients
        assert seen == [LENGTH] * passes + expected_seen and LENGTH not in expected_seen
        losses, weights, *others = found
        assert losses == expected[0] and others == list(expected[2:])
        assert all(gradients == [] and held == [] for _, gradients, held, _ in others[1])
        assert all(torch.equal(value, expected[1][name]) for name, value in weights.items())


def out_of_memory():
    engine = pipelined.make(Layout(), ds_plugin.initialize, 1, "bf16", section("truncate"))

    def fail(module, given):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    engine.module.register_forward_pre_hook(fail)
    try:
        engine.train_batch(pipelined.batches(engine))
    except torch.OutOfMemoryError as error:
        return error.__notes__
    return None


def test_an_out_of_memory_of_the_preflight_says_so(workers):
    [notes] = workers(1).run(out_of_memory)
    assert f"a step at the full length of {LENGTH} tokens, does not fit" in notes[0]


# -- interruptions and refusals ---------------------------------------------------------------------------------------

INTERRUPTED = 4  # two windows are open and an interval of reports has begun


def uninterrupted(folder, layout, mode):
    engine = pipelined.make(layout, ds_plugin.initialize, zero=1, sections=section(mode))
    data = source(engine, mode)
    before = train(engine, data, INTERRUPTED)
    engine.save_checkpoint(folder)
    return before + train(engine, data, STEPS - INTERRUPTED)


def resumed(folder, layout, mode):
    engine = pipelined.make(layout, ds_plugin.initialize, zero=1, sections=section(mode))
    data = source(engine, mode)
    train(engine, data, 1)  # what is there already has to give way
    engine.load_checkpoint(folder)
    # The plugin's batches find their place by themselves.
    return train(engine, data if mode == "carry" else source(engine, mode), STEPS - INTERRUPTED)


@pytest.mark.parametrize(
    ("layout", "mode"), [(Layout(pipe=2), "carry"), *(slow(Layout(pipe=2, data=2), mode) for mode in MODES)]
)
def test_a_resumed_run_is_the_uninterrupted_one(workers, once, tmp_path, layout, mode):
    whole = workers(layout.ranks).run(uninterrupted, str(tmp_path), layout, mode)
    expected = once(layout.ranks, trained, layout, mode)[0][0]
    assert [step["loss"] for step in whole[0]] == expected["loss"]  # a save changes nothing
    for found, steps in zip(workers(layout.ranks).run(resumed, str(tmp_path), layout, mode), whole, strict=True):
        assert found == steps[INTERRUPTED:]


def error_of(action, *args, **kwargs):
    with pytest.raises(Exception) as caught:
        action(*args, **kwargs)
    return f"{type(caught.value).__name__}: {caught.value}"


def refused():
    layout = Layout(pipe=3)  # the stage in the middle refuses too: it would wait for the others
    carries = pipelined.make(layout, ds_plugin.initialize, sections=section("carry"))
    whole = pipelined.make(layout, ds_plugin.initialize, sections=section())
    return [
        error_of(carries.train_batch, iter([])),
        error_of(whole.set_train_batch_size, 2 * BATCH * MICRO),
        error_of(pipelined.make, layout, ds_plugin.initialize, sections=section("mask")),
        error_of(whole.train_batch, pipelined.batches(whole, length=LENGTH - 2)),
    ]


def test_what_cannot_work_is_refused(workers):
    for carry, size, mask, length in workers(3).run(refused):
        assert carry.startswith("StateError") and "train_batch(...) ds_plugin.get_plugin(engine).batches(" in carry
        assert size.startswith("StateError") and "batch size cannot be changed" in size
        assert mask.startswith("ConfigError") and 'write "truncate" or "carry"' in mask
        assert length.startswith("ConfigError") and "end_length: 16" in length
