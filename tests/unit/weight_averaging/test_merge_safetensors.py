"""Merging safetensors folders: against a naive mean, bit for bit; and refused."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.merge.merge import merge
from tests.unit.weight_averaging.folders import INDEX, SHARDS, STATE, altered, naive, read, same, weights_of, write


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_naive_mean_bit_for_bit(tmp_path, dtype, workers):
    folders = [
        write(tmp_path / f"step{seed}", weights_of(seed, dtype), {"format": "pt", "a": "b"}) for seed in (1, 2, 3)
    ]
    merge(folders, tmp_path / "out", workers=workers)
    same(read(tmp_path / "out"), naive(folders, [1, 1, 1]))


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


def test_fp64_is_averaged_in_fp64(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file({"a": torch.randn(9, dtype=torch.float64)}, tmp_path / f"{seed}.safetensors")
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    merge(files, tmp_path / "out")
    first, second = (load_file(file)["a"] for file in files)
    assert torch.equal(load_file(tmp_path / "out" / "1.safetensors")["a"], (first + second) / 2)


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
