"""The averager on a stand-in for an engine: uneven, empty and non-contiguous shards."""

import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from ds_plugin.core.errors import CheckpointError, ConfigError, StateError
from ds_plugin.deepspeed_engine import readings
from ds_plugin.weight_averaging import restart, swap, window
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots import memory, storage
from ds_plugin.weight_averaging.state import files
from ds_plugin.weight_averaging.state.fragments import whole
from tests.reference import averaging as reference


class Engine:
    """Three shards, one of them empty; counts its refreshes."""

    layout = "sharded"

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.masters = [torch.randn(7, dtype=dtype), torch.empty(0, dtype=dtype), torch.randn(3, 5, dtype=dtype)]
        self.refreshed = 0

    def tensors(self):
        return self.masters

    def refresh(self):
        self.refreshed += 1

    def fragments(self):
        return whole((f"weight{i}", m.shape, i, 0) for i, m in enumerate(self.masters))

    def step(self):
        for master in self.masters:
            master.add_(torch.randn(master.shape) * 0.1)

    def copy(self):
        return [m.clone() for m in self.masters]


def make(engine, **changes):
    size = {} if changes.get("mode") == "ema" else {"window": 3}
    settings = {"enabled": True, "interval": 2, **size, **changes}
    return WeightAverager(WeightAveragingConfig.model_validate(settings), engine)


def run(averager, engine, steps, start=1):
    """Returns the masters after each step."""
    history = {}
    for step in range(start, start + steps):
        engine.step()
        if averager.due(step):
            averager.snapshot(step)
        history[step] = engine.copy()
    return history


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def mean_of(snapshots):
    return [sum(tensors[1:], start=tensors[0].clone()) / len(tensors) for tensors in zip(*snapshots, strict=True)]


@pytest.mark.parametrize(
    ("interval", "start", "expected"),
    [(1, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [2, 4, 6]), (3, 0, [3, 6]), (2, 4, [4, 6]), (2, 5, [6]), (7, 0, [])],
)
def test_due(interval, start, expected):
    averager = make(Engine(), interval=interval, start_step=start)
    assert [step for step in range(1, 7) if averager.due(step)] == expected


def test_the_window_slides_and_the_mean_is_bitwise():
    engine = Engine()
    averager = make(engine)
    history = run(averager, engine, 9)  # snapshots at 2, 4, 6, 8; three are kept
    assert averager.steps == [4, 6, 8]
    assert equal(averager.snapshots()[0], history[4]) and equal(averager.snapshots()[2], history[8])
    before = engine.copy()
    with averager.averaged_weights():
        assert equal(engine.masters, mean_of([history[4], history[6], history[8]]))
        assert not equal(engine.masters, before)
        assert engine.refreshed == 1
    assert equal(engine.masters, before)
    assert engine.refreshed == 2


def test_a_window_that_is_not_full_averages_what_it_has():
    engine = Engine()
    averager = make(engine, window=5)
    history = run(averager, engine, 4)
    with averager.averaged_weights():
        assert equal(engine.masters, mean_of([history[2], history[4]]))


def test_reading_twice_gives_the_same_bits():
    engine = Engine()
    averager = make(engine)
    run(averager, engine, 8)
    with averager.averaged_weights():
        first = engine.copy()
    with averager.averaged_weights():
        assert equal(engine.masters, first)


def test_weights_return_when_the_evaluation_fails(caplog):
    """What went wrong is said before the ranks may have to wait for one that is alone with it."""
    engine = Engine()
    averager = make(engine)
    run(averager, engine, 4)
    before, refresh, said = engine.copy(), engine.refresh, []
    engine.refresh = lambda: (said.append(caplog.text), refresh())
    with pytest.raises(ZeroDivisionError), averager.averaged_weights():
        raise ZeroDivisionError("a bad sample")
    assert equal(engine.masters, before) and not averager.swapped
    assert said[0] == "" and "block ends with ZeroDivisionError: a bad sample" in said[1]


