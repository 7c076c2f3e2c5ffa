"""Reading a window on other ranks: plans worked out by hand, and stand-in engines with uneven and empty shards."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_plugin.core.errors import CheckpointError, StateError
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.state import files as checkpoint
from ds_plugin.weight_averaging.state import reshard
from ds_plugin.weight_averaging.state.fragments import Fragment
from ds_plugin.weight_averaging.state.reshard import Piece, Resharded, plan

W, B = (2, 5), (3,)  # a matrix of 10 elements, then a vector of 3
F0, F1 = Path("rank0"), Path("rank1")
# one flat shard on each of two ranks, 14 elements with one of padding: w w w w w w w | w w w b b b -
SAVED = [
    (F0, [Fragment("w", W, 0, 7, 0, 0)]),
    (F1, [Fragment("w", W, 7, 3, 0, 0), Fragment("b", B, 0, 3, 0, 3)]),
]


@pytest.mark.parametrize(
    ("targets", "pieces"),
    [
        # three ranks, 15 elements: w w w w w | w w w w w | b b b - -
        ([Fragment("w", W, 0, 5, 0, 0)], [Piece(F0, 0, 0, 0, 0, 5)]),
        ([Fragment("w", W, 5, 5, 0, 0)], [Piece(F0, 0, 5, 0, 0, 2), Piece(F1, 0, 0, 0, 2, 3)]),
        ([Fragment("b", B, 0, 3, 0, 0)], [Piece(F1, 0, 3, 0, 0, 3)]),
        # the second of two ranks of ZeRO 3, which cuts each parameter: w w w w w b -
        (
            [Fragment("w", W, 5, 5, 0, 0), Fragment("b", B, 2, 1, 0, 5)],
            [Piece(F0, 0, 5, 0, 0, 2), Piece(F1, 0, 0, 0, 2, 3), Piece(F1, 0, 5, 0, 5, 1)],
        ),
        # one rank, a shard for each parameter, the vector first
        (
            [Fragment("b", B, 0, 3, 0, 0), Fragment("w", W, 0, 10, 1, 0)],
            [Piece(F1, 0, 3, 0, 0, 3), Piece(F0, 0, 0, 1, 0, 7), Piece(F1, 0, 0, 1, 7, 3)],
        ),
        ([], []),
    ],
)
def test_plans_worked_out_by_hand(targets, pieces):
    assert plan(targets, SAVED) == pieces
    assert plan(targets, SAVED[::-1]) == pieces


@pytest.mark.parametrize(
    ("target", "sources", "parts"),
    [
        (Fragment("w", W, 0, 10, 0, 0), SAVED[:1], ["element 7 of parameter w [2, 5]", "none of rank0"]),
        (Fragment("w", W, 0, 10, 0, 0), SAVED[1:], ["element 0 of parameter w", "none of rank1"]),
        (Fragment("v", W, 0, 10, 0, 0), SAVED, ["element 0 of parameter v", "none of rank0 to rank1"]),
        (Fragment("w", (5, 2), 0, 10, 0, 0), SAVED, ["rank0", "parameter w", "[2, 5]", "[5, 2]"]),
        (
            Fragment("w", W, 2, 8, 0, 0),
            [*SAVED, (Path("rank2"), [Fragment("w", W, 6, 2, 0, 0)])],
            ["elements 6 to 7 of parameter w", "rank2", "rank0"],
        ),
        (Fragment("w", W, 2, 3, 0, 0), [SAVED[0], SAVED[0]], ["elements 2 to 5 of parameter w"]),
    ],
)
def test_what_is_not_there_exactly_once_is_named(target, sources, parts):
    with pytest.raises(CheckpointError) as caught:
        plan([target], sources)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


class File:
    """A file's slices, and how many elements were read at a time (none, to learn the dtype, do not count)."""

    def __init__(self, tensors):
        self.tensors, self.read = tensors, []

    def get_slice(self, name):
        self.name = name
        return self

    def __getitem__(self, place):
        found = self.tensors[self.name][place]
        self.read += [found.numel()] if found.numel() else []
        return found

    def get_shape(self):
        return list(self.tensors[self.name].shape)


