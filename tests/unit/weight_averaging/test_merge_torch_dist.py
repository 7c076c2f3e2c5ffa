"""Merging torch_dist folders: against torch's own reader and a naive mean, whatever their chunks; and refused."""

import itertools
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_with_torch

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.merge.merge import merge
from tests.unit.weight_averaging.folders import Evil

FILES = ("__0_0.distcp", "__0_1.distcp", "__1_0.distcp")
COMMON = "common_state/shard_0_1"
CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def write(folder, tensors, cuts=None, objects=(), config=CONFIG):
    """A checkpoint of whole ``tensors``, each stored in chunks; ``cuts``: where, per name and dimension."""
    folder.mkdir()
    entries, places, turn = {}, {}, itertools.cycle(FILES)

    def put(content, key):
        name = next(turn)
        with open(folder / name, "ab") as file:
            begin = file.tell()
            content(file)
            places[key] = filesystem._StorageInfo(name, begin, file.tell() - begin)

    for name, whole in tensors.items():
        bounds = [
            sorted({0, *inner, size})
            for inner, size in zip((cuts or {}).get(name, [()] * whole.dim()), whole.shape, strict=True)
        ]
        chunks = []
        for box in itertools.product(*map(itertools.pairwise, (b if len(b) > 1 else [0, 0] for b in bounds))):
            offset, sizes = torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box)
            part = whole[tuple(slice(a, b) for a, b in box)].clone()
            put(lambda file, part=part: torch.save(part, file), metadata.MetadataIndex(name, offset, len(chunks)))
            chunks.append(metadata.ChunkStorageMetadata(offset, sizes))
        properties = metadata.TensorProperties.create_from_tensor(whole)
        entries[name] = metadata.TensorStorageMetadata(properties, whole.shape, chunks)
    for name, content in dict(objects).items():
        put(lambda file, content=content: file.write(content), metadata.MetadataIndex(name))
        entries[name] = metadata.BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata.Metadata(entries, storage_data=places)))
    (folder / "metadata.json").write_text(json.dumps(config))
    torch.save({"iteration": 3, "args": Evil("was-run")}, folder / "common.pt")
    return folder


