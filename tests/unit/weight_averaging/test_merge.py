"""Merging safetensors folders and hand-made ZeRO files: against a naive mean, resumed, and refused."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ds_plugin.cli.main import main
from ds_plugin.core.errors import CheckpointError, ConfigError, PluginError
from ds_plugin.weight_averaging.merge import inputs
from ds_plugin.weight_averaging.merge.merge import merge, parse_weights
from tests.reference import averaging as reference

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def weights_of(seed, dtype=torch.float32):
    """Two shards' tensors: several chunks, odd sizes, an empty one, a scalar, integers, of which a counter differs."""
    torch.manual_seed(seed)
    chunk = inputs.CHUNK
    first = {"embed.weight": torch.randn(3, chunk // 2 + 1), "norm.weight": torch.randn(7), "none": torch.empty(0, 3)}
    second = {"head.weight": torch.randn(11, 13), "scale": torch.randn(())}
    shards = [{name: t.to(dtype) for name, t in shard.items()} for shard in (first, second)]
    shards[1] |= {"positions": torch.arange(chunk + 5), "mask": torch.tensor([True, False])}
    shards[1] |= {"count": torch.tensor(seed)}
    return shards


def write(folder, shards, metadata=None):
    """A Hugging Face folder."""
    folder.mkdir()
    for name, shard in zip(SHARDS, shards, strict=True):
        save_file(shard, folder / name, metadata=metadata or {"format": "pt"})
    where = {tensor: name for name, shard in zip(SHARDS, shards, strict=True) for tensor in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


@pytest.fixture
def checkpoints(tmp_path):
    return [write(tmp_path / f"step{seed}", weights_of(seed)) for seed in (1, 2, 3)]


def read(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def naive(folders, weights):
    """The weighted mean of whole checkpoints in fp32; integers are the last one's."""
    loaded = [read(folder) for folder in folders]
    result = dict(loaded[-1])
    names = [name for name, tensor in result.items() if tensor.is_floating_point()]
    mean = reference.weighted_mean([{name: one[name].float() for name in names} for one in loaded], weights)
    return result | {name: mean[name].to(result[name].dtype) for name in names}


def same(found, expected):
    assert found.keys() == expected.keys()
    different = [n for n in expected if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert different == []


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_naive_mean_bit_for_bit(tmp_path, dtype, workers):
    folders = [
        write(tmp_path / f"step{seed}", weights_of(seed, dtype), {"format": "pt", "a": "b"}) for seed in (1, 2, 3)
    ]
    merge(folders, tmp_path / "out", workers=workers)
    same(read(tmp_path / "out"), naive(folders, [1, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_stay_apart(tmp_path, monkeypatch, dtype):
    """What one thread writes stays as it is while others work, however slow the disk is, and in whichever order."""
    monkeypatch.setattr(inputs, "CHUNK", 7)
    folders = []
    for n in (1, 2):
        tensors = [{f"{s}": torch.randn(61).to(dtype), f"{s}.count": torch.arange(20)} for s in (1, 2)]
        folders.append(write(tmp_path / f"step{n}", tensors))
    pwrite, threads, slowness = os.pwrite, set(), random.Random(1)

    def slow(file, view, offset):
        threads.add(threading.get_ident())
        before = bytes(view)
        time.sleep(slowness.uniform(0, 0.01))
        assert bytes(view) == before
        return pwrite(file, view[: max(1, len(view) // 2)], offset)  # a disk may take a part

    monkeypatch.setattr(os, "pwrite", slow)
    merge(folders, tmp_path / "out", workers=3)
    assert len(threads) > 1
    same(read(tmp_path / "out"), naive(folders, [1, 1]))


def test_a_thread_that_fails_ends_all_and_leaves_nothing(tmp_path, checkpoints, monkeypatch):
    """Its error is the one that is raised, and the pieces that nobody has begun are left."""
    monkeypatch.setattr(inputs, "CHUNK", 2_000)
    pwrite, written = os.pwrite, []

    def failing(file, view, offset):
        written.append(offset)
        if len(written) == 3:
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.01)
        return pwrite(file, view, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(PluginError, match="out cannot be read or written: Input/output error"):
        merge(checkpoints, tmp_path / "out")
    assert len(written) < 20
    assert not list(tmp_path.glob("*out*"))


STATE = (
    "latest_universal", "trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "rng_state_0.pth", "zero_to_fp32.py", "ds_plugin.json",
)  # fmt: skip


def test_keeps_sharding_metadata_index_and_small_files(tmp_path, checkpoints):
    (checkpoints[0] / "pytorch_model.bin").write_bytes(b"a pickle")
    (checkpoints[0] / "pytorch_model.bin.index.json").write_text("{}")
    (checkpoints[0] / "tokenizer.json").write_text("{}")
    for name in STATE:
        (checkpoints[0] / name).write_text("{}")
    merge(checkpoints, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*SHARDS, INDEX, "config.json", "tokenizer.json"}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == json.loads((checkpoints[0] / INDEX).read_text())["weight_map"]
    for name in SHARDS:
        with safe_open(tmp_path / "out" / name, "pt") as found, safe_open(checkpoints[0] / name, "pt") as before:
            assert found.metadata() == before.metadata() and list(found.keys()) == list(before.keys())


def test_another_dtype_rewrites_headers_and_index(tmp_path, checkpoints):
    merge(checkpoints, tmp_path / "out", dtype="bf16")
    expected = naive(checkpoints, [1, 1, 1])
    expected = {n: t.bfloat16() if t.is_floating_point() else t for n, t in expected.items()}
    same(read(tmp_path / "out"), expected)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert index["weight_map"] == json.loads((checkpoints[0] / INDEX).read_text())["weight_map"]


def test_the_dtype_reaches_the_configuration(tmp_path, checkpoints):
    """Under the key that is there, in a configuration within it too; where there is none, readers ask the weights."""
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "x": 1}, "dtype_of": "float32"}
    (checkpoints[0] / "config.json").write_text(json.dumps(config))
    merge(checkpoints, tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == config
    merge(checkpoints, tmp_path / "half", dtype="bf16")
    expected = config | {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": 1}}
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == expected
    (checkpoints[0] / "config.json").write_text('{"model_type": "tiny"}')
    merge(checkpoints, tmp_path / "none", dtype="fp16")
    assert json.loads((tmp_path / "none" / "config.json").read_text()) == {"model_type": "tiny"}


def compiled(shards):
    """As `torch.compile` names them: one shard's as of a compiled model, the other's as of a compiled layer."""
    first, second = shards
    return [{f"_orig_mod.{n}": t for n, t in first.items()}, {f"{n}._orig_mod.w": t for n, t in second.items()}]


def test_names_are_those_of_the_model_that_was_wrapped(tmp_path):
    """Whether both, or one of the checkpoints alone, are of the compiled model."""
    plain = [[first, {f"{n}.w": t for n, t in second.items()}] for first, second in (weights_of(1), weights_of(2))]
    bare = [write(tmp_path / f"bare{n}", shards) for n, shards in enumerate(plain)]
    wrapped = [write(tmp_path / f"wrapped{n}", compiled(weights_of(n + 1))) for n in range(2)]
    for n, folders in enumerate([wrapped, [wrapped[0], bare[1]], [bare[0], wrapped[1]]]):
        merge(folders, tmp_path / f"{n}")
        same(read(tmp_path / f"{n}"), naive(bare, [1, 1]))
        index = json.loads((tmp_path / f"{n}" / INDEX).read_text())["weight_map"]
        assert index == json.loads((bare[0] / INDEX).read_text())["weight_map"]
    (wrapped[0] / INDEX).unlink()
    altered(wrapped[0], 0, lambda tensors: tensors.update({"norm.weight": torch.zeros(7)}))
    with pytest.raises(CheckpointError, match="model-00001.* holds _?norm.*the name of another tensor; save the model"):
        merge(wrapped, tmp_path / "clash")


def test_wrapped_names_of_deepspeed(tmp_path):
    """Its masters and its module call a checkpointed layer by two names, which must not become two tensors."""
    for step in (0, 1):
        shapes = {"_orig_mod.a": SHAPES["a"], "_orig_mod.b._checkpoint_wrapped_module.w": SHAPES["b"]}
        module = {"_orig_mod.a": torch.zeros(2, 3), "_orig_mod.b.w": torch.zeros(3), "_orig_mod.tied": torch.zeros(3)}
        shared = {"_orig_mod.tied": "_orig_mod.b._checkpoint_wrapped_module.w"}
        more = {"module": module | {"_orig_mod.count": torch.arange(2) + step}, "shared_params": shared}
        flat = [torch.arange(9.0) + step]
        zero_folder(tmp_path / f"step{step}", shapes, flat, buffer_names=["_orig_mod.count"], **more)
    merge([tmp_path / "step0", tmp_path / "step1"], tmp_path / "out")
    mean = torch.arange(9.0) + 0.5
    same(
        read(tmp_path / "out"),
        {"a": mean[:6].view(2, 3), "b.w": mean[6:], "tied": mean[6:], "count": torch.arange(2) + 1},
    )


def test_fp64_is_averaged_in_fp64(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file({"a": torch.randn(9, dtype=torch.float64)}, tmp_path / f"{seed}.safetensors")
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    merge(files, tmp_path / "out")
    first, second = (load_file(file)["a"] for file in files)
    assert torch.equal(load_file(tmp_path / "out" / "1.safetensors")["a"], (first + second) / 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean", [1, 1, 1]),
        ("wma", [1, 2, 3]),
        ("cosine", [0.5, 1, 0.5]),
        ("1e-300,1e-300,1e-300", [1e-300] * 3),
        ("1e308,1e308,1e308", [1e308] * 3),
        ("minus-sqrt", [(1 / 3) ** 0.5, (2 / 3) ** 0.5 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5]),
        ("0.1,0,2", [0.1, 0, 2]),
        ("0,0,2", [0, 0, 2]),
    ],
)
def test_weights(tmp_path, checkpoints, text, expected):
    assert parse_weights(text, 3) == pytest.approx(expected)
    merge(checkpoints, tmp_path / "out", weights=text)
    same(read(tmp_path / "out"), naive(checkpoints, parse_weights(text, 3)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,0.5", "2 numbers for 3 checkpoints"),
        ("0.5,nan,1", "finite numbers"),
        ("1,inf,1", "finite numbers"),
        ("1,-1,1", "not negative"),
        ("0,0,0", "one of them positive"),
        ("newest", "mean, minus-sqrt, cosine, wma"),
        ("linear", "write 'wma'.*'mean'"),
    ],
)
def test_weights_refused(tmp_path, checkpoints, text, message):
    with pytest.raises(ConfigError, match=message):
        merge(checkpoints, tmp_path / "out", weights=text)
    assert not (tmp_path / "out").exists()


def altered(folder, shard, change):
    """Rewrite one shard of a folder with its tensors changed in place by ``change``."""
    tensors = load_file(folder / SHARDS[shard])
    change(tensors)
    save_file(tensors, folder / SHARDS[shard])


def missing_shard(folder):
    (folder / SHARDS[1]).unlink()


def truncated_shard(folder):
    os.truncate(folder / SHARDS[1], (folder / SHARDS[1]).stat().st_size - 1)


def truncated_header(folder):
    os.truncate(folder / SHARDS[1], 40)


def damaged_header(folder):
    content = bytearray((folder / SHARDS[1]).read_bytes())
    content[10] = 0
    (folder / SHARDS[1]).write_bytes(content)


def header(change):
    """Alter the header of the second shard, whose data stay as they are."""

    def damage(folder):
        path = folder / SHARDS[1]
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + length].decode()).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def overlapping(text):
    found = json.loads(text)
    found["head.weight"]["data_offsets"] = [offset + 4 for offset in found["head.weight"]["data_offsets"]]
    return json.dumps(found)


def negative(text):
    found = json.loads(text)
    found["head.weight"]["shape"] = [-11, -13]
    return json.dumps(found)


def repeated(text):
    return text.replace("{", '{"scale":{"dtype":"F32","shape":[],"data_offsets":[0,4]},', 1)


def index_without_map(folder):
    (folder / INDEX).write_text("{}")


def index_with_more(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lost"] = SHARDS[0]
    (folder / INDEX).write_text(json.dumps(index))


def other_shape(folder):
    altered(folder, 1, lambda tensors: tensors.update({"head.weight": torch.zeros(11, 12)}))


def other_dtype(folder):
    altered(folder, 1, lambda tensors: tensors.update({"head.weight": torch.zeros(11, 13).half()}))


def other_names(folder):
    (folder / INDEX).unlink()
    altered(folder, 1, lambda tensors: tensors.update({"more": torch.zeros(1)}))


def fewer_names(folder):
    (folder / INDEX).unlink()
    altered(folder, 0, lambda tensors: tensors.pop("norm.weight"))


def twice_the_name(folder):
    (folder / INDEX).unlink()
    altered(folder, 0, lambda tensors: tensors.update({"scale": torch.zeros(())}))


def other_integers(folder):
    altered(folder, 1, lambda tensors: tensors["positions"][-1:].add_(1))  # beyond what is read at a time


def other_mask(folder):
    altered(folder, 1, lambda tensors: tensors["mask"].logical_not_())


def fp8(folder):
    altered(folder, 1, lambda tensors: tensors.update({"scale": tensors["scale"].to(torch.float8_e4m3fn)}))


def quantized(folder):
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')


def quantized_within(folder):
    (folder / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "fp8"}}}')


def damaged_config(folder):
    (folder / "config.json").write_text("{")


def universal(folder):
    (folder / "zero" / "embed.weight").mkdir(parents=True)
    (folder / "zero" / "embed.weight" / "fp32.pt").touch()
    (folder / "mp_rank_00_model_states.pt").touch()


def lost_tag(folder):
    (folder / "latest").write_text("global_step8")


def empty_tag(folder):
    """As a crash leaves it."""
    (folder / "latest").write_text("\n")


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, r"step2/model-00002-of-00002.safetensors is missing"),
        (truncated_shard, r"step2/model-00002.* is truncated or damaged"),
        (truncated_header, r"step2/model-00002.* is truncated or damaged"),
        (header(overlapping), r"step2/model-00002.* is truncated or damaged \(SafetensorError"),
        (header(negative), r"step2/model-00002.* is truncated or damaged \(SafetensorError"),
        (header(repeated), r"step2/model-00002.* is damaged \(not JSON: it repeats the key"),
        (damaged_header, r"step2/model-00002.* is truncated or damaged"),
        (index_without_map, r"step2/model.safetensors.index.json is damaged"),
        (index_with_more, r"step2/model-00001.* lacks tensor lost"),
        (other_shape, r"head.weight is float32 \[11, 12\] in .*step2 and float32 \[11, 13\] in .*step1"),
        (other_dtype, r"head.weight is float16 \[11, 13\] in .*step2 and float32 \[11, 13\] in .*step1"),
        (other_names, r"tensor more is float32 \[1\] in .*step2 and absent in .*step1"),
        (fewer_names, r"norm.weight is absent in .*step2 and float32 \[7\] in .*step1"),
        (twice_the_name, r"model-00002.* holds tensor scale, which another file"),
        (other_integers, r"positions is torch.int64 and differs between .*/step.*/step.*dequantized"),
        (other_mask, r"mask is torch.bool and differs between .*have no mean: leave one"),
        (fp8, r"step2/model-00002.*: tensor scale is F8_E4M3, which has no mean; .*dequantized \(transformers: "),
        (quantized, r"step2/config.json has a quantization_config \(gptq\): .*dequantized"),
        (quantized_within, r"step2/config.json has a quantization_config \(fp8\)"),
        (damaged_config, r"step2/config.json is damaged"),
        (universal, r"step2 is a universal checkpoint, .* give the tag folder that it was converted from"),
        (lost_tag, r"step2/latest names global_step8, which is missing; .*remove 'latest' to merge"),
        (empty_tag, r"step2/latest names no checkpoint"),
        (emptied, r"step2 holds none of"),
    ],
)
def test_damaged_or_different_checkpoints_are_refused(tmp_path, checkpoints, damage, message):
    damage(checkpoints[1])
    with pytest.raises(CheckpointError, match=message):
        merge(checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_line_and_exit_code_2(tmp_path, checkpoints, capsys):
    assert main(["merge", *map(str, checkpoints), "--out", str(tmp_path / "out"), "--weights", "1,2"]) == 2
    assert capsys.readouterr().err == "error: --weights has 2 numbers for 3 checkpoints; give one for each\n"
    assert main(["merge", str(tmp_path / "lost"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no checkpoint at" in capsys.readouterr().err
    assert main(["merge", str(checkpoints[0]), "--out", str(tmp_path / "out"), "--dtype", "int8"]) == 2
    assert "--dtype is 'int8'; write fp32, bf16, fp16" in capsys.readouterr().err


def test_the_command(tmp_path, checkpoints, capsys):
    arguments = ["merge", *map(str, checkpoints), "--out", str(tmp_path / "out"), "--workers", "2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(name in line for line in lines) for name in SHARDS)
    assert lines[-1] == f"{tmp_path / 'out'}: the mean of 3 checkpoints"
    assert main(arguments) == 2
    assert "out holds config.json; give a new folder" in capsys.readouterr().err


def test_an_output_folder_with_other_content_is_refused(tmp_path, checkpoints, monkeypatch):
    before = read(checkpoints[0])
    with pytest.raises(ConfigError, match="step1 holds config.json; give a new folder"):
        merge(checkpoints, checkpoints[0])
    same(read(checkpoints[0]), before)
    with pytest.raises(PluginError, match="config.json cannot be read or written: Not a directory"):
        merge(checkpoints, checkpoints[0] / "config.json")
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="is a mount point"):
        patched.setattr(os.path, "ismount", lambda path: True)
        merge(checkpoints, tmp_path / "out")
    merge(checkpoints, tmp_path / "out")  # an empty folder is a new one
    with pytest.raises(ConfigError, match="out holds config.json"):
        merge(checkpoints, tmp_path / "out")


SLOW = """
import os, sys, time
from ds_plugin.weight_averaging.merge.merge import merge
pwrite = os.pwrite
def slow(file, view, offset):
    os.write(1, b"writing" + bytes([10]))  # whole, of either thread
    time.sleep(600)
os.pwrite = slow
merge({folders!r}, {out!r})
"""


def test_a_killed_merge_is_swept_and_a_live_one_is_not(tmp_path, checkpoints):
    out = tmp_path / "out"
    code = SLOW.format(folders=[str(c) for c in checkpoints], out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        staging = tmp_path / ".out.merging"
        before = sorted(path.name for path in staging.iterdir())
        assert SHARDS[0] in before and not out.exists()
        with pytest.raises(ConfigError, match="another merge writes --out .*out; wait for it"):
            merge(checkpoints, out)
        assert sorted(path.name for path in staging.iterdir()) == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (staging / "left").mkdir()
    (staging / "left" / "over").touch()
    merge(checkpoints, out)
    assert {path.name for path in out.iterdir()} == {*SHARDS, INDEX, "config.json"}
    same(read(out), naive(checkpoints, [1, 1, 1]))
    assert not list(tmp_path.glob(".out*"))


def test_a_full_disk_leaves_nothing(tmp_path, checkpoints, monkeypatch):
    def full(file, view, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(PluginError, match=r"out is full; make room"):
        patched.setattr(os, "pwrite", full)
        merge(checkpoints, tmp_path / "out")
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patched, pytest.raises(PluginError, match=r"needs [\d.]+ MB, its disk has 0.0 MB"):
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        merge(checkpoints, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_checkpoint_that_shrinks_meanwhile(tmp_path, checkpoints, monkeypatch):
    pwrite = os.pwrite

    def shrink(file, view, offset):
        os.truncate(checkpoints[1] / SHARDS[0], 5000)
        return pwrite(file, view, offset)

    monkeypatch.setattr(os, "pwrite", shrink)
    with pytest.raises(CheckpointError, match="became shorter"):
        merge(checkpoints, tmp_path / "out")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def zero_folder(folder, shapes, partitions, world=None, **model):
    """A ZeRO 1 tag folder of one group, by hand."""
    folder.mkdir()
    for rank, partition in enumerate(partitions):
        state = {"single_partition_of_fp32_groups": [partition], "partition_count": [world or len(partitions)]}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, folder / name)
    model = {"module": {}, "buffer_names": [], "shared_params": {}, "param_shapes": [shapes], **model}
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    return folder


SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([3])}


def test_zero_by_hand(tmp_path):
    """Two ranks, a parameter across the boundary, a buffer, a frozen weight, a tied name, several output shards."""
    for step in (0, 1):
        values = torch.arange(9.0) + step
        module = {
            "a": values[:6].view(2, 3).bfloat16(),
            "b": torch.zeros(3).bfloat16(),
            "tied": torch.zeros(3).bfloat16(),
            "count": torch.tensor(step),
            "frozen": torch.tensor([1.5 + step]).bfloat16(),
        }
        more = {"module": module, "buffer_names": ["count"], "shared_params": {"tied": "b"}}
        zero_folder(tmp_path / f"step{step}", SHAPES, [values[:5], values[5:]], **more)
    merge([tmp_path / "step0", tmp_path / "step1"], tmp_path / "out", shard_bytes=30)
    expected = torch.arange(9.0) + 0.5
    same(
        read(tmp_path / "out"),
        {
            "a": expected[:6].view(2, 3),
            "b": expected[6:],
            "tied": expected[6:],
            "count": torch.tensor(1),
            "frozen": torch.tensor([2.5]),
        },
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert index["metadata"]["total_size"] == 4 * 9 + 4 * 3 + 8 + 4 and len(set(index["weight_map"].values())) == 3


def test_paddings_between_parameters_are_left_out(tmp_path):
    """DeepSpeed 0.19 may align each parameter of ZeRO 1/2; only rank 0's file says by how much."""
    flat = torch.tensor([0.0, 1, 2, 3, 4, 5, -1, -1, 6, 7, 8, -1])
    folder = zero_folder(tmp_path / "step", SHAPES, [flat[:7], flat[7:]])
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer_state_dict"]["param_alignment_paddings"] = [[2, 1]]
    torch.save(state, path)
    merge([folder], tmp_path / "out")
    same(read(tmp_path / "out"), {"a": flat[:6].view(2, 3), "b": flat[8:11]})


def test_latest_names_the_tag(tmp_path):
    zero_folder(tmp_path / "step1", SHAPES, [torch.arange(9.0)])
    (tmp_path / "latest").write_text("step1")
    merge([tmp_path], tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["b"], torch.tensor([6.0, 7.0, 8.0]))
    for name in ("latest_universal", "latest_checkpointed_iteration.txt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(CheckpointError, match=f"{name} names no checkpoint"):
            merge([folder], tmp_path / "none")


def test_a_trainers_folder_gives_the_masters(tmp_path):
    """Not the 16-bit weights that Trainer writes beside ``latest``, which is said; with what readers want."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        flat = torch.arange(9.0) + step
        zero_folder(folder / f"global_step{step}", SHAPES, [flat[:5], flat[5:]])
        save_file({"a": flat[:6].view(2, 3).bfloat16(), "b": flat[6:].bfloat16()}, folder / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
        (folder / "config.json").write_text('{"model_type": "tiny", "dtype": "bfloat16"}')
        (folder / "latest").write_text(f"global_step{step}")
        for name in (*STATE, "tokenizer.json"):
            (folder / name).write_text("{}")
    said, checkpoints = [], [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    merge(checkpoints, tmp_path / "out", note=said.append)
    assert said == [
        f"{checkpoints[1]}: the mean is of the fp32 masters in global_step2, which 'latest' names, not of "
        "model.safetensors",
        "model.safetensors is written, 0.0 MB",
    ]
    expected = torch.arange(9.0) + 1.5
    same(read(tmp_path / "out"), {"a": expected[:6].view(2, 3), "b": expected[6:]})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "tiny", "dtype": "float32"}
    tags = [folder / f"global_step{step}" for step, folder in enumerate(checkpoints, 1)]
    merge(tags, tmp_path / "tags", dtype="bf16")
    assert json.loads((tmp_path / "tags" / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapters_stay_adapters(tmp_path):
    """PEFT loads them from their own file; DeepSpeed's masters have the names of another model."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"lora": torch.full((3,), float(step))}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
        (folder / "latest").write_text("global_step8")
    said = []
    merge([tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"], tmp_path / "out", note=said.append)
    assert torch.equal(read(tmp_path / "out")["lora"], torch.full((3,), 1.5))
    assert (tmp_path / "out" / "adapter_config.json").is_file() and "adapters in adapter_model.safetensors" in said[0]


def test_integers_of_deepspeed(tmp_path):
    """What it calls a buffer is the newest's; packed weights that are frozen must be equal."""
    for step in (0, 1):
        module = {"count": torch.arange(3) + step, "packed": torch.arange(4, dtype=torch.uint8)}
        more = {"module": module, "buffer_names": ["count"]}
        zero_folder(tmp_path / f"step{step}", SHAPES, [torch.arange(9.0)], **more)
    merge([tmp_path / "step0", tmp_path / "step1"], tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["count"], torch.arange(3) + 1)
    module["packed"] = torch.zeros(4, dtype=torch.uint8)
    zero_folder(tmp_path / "step2", SHAPES, [torch.arange(9.0)], **more)
    with pytest.raises(CheckpointError, match="packed is torch.uint8 and differs between .*step0 and .*step2, "):
        merge([tmp_path / "step0", tmp_path / "step2"], tmp_path / "again")
    assert not (tmp_path / "again").exists()
    zero_folder(tmp_path / "fp8", SHAPES, [torch.arange(9.0)], module={"w": torch.zeros(4).to(torch.float8_e5m2)})
    with pytest.raises(CheckpointError, match="fp8/mp_rank_00.*: w is torch.float8_e5m2 .*; give the checkpoints"):
        merge([tmp_path / "fp8"], tmp_path / "again")


@pytest.mark.parametrize("file", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_foreign_class_is_named_and_never_loaded(tmp_path, file):
    folder = zero_folder(tmp_path / "step", SHAPES, [torch.zeros(5), torch.zeros(4)])
    content = torch.load(folder / file, weights_only=True)
    torch.save({**content, "client": Evil(str(tmp_path / "was-run"))}, folder / file)
    with pytest.raises(CheckpointError, match=rf"{file} holds (posix|nt).mkdir, which is not loaded"):
        merge([folder], tmp_path / "out")
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "out").exists()


def test_a_bare_pickle_is_not_loaded(tmp_path):
    folder = zero_folder(tmp_path / "step", SHAPES, [torch.zeros(9)])
    (folder / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "was-run"))))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        merge([folder], tmp_path / "out")
    assert not (tmp_path / "was-run").exists()


def no_model(folder):
    (folder / "mp_rank_00_model_states.pt").unlink()


def no_rank(folder):
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()


def rank_too_many(folder):
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.with_name("zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(path.read_bytes())


def cut_rank(folder):
    os.truncate(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", 700)


def no_optimizers(folder):
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()


def more_ranks(folder):
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    torch.save({**state, "mp_world_size": 2}, folder / "mp_rank_00_model_states.pt")


def gap_in_ranks(folder):
    (folder / "mp_rank_02_model_states.pt").touch()


def no_layers(folder):
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    torch.save({**state, "module": None}, folder / "mp_rank_00_model_states.pt")


def strange_name(folder):
    (folder / "layer_00-slice_00-model_states.pt").touch()


def experts(folder):
    (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").touch()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_model, "mp_rank_00_model_states.pt is missing"),
        (no_rank, r"zero_pp_rank_0_mp_rank_00_optim_states.pt is missing, one of 2 ranks"),
        (rank_too_many, r"has 3 ranks' shards, 2 saved it"),
        (cut_rank, r"zero_pp_rank_1_mp_rank_00_optim_states.pt is truncated or damaged"),
        (no_optimizers, r"holds no \*_optim_states.pt"),
        (more_ranks, "mp_rank_01_model_states.pt is missing"),
        (gap_in_ranks, "mp_rank_01_model_states.pt is missing"),
        (no_layers, r"lacks layer_\*-model_states.pt"),
        (strange_name, "is not named as DeepSpeed names its files"),
        (experts, "a checkpoint of experts"),
    ],
)
def test_zero_files_refused(tmp_path, damage, message):
    folders = [zero_folder(tmp_path / f"{n}", SHAPES, [torch.zeros(5), torch.zeros(4)]) for n in (1, 2)]
    damage(folders[1])
    with pytest.raises(CheckpointError, match=message):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def pipeline_folder(folder, values, stages, layers):
    """A ZeRO 1 tag folder of pipeline stages: the masters of each, and what each layer's file holds."""
    folder.mkdir()
    for rank, shapes in enumerate(stages):
        flat = torch.cat([values[name].flatten() for name in shapes])
        state = {"single_partition_of_fp32_groups": [flat], "partition_count": [1]}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt")
        model = {"module": None, "param_shapes": [{name: values[name].shape for name in shapes}]}
        torch.save({**model, "mp_world_size": len(stages)}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    for number, content in layers.items():
        torch.save(content, folder / f"layer_{number:02d}-model_states.pt")
    return folder


STAGES = [["tied_modules.embed.weight", "1.weight"], ["3.weight", "tied_modules.embed.weight"]]


def test_stages_with_tied_and_frozen_layers_and_buffers(tmp_path):
    """Layer 0 and 4 are one module, 2 is a function (which has no file), 1 has a buffer, 5 is frozen."""
    for step in (0, 1):
        values = {name: torch.arange(3.0) + step + i for i, name in enumerate(dict.fromkeys(sum(STAGES, [])))}
        low = {name: value.bfloat16() for name, value in values.items()}
        tied = {"weight": low["tied_modules.embed.weight"]}
        layers = {
            0: tied, 1: {"weight": low["1.weight"], "count": torch.tensor(step)}, 3: {"weight": low["3.weight"]},
            4: tied, 5: {"scale": torch.tensor([step])},
        }  # fmt: skip
        pipeline_folder(tmp_path / f"step{step}", values, STAGES, layers)
    merge([tmp_path / "step0", tmp_path / "step1"], tmp_path / "out")
    found = read(tmp_path / "out")
    expected = {name: value - 0.5 for name, value in values.items()}
    same(found, expected | {"1.count": torch.tensor(1), "5.scale": torch.tensor([1])})
    (tmp_path / "step1" / "layer_03-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="step1/layer_03.*-model_states.pt is missing"):
        merge([tmp_path / "step1"], tmp_path / "again")


def test_stages_that_do_not_fit_together(tmp_path):
    values = {"0.weight": torch.zeros(3)}
    folder = pipeline_folder(tmp_path / "two", values, [["0.weight"], ["0.weight"]], {0: {}})
    with pytest.raises(CheckpointError, match="2 model-parallel ranks and the layers of 1 tensor-parallel ones"):
        merge([folder], tmp_path / "out")
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    torch.save({"module": None}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="pipeline stages without ZeRO.*zero_optimization.stage 1"):
        merge([folder], tmp_path / "out")


def test_other_layouts_are_refused(tmp_path, checkpoints):
    two = zero_folder(tmp_path / "two", SHAPES, [torch.zeros(5), torch.zeros(4)])
    one = zero_folder(tmp_path / "one", SHAPES, [torch.zeros(9)])
    with pytest.raises(CheckpointError, match="one is a checkpoint of ZeRO 1/2 on 1 ranks.* on 2 ranks"):
        merge([two, one], tmp_path / "out")
    with pytest.raises(CheckpointError, match="step1 is a safetensors checkpoint"):
        merge([two, checkpoints[0]], tmp_path / "out")
    short = zero_folder(tmp_path / "short", SHAPES, [torch.zeros(4), torch.zeros(2)])
    with pytest.raises(CheckpointError, match="the partitions end within parameter b"):
        merge([short], tmp_path / "out")
    long = zero_folder(tmp_path / "long", SHAPES, [torch.zeros(14)])
    with pytest.raises(CheckpointError, match="group 0 holds 14 elements, its parameters 9"):
        merge([long], tmp_path / "out")


# not getrusage: after vfork a process's ru_maxrss counts pytest's own peak, which it has never had
PEAK = """
import re, sys
from ds_plugin.cli.main import main
from ds_plugin.weight_averaging.merge import merge
def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
imported = kilobytes("VmRSS")
code = main(sys.argv[1:])
print(code, (kilobytes("VmHWM") - imported) * 1024, "deepspeed" in sys.modules)
"""


def test_memory_stays_below_two_shards_and_300_mb(tmp_path):
    """Above what the imports take (more with a CUDA build of torch); six checkpoints, two workers, bf16 (which is
    widened). DeepSpeed is never imported."""
    megabytes = 24
    names = [write(tmp_path / f"step{seed}", weights_of(seed)) for seed in (1, 2)]
    for seed, folder in enumerate(names):
        torch.manual_seed(seed)
        for shard in (0, 1):
            grown = torch.randn(megabytes * 10**6 // 2).bfloat16()
            altered(folder, shard, lambda t, shard=shard, grown=grown: t.update({f"big{shard}": grown}))
        (folder / INDEX).unlink()
    arguments = ["merge", *map(str, names * 3), "--out", str(tmp_path / "out"), "--workers", "2"]
    result = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    code, peak, deepspeed = result.stdout.splitlines()[-1].split()
    assert code == "0" and deepspeed == "False"
    assert int(peak) < 2 * megabytes * 10**6 + 300 * 10**6
    # and far below it: nothing grows with the shards
    assert int(peak) < 60 * 10**6
