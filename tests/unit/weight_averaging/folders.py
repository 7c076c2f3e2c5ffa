"""Checkpoints to merge, made by hand, and what their mean must be."""

import json
import os

import torch
from safetensors.torch import load_file, save_file

from ds_plugin.weight_averaging.merge import inputs
from tests.reference import averaging as reference

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
STATE = (
    "latest_universal", "trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "rng_state_0.pth", "zero_to_fp32.py", "ds_plugin.json",
)  # fmt: skip
SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([3])}


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


def altered(folder, shard, change):
    """Rewrite one shard of a folder with its tensors changed in place by ``change``."""
    tensors = load_file(folder / SHARDS[shard])
    change(tensors)
    save_file(tensors, folder / SHARDS[shard])


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
