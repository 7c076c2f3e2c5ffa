"""megatron-core on a CPU: real processes, real tensor parallelism.

The workers import megatron before the tests enable it, so names copied at import time are covered; the fresh
interpreter of `test_enable_before_importing_megatron` covers the other order.
"""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megatron_patches
from ds_plugin.core.errors import ConfigError, StateError
from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 50
SMALL = dict(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16)
MODERN = dict(activation="swiglu", normalization="RMSNorm", position_embedding="rope", bias=False, num_query_groups=2,
              tie_embeddings=True)  # fmt: skip


def build(seed=1234, dtype=torch.float32, **settings):
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig(**{**SMALL, **settings})
    gpt.initialize_parallel(cfg, seed)
    return gpt.build_gpt(cfg, VOCAB, gpt.transformer_config(cfg, dtype), gpt.layer_spec(cfg))


def batch(length=9):
    tokens = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(length).expand(2, -1), tokens.roll(-1, 1)


def loss_of(model, length=9):
    tokens, positions, labels = batch(length)
    return model(tokens, positions, None, labels=labels).mean()


def train(model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def full_weights(model):
    """Every parameter put together again over the tensor-parallel group, as bytes by name."""
    world, full = dist.get_world_size(), {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().contiguous()
        if getattr(parameter, "tensor_model_parallel", False) and world > 1:
            parts = [torch.empty_like(value) for _ in range(world)]
            dist.all_gather(parts, value)
            # A gated MLP holds its part of the gate, then its part of the value: stride 2.
            strides = [part.chunk(parameter.partition_stride, parameter.partition_dim) for part in parts]
            pieces = [chunks[i] for i in range(parameter.partition_stride) for chunks in strides]
            value = torch.cat(pieces, parameter.partition_dim)
        full[name] = (tuple(value.shape), value.numpy().tobytes())
    return full


def weights_and_first_loss(settings, tensor_parallel):
    model = build(**settings, tensor_parallel=tensor_parallel)
    return full_weights(model), loss_of(model).item()


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_tensor_parallel_cuts_the_same_model(workers, settings):
    [(one, one_loss)] = workers(1).run(weights_and_first_loss, settings, 1)
    two = workers(2).run(weights_and_first_loss, settings, 2)
    assert len(one) > 10
    for weights, loss in two:
        assert weights == one
        assert loss == pytest.approx(one_loss, abs=1e-6)


def init_then_train_with_dropout():
    model = build(tensor_parallel=2, dropout=0.2)
    before = megatron_on_cpu.check_replicas(model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, 3)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, first[name])]
    return before, megatron_on_cpu.check_replicas(model), len(moved) == len(first)


def test_replicas_stay_identical_through_training_with_dropout(workers):
    # position embeddings, per layer 2 norms (weight, bias) and 2 row-parallel biases, final norm: 1 + 2 * 6 + 2
    assert workers(2).run(init_then_train_with_dropout) == [(15, 15, True)] * 2


def perturb(name, rank):
    model = build(tensor_parallel=2)
    if dist.get_rank() == rank:
        weight = dict(model.named_parameters())[name]
        with torch.no_grad():
            weight[3] = torch.nextafter(weight[3], torch.tensor(2.0))
    megatron_on_cpu.check_replicas(model)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ulp_on_one_rank_is_named_on_every_rank(workers, rank):
    name = "decoder.layers.1.pre_mlp_layernorm.weight"
    errors = workers(2).run(perturb, name, rank, expect="errors")
    assert errors[0] == errors[1]
    assert errors[0].type == "StateError"
    assert f"parameter {name!r}" in errors[0].message and "ranks [0, 1]" in errors[0].message


