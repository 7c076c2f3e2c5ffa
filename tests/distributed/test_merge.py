"""Merging real DeepSpeed checkpoints: the bits of the in-training average at the same snapshots."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

import ds_plugin
from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.merge.merge import merge
from megatron_patches.models import gpt
from tests.distributed import pipelined, plain, test_completep
from tests.harness import slow
from tests.reference import averaging as reference


def _train_and_save(folder, zero, precision, extra, sections):
    """Nine steps with a checkpoint at every snapshot (2, 4, 6, 8); the average in fp32, whole, by name."""
    config = plain.deepspeed_config(zero, precision, **{"weight_averaging": plain.AVERAGING, **sections})
    config["zero_optimization"].update(extra)
    config["zero_force_ds_cpu_optimizer"] = False
    engine = plain.make(config)

    def after_step(engine):
        if engine.global_steps % 2 == 0:
            engine.save_checkpoint(folder, tag=f"step{engine.global_steps}")

    plain.train(engine, 9, after_step)
    plugin = ds_plugin.get_plugin(engine)
    assert plugin.averager.steps == [4, 6, 8]
    with plugin.averaged_weights():
        # in fp32 the parameters are the masters; DeepSpeed's safe_get_full_fp32_param errs with round_robin_gradients
        return reference.full_parameters(engine) if precision == "fp32" else reference.full_masters(engine)


LAYOUTS = [
    # ranks, stage, precision, more of zero_optimization, more of the config
    slow(2, 1, "fp32", {}, {}),
    (2, 2, "fp32", {"round_robin_gradients": True}, {}),
    slow(2, 3, "fp32", {}, {}),
    (3, 3, "fp32", {"sub_group_size": 300}, {}),
    slow(3, 2, "bf16", {}, {}),
    (2, 3, "bf16", {"stage3_param_persistence_threshold": 0}, {}),
    (2, 1, "bf16", {}, {"data_types": {"grad_accum_dtype": "fp32"}}),  # DeepSpeed's BF16_Optimizer
    (1, 0, "fp32", {}, {}),
    (2, 1, "fp32", {}, {"weight_averaging": {**plain.AVERAGING, "weights": "minus-sqrt"}}),
]


@pytest.mark.parametrize(("ranks", "zero", "precision", "extra", "sections"), LAYOUTS)
def test_equals_the_average_of_training_bit_for_bit(workers, tmp_path, ranks, zero, precision, extra, sections):
    averages = workers(ranks).run(_train_and_save, str(tmp_path / "run"), zero, precision, extra, sections)
    checkpoints = [tmp_path / "run" / f"step{step}" for step in (4, 6, 8)]
    weights = sections.get("weight_averaging", {}).get("weights", "mean")
    merge(checkpoints, tmp_path / "out", weights=weights, shard_bytes=3000, workers=2)
    found = {name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    assert found.keys() == averages[0].keys()
    assert [n for n in found if found[n].dtype != torch.float32 or not torch.equal(found[n], averages[0][n])] == []
    assert len(list((tmp_path / "out").glob("model-*"))) > 1
    plain.TinyLM().load_state_dict(found)


def test_the_newest_tag_and_other_numbers_of_ranks(workers, tmp_path):
    for ranks in (1, 2):
        workers(ranks).run(_train_and_save, str(tmp_path / f"{ranks}"), 1, "fp32", {}, {})
    merge([tmp_path / "2"], tmp_path / "latest")
    merge([tmp_path / "2" / "step8"], tmp_path / "step8")
    assert (tmp_path / "latest" / "model.safetensors").read_bytes() == (
        tmp_path / "step8" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(CheckpointError, match="ZeRO 1/2 on 1 ranks, .* ZeRO 1/2 on 2 ranks"):
        merge([tmp_path / "2", tmp_path / "1"], tmp_path / "mixed")


GPT = {"num_layers": 2, "hidden_size": 32, "tensor_parallel": 2}


def _train_tensor_parallel(folder, zero, precision):
    """As `_train_and_save`, of megatron-core's layers on tensor-parallel ranks."""
    sections = {"weight_averaging": {**plain.AVERAGING, "interval": 1}}
    config = plain.deepspeed_config(zero, precision, **sections)
    engine = ds_plugin.initialize(model=test_completep.build(None, **GPT), config=config, mpu=gpt.DeepSpeedMPU())[0]
    for step in range(4):
        tokens, labels = test_completep.batch(step)
        engine.backward(engine(tokens, test_completep.positions(), None, labels=labels).mean())
        engine.step()
        engine.save_checkpoint(folder, tag=f"step{step + 1}")
    with ds_plugin.get_plugin(engine).averaged_weights():
        return reference.full_parameters(engine) if precision == "fp32" else reference.full_masters(engine)