def test_only_what_is_needed_is_read_in_pieces(monkeypatch):
    monkeypatch.setattr(reshard, "READ_ELEMENTS", 2)
    files = {
        F0: File({"x.0": torch.arange(7.0), "y.0": torch.arange(7.0).bfloat16()}),
        F1: File({"x.0": torch.arange(7.0, 14.0), "y.0": torch.zeros(7)}),
    }
    pieces = plan([Fragment("w", W, 4, 5, 0, 1)], SAVED)
    found = Resharded(pieces, files)
    out, nothing = torch.full((2, 4), float("nan")), torch.full((3,), float("nan"))
    found.read_("x.1", nothing)  # of which this rank has nothing
    assert files[F0].read == [] and files[F1].read == [] and nothing.tolist() == [0, 0, 0]
    found.read_("x.0", out)
    assert torch.equal(out, torch.tensor([[0.0, 4, 5, 6], [7, 8, 0, 0]]))  # padding before and after
    assert files[F0].read == [2, 1] and files[F1].read == [2]
    with pytest.raises(CheckpointError, match="rank0 is truncated or damaged.*z.0"):
        found.read_("z.0", out)
    with pytest.raises(CheckpointError, match="rank1 is truncated or damaged.*y.0 is not of the type or size"):
        found.read_("y.0", out.bfloat16())
    files[F1].tensors["x.0"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="rank1 is truncated or damaged.*x.0 is not of the type or size"):
        found.read_("x.0", out)


# -- whole files, on engines that cut their weights as DistributedOptimizer does ---------------------------------------

SHAPES = {"a": (3, 4), "b": (5,), "c": (), "d": (2, 2)}
TOTAL = 22


class Engine:
    """A rank's part of all weights laid end to end: a flat shard for each parameter that it has elements of."""

    layout = "sharded"

    def __init__(self, first, last, shapes=SHAPES):
        self.found, self.masters, at = [], [], 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            start, end = max(0, first - at), min(size, last - at)
            if start < end:
                self.found.append(Fragment(name, shape, start, end - start, len(self.masters), 0))
                self.masters.append(torch.zeros(end - start))
            at += size

    def tensors(self):
        return self.masters

    def fragments(self):
        return self.found

    def refresh(self):
        pass

    def fill(self, step, seed=0):
        """The weights of ``step``, the same under every cut."""
        for f in self.found:
            whole = torch.randn(torch.Size(f.shape).numel(), generator=torch.Generator().manual_seed(ord(f.name)))
            whole += 0.1 * (seed + step) * torch.arange(whole.numel())
            self.masters[f.shard].view(-1)[f.offset : f.offset + f.count] = whole[f.start : f.start + f.count]


class Whole(Engine):
    """Every parameter whole, in its own shape, on every rank."""

    layout = "replicated"

    def __init__(self, first=0, last=TOTAL):
        super().__init__(0, TOTAL)
        self.masters = [torch.zeros(f.shape) for f in self.found]


class Padded(Engine):
    """One flat shard with padding between the parameters."""

    def __init__(self, first, last):
        super().__init__(first, last)
        places, at = [], 1
        for f in self.found:
            places.append(Fragment(f.name, f.shape, f.start, f.count, 0, at))
            at += f.count + 2
        self.found, self.masters = places, [torch.full((at,), float("nan"))]


MODES = {
    "sliding": {"window": 3},
    "deltas": {"window": 3, "deltas": "bf16"},
    "block": {"mode": "block", "window": 2},
    "ema": {"mode": "ema", "horizons": [2, 4]},
}
CUTS = {
    # where each rank's part ends
    "one": (Engine, [22]),
    "two": (Engine, [13, 22]),
    "uneven": (Engine, [1, 1, 17, 22]),  # the second is empty
    "ends empty": (Engine, [22, 22, 22]),
    "padded": (Padded, [9, 22]),
    "whole": (Whole, [22, 22]),
}


def ranks_of(cut, mode):
    kind, ends = CUTS[cut]
    config = WeightAveragingConfig.model_validate({"enabled": True, "interval": 1, **MODES[mode]})
    return [WeightAverager(config, kind(first, last)) for first, last in zip([0, *ends], ends, strict=False)]


def trained(cut, mode, steps=5, seed=0):
    ranks = ranks_of(cut, mode)
    for step in range(1, steps + 1):
        for averager in ranks:
            averager.shards.fill(step, seed)
            averager.snapshot(step, finite=True)
    return ranks


def saved(folder, ranks, coordinate=(0, 0), first=0, world=None):
    for rank, averager in enumerate(ranks, start=first):
        world_size = len(ranks) if world is None else world
        checkpoint.save(folder, averager, rank=rank, world_size=world_size, save_id="abc", coordinate=list(coordinate))


def load(folder, ranks, saved_ranks, coordinate=(0, 0), save_id="abc"):
    for rank, averager in enumerate(ranks):
        checkpoint.load(
            folder,
            averager,
            rank=rank,
            world_size=len(ranks),
            save_id=save_id,
            coordinate=coordinate,
            saved_ranks=saved_ranks,
        )