def test_a_swap_in_pieces_is_the_same_swap(monkeypatch):
    monkeypatch.setattr(swap, "EXCHANGE_ELEMENTS", 4)  # 7 and 15 elements: pieces that do not divide them
    test_the_window_slides_and_the_mean_is_bitwise()


def test_exchange_of_non_contiguous_tensors():
    left, right = torch.randn(4, 6), torch.randn(6, 4)
    a, b = left.clone(), right.t().clone()
    exchange = swap.Exchange([left], [right.t()])
    exchange.forth()
    assert torch.equal(left, b) and torch.equal(right.t(), a)
    exchange.back()
    assert torch.equal(left, a) and torch.equal(right.t(), b)


class Copying(Engine):
    """A shard with strides, 16-bit copies that a refresh writes, and a model with a BatchNorm in training mode."""

    def __init__(self):
        super().__init__()
        self.masters.append(torch.randn(4, 3).t())
        self.low = [m.bfloat16() for m in self.masters]
        self.models = [torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3, affine=False))]
        self.models[0][1].register_buffer("wide", torch.ones(1).expand(4), persistent=False)  # cannot be written to

    def refresh(self):
        for low, master in zip(self.low, self.masters, strict=True):
            low.copy_(master)

    def evaluate(self):
        self.models[0](torch.randn(5, 3) * 3 + 2)
        self.models[0][1].num_batches_tracked = torch.tensor(9)  # another tensor under its name

    def everything(self):
        buffers = list(self.models[0].buffers())
        return [t.clone() for t in [*self.masters, *self.low, *buffers]], [id(b) for b in buffers]


class Failing(TorchDispatchMode):
    """torch's calls number ``first`` to ``last`` fail; one that copies has then written what is not its source."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last, self.calls = first, last, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if self.first <= self.calls <= self.last:
            if func is torch.ops.aten.copy_.default:
                args[0].fill_(-77)
            raise torch.OutOfMemoryError(f"call {self.calls}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lasting", [False, True], ids=["one call fails", "all later calls fail"])
@pytest.mark.parametrize("restart_instead", [False, True], ids=["a swap", "a restart"])
def test_a_swap_that_fails_anywhere_is_undone_or_steps_are_refused(restart_instead, lasting, monkeypatch):
    monkeypatch.setattr(swap, "EXCHANGE_ELEMENTS", 8)
    engine = Copying()
    averager = make(engine, window=2)
    run(averager, engine, 4)
    engine.refresh()
    average = [m.clone() for m in averager.read()]
    undone = refused = 0
    for call in itertools.count(1):
        before, steps, entered = engine.everything(), list(averager.steps), False
        mode = Failing(call, 10**9 if lasting else call)
        try:
            with mode:
                if restart_instead:
                    averager.restart()
                else:
                    with averager.averaged_weights():
                        entered = True
                        assert equal(engine.masters, average)
                        mode.calls, here = -(10**6), mode.calls  # what evaluation does is not what is tested
                        engine.evaluate()
                        mode.calls = here
        except (torch.OutOfMemoryError, StateError) as error:
            raised = error
        else:
            break
        if averager.swapped:  # said, and what would train on the average is refused
            refused += 1
            assert isinstance(raised, StateError) and "could not be put back (OutOfMemoryError: call" in str(raised)
            with pytest.raises(StateError, match="a step while the averaged .* start again from the last checkpoint"):
                averager.refuse_while_swapped("a step")
            with pytest.raises(StateError, match="could not be put back"), averager.averaged_weights():
                pass
            assert entered or lasting
            engine = Copying()
            averager = make(engine, window=2)
            run(averager, engine, 4)
            engine.refresh()
            average = [m.clone() for m in averager.read()]
        else:
            undone += 1
            after = engine.everything()
            assert equal(before[0], after[0]) and before[1] == after[1] and averager.steps == steps, call
    assert undone >= 20
    assert (refused > 0) == (lasting or not restart_instead)
    assert equal(engine.masters, average if restart_instead else before[0][: len(engine.masters)])


def test_buffers_that_evaluation_changes_are_put_back():
    engine = Copying()
    averager = make(engine)
    run(averager, engine, 2)
    engine.refresh()
    before = engine.everything()
    with averager.averaged_weights():
        engine.evaluate()
        inside = engine.everything()
    after = engine.everything()
    assert equal(before[0], after[0]) and before[1] == after[1]
    assert sum(not torch.equal(a, b) for a, b in zip(inside[0][-7:], before[0][-7:], strict=True)) == 6


class Angles(torch.nn.Module):
    """A table that grows with the longest sample so far, whose length is an attribute; and a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.length = 0
        self.register_buffer("table", torch.zeros(0), persistent=False)
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, length):
        if length > self.length:
            self.length, self.table = length, torch.arange(float(length))
        return self.table[:length]


