"""Where snapshots lie, and differences in bf16, on a stand-in for an engine with uneven and empty shards."""

import errno
import gc
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from ds_plugin.core.errors import CheckpointError, ConfigError
from ds_plugin.weight_averaging import deltas, modes
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots import memory, storage
from ds_plugin.weight_averaging.state import files as checkpoint
from ds_plugin.weight_averaging.state.fragments import whole
from tests.reference import averaging as reference
from tests.reference import deltas as reference_deltas

BLOCK, EMA, BF16 = {"mode": "block"}, {"mode": "ema", "horizons": [2, 4]}, {"deltas": "bf16"}
IDENTITY = {"rank": 0, "world_size": 1, "save_id": "abc"}


class Engine:
    """Three shards of 7, 0 and 3 x 5 elements, the last one with strides, as parameters may have them."""

    layout = "sharded"

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.masters = [self.noise(7), self.noise(0), self.noise(5, 3).t()]

    def noise(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def tensors(self):
        return self.masters

    def refresh(self):
        pass

    def fragments(self):
        return whole((f"p{i}", t.shape, i, 0) for i, t in enumerate(self.masters))

    def step(self):
        for master in self.masters:
            master.add_(self.noise(*master.shape) * 0.01)

    def named(self):
        return {i: m.clone() for i, m in enumerate(self.masters)}


def parse(**changes):
    size = {} if changes.get("mode") == "ema" else {"window": 3}
    return WeightAveragingConfig.model_validate({"enabled": True, "interval": 1, **size, **changes})


def make(engine, **changes):
    return WeightAverager(parse(**changes), engine)


def run(averager, engine, steps, start=1):
    """The masters after each step."""
    held = []
    for step in range(start, start + steps):
        engine.step()
        averager.snapshot(step)
        held.append(engine.named())
    return held


def read(averager, engine, horizon=None):
    with averager.averaged_weights(horizon):
        return engine.named()


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in right)


def mapped(folder):
    """Files in a folder that this process has mapped into memory: their size each."""
    gc.collect()
    with open("/proc/self/maps") as file:
        spans = [line.split()[0].split("-") for line in file if f"{folder}/" in line]
    return [int(end, 16) - int(start, 16) for start, end in spans]


# -- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"storage": "disk"}, ["storage", "'pinned', 'memory' or 'files'"]),
        ({"storage": "files"}, ["storage_path: missing", "folder"]),
        ({"storage": "files", "storage_path": ""}, ["storage_path: missing"]),
        ({"storage_path": "/tmp"}, ["storage_path: '/tmp'", "'pinned'", "leave it out"]),
        ({"deltas": "fp16"}, ["deltas", "'fp32' or 'bf16'"]),
        ({**BF16, **BLOCK}, ["deltas", "'block'", '"mode": "sliding"']),
        ({**BF16, **EMA}, ["deltas", "'ema'"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, parts):
    with pytest.raises(ValueError) as caught:
        parse(**changes)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"weights": "wma"}, BLOCK, EMA, BF16], ids=str)
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_every_storage_gives_the_bits_of_the_default(tmp_path, changes, kind):
    engines = [Engine(), Engine()]
    where = {"storage": kind, **({"storage_path": str(tmp_path)} if kind == "files" else {})}
    averagers = [make(engines[0], **changes), make(engines[1], **changes, **where)]
    for step in range(1, 9):
        for averager, engine in zip(averagers, engines, strict=True):
            run(averager, engine, 1, start=step)
        left, right = (read(a, h) for a, h in zip(averagers, engines, strict=True))
        assert equal(left, right) and averagers[0].steps == averagers[1].steps, step


@pytest.mark.parametrize(
    ("changes", "in_memory", "in_files"),
    [  # 22 elements; the spare buffer is 4 bytes each
        ({}, 22 * 4 * 4, None),
        (BF16, 22 * (4 + 2 * 2 + 4), None),
        ({**BF16, "window": 1}, 22 * (4 + 4), None),
        ({"storage": "files"}, 22 * 4, 22 * 4 * 3),
        ({"storage": "files", **BF16}, 22 * 4, 22 * (4 + 2 * 2)),
        ({"storage": "files", **EMA}, 22 * 4, 22 * 4 * 2),
    ],
    ids=str,
)
def test_what_it_takes_is_worked_out_and_said(tmp_path, changes, in_memory, in_files):
    folder = {"storage_path": str(tmp_path)} if in_files else {}
    averager = make(Engine(), **changes, **folder)
    assert averager.memory.rank == in_memory
    assert (averager.files and averager.files.rank) == in_files
    kept, spare = storage.Storage(averager.config, Engine().masters, modes.buffers(averager.config)).allocate()
    assert sum(map(nbytes, [*kept, spare])) == in_memory + (in_files or 0)  # and that is what is allocated
    line = averager.describe()
    assert f"{in_memory / 1e6:.1f} MB of CPU memory" in line
    assert (f"of files in {tmp_path}" in line) == bool(in_files)
    assert ("bf16 differences" in line) == (changes.get("deltas") == "bf16")


