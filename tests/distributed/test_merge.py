"""Merging real DeepSpeed checkpoints: the bits of the in-training average at the same snapshots."""

import pytest
import torch
from safetensors.torch import load_file

import ds_plugin
from ds_plugin.errors import CheckpointError
from ds_plugin.weight_averaging.merge import merge
from tests.distributed import plain
from tests.reference import averaging as reference


def _train_and_save(folder, zero, precision, extra, sections):
    """Nine steps with a checkpoint at every snapshot (2, 4, 6, 8); the average in fp32, whole, by name."""
    config = plain.host_config(zero, precision, **{"weight_averaging": plain.AVERAGING, **sections})
    config["zero_optimization"].update(extra)
    config["zero_force_ds_cpu_optimizer"] = False
    engine = plain.make(config)

    def after_step(engine):
        if engine.global_steps % 2 == 0:
            engine.save_checkpoint(folder, tag=f"step{engine.global_steps}")

    plain.train(engine, 9, after_step)
    plugin = ds_plugin.attached(engine)
    assert plugin.averager.steps == [4, 6, 8]
    with plugin.averaged_weights():
        # in fp32 the parameters are the masters; DeepSpeed's safe_get_full_fp32_param errs with round_robin_gradients
        return reference.full_parameters(engine) if precision == "fp32" else reference.full_masters(engine)


LAYOUTS = [
    # ranks, stage, precision, more of zero_optimization, more of the config
    (2, 1, "fp32", {}, {}),
    (2, 2, "fp32", {"round_robin_gradients": True}, {}),
    (2, 3, "fp32", {}, {}),
    (3, 3, "fp32", {"sub_group_size": 300}, {}),
    (3, 2, "bf16", {}, {}),
    (2, 3, "bf16", {"stage3_param_persistence_threshold": 0}, {}),
    (2, 1, "bf16", {}, {"data_types": {"grad_accum_dtype": "fp32"}}),  # DeepSpeed's BF16_Optimizer
    (1, 0, "fp32", {}, {}),
    (2, 1, "fp32", {}, {"weight_averaging": {**plain.AVERAGING, "weights": "1-sqrt"}}),
]


@pytest.mark.parametrize(("ranks", "zero", "precision", "extra", "sections"), LAYOUTS)
def test_equals_the_average_of_training_bit_for_bit(workers, tmp_path, ranks, zero, precision, extra, sections):
    averages = workers(ranks).run(_train_and_save, str(tmp_path / "run"), zero, precision, extra, sections)
    checkpoints = [tmp_path / "run" / f"step{step}" for step in (4, 6, 8)]
    weights = sections.get("weight_averaging", {}).get("weights", "uniform")
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
