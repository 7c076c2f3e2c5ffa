"""Merging torch_dist checkpoints that megatron-core has written: what it reads back itself is the naive mean."""

from pathlib import Path

import torch

from ds_plugin.cli.main import main
from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt
from tests.distributed import megatron_training as schedules

SIZE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": schedules.LENGTH}
MASTER = "optimizer.state.fp32_param."
SCHEDULER = type("Constant", (), {"step": lambda self, increment: None})()


def build(tensor_parallel, dtype, seed=1234):
    """A model without its wrappers, and its config."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, "tensor_parallel": tensor_parallel})
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel)
    gpt.initialize_parallel(cfg, seed)
    config = gpt.transformer_config(cfg, dtype)
    size = (schedules.VOCAB, schedules.LENGTH)
    return GPTModel(config, gpt.layer_spec(cfg), *size, share_embeddings_and_output_weights=False).to(dtype)


def train_and_save(folder, tensor_parallel, precision, shardings):
    """Three steps; a checkpoint after each, its optimizer in the sharding type of the step (None: no optimizer)."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = build(tensor_parallel, dtype)
    sharded = "plain" not in shardings
    wrapped = Float16Module(model.config, model) if precision == "bf16" else model
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=sharded), wrapped
    )
    config = OptimizerConfig(
        lr=0.01, bf16=precision == "bf16", params_dtype=dtype, use_distributed_optimizer=sharded, adam_eps=1e-4
    )
    optimizer = get_megatron_optimizer(config, [ddp])
    for step, sharding in enumerate(shardings):
        schedules.train_step(ddp, optimizer, SCHEDULER, step)
        metadata = {} if sharding == "plain" else {"distrib_optim_sharding_type": sharding}
        state = {"model": model.sharded_state_dict(metadata=metadata), "iteration": step + 1}
        if sharding is not None:
            state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=metadata)
        target = Path(folder, f"iter_{step + 1:07d}")
        target.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(state, str(target))
    Path(folder, "latest_checkpointed_iteration.txt").write_text(f"{len(shardings)}")
    return sorted(state["model"])


def read_plain(folders):
    """megatron-core's own reading of whole tensors, by name, of each folder."""
    from megatron.core import dist_checkpointing

    megatron_on_cpu.enable()
    read = [dist_checkpointing.load_plain_tensors(str(folder)) for folder in folders]
    return [{name: value for name, value in state.items() if isinstance(value, torch.Tensor)} for state in read]


def read_back(folder, tensor_parallel):
    """This rank's parameters of a freshly drawn fp32 model after loading ``folder``, what cuts them, and the rest."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    model = build(tensor_parallel, torch.float32, seed=99)
    state, missing, unexpected = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, str(folder), strict=StrictHandling.RETURN_ALL
    )
    model.load_state_dict(state["model"])
    cut = {n: p.partition_dim for n, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, cut, (state["iteration"], sorted(missing), sorted(unexpected))


def mean_of(checkpoints, name):
    """In fp32, oldest to newest, divided once."""
    return sum(checkpoint[name].float() for checkpoint in checkpoints) / len(checkpoints)


def test_the_mean_of_masters_is_read_back_at_any_size(workers, tmp_path, capsys):
    """Checkpoints of two tensor-parallel ranks and of none, in both orders, so that either has to be cut anew."""
    two, one, plain = (tmp_path / name for name in ("two", "one", "plain"))
    workers(2).run(train_and_save, str(two), 2, "bf16", ["fully_reshardable"] * 3)
    workers(2).run(train_and_save, str(one), 1, "bf16", ["fully_reshardable", "dp_reshardable"])
    workers(2).run(train_and_save, str(plain), 2, "bf16", ["plain"])
    inputs = [two / "iter_0000001", two / "iter_0000002", two / "iter_0000003", one / "iter_0000001"]
    inputs += [plain / "iter_0000001", one / "iter_0000002"]
    merges = {
        "same": ("param", [0, 1, 2], []),
        "cut to one": ("param", [0, 1, 3], ["--workers", "2"]),
        "cut to two": ("param", [3, 1, 2], []),
        "not distributed": ("fp32_param", [4, 4], []),
        "weights": (None, [5, 5], []),
    }
    said = {}
    for name, (_, numbers, options) in merges.items():
        assert main(["merge", *(str(inputs[n]) for n in numbers), "--out", str(tmp_path / name), *options]) == 0
        said[name] = capsys.readouterr().out
    assert f"{inputs[2]}: the mean is of the fp32 masters of" in said["same"]
    assert "no fp32 masters under the parameters' names" in said["weights"]
    assert "the mean is of the model's bfloat16 weights" in said["weights"]

    folders = [*inputs, *(tmp_path / name for name in merges)]
    [tensors] = workers(1).run(read_plain, [str(folder) for folder in folders])
    read, found = tensors[: len(inputs)], dict(zip(merges, tensors[len(inputs) :], strict=True))
    names = [name for name in read[0] if not name.startswith("optimizer.")]
    assert len(names) > 15
    for merged, (master, numbers, _) in merges.items():
        assert sorted(found[merged]) == sorted(names)  # the model, and nothing of the optimizer
        checkpoints = [read[n] for n in numbers]
        for name in names:
            key = name if master is None else f"optimizer.state.{master}.{name}"
            expected = mean_of(checkpoints, key)
            if master is None:
                expected = expected.bfloat16()
            assert found[merged][name].dtype == expected.dtype and torch.equal(found[merged][name], expected), name
    assert any(not torch.equal(found["same"][name], found["cut to one"][name]) for name in names)
    assert any(not torch.equal(found["same"][name].bfloat16(), read[2][name]) for name in names)  # they had moved

    [(weights, _, rest)] = workers(1).run(read_back, str(tmp_path / "same"), 1)
    assert rest == (3, [], [])
    halves = workers(2).run(read_back, str(tmp_path / "same"), 2)
    cut = halves[0][1]
    assert len(cut) > 5 and len(weights) > 20
    for name, value in weights.items():
        parts = [half[0][name] for half in halves]
        assert torch.equal(torch.cat(parts, cut[name]) if name in cut else parts[0], value), name
        if name.startswith("decoder.layers"):
            _, _, layer, key = name.split(".", 3)
            stacked = found["same"].get(f"decoder.layers.{key}")
            assert stacked is None or torch.equal(stacked[int(layer)], value)
    assert torch.equal(weights["output_layer.weight"], found["same"]["output_layer.weight"])