def drift_in_one_group_with_zero(stage):
    """4 ranks, TP2 x DP2; both data-parallel copies of tensor-parallel rank 1 drift, through the engine's weights."""
    import deepspeed

    model = build(tensor_parallel=2)
    name = "decoder.final_layernorm.weight"
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=gpt.DeepSpeedMPU())
    for _ in range(2):
        engine.backward(loss_of(engine))
        engine.step()
    compared = megatron_on_cpu.check_replicas(engine)
    weight = dict(model.named_parameters())[name]
    if stage == 3:
        # Each rank of the data-parallel group holds one half; change an element of the second.
        if dist.get_rank() == 3:
            weight.ds_tensor.data[0] += 1e-3
    elif dist.get_rank() == 3:
        weight.data[20] += 1e-3
    try:
        megatron_on_cpu.check_replicas(engine)
    except StateError as error:
        return compared, str(error)
    return compared, "nothing found"


@pytest.mark.parametrize("stage", [1, 3])
def test_replicas_under_zero(workers, stage):
    results = workers(4).run(drift_in_one_group_with_zero, stage)
    assert len(set(results)) == 1
    compared, message = results[0]
    assert compared == 15
    assert "parameter 'module.decoder.final_layernorm.weight'" in message


def build_inside_zero_init():
    import deepspeed

    megatron_on_cpu.enable()
    with deepspeed.zero.Init():
        build()


def test_building_inside_zero_init_is_refused(workers):
    [error] = workers(1).run(build_inside_zero_init, expect="errors")
    assert error.type == "ConfigError" and "outside it" in error.message


def tracker_streams():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    # A handler of its own: the warning that it gives on every fork must not come through.
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(handler)

    build(tensor_parallel=2)
    tracker = get_cuda_rng_tracker()
    saved = tracker.get_states()
    default_before = torch.get_rng_state()
    with tracker.fork():
        inside = torch.rand(4)
    restored = torch.equal(torch.get_rng_state(), default_before)
    outside = torch.rand(4)
    with tracker.fork():
        inside_next = torch.rand(4)
    tracker.set_states(saved)
    with tracker.fork():
        inside_again = torch.rand(4)
    return inside.tolist(), inside_next.tolist(), inside_again.tolist(), outside.tolist(), restored, seen


def test_the_tracker_really_forks(workers):
    ranks = workers(2).run(tracker_streams)
    for inside, inside_next, inside_again, outside, restored, warnings in ranks:
        assert restored, "leaving the fork must put the default stream back"
        assert inside != outside
        assert inside != inside_next, "the model-parallel stream must go on from where it was"
        assert inside == inside_again, "get_states and set_states must rewind it"
        assert warnings == []
    assert ranks[0][0] != ranks[1][0], "each rank has its own model-parallel stream"
    assert ranks[0][3] == ranks[1][3], "all ranks share the default stream"


def lengths_and_causality():
    model = build()
    model.eval()
    losses = [loss_of(model, length).item() for length in (1, 2, 7, 16)]
    tokens, positions, _ = batch(8)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    a, b = model(tokens, positions, None), model(changed, positions, None)
    return losses, torch.equal(a[:, :5], b[:, :5]), torch.equal(a[:, 5:], b[:, 5:])


def test_any_length_without_a_mask_is_causal(workers):
    [(losses, past_same, future_same)] = workers(1).run(lengths_and_causality)
    assert all(3.0 < loss < 6.0 for loss in losses)
    assert past_same and not future_same


def half_precision():
    model = build(dtype=torch.bfloat16, **MODERN)
    loss = loss_of(model)
    loss.backward()
    return {str(p.dtype) for p in model.parameters()}, all(p.grad is not None for p in model.parameters()), loss.item()


def test_bfloat16_trains_in_one_dtype(workers):
    [(dtypes, has_grads, loss)] = workers(1).run(half_precision)
    assert dtypes == {"torch.bfloat16"} and has_grads
    assert 3.0 < loss < 6.0