def _load_tensor_parallel(out):
    """This rank's parameters of a new model that has loaded this rank's folder, and what it did not find there."""
    path = f"{out}/tp{dist.get_rank()}-of-2/model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["tensor_parallel_rank"] == str(dist.get_rank())
    model = test_completep.build(None, **GPT)
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found, [name for name in missing if not name.endswith("_extra_state")], unexpected


@pytest.mark.parametrize(("zero", "precision"), [(1, "bf16"), slow(0, "fp32")])
def test_tensor_parallel_ranks_have_a_folder_each(workers, tmp_path, zero, precision):
    averages = workers(2).run(_train_tensor_parallel, str(tmp_path / "run"), zero, precision)
    merge([tmp_path / "run" / f"step{step}" for step in (2, 3, 4)], tmp_path / "out", workers=2)
    for average, (found, missing, unexpected) in zip(
        averages, workers(2).run(_load_tensor_parallel, str(tmp_path / "out")), strict=True
    ):
        assert missing == [] and unexpected == []
        assert found.keys() == average.keys() and [n for n in found if not torch.equal(found[n], average[n])] == []
    halves = [average["output_layer.weight"] for average in averages]
    assert not torch.equal(*halves)
    (tmp_path / "run" / "step3" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="step3/mp_rank_00_model_states.pt is missing"):
        merge([tmp_path / "run" / "step3"], tmp_path / "again")


def _train_pipeline(folder, layout, precision):
    """Four steps with a checkpoint after each of the last three; the mean of their masters, of this stage."""
    engine = pipelined.make(layout, deepspeed.initialize, 1, precision)
    masters = []

    def after_step(engine):
        if engine.global_steps > 1:
            engine.save_checkpoint(folder, tag=f"step{engine.global_steps}")
            masters.append(reference.full_masters(engine))

    pipelined.train(engine, 4, after_step)
    return engine.grid.get_slice_parallel_rank(), reference.mean(masters)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [(pipelined.Layout(pipe=2), "fp32"), slow(pipelined.Layout(pipe=2, tensor=2), "bf16")],
    ids=["pp2", "pp2-tp2"],
)
def test_pipeline_stages_lie_together(workers, tmp_path, layout, precision):
    """DeepSpeed's pipeline engine; in bf16 its masters are BF16_Optimizer's."""
    means = workers(layout.ranks).run(_train_pipeline, str(tmp_path / "run"), layout, precision)
    merge([tmp_path / "run" / f"step{step}" for step in (2, 3, 4)], tmp_path / "out", shard_bytes=20000)
    for rank in range(layout.tensor):
        expected = {name: value for tp, stage in means if tp == rank for name, value in stage.items()}
        folder = tmp_path / "out" / f"tp{rank}-of-{layout.tensor}" if layout.tensor > 1 else tmp_path / "out"
        found = {name: t for path in folder.glob("model-*.safetensors") for name, t in load_file(path).items()}
        assert found.keys() == expected.keys() and len({name.split(".")[0] for name in found}) == 6
        assert [n for n in found if found[n].dtype != torch.float32 or not torch.equal(found[n], expected[n])] == []
        assert (folder / "model.safetensors.index.json").is_file()