def assert_same(ranks, whole):
    """Every buffer of the ranks against those of one rank that holds everything; padding is zero."""
    expected = whole.mode.tensors()
    places = {f.name: f.shard for f in whole.shards.fragments()}
    for averager in ranks:
        assert averager.steps == whole.steps
        found = averager.mode.tensors()
        assert bool(found) == bool(averager.shards.masters)
        for name, buffer in found.items():
            what, _, shard = name.rpartition(".")
            flat = buffer.view(-1).clone()
            for f in averager.shards.fragments():
                if f.shard == int(shard):
                    theirs = expected[f"{what}.{places[f.name]}"]
                    assert theirs.dtype == flat.dtype
                    mine = flat[f.offset : f.offset + f.count]
                    assert torch.equal(mine, theirs.view(-1)[f.start : f.start + f.count]), (name, f)
                    mine.zero_()
            assert not flat.any() and not flat.isnan().any(), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("old", CUTS)
def test_every_cut_is_read_by_every_other(tmp_path, mode, old):
    [whole] = trained("one", mode)
    before = trained(old, mode)
    saved(tmp_path, before)
    for new in CUTS:
        after = ranks_of(new, mode)
        load(tmp_path, after, len(before))
        if new != old:  # the same cut takes its files as they are, with what the padding held
            assert_same(after, whole)
        for averager in [*after, whole]:
            averager.shards.fill(6)
            averager.snapshot(6, finite=True)
        with whole.averaged_weights():
            expected = {f.name: whole.shards.masters[f.shard].clone().view(-1) for f in whole.shards.fragments()}
        for averager in after:
            with averager.averaged_weights():
                for f in averager.shards.fragments():
                    mine = averager.shards.masters[f.shard].view(-1)[f.offset : f.offset + f.count]
                    assert torch.equal(mine, expected[f.name][f.start : f.start + f.count])
        [whole] = trained("one", mode)


