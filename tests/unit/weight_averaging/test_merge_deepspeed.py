"""Merging hand-made files of DeepSpeed's: ZeRO partitions, pipeline stages, a Trainer's folder; and refused."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.merge.merge import merge
from tests.unit.weight_averaging.folders import INDEX, SHAPES, STATE, Evil, read, same, zero_folder


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