def test_a_cache_that_evaluation_has_grown_stays():
    engine = Engine()
    engine.models = [Angles()]
    averager = make(engine)
    run(averager, engine, 2)
    graph = engine.models[0].graph
    with averager.averaged_weights():
        engine.models[0](5)
        del engine.models[0].graph
        graph.mul_(2)
    assert engine.models[0](5).tolist() == [0, 1, 2, 3, 4]
    assert (
        torch.equal(engine.models[0].state_dict()["graph"].to_dense(), torch.eye(3)) and engine.models[0].graph is graph
    )


def test_refusals():
    engine = Engine()
    averager = make(engine, start_step=5)
    with pytest.raises(StateError, match="first is taken at step 6"), averager.averaged_weights():
        pass
    run(averager, engine, 6)
    with (
        averager.averaged_weights(),
        pytest.raises(StateError, match="another read of the average while"),
        averager.averaged_weights(),
    ):
        pass
    with pytest.raises(ConfigError, match="bfloat16"):
        make(Engine(torch.bfloat16))


# -- modes -----------------------------------------------------------------------------------------------------------

BLOCK, EMA = {"mode": "block"}, {"mode": "ema", "horizons": [2, 4]}


def named(tensors):
    return dict(enumerate(tensors))


def read(averager, engine, horizon=None):
    with averager.averaged_weights(horizon):
        return named(engine.copy())


def same(left, right):
    return all(torch.equal(left[key], right[key]) for key in right)