class Created(TorchDispatchMode):
    """The largest storage, in bytes, that an operation allocates: not views, what is written in place, mapped files."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = function(*args, **kwargs or {})
        mapped = function is torch.ops.aten.set_.source_Storage  # safetensors' tensor upon its file
        for made in tree_leaves(None if mapped else found):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("old", ["one", "two", "uneven"])
def test_a_window_is_read_into_its_place(tmp_path, mode, old, monkeypatch):
    """No tensor of more than the pieces that are read is made, let alone a second copy of the window."""
    for module in (reshard, checkpoint):
        monkeypatch.setattr(module, "READ_ELEMENTS", 1)
    saved(tmp_path, trained(old, mode))
    after = ranks_of("padded", mode)
    with Created() as created:
        load(tmp_path, after, len(CUTS[old][1]))
        assert created.largest <= 4
        torch.zeros(2)
    assert created.largest == 8  # it does see what is made
    assert_same(after, trained("one", mode)[0])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_refused_leaves_the_window_as_it_was(tmp_path, mode):
    """The last tensor of the last file is damaged, and nothing has been written."""
    saved(tmp_path, trained("two", mode, seed=1))
    [averager], [untouched] = trained("one", mode), trained("one", mode)
    _rewrite(tmp_path / checkpoint.shard_name(1), lambda tensors, _: tensors[max(tensors)].view(torch.int16).add_(1))
    with pytest.raises(CheckpointError, match="not those that were saved"):
        load(tmp_path, [averager], 2)
    assert_same([averager], untouched)


def test_what_fails_while_it_is_read_leaves_no_half_window(tmp_path, monkeypatch):
    saved(tmp_path, trained("two", "sliding", seed=1))
    [averager], read = trained("one", "sliding"), Resharded.read_

    def fail(self, name, out):
        if name == "snapshot.2.0":
            raise OSError("the disk is gone")
        read(self, name, out)

    monkeypatch.setattr(Resharded, "read_", fail)
    with pytest.raises(OSError, match="gone"):
        load(tmp_path, [averager], 2)
    assert averager.steps == []


def test_a_smaller_window_takes_the_newest(tmp_path):
    saved(tmp_path, trained("two", "sliding"))
    config = WeightAveragingConfig.model_validate({"enabled": True, "interval": 1, "window": 2})
    smaller = WeightAverager(config, Engine(0, TOTAL))
    load(tmp_path, [smaller], 2)
    [whole] = trained("one", "sliding")
    assert smaller.steps == [4, 5]
    assert all(torch.equal(*pair) for pair in zip(smaller.snapshots()[0], whole.snapshots()[1], strict=True))


def test_shards_alike_that_hold_other_weights(tmp_path):
    """The same number of ranks and the same shards, the parameters in another order."""
    config = WeightAveragingConfig.model_validate({"enabled": True, "interval": 1})
    before, after = (WeightAverager(config, Engine(0, 6, {name: (3,) for name in order})) for order in ("ab", "ba"))
    before.shards.fill(1)
    before.snapshot(1, finite=True)
    saved(tmp_path, [before])
    load(tmp_path, [after], 1)
    [first], [second] = before.snapshots(), after.snapshots()
    assert torch.equal(first[0], second[1]) and torch.equal(first[1], second[0])
    assert not torch.equal(first[0], first[1])


def test_ranks_read_the_files_of_their_own_coordinate(tmp_path):
    """Two stages with the same names and other weights, two ranks each."""
    stages = [trained("two", "sliding", seed=seed) for seed in (0, 50)]
    for stage, ranks in enumerate(stages):
        saved(tmp_path, ranks, coordinate=(0, stage), first=2 * stage, world=4)
    for stage in range(2):
        after = ranks_of("one", "sliding")
        load(tmp_path, after, 4, coordinate=(0, stage))
        assert_same(after, trained("one", "sliding", seed=50 * stage)[0])
    with pytest.raises(CheckpointError, match=r"no window of tensor-parallel.*\(1, 0\), only \(0, 0\), \(0, 1\)"):
        load(tmp_path, ranks_of("one", "sliding"), 4, coordinate=(1, 0))
    moved = ranks_of("two", "sliding")  # as many ranks as saved, the stages in another order
    for rank, averager in enumerate(moved):
        checkpoint.load(tmp_path, averager, rank=rank, world_size=4, save_id="abc", coordinate=(0, 1))
    assert_same(moved, trained("one", "sliding", seed=50)[0])


def _rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def _alter(tensors, metadata):
    tensors["snapshot.1.0"][2] += 1


def _retype(tensors, metadata):
    tensors["snapshot.1.0"] = tensors["snapshot.1.0"].view(torch.int32)


def _drop(tensors, metadata):
    del tensors["snapshot.2.1"]


def _add(tensors, metadata):
    tensors["more"] = torch.zeros(1)


def _older(tensors, metadata):
    metadata["format"] = "4"


def _newer(tensors, metadata):
    metadata["format"] = "6"


def _moved(tensors, metadata):
    metadata["header"] = json.dumps({**json.loads(metadata["header"]), "coordinate": [0, 1]})


def _other_state(tensors, metadata):
    metadata["header"] = json.dumps({**json.loads(metadata["header"]), "state": {"steps": [2, 3, 4]}})
    metadata["header_sha256"] = hashlib.sha256(metadata["header"].encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_alter, ["damaged", "not those that were saved"]),
        (_retype, ["damaged", "not those that were saved"]),
        (_drop, ["damaged", "not those that were saved"]),
        (_moved, ["damaged", "metadata"]),
        (_other_state, ["holds", "[2, 3, 4]", "[3, 4, 5]"]),
        (_older, ["format '4'", "reads '5'", "version"]),
        (_newer, ["format '6'", "reads '5'", "version"]),
    ],
)
def test_files_that_were_changed_are_named(tmp_path, change, parts):
    saved(tmp_path, trained("two", "sliding"))
    path = tmp_path / checkpoint.shard_name(1)
    _rewrite(path, change)
    averager = ranks_of("one", "sliding")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, averager, 2)
    assert all(part in str(caught.value) for part in [path.name, *parts]), str(caught.value)
    assert averager[0].steps == []


@pytest.mark.parametrize("damaged", range(4))
def test_each_file_is_tested_by_one_rank(tmp_path, damaged):
    """Rank r of 2 tests every second of 4 files in full, also where it reads nothing from them."""
    saved(tmp_path, trained("uneven", "sliding"))
    _rewrite(tmp_path / checkpoint.shard_name(damaged), _add)
    found = []
    for rank, averager in enumerate(ranks_of("two", "sliding")):
        try:
            checkpoint.load(tmp_path, averager, rank=rank, world_size=2, save_id="abc", saved_ranks=4)
        except CheckpointError as error:
            found.append((rank, "not those that were saved" in str(error)))
    assert found == [(damaged % 2, True)]


def test_other_settings_are_refused(tmp_path):
    saved(tmp_path, trained("two", "sliding"))
    for mode, parts in {"deltas": ["deltas 'fp32'", "'bf16'"], "ema": ["mode 'sliding'", "'ema'"]}.items():
        for cut, saved_ranks in (("one", 2), ("two", 2)):
            with pytest.raises(CheckpointError) as caught:
                load(tmp_path, ranks_of(cut, mode), saved_ranks)
            assert all(part in str(caught.value) for part in parts), str(caught.value)
    config = ranks_of("one", "deltas")[0].config
    checkpoint.compare({}, config, tmp_path)  # averaging was off
    with pytest.raises(CheckpointError, match="deltas 'fp32'.*write \"fp32\""):
        checkpoint.compare({"mode": "sliding", "deltas": "fp32", "window": 3}, config, tmp_path)


def test_a_layout_that_overlaps_is_not_saved(tmp_path):
    [averager] = trained("one", "sliding")
    averager.shards.found.append(Fragment("e", (2,), 0, 2, 0, 3))
    with pytest.raises(StateError, match="overlaps"):
        saved(tmp_path, [averager])
    assert not list(tmp_path.iterdir())
