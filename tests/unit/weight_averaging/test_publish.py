"""The plan of a published model by hand, and the writing on one rank: headers, cuts, who writes what, failures."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from ds_plugin.core.errors import ConfigError, PluginError, StateError
from ds_plugin.deepspeed_engine import publish as publishing
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.publish.layout import Cut, Entry, Report, agree, cut_along, index_of, plan_files
from ds_plugin.weight_averaging.state.fragments import whole

HALF = torch.bfloat16


def test_the_header_says_where_each_byte_is():
    entries = [Entry("a", HALF, (3,)), Entry("b", torch.float32, (2, 2), ("c",)), Entry("d", torch.int64, ())]
    (file,) = plan_files(entries, 1000)
    assert file.name == "model.safetensors"
    length = int.from_bytes(file.header[:8], "little")
    assert length % 8 == 0 and length == len(file.header) - 8
    assert json.loads(file.header[8:]) == {
        "__metadata__": {"format": "pt", "c": "b"},
        "d": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},  # the widest first: each is aligned to its items
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]},
        "a": {"dtype": "BF16", "shape": [3], "data_offsets": [24, 30]},
    }
    assert file.offsets == {"d": 8 + length, "b": 16 + length, "a": 32 + length} and file.size == 38 + length


# bytes of the tensors in order -> the tensors of each file, with 100 bytes a file
SPLITS = [
    ([100], [[0]]),
    ([60, 40, 4], [[0, 1], [2]]),
    ([40, 400, 40, 60], [[0], [1], [2, 3]]),
    ([100, 0], [[0, 1]]),
    ([], [[]]),
]


@pytest.mark.parametrize(("sizes", "expected"), SPLITS)
def test_files_hold_what_fits(sizes, expected):
    entries = [Entry(str(i), torch.float32, (size // 4,)) for i, size in enumerate(sizes)]
    files = plan_files(entries, 100)
    assert [[int(name) for name in file.offsets] for file in files] == expected
    if len(files) > 1:
        count = len(files)
        assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        index = json.loads(index_of(files))
        assert index["metadata"] == {"total_size": sum(sizes)}
        assert index["weight_map"] == {str(i): files[at].name for at, some in enumerate(expected) for i in some}


# this rank's slice, what it is cut along, start and count in it -> (first element of the whole, elements)
RUNS = [
    # [2, 3] of [4, 3] by rows, second rank: elements 6 to 11
    ((2, 3), 0, 1, 1, 0, 6, [(6, 6)]),
    ((2, 3), 0, 1, 1, 2, 3, [(8, 3)]),
    # [2, 3] of [2, 6] by columns: each row of 6 has 3 of the first rank, then 3 of the second
    ((2, 3), 1, 1, 0, 0, 6, [(0, 3), (6, 3)]),
    ((2, 3), 1, 1, 1, 0, 6, [(3, 3), (9, 3)]),
    ((2, 3), 1, 1, 1, 2, 2, [(5, 1), (9, 1)]),
    # [4, 2] of [8, 2], two tensors of two rows end to end: rows 0 1 and 4 5 of the first rank, 2 3 and 6 7 of the other
    ((4, 2), 0, 2, 0, 0, 8, [(0, 4), (8, 4)]),
    ((4, 2), 0, 2, 1, 0, 8, [(4, 4), (12, 4)]),
    ((4, 2), 0, 2, 1, 3, 2, [(7, 1), (12, 1)]),
    ((4,), 0, 2, 1, 1, 2, [(3, 1), (6, 1)]),
]


@pytest.mark.parametrize(("shape", "dim", "stride", "rank", "start", "count", "expected"), RUNS)
def test_where_a_slice_lies_in_the_whole(shape, dim, stride, rank, start, count, expected):
    whole_shape, cut = cut_along(shape, dim, stride, rank, 2)
    assert whole_shape == tuple(size * (2 if d == dim else 1) for d, size in enumerate(shape))
    assert list(cut.runs(start, count)) == expected


def test_slices_make_the_tensor_that_concatenation_makes():
    for dim, stride, ranks in [(0, 1, 2), (0, 2, 3), (1, 1, 3), (1, 3, 2), (2, 2, 2)]:
        slices = [torch.randn(4, 6, 2) for _ in range(ranks)]
        chunks = [s.chunk(stride, dim) for s in slices]
        expected = torch.cat([chunks[r][i] for i in range(stride) for r in range(ranks)], dim)
        found = torch.full(expected.shape, float("nan"))
        for rank, values in enumerate(slices):
            shape, cut = cut_along((4, 6, 2), dim, stride, rank, ranks)
            assert shape == expected.shape
            for start, count in [(0, 7), (7, 1), (8, 40)]:  # as shards divide it
                for at, length in cut.runs(start, count):
                    found.view(-1)[at : at + length] = values.view(-1)[start : start + length]
                    start += length
        assert torch.equal(found, expected), (dim, stride, ranks)
    assert list(Cut(10).runs(3, 5)) == [(3, 5)]
    for dim, stride in [(3, 1), (-1, 1), (0, 3)]:
        with pytest.raises(StateError, match="cannot be cut"):
            cut_along((4, 6, 2), dim, stride, 0, 2)


def _row(name, numel=4, tp_sharded=False, zero3_sharded=False):
    return Entry(name, torch.float32, (numel,), (), tp_sharded, zero3_sharded)


def _writes(reports, layout):
    found = [agree(reports, rank, layout, "tied_modules.") for rank in range(len(reports))]
    assert all(entries == found[0][0] for entries, _ in found)
    return [e.name for e in found[0][0]], [mine for _, mine in found]


def test_who_writes_what_under_data_parallelism():
    rows = (_row("a"), _row("frozen"), _row("part", zero3_sharded=True))
    reports = [Report((0, 0), rows, (1, 0, 0)), Report((0, 0), None, (3, 0, 0))]
    assert _writes(reports, "sharded") == (
        ["a", "frozen", "part"],
        [[(0, True), (1, False), (2, False)], [(0, True), (2, False)]],
    )
    reports = [Report((0, 0), rows[:2], (4, 0)), Report((0, 0), None, (4, 0))]
    assert _writes(reports, "replicated") == (["a", "frozen"], [[(0, True), (1, False)], []])


def test_who_writes_what_of_stages_and_slices():
    first = (_row("tied_modules.e", 8, tp_sharded=True), _row("0.a"))
    second = (_row("1.b", 8, tp_sharded=True), _row("tied_modules.e", 8, tp_sharded=True))
    reports = [
        Report((0, 0), first, (4, 4)),
        Report((0, 1), first, (4, 4)),
        Report((1, 0), second, (4, 4)),
        Report((1, 1), second, (4, 4)),
    ]
    names, mine = _writes(reports, "sharded")
    assert names == ["tied_modules.e", "0.a", "1.b"]
    assert mine == [[(0, True), (1, True)], [(0, True)], [(0, True)], [(0, True)]]


REFUSED = [
    # two ranks' places and rows, the elements each has of the average
    ([((0, 0), (_row("a"),), (1,)), ((0, 0), None, (2,))], "hold 3 elements of a where 4 are needed"),
    ([((0, 0), (_row("a"),), (4,)), ((0, 0), None, (4,))], "hold 8 elements of a"),
    ([((0, 0), (_row("a"),), (4,)), ((1, 0), (_row("a"),), (4,))], "stages 0 and 1 both have a a, which is not tied"),
    ([((0, 0), (_row("a"),), (4,)), ((0, 1), (_row("a", 8),), (8,))], r"a is .* \[4\] on one rank and .* \[8\]"),
    (
        [((0, 0), (_row("a", tp_sharded=True),), (2,)), ((0, 1), (_row("b"),), (4,))],
        "not the same on all tensor-parallel",
    ),
    ([((0, 0), (_row("a"), _row("b")), (4, 4)), ((0, 1), (_row("a"),), (4,))], "b is not the same"),
]


@pytest.mark.parametrize(("reports", "message"), REFUSED)
def test_ranks_that_do_not_fit_together_are_refused(reports, message):
    with pytest.raises(StateError, match=message):
        agree([Report(*report) for report in reports], 0, "sharded", "tied_modules.")


class Tied(torch.nn.Module):
    """Tied and odd tensors; everything but `frozen` is averaged."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 5)
        self.second = torch.nn.Linear(3, 5, bias=False)
        self.second.weight = self.first.weight
        self.frozen = torch.nn.Parameter(torch.randn(2, 3).t().bfloat16(), requires_grad=False)  # with strides
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.ones(9), persistent=False)