def test_blocks_do_not_overlap():
    """Steps 2, 4, 6 are the first block, 8, 10, 12 the second."""
    engine = Engine()
    averager = make(engine, **BLOCK)
    held = []
    for step in range(1, 15):
        history = run(averager, engine, 1, start=step)
        if step % 2 == 0:
            held.append(named(history[step]))
            assert same(read(averager, engine), reference.last_block(held, 3)), step
            first, second = ([2, 4, 6], [8, 10, 12])
            assert averager.steps == (second if step >= 12 else first[: step // 2])


def test_a_bank_of_horizons():
    engine = Engine()
    averager = make(engine, **EMA)
    held = []
    for step in range(1, 15):
        history = run(averager, engine, 1, start=step)
        if step % 2 == 0:
            held.append(named(history[step]))
            for horizon in (2, 4):
                assert same(read(averager, engine, horizon), reference.ema(held, horizon)), (step, horizon)
            assert same(read(averager, engine), reference.ema(held, 2))  # the first is the default
    assert averager.steps == [2, 14]
    plain_mean = reference.mean(held[:4])  # up to its horizon an average is the plain mean, but for rounding
    assert all(torch.allclose(reference.ema(held[:4], 4)[key], plain_mean[key], atol=1e-6) for key in plain_mean)


@pytest.mark.parametrize(
    ("weights", "used"),
    [("wma", {2: [1, 2], 3: [1, 2, 3]}), ([0.0, 1.0, 3.0], {2: [1, 3], 3: [0, 1, 3]})],
)
def test_weights_at_read_time(weights, used):
    engine = Engine()
    averager = make(engine, weights=weights)
    history = run(averager, engine, 4)
    assert same(read(averager, engine), reference.weighted_mean([named(history[s]) for s in (2, 4)], used[2]))
    history |= run(averager, engine, 4, start=5)
    assert same(read(averager, engine), reference.weighted_mean([named(history[s]) for s in (4, 6, 8)], used[3]))


def test_horizons_that_are_not_there():
    engine = Engine()
    for changes, part in ((EMA, r"\[2, 4\]"), (BLOCK, "'block'")):
        averager = make(engine, **changes)
        run(averager, engine, 2)
        with pytest.raises(StateError, match=f"no horizon 3.*{part}"), averager.averaged_weights(3):
            pass


@pytest.mark.parametrize("changes", [{}, BLOCK, EMA])
def test_what_is_not_finite_is_left_out(changes, caplog):
    engine = Engine()
    averager = make(engine, **changes)
    run(averager, engine, 3)
    expected = read(averager, engine)
    with caplog.at_level(logging.WARNING, "ds_plugin"):
        averager.snapshot(4, finite=False)  # the gradient norm said so
        engine.masters[2][1, 1] = torch.nan
        averager.snapshot(6)  # nobody said anything
        averager.snapshot(8)
    assert set(averager.steps) == {2} and caplog.text.count("step 4 is not finite") == 1 == len(caplog.records)
    assert same(read(averager, engine), expected)


def dense(norm):
    return SimpleNamespace(get_global_grad_norm=lambda: norm, mp_world_size=1, has_moe_layers=False)


@pytest.mark.parametrize(
    ("norm", "verdict"),
    [(None, None), (1.5, True), (0.0, True), (float("nan"), False), (float("inf"), False), (torch.tensor(-1.0), False)],
)
def test_the_norm_says_whether_a_step_was_finite(norm, verdict):
    assert readings.step_was_finite(dense(norm)) is verdict


def test_a_norm_on_the_accelerator_is_not_read_there():
    norm = torch.ones((), device="meta")  # which has no value: reading it would raise
    verdict = readings.step_was_finite(dense(norm))
    assert verdict is norm


def test_zero_without_a_norm_is_refused():
    engine = SimpleNamespace(optimizer=SimpleNamespace(compute_grad_norm=False))
    with pytest.raises(ConfigError, match="compute_grad_norm is false.*write true"):
        readings.refuse_unknown_norm(engine)


def test_an_optimizer_that_grew_is_refused_everywhere(tmp_path):
    """As by add_param_group() after attach: a new master, or an old one in another shape."""
    for change in (lambda masters: [*masters, torch.ones(4)], lambda masters: [masters[0][:5], *masters[1:]]):
        engine = Engine()
        averager = make(engine)
        run(averager, engine, 4)
        engine.masters = change(engine.masters)
        before = engine.copy()
        for use in (
            lambda averager=averager: averager.snapshot(6, finite=True),
            lambda averager=averager: averager.averaged_weights().__enter__(),
            lambda averager=averager: averager.restart(),
            lambda averager=averager: files.save(tmp_path, averager, **IDENTITY),
        ):
            with pytest.raises(StateError, match=r"master weights of \d+ elements, and had 3 of 22 .*add_param_group"):
                use()
        assert averager.steps == [2, 4] and not averager.swapped and equal(engine.masters, before)
        assert list(tmp_path.iterdir()) == []


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "copies"), [({}, 4), (BLOCK, 3), (EMA, 3), ({"window": 9}, 10)])
def test_memory_is_worked_out_and_allocated(changes, copies, monkeypatch):
    """22 elements in three shards."""
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(t := empty(*a, **k)) or t)
    engine = Engine()
    del allocated[:]
    averager = make(engine, **changes)
    assert averager.memory.rank == copies * 22 * 4 == sum(t.nbytes for t in allocated)
    assert f"{averager.memory.rank / 1e6:.1f} MB of CPU memory on this rank" in averager.describe()