def recompute(direct):
    """Loss and gradients with every layer run again in the backward pass, and without."""
    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig(**SMALL, dropout=0.2, tensor_parallel=2)
    results = []
    for granularity in (None, "full"):
        gpt.initialize_parallel(cfg, 1234)
        config = gpt.transformer_config(cfg, torch.float32)
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = granularity, "uniform", 1
        model = gpt.build_gpt(cfg, VOCAB, config, gpt.layer_spec(cfg))
        loss = loss_of(model)
        torch.autograd.backward(loss) if direct else loss.backward()
        results.append([loss] + [p.grad for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("direct", [False, True])
def test_recomputed_layers_draw_the_same_dropout(workers, direct):
    assert workers(2).run(recompute, direct) == [True, True]


def distributed_optimizer_step():
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = build()
    assert parallel_state.get_data_parallel_world_size() == 2
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    ddp = DistributedDataParallel(model.config, ddp_config, model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, use_distributed_optimizer=True, clip_grad=1.0), [ddp])
    losses = []
    for _ in range(3):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = loss_of(ddp)
        loss.backward()
        finalize_model_grads([ddp])
        ok, norm, _ = optimizer.step()
        losses.append(loss.item())
        assert ok and norm > 0
    assert tensor_parallel.get_cuda_rng_tracker().is_initialized()
    return losses


def test_megatrons_distributed_optimizer_trains(workers):
    results = workers(2).run(distributed_optimizer_step)
    assert results[0] == results[1]
    assert results[0][2] < results[0][1] < results[0][0]


def snapshot():
    """Every attribute of torch.cuda and its submodules, the classes it touches, and megatron's copies."""
    spaces = {n: dict(vars(m)) for n, m in sys.modules.items() if n.split(".")[:2] == ["torch", "cuda"] and m}
    spaces |= {n: dict(vars(m)) for n, m in sys.modules.items() if n.split(".")[0] == "megatron" and m}
    spaces |= {n: dict(vars(m)) for n, m in sys.modules.items() if n.split(".")[:2] == ["torch", "autograd"] and m}
    spaces["torch.Tensor"] = dict(vars(torch.Tensor))
    spaces["torch.optim.Optimizer"] = dict(vars(torch.optim.Optimizer))
    return {f"{space}.{name}": value for space, names in spaces.items() for name, value in names.items()}


def differences(before, after):
    return sorted(n for n in before.keys() | after.keys() if before.get(n, ...) is not after.get(n, ...))


def enable_and_disable(pretend):
    import megatron.core.optimizer.layer_wise_optimizer
    import megatron.core.tensor_parallel.random as tracker_module
    import megatron.core.transformer.multi_latent_attention  # noqa: F401

    before = snapshot()
    megatron_on_cpu.enable()
    megatron_on_cpu.enable(pretend_cuda=pretend)
    on = differences(before, snapshot())
    copied = tracker_module._lazy_call is torch.cuda._lazy_call
    moved = torch.ones(1, device="cuda").cuda().to("cuda:0").device.type
    available = torch.cuda.is_available(), torch.cuda.device_count()
    megatron_on_cpu.disable()
    megatron_on_cpu.disable()
    stack = torch.overrides._get_current_function_mode_stack()
    return on, copied, moved, available, differences(before, snapshot()), len(stack), megatron_patches.active()


@pytest.mark.parametrize("pretend", [False, True])
def test_enable_and_disable_restore_everything(workers, pretend):
    [(on, copied, moved, available, left, modes, active)] = workers(1).run(enable_and_disable, pretend)
    assert copied and "torch.cuda._lazy_call" in on and "megatron.core.tensor_parallel.random._lazy_call" in on
    assert ("torch.cuda.is_available" in on) == pretend
    assert ("torch.Tensor.pin_memory" in on) == pretend
    assert available == ((True, 1) if pretend else (False, 0))
    assert moved == "cpu"
    assert (left, modes, active) == ([], 0, [])


def load_as_with_a_cuda_build():
    """A torch that was built with CUDA names a GPU as its accelerator, be there one or not."""
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    megatron_on_cpu.enable(pretend_cuda=True)
    assert torch.get_device_module(torch.device("cuda")).is_available()
    numbers = torch.utils.data.TensorDataset(torch.arange(4))
    loader = torch.utils.data.DataLoader(numbers, num_workers=1, pin_memory=True, multiprocessing_context="fork")
    return [batch[0].item() for batch in loader]


def test_loader_processes_run_where_torch_was_built_for_gpus(workers):
    assert workers(1).run(load_as_with_a_cuda_build) == [[0, 1, 2, 3]]


def leave_out_of_order():
    from torch.overrides import TorchFunctionMode

    megatron_on_cpu.enable()
    with TorchFunctionMode() as other:
        megatron_patches.revert()
        stack = torch.overrides._get_current_function_mode_stack()
        assert stack == [other]
    assert not megatron_on_cpu.enabled()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1, device="cuda")