def change(folder, what):
    """Alter what ``.metadata`` says."""
    found = FileSystemReader(folder).read_metadata()
    what(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def read(folder):
    """Whole tensors, as torch reads them."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items() if hasattr(e, "chunks")}
    load_with_torch(tensors, storage_reader=FileSystemReader(folder), planner=DefaultLoadPlanner(), no_dist=True)
    return tensors


def naive(checkpoints, dtype=None):
    result = dict(checkpoints[-1])
    for name in (name for name, tensor in result.items() if tensor.is_floating_point()):
        total = sum(checkpoint[name].float() for checkpoint in checkpoints)
        result[name] = (total / len(checkpoints)).to(dtype or result[name].dtype)
    return result


def same(found, expected):
    assert found.keys() == expected.keys()
    different = [n for n in expected if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert different == []


def random_cuts(tensors, generator):
    return {
        name: [[generator.randrange(size) for _ in range(generator.randrange(3))] if size else [] for size in t.shape]
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_naive_mean_however_each_is_cut(tmp_path, seed):
    """Three checkpoints, each cut at other random places (the last two alike where the seed is even)."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    shapes = [(), (13,), (5, 7), (1, 9), (3, 4, 5), (2, 3, 2, 3), (0, 3)]
    checkpoints, folders, cuts = [], [], {}
    for step in range(3):
        tensors = {f"t{len(shape)}.{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
        tensors |= {"half": torch.randn(6, 6).bfloat16(), "count": torch.tensor(step)}
        tensors["table"] = torch.arange(8).view(2, 4)
        if step < 2 or seed % 2:
            cuts = random_cuts(tensors, generator)
        folders.append(write(tmp_path / f"step{step}", tensors, cuts, {"x._extra_state/shard_0_1": b"%d" % step}))
        checkpoints.append(tensors)
    merge(folders, tmp_path / "out", workers=1 + seed % 2)
    same(read(tmp_path / "out"), naive(checkpoints))
    written, newest = (FileSystemReader(f).read_metadata() for f in (tmp_path / "out", folders[-1]))
    for name, entry in newest.state_dict_metadata.items():
        assert written.state_dict_metadata[name] == entry  # chunks, shapes and dtypes
    place = written.storage_data[metadata.MetadataIndex("x._extra_state/shard_0_1")]
    assert (tmp_path / "out" / place.relative_path).read_bytes()[place.offset :][: place.length] == b"2"
    tensors["table"].view(-1)[generator.randrange(8)] = 99
    other = write(tmp_path / "other", tensors, cuts, {"x._extra_state/shard_0_1": b"3"})
    with pytest.raises(
        CheckpointError, match=r"table is torch.int64 and differs between .*step0 and .*other, and integers"
    ):
        merge([*folders, other], tmp_path / "again")


WEIGHTS = {"a": torch.randn(4, 3).bfloat16(), "b": torch.randn(5)}
MASTERS = {"a": torch.randn(4, 3), "b": torch.randn(5)}


def with_masters(prefix, **changes):
    return WEIGHTS | {prefix + name: master for name, master in (MASTERS | changes).items()}


@pytest.mark.parametrize("prefix", ["optimizer.state.param.", "chained_1.optimizer.state.fp32_param."])
def test_masters_take_the_place_of_weights(tmp_path, prefix):
    moments = {"optimizer.state.exp_avg.a": torch.randn(4, 3)}
    cuts = {prefix + "a": [[1], []], "a": [[], [2]]}
    folder, notes = write(tmp_path / "step", with_masters(prefix) | moments, cuts), []
    merge([folder], tmp_path / "out", note=notes.append)
    same(read(tmp_path / "out"), MASTERS)
    assert notes[0] == f"{folder}: the mean is of the fp32 masters of 2 tensors"
    merge([folder], tmp_path / "low", dtype="bf16")
    same(read(tmp_path / "low"), {name: value.bfloat16() for name, value in MASTERS.items()})


@pytest.mark.parametrize("master", [torch.randn(2, 6), torch.randn(4, 3).half()], ids=["flattened", "16 bits"])
def test_without_usable_masters_it_says_so(tmp_path, master):
    folder, notes = write(tmp_path / "step", with_masters("optimizer.state.fp32_param.", a=master)), []
    merge([folder], tmp_path / "out", note=notes.append)
    same(read(tmp_path / "out"), {"a": WEIGHTS["a"], "b": MASTERS["b"]})
    assert "no fp32 masters under the parameters' names" in notes[0] and "for 1 of 2 tensors, such as a:" in notes[0]
    plain = write(tmp_path / "plain", WEIGHTS)
    with pytest.raises(CheckpointError, match="is a torch_dist checkpoint, .*is a torch_dist checkpoint with fp32 mas"):
        merge([folder, plain], tmp_path / "mixed")


def test_fp8_is_refused_with_a_remedy(tmp_path):
    folder = write(tmp_path / "step", {"a": torch.zeros(4).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="step: tensor a is torch.float8_e4m3fn, .*; save the weights in bf16"):
        merge([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_the_newest_ones_and_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [write(tmp_path / f"step{step}", WEIGHTS, objects={"x/shard_0_1": pickle.dumps(step)}) for step in (0, 1)]
    torch.save({"iteration": 4}, folders[1] / "common.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    folders[1].rename(tmp_path / "iter_0000007")
    merge([folders[0], tmp_path], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"__{i}_0.distcp" for i in range(3)), ".metadata", "common.pt", "metadata.json",
    }  # fmt: skip
    for name in ("common.pt", "metadata.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "iter_0000007" / name).read_bytes()
    merge([tmp_path, folders[0]], tmp_path / "evil")  # its common.pt holds what would run if it were loaded
    assert (tmp_path / "evil" / "common.pt").read_bytes() == (folders[0] / "common.pt").read_bytes()
    assert not (tmp_path / "was-run").exists()


def test_common_state_among_the_objects(tmp_path):
    """Newer versions of megatron-core write no common.pt: the newest checkpoint's object is taken, never loaded."""
    folders = []
    for step in (0, 1):
        state = pickle.dumps(Evil("was-run")) + bytes([step])
        folders.append(write(tmp_path / f"step{step}", {"a": torch.full((3,), float(step))}, objects={COMMON: state}))
        (folders[-1] / "common.pt").unlink()
    merge(folders, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "__0_0.distcp",
        "__1_0.distcp",
        ".metadata",
        "metadata.json",
    }
    place = FileSystemReader(tmp_path / "out").read_metadata().storage_data[metadata.MetadataIndex(COMMON)]
    assert (tmp_path / "out" / place.relative_path).read_bytes()[place.offset :][: place.length] == state
    assert read(tmp_path / "out")["a"].tolist() == [0.5] * 3


def evil_metadata(folder):
    found = FileSystemReader(folder).read_metadata()
    found.planner_data = Evil("was-run")
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def evil_chunk(folder):
    content = torch.load(folder / FILES[0], weights_only=True)
    torch.save([content, Evil("was-run")], folder / FILES[0])
    size = (folder / FILES[0]).stat().st_size
    first = metadata.MetadataIndex("a", (0, 0))
    change(folder, lambda found: found.storage_data.update({first: filesystem._StorageInfo(FILES[0], 0, size)}))


def list_for_a_tensor(folder):
    with open(folder / FILES[0], "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        torch.save([1], file)
        length = file.tell() - size
    first = metadata.MetadataIndex("a", (0, 0))
    change(folder, lambda found: found.storage_data.update({first: filesystem._StorageInfo(FILES[0], size, length)}))


def info(**values):
    """Alter where the first chunk of ``a`` lies."""

    def damage(folder):
        change(folder, lambda m: m.storage_data[metadata.MetadataIndex("a", (0, 0))].__dict__.update(values))

    return damage


def truncated_metadata(folder):
    os.truncate(folder / ".metadata", 300)


def not_metadata(folder):
    (folder / ".metadata").write_bytes(pickle.dumps([1, 2]))


def chunk_forgotten(folder):
    change(folder, lambda found: found.state_dict_metadata["a"].chunks.pop())


def place_forgotten(folder):
    change(folder, lambda found: found.storage_data.pop(metadata.MetadataIndex("b", (0,))))


def only_the_optimizer(folder):
    def forget(found):
        found.state_dict_metadata = {f"optimizer.{n}": e for n, e in found.state_dict_metadata.items()}

    change(folder, forget)


def other_shape(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write(folder, {**WEIGHTS, "b": torch.zeros(6)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (evil_metadata, r"step1/.metadata holds posix.mkdir, which is not loaded"),
        (evil_chunk, r"step1: a is truncated or damaged \(UnpicklingError"),
        (list_for_a_tensor, r"step1: a is truncated or damaged"),
        (truncated_metadata, r"step1/.metadata is truncated or damaged"),
        (not_metadata, r"step1/.metadata is truncated or damaged"),
        (chunk_forgotten, r"the 1 chunks of a \[4, 3\] do not cover it once"),
        (place_forgotten, r"step1/.metadata is truncated or damaged \(KeyError"),
        (only_the_optimizer, r"step1 holds no weights of a model"),
        (other_shape, r"tensor b is float32 \[6\] in .*step1 and float32 \[5\] in .*step0"),
        (info(relative_path="../step0/__0_0.distcp"), r"a lies in ../step0/__0_0.distcp, not in a"),
        (info(relative_path="common.pt"), r"a lies in common.pt, not in a"),
        (info(relative_path="__7_0.distcp"), r"step1/__7_0.distcp is missing"),
        (info(transform_descriptors=["zstd"]), r"a is stored as \['zstd'\], which merge cannot read"),
        (info(length=10**6), r"__0_0.distcp is truncated: \d+ bytes, and a ends at 1000000"),
        (info(length=100), r"step1: a is truncated or damaged"),
        (info(offset="0"), r"step1/.metadata is truncated or damaged \(TypeError"),
        (lambda folder: (folder / "common.pt").unlink(), r"step1/common.pt is missing"),
        (
            lambda folder: (folder / "metadata.json").unlink(),
            r"step1/metadata.json cannot be read",
        ),
        (lambda folder: (folder / "metadata.json").write_text("[]"), r"step1/metadata.json is damaged"),
        (
            lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}'),
            r"the format is fsdp_dtensor 1, merge reads torch_dist 1",
        ),
    ],
)
def test_damaged_or_foreign_checkpoints_are_refused(tmp_path, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    folders = [write(tmp_path / f"step{step}", WEIGHTS, {"a": [[1], []]}) for step in (0, 1)]
    damage(folders[1])
    with pytest.raises(CheckpointError, match=message):
        merge(folders, tmp_path / "out")
    assert not Path("was-run").exists() and not (tmp_path / "out").exists()