def test_pinned_memory_is_rounded_up():
    assert [memory.rounded(size) for size in (0, 1, 28, 32, 33)] == [0, 1, 32, 32, 64]


def test_too_little_memory_is_refused_before_any_is_allocated(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=351))
    monkeypatch.setattr(storage.Storage, "allocate", lambda *a: pytest.fail("allocated"))
    with pytest.raises(ConfigError, match=r'1 rank.* need 0.0 MB.*available; write a smaller "window"'):
        make(Engine())


# -- restart ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, BLOCK, EMA])
def test_a_restart_replaces_the_weights_and_forgets(changes):
    engine = Engine()
    averager = make(engine, **changes)
    with pytest.raises(StateError, match="no snapshot"):
        averager.restart()
    run(averager, engine, 5)
    expected, refreshed = read(averager, engine), engine.refreshed
    with averager.averaged_weights(), pytest.raises(StateError, match="another read of the average while"):
        averager.restart()
    averager.restart()
    assert same(named(engine.masters), expected) and engine.refreshed == refreshed + 3
    assert averager.steps == []
    history = run(averager, engine, 2, start=6)
    assert same(read(averager, engine), named(history[6]))


def to_reset(optimizer):
    engine = SimpleNamespace(optimizer=optimizer)
    return restart.to_reset(readings.optimizers(engine), torch.device("cpu"), keep=False)


def test_moments_start_again():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], amsgrad=True)
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state[parameter]
    restart.zero_(to_reset(optimizer))
    assert len(state) == 4 and all(not value.any() for value in state.values())
    state["step"] = 5  # as DeepSpeed's own Adams count
    restart.zero_(to_reset(optimizer))
    assert state["step"] == 0
    state["worker_error"] = torch.ones(3)
    with pytest.raises(StateError, match="worker_error.*moments='keep'"):
        to_reset(optimizer)


# -- on disk ---------------------------------------------------------------------------------------------------------

IDENTITY = {"rank": 0, "world_size": 2, "save_id": "abc"}


def saved(tmp_path, **changes):
    engine = Engine()
    averager = make(engine, **changes)
    run(averager, engine, 7)
    files.save(tmp_path, averager, **IDENTITY)
    return engine, averager


def test_resume_continues_bitwise(tmp_path):
    engine, averager = saved(tmp_path)
    other_engine = Engine()
    other = make(other_engine)
    files.load(tmp_path, other, **IDENTITY)
    assert other.steps == averager.steps == [2, 4, 6]
    for a, b in zip(engine.masters, other_engine.masters, strict=True):
        b.copy_(a)
    state = torch.get_rng_state()
    run(averager, engine, 5, start=8)
    torch.set_rng_state(state)
    run(other, other_engine, 5, start=8)
    with averager.averaged_weights(), other.averaged_weights():
        assert equal(engine.masters, other_engine.masters)


def test_another_window_keeps_the_newest(tmp_path):
    _, averager = saved(tmp_path)
    smaller = make(Engine(), window=2)
    files.load(tmp_path, smaller, **IDENTITY)
    assert smaller.steps == [4, 6]
    assert equal(smaller.snapshots()[1], averager.snapshots()[2])
    larger = make(Engine(), window=9)
    files.load(tmp_path, larger, **IDENTITY)
    assert larger.steps == [2, 4, 6]


@pytest.mark.parametrize("changes", [BLOCK, EMA], ids=["block", "ema"])
@pytest.mark.parametrize("before", [1, 4, 6, 9])  # nothing, an open block, a finished one, both
def test_other_modes_resume_bitwise(tmp_path, changes, before):
    engine = Engine()
    averager = make(engine, **changes)
    run(averager, engine, before)
    files.save(tmp_path, averager, **IDENTITY)
    other_engine = Engine()
    other = make(other_engine, **changes)
    run(other, other_engine, 5)  # what it holds gives way
    files.load(tmp_path, other, **IDENTITY)
    assert other.steps == averager.steps
    window.copy_(other_engine.masters, engine.masters)
    state = torch.get_rng_state()
    for steps in range(4):
        torch.set_rng_state(state)
        run(averager, engine, steps, start=before + 1)
        torch.set_rng_state(state)
        run(other, other_engine, steps, start=before + 1)
        if averager.steps:
            assert same(read(averager, engine), read(other, other_engine))
        state = torch.get_rng_state()
        before += steps