def test_reverting_the_registry_disables_it_under_another_mode(workers):
    workers(1).run(leave_out_of_order)


def enable_on_an_unknown_torch():
    del torch.cuda.default_stream
    before = snapshot()
    try:
        megatron_on_cpu.enable()
    finally:
        assert differences(before, snapshot()) == [] and not megatron_on_cpu.enabled()


def test_a_torch_without_a_symbol_is_refused_and_left_alone(workers):
    [error] = workers(1).run(enable_on_an_unknown_torch, expect="errors")
    assert error.type == "PluginError" and "torch.cuda.default_stream in torch 2" in error.message


def enable_with_cuda():
    torch.cuda.is_available = lambda: True
    try:
        megatron_on_cpu.enable()
    finally:
        assert not megatron_on_cpu.enabled() and megatron_patches.active() == []


def test_a_machine_with_cuda_is_refused(workers):
    [error] = workers(1).run(enable_with_cuda, expect="errors")
    assert error.type == "ConfigError" and 'CUDA_VISIBLE_DEVICES=""' in error.message


def initialize_without(what):
    cfg = gpt.GPTConfig(**SMALL, tensor_parallel=2 if what == "ranks" else 1)
    if what != "enable":
        megatron_on_cpu.enable()
    gpt.initialize_parallel(cfg, -1 if what == "seed" else 1)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("enable", "megatron_on_cpu.enable()"),
        ("ranks", "= 2 x 1 does not divide the 1 ranks"),
        ("seed", "seed = -1"),
    ],
)
def test_initialize_parallel_names_what_is_wrong(workers, what, words):
    [error] = workers(1).run(initialize_without, what, expect="errors")
    assert error.type == ConfigError.__name__ and words in error.message


FRESH = """
import sys
import megatron_patches
assert not {"torch", "megatron"} & set(sys.modules), "importing the package must be cheap"
from megatron_patches import megatron_on_cpu
assert not any(name.split(".")[0] == "megatron" for name in sys.modules)
megatron_on_cpu.enable()
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
mended = DistributedOptimizer.state_dict
assert mended.__module__ == "megatron_patches.megatron_on_cpu", mended
from megatron.core.tensor_parallel import random as tracker_module
tracker = tracker_module.CudaRNGStatesTracker()
tracker.add(tracker_module._MODEL_PARALLEL_RNG_TRACKER_NAME, 7)
torch.manual_seed(1)
outside = torch.rand(3)
torch.manual_seed(1)
with tracker.fork():
    inside = torch.rand(3)
assert not torch.equal(inside, outside)
assert torch.equal(torch.rand(3), outside)
megatron_on_cpu.disable()
assert tracker_module._lazy_call is torch.cuda._lazy_call
assert torch.cuda._lazy_call.__module__ == "torch.cuda"
assert DistributedOptimizer.state_dict.__module__ == DistributedOptimizer.__module__
assert megatron_patches.active() == []
megatron_on_cpu.enable()
assert DistributedOptimizer.state_dict is mended
"""


def test_enable_before_importing_megatron():
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