def nbytes(held):
    if isinstance(held, torch.Tensor):
        return held.nbytes
    return sum(map(nbytes, held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()))


def test_files_have_no_names_and_go_with_the_averager(tmp_path):
    engine = Engine()
    averager = make(engine, storage="files", storage_path=str(tmp_path), **BF16)
    run(averager, engine, 5)
    page = os.sysconf("SC_PAGE_SIZE")
    assert mapped(tmp_path) == [page] * 3 and os.listdir(tmp_path) == []
    del averager
    assert mapped(tmp_path) == [] and os.listdir(tmp_path) == []


def test_blocks_are_on_disk_before_anything_is_written(tmp_path, monkeypatch):
    allocated, real = [], os.posix_fallocate

    def fallocate(descriptor, start, length):
        real(descriptor, start, length)
        allocated.append((start, length, os.fstat(descriptor).st_blocks * 512))

    monkeypatch.setattr(storage.os, "posix_fallocate", fallocate)
    make(Engine(), storage="files", storage_path=str(tmp_path))
    assert [a[:2] for a in allocated] == [(0, 88)] * 3 and all(a[2] >= 88 for a in allocated)


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=f"storage_path: no file of 0.0 MB .*{tmp_path}.*No space left.*make room"):
        make(Engine(), storage="files", storage_path=str(tmp_path))
    assert os.listdir(tmp_path) == [] and mapped(tmp_path) == []


def test_too_little_disk_is_refused_before_any_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.Storage, "allocate", lambda *a: pytest.fail("allocated"))
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=263))
    with pytest.raises(ConfigError, match=f'need 0.0 MB of files in {tmp_path}.*available.*"storage_path" with more'):
        make(Engine(), storage="files", storage_path=str(tmp_path))
    for folder in (tmp_path / "absent", "/proc/self/status"):
        with pytest.raises(ConfigError, match=f"storage_path: '{folder}' is not a folder.*make it"):
            make(Engine(), storage="files", storage_path=str(folder))


def test_files_are_saved_and_resumed(tmp_path):
    """Their shards are parts of one mapping."""
    engine = Engine()
    averager = make(engine, storage="files", storage_path=str(tmp_path))
    run(averager, engine, 4)
    checkpoint.save(tmp_path, averager, **IDENTITY)
    other = make(engine, storage="files", storage_path=str(tmp_path))
    checkpoint.load(tmp_path, other, **IDENTITY)
    assert other.steps == [2, 3, 4] and equal(read(other, engine), read(averager, engine))


# -- pinned memory, which torch rounds up ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "counts", "taken"),
    [
        ([], [], 0),
        ([0, 0], [2], 0),
        ([4096], [1], 4096),
        ([4097], [1], 8192),
        ([4097] * 2, [2], 16384),
        ([4097] * 3, [3], 16384),  # 12291 bytes; one by one 24576
        ([4097] * 6, [6], 32768),  # 24582; one by one 49152
        ([4224] * 4, [1, 3], 24576),  # 16896; all in one 32768
        ([4096] * 5, [1, 4], 20480),  # exact
        ([4000, 2000, 2000], [3], 8192),  # 4096 twice would do, too: the fewest allocations
    ],
)
def test_buffers_are_pinned_so_that_least_is_rounded_up(sizes, counts, taken):
    assert memory.pinned(sizes) == taken
    assert [len(batch) for batch in memory.batches(sizes)] == counts
    assert sum(memory.batches(sizes), start=[]) == sizes

    def fewest(left):  # every way to put them into allocations
        return min((memory.rounded(sum(left[:n])) + fewest(left[n:]) for n in range(1, len(left) + 1)), default=0)

    assert taken == fewest(sizes)


def test_a_window_of_five_and_the_spare_buffer_waste_a_third_at_most():
    worst = max(memory.pinned([size] * 6) / (6 * size) for size in range(2**12, 2**13))
    assert 1.33 < worst < 4 / 3