@pytest.mark.parametrize(
    ("saved_as", "resumed_as", "parts"),
    [
        ({}, BLOCK, ["mode", "'sliding'", "'block'"]),
        (EMA, {}, ["mode", "'ema'", "'sliding'"]),
        (BLOCK, {**BLOCK, "window": 2}, ["window", "3", "2"]),
        (EMA, {**EMA, "horizons": [4, 2]}, ["horizons", "[2, 4]", "[4, 2]"]),
    ],
)
def test_another_mode_is_refused(tmp_path, saved_as, resumed_as, parts):
    saved(tmp_path, **saved_as)
    averager = make(Engine(), **resumed_as)
    with pytest.raises(CheckpointError) as caught:
        files.load(tmp_path, averager, **IDENTITY)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert averager.steps == []


def test_altered_weights_are_noticed(tmp_path):
    saved(tmp_path)
    path = tmp_path / files.shard_name(0)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="rank_00000.*not those that were saved"):
        files.load(tmp_path, make(Engine()), **IDENTITY)


@pytest.mark.parametrize("number", [None, "4", "6"])
def test_files_of_another_format_are_refused_by_name(tmp_path, number):
    metadata = {"steps": "[2, 4, 6]"} | ({} if number is None else {"format": number})
    save_file({"snapshot.0.0": torch.zeros(7)}, tmp_path / files.shard_name(0), metadata=metadata)
    averager = make(Engine())
    with pytest.raises(CheckpointError, match=f"rank_00000.*format {number!r}, this version reads '5'"):
        files.load(tmp_path, averager, **IDENTITY)
    assert averager.steps == []


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda p: p.unlink(), ["missing", "weight_averaging_rank_00000.safetensors"]),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), ["damaged"]),
        (lambda p: p.write_bytes(b"not safetensors"), ["damaged"]),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, parts):
    saved(tmp_path)
    damage(tmp_path / files.shard_name(0))
    averager = make(Engine())
    with pytest.raises(CheckpointError) as caught:
        files.load(tmp_path, averager, **IDENTITY)
    assert all(part in str(caught.value) for part in [*parts, "--tag"]), str(caught.value)
    assert averager.steps == []


@pytest.mark.parametrize(("key", "value"), [("world_size", 3), ("save_id", "xyz")])
def test_a_foreign_shard_is_named(tmp_path, key, value):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=f"{key}.*{IDENTITY[key]}.*{value}"):
        files.load(tmp_path, make(Engine()), **{**IDENTITY, key: value})


def test_another_ranks_shard_is_named(tmp_path):
    saved(tmp_path)
    (tmp_path / files.shard_name(0)).rename(tmp_path / files.shard_name(1))
    with pytest.raises(CheckpointError, match="rank 0 where this run expects 1"):
        files.load(tmp_path, make(Engine()), **{**IDENTITY, "rank": 1})


def test_weights_of_another_size_are_named(tmp_path):
    engine = Engine()
    averager = make(engine)
    run(averager, engine, 7)
    alone = {**IDENTITY, "world_size": 1}
    files.save(tmp_path, averager, **alone)
    engine.masters[0] = torch.zeros(9)
    with pytest.raises(CheckpointError, match=r"parameter weight0 as a part of \[7\].*\[9\]"):
        files.load(tmp_path, make(engine), **alone)
    engine = Engine()
    engine.masters.append(torch.zeros(1))
    with pytest.raises(CheckpointError, match="element 0 of parameter weight3 .*none of.*rank_00000"):
        files.load(tmp_path, make(engine), **alone)