class Whole:
    """Every averaged parameter whole, as at stage 0."""

    layout = "replicated"

    def __init__(self, model):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def tensors(self):
        return [p.data for p in self.parameters.values()]

    def refresh(self):
        raise AssertionError("the average never is in the model")

    def fragments(self):
        return whole((name, p.shape, i, 0) for i, (name, p) in enumerate(self.parameters.items()))


@pytest.fixture
def averaged():
    """An engine of one rank without torch.distributed, its averager, and the average by hand."""
    torch.manual_seed(0)
    engine = SimpleNamespace(module=Tied(), mpu=None, autotp_size=lambda: 1, has_moe_layers=False)
    shards = Whole(engine.module)
    averager = WeightAverager(WeightAveragingConfig(enabled=True, window=2, interval=1), shards)
    expected = {name: torch.zeros_like(p) for name, p in shards.parameters.items()}
    for step in (1, 2):
        for name, p in shards.parameters.items():
            p.data.add_(torch.randn(p.shape))
            expected[name] += p.detach()
        averager.snapshot(step, finite=True)
    state = engine.module.state_dict()
    others = {n: state[n] for n in ("frozen", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")}
    return engine, averager, {n: v / 2 for n, v in expected.items()} | others


def _equal(found, expected):
    assert found.keys() == expected.keys()
    return [n for n in found if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]


@pytest.mark.parametrize(("size", "piece"), [(10**9, 2), (40, 10**6)])
def test_the_folder_holds_the_average_and_what_is_not_averaged(averaged, tmp_path, monkeypatch, size, piece):
    engine, averager, expected = averaged
    monkeypatch.setattr(publishing, "PIECE", piece)
    pwrite = os.pwrite
    monkeypatch.setattr(publishing.os, "pwrite", lambda fd, view, at: pwrite(fd, view[:7], at))  # as signals cut it
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    folder = tmp_path / "new" / "average"
    files = publishing.publish(engine, averager, folder, max_shard_bytes=size)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"] and list((tmp_path / "new").iterdir()) == [folder]
    assert len(files) == (1 if size > 40 else 5)
    assert _equal({n: v for file in files for n, v in load_file(file).items()}, expected) == []
    assert _equal(engine.module.state_dict(), before) == []
    names = {file.name for file in files} | ({"model.safetensors.index.json"} if size == 40 else set())
    assert {p.name for p in folder.iterdir()} == names
    if size == 40:
        weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert all(name in load_file(folder / file) for name, file in weights.items()) and weights.keys() == set(
            expected
        )
    else:
        with safe_open(files[0], "pt") as opened:
            assert opened.metadata() == {"format": "pt", "second.weight": "first.weight"}
        model = Tied()
        assert load_model(model, files[0]) == (set(), [])
        assert torch.equal(model.second.weight, expected["first.weight"])


def test_one_dtype_for_all(averaged, tmp_path):
    engine, averager, expected = averaged
    (file,) = publishing.publish(engine, averager, tmp_path / "a", dtype=HALF)
    expected = {n: v.to(HALF) if v.is_floating_point() else v for n, v in expected.items()}
    assert _equal(load_file(file), expected) == []


def test_the_names_are_those_of_the_model_that_was_wrapped(averaged, tmp_path):
    """By `torch.compile`: the model as a whole, and a layer; so that others load the files by them."""
    engine, averager, expected = averaged
    engine.module.norm = torch.compile(engine.module.norm)
    engine.module = torch.compile(engine.module)
    assert "_orig_mod.norm._orig_mod.weight" in dict(engine.module.named_parameters())
    (file,) = publishing.publish(engine, averager, tmp_path / "a")
    assert _equal(load_file(file), expected) == []
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "second.weight": "first.weight"}
    clash = torch.nn.Module()
    clash.frozen, clash._orig_mod = torch.nn.Parameter(torch.zeros(1)), engine.module
    engine.module = clash
    with pytest.raises(ConfigError, match="_orig_mod.frozen is frozen without its wrapper, as another"):
        publishing.publish(engine, averager, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def _failing(code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    return fail


def test_nothing_is_left_of_a_failure(averaged, tmp_path, monkeypatch):
    engine, averager, expected = averaged
    folder = tmp_path / "a"

    def attempt(error, message, **changes):
        with pytest.raises(error, match=message):
            publishing.publish(engine, averager, folder, **changes)
        assert list(tmp_path.iterdir()) == []

    for name in ("posix_fallocate", "pwrite", "rename"):
        with monkeypatch.context() as patched:
            patched.setattr(publishing.os, name, _failing(errno.ENOSPC))
            attempt(PluginError, "the disk of .* is full")
            patched.setattr(publishing.os, name, _failing(errno.EACCES))
            attempt(PluginError, "cannot be written .Permission denied.; give another folder")
    attempt(ConfigError, "dtype=torch.int8", dtype=torch.int8)
    attempt(ConfigError, "max_shard_bytes=0", max_shard_bytes=0)
    attempt(StateError, "there is no horizon 3", horizon=3)
    engine.autotp_size = lambda: 2
    attempt(ConfigError, "autotp_size is 2")
    engine.autotp_size = lambda: 1
    engine.module.first.weight.allreduce = False
    attempt(ConfigError, "first.weight is an expert's")
    with pytest.raises(ConfigError, match="save_averaged_checkpoint: first.weight is an expert's"):
        publishing.refuse_checkpoint(engine)
    del engine.module.first.weight.allreduce
    engine.module.first.weight.model_parallel = True
    engine.mpu = SimpleNamespace(get_model_parallel_rank=lambda: 0, get_model_parallel_world_size=lambda: 2)
    attempt(ConfigError, "first.weight is cut by tensor parallelism and nothing says how")
    engine.mpu.get_pipe_parallel_world_size = lambda: 2
    attempt(ConfigError, "pipeline stages that DeepSpeed does not know")
    engine.mpu = None
    parameters = averager.shards.parameters
    parameters["gone"] = parameters.pop("norm.bias")
    attempt(StateError, "no parameter gone any more")
    parameters["norm.bias"] = parameters.pop("gone")

    folder.mkdir()  # empty
    with monkeypatch.context() as patched:
        patched.setattr(publishing.os, "posix_fallocate", _failing(errno.EOPNOTSUPP))
        (file,) = publishing.publish(engine, averager, folder)
    assert load_file(file).keys() == expected.keys()
    kept = file.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        publishing.publish(engine, averager, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and file.read_bytes() == kept