@pytest.fixture
def pinned(monkeypatch):
    """Bytes of the allocations that were asked for pinned."""
    taken, empty = [], torch.empty

    def pretend(*shape, pin_memory=False, **settings):
        found = empty(*shape, **settings)
        taken.extend([found.nbytes] if pin_memory else [])
        return found

    monkeypatch.setattr(storage.torch, "empty", pretend)
    monkeypatch.setattr(storage, "has_streams", lambda kind: kind == "cuda")
    return taken


def on_gpu(*counts):
    """Masters of param groups, as `Storage` looks at them."""
    shape = torch.Size
    return [SimpleNamespace(device=torch.device("cuda"), shape=shape([n]), numel=lambda n=n: n) for n in counts]


@pytest.mark.parametrize(
    ("changes", "kept", "batches"),
    [  # 350 floats are 1400 bytes, 1408 with what aligns them, halves 704; 5 take 64 as either. Four times 4288 in all,
        ({}, [torch.float32] * 3, [1408, 15744]),  # as 2048 and 16384
        (BF16, [torch.float32] + [torch.bfloat16] * 2, [1408, 3584, 7936]),  # and here as 2048, 4096 and 8192
        ({"storage": "memory"}, [torch.float32] * 3, [1408, 2880]),
        ({"storage": "files"}, [torch.float32] * 3, [1408, 2880]),
    ],
    ids=str,
)
def test_groups_are_pinned_together_where_that_wastes_less(tmp_path, changes, kept, batches, pinned):
    folder = {"storage_path": str(tmp_path)} if changes.get("storage") == "files" else {}
    masters = on_gpu(350, 350, 0, 350, 5)
    where = storage.Storage(parse(**changes, **folder), masters, kept)
    held, files = where.reserve()
    assert pinned == []  # not before all ranks know that there is room
    buffers, spare = where.allocate()
    buffers = [*buffers, spare]
    assert pinned == batches
    plain = 0 if where.exchangeable or files else 3 * 4220
    assert held.rank == sum(map(memory.rounded, batches)) + plain
    places = []
    for dtype, buffer in zip([*kept, torch.float32], buffers, strict=True):
        assert [t.shape for t in buffer] == [m.shape for m in masters]
        assert all(t.dtype == dtype and t.is_contiguous() for t in buffer)
        places += [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in buffer if t.numel()]
    assert all(end <= start for (_, end), (start, _) in zip(sorted(places), sorted(places)[1:], strict=False))


# -- differences in bf16 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("weights", ["mean", "wma"])
def test_differences_equal_the_naive_chain(window, weights, monkeypatch):
    monkeypatch.setattr(deltas.window, "PIECE", 4)  # 7 and 15 elements: pieces that do not divide them
    engine = Engine()
    averager = make(engine, window=window, weights=weights, **BF16)
    held = []
    for step in range(1, 9):
        held += run(averager, engine, 1, start=step)
        whole = reference_deltas.restored(held[-window:])
        assert averager.steps == list(range(max(1, step - window + 1), step + 1))
        kept = reference_deltas.snapshots(averager)
        assert all(equal(dict(enumerate(a)), b) for a, b in zip(kept, whole, strict=True))
        relative = [i + 1 if weights == "wma" else 1 for i in range(len(whole))]
        expected = reference.weighted_mean(whole, relative)
        assert equal(read(averager, engine), expected), step


def test_the_error_is_within_its_bound_and_does_not_build_up():
    """As `deltas` derives it, worked out in fp64; 200 snapshots, of which 5 are in the window."""
    engine, window, u, v = Engine(), 5, 2**-8, 2**-24
    averager = make(engine, window=window, **BF16)
    exact, largest = [], torch.zeros(())
    for step in range(1, 201):
        exact = [*exact, *run(averager, engine, 1, start=step)][-window:]
        snapshots = reference_deltas.snapshots(averager)
        bound = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in exact[0].items()}
        for i in range(len(exact) - 2, -1, -1):
            for name in bound:
                moved = (exact[i][name].double() - exact[i + 1][name].double()).abs()
                summed = snapshots[i][name].double().abs() * (1 + v)  # the sum before it was rounded
                bound[name] += (u + v + u * v) * moved + v * summed
                error = (snapshots[i][name].double() - exact[i][name].double()).abs()
                assert (error <= bound[name]).all(), (step, i)
                largest = max(largest, error.max() if error.numel() else largest)
    raw = max((value.bfloat16().double() - value.double()).abs().max() for value in exact[0].values() if value.numel())
    assert 1e-5 < largest < raw / 20  # there is an error, and it is far from that of weights kept in bf16


def test_a_raw_difference_is_rounded_once():
    """By hand: 1 - 2^-9 is a tie between 1 and 1 - 2^-8, and goes to the even one; 2^-30 more decides it."""
    out = [torch.empty(2, dtype=torch.bfloat16)]
    deltas.quantize_delta_(out, [torch.tensor([1 - 2**-9, 1 - 2**-9 - 2**-24])], [torch.zeros(2)])
    assert out[0].tolist() == [1.0, 1 - 2**-8]


@pytest.mark.parametrize(("before", "window"), [(1, 3), (2, 3), (7, 3), (7, 2), (7, 1), (7, 5)])
def test_differences_are_saved_and_resumed_bitwise(tmp_path, before, window):
    engine = Engine()
    averager = make(engine, **BF16)
    run(averager, engine, before)
    checkpoint.save(tmp_path, averager, **IDENTITY)
    saved = averager.mode.tensors()
    assert {t.dtype for n, t in saved.items() if n.startswith("snapshot.0.")} == {torch.float32}
    older = {t.dtype for n, t in saved.items() if not n.startswith("snapshot.0.")}
    assert older == ({torch.bfloat16} if before > 1 else set())
    other_engine = Engine(1)
    other = make(other_engine, window=window, **BF16)
    run(other, other_engine, 4)  # what it holds gives way
    checkpoint.load(tmp_path, other, **IDENTITY)
    assert other.steps == averager.steps[-window:]
    kept, found = reference_deltas.snapshots(averager)[-window:], reference_deltas.snapshots(other)
    for left, right in zip(kept, found, strict=True):
        assert equal(dict(enumerate(left)), dict(enumerate(right)))
    if window == 3:
        for a, b in zip(engine.masters, other_engine.masters, strict=True):
            b.copy_(a)
        other_engine.generator = torch.Generator().set_state(engine.generator.get_state())
        for step in range(before + 1, before + 5):
            run(averager, engine, 1, start=step)
            run(other, other_engine, 1, start=step)
            assert equal(read(averager, engine), read(other, other_engine))


@pytest.mark.parametrize(("saved_as", "resumed_as"), [({}, BF16), (BF16, {})], ids=str)
def test_whole_snapshots_and_differences_do_not_mix(tmp_path, saved_as, resumed_as):
    engine = Engine()
    averager = make(engine, **saved_as)
    run(averager, engine, 4)
    checkpoint.save(tmp_path, averager, **IDENTITY)
    other = make(Engine(), **resumed_as)
    with pytest.raises(CheckpointError, match="deltas '(fp32|bf16)', this run has '(fp32|bf16)'"):
        checkpoint.load(tmp_path, other, **IDENTITY)
    assert other.steps == []


# -- a mode that keeps the buffer it is given ------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, BLOCK, EMA, BF16], ids=str)
def test_taking_a_buffer_is_adding_it(changes):
    """Every buffer is in one hand at a time; what is given is not read again by anyone who does not hold it."""

    def allocate(dtype):
        return [torch.full((6,), float("nan"), dtype=dtype)]

    config = parse(**changes)
    adding, taking = (modes.make(config, list(map(allocate, modes.buffers(config)))) for _ in range(2))
    spare, out = allocate(torch.float32), [allocate(torch.float32) for _ in range(2)]
    seen = set()
    for step in range(1, 12):
        value = [torch.randn(6)]
        spare[0].copy_(value[0])
        adding.add(step, value)
        spare = taking.take(step, spare)
        spare[0].fill_(torch.nan)
        seen.add(spare[0].data_ptr())
        for mode, target in zip((adding, taking), out, strict=True):
            mode.read_(target, None)
        assert torch.equal(out[0][0], out[1][0]) and adding.steps() == taking.steps(), step
    assert len(seen) == {"{}": 4, "{'deltas': 'bf16'}": 2}.get(str(changes), 1)


def test_masters_in_cpu_memory_are_copied_once_and_without_a_thread(monkeypatch):
    engine = Engine()
    averager = make(engine)
    monkeypatch.setattr(averager.mode, "take", lambda *a: pytest.fail("they went through the spare buffer"))
    before = set(threading.enumerate())
    run(averager, engine, 3)
    assert set(threading.enumerate()) <= before and averager.steps == [1, 2, 3]
