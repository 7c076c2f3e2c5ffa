"""CompleteP on megatron-core's own optimizer: real schedules, DP, TP and PP, on gloo ranks.

The model has m_N = m_L = 2, so every multiplier is a power of two and the forward and the folded mode can be compared
to the last bits.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_patches import cpu_host, gpt
from megatron_patches.completep import build_param_groups, finish, prepare, ratios_of
from megatron_patches.completep import megatron as host
from megatron_patches.completep.config import CompletePConfig

VOCAB, LENGTH, STEPS, MICRO_BATCHES, MICRO_SIZE = 64, 8, 10, 4, 2
SIZE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": LENGTH}
LR, MIN_LR, DECAY, EPS, CLIP = 0.01, 0.001, 0.1, 1e-4, 0.2  # an eps and a clip that matter, so that they are seen
WARMUP, DECAY_STEPS = 2, 20


def section(**changes):
    return CompletePConfig.model_validate({"enabled": True, "base_width": 16, "base_depth": 2, **changes})


def build(completep, *, tied=False, tensor_parallel=1, pipeline_parallel=1, weights=None):
    """This rank's stage of the model; `weights` are those of the whole model, by name."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    cpu_host.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, "tie_embeddings": tied, "tensor_parallel": tensor_parallel})
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
    gpt.initialize_parallel(cfg, 1234)
    config = gpt.transformer_config(cfg, torch.float32)
    config.pipeline_model_parallel_size, config.pipeline_dtype = pipeline_parallel, torch.float32
    config, spec = prepare(config, gpt.layer_spec(cfg), completep)
    model = GPTModel(
        config, spec, VOCAB, LENGTH, share_embeddings_and_output_weights=tied,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip
    finish(model, completep)
    if weights is not None:
        load(model, weights, tied)
    return model


def load(model, weights, tied):
    from megatron.core import parallel_state

    offset = model.decoder.layers[0].layer_number - 1
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + offset)
            whole = weights[
                "embedding.word_embeddings.weight" if tied and parts[0] == "output_layer" else ".".join(parts)
            ]
            if getattr(parameter, "tensor_model_parallel", False):
                size = parameter.shape[parameter.partition_dim]
                whole = whole.narrow(parameter.partition_dim, rank * size, size)
            parameter.copy_(whole)


def wrap(model, sharded):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=sharded), model
    )


def optimizer_config(sharded, **changes):
    from megatron.core.optimizer import OptimizerConfig

    values = dict(lr=LR, min_lr=MIN_LR, weight_decay=DECAY, adam_eps=EPS, clip_grad=CLIP)
    return OptimizerConfig(**{**values, "use_distributed_optimizer": sharded, **changes})


def scheduler_of(optimizer, init_lr=0.0):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=init_lr, max_lr=LR, min_lr=MIN_LR, lr_warmup_steps=WARMUP, lr_decay_steps=DECAY_STEPS,
        lr_decay_style="linear", start_wd=DECAY, end_wd=DECAY, wd_incr_steps=1, wd_incr_style="constant",
    )  # fmt: skip
    host.check_scheduler(scheduler)
    return scheduler


def micro_batch(step, index):
    """Tokens of an eighth of the vocabulary, so that there is something to learn."""
    generator = torch.Generator().manual_seed(100 * step + index)
    tokens = torch.randint(0, VOCAB // 8, (MICRO_SIZE, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def forward(data, model):
    tokens, labels = next(data)
    positions = torch.arange(LENGTH).expand(MICRO_SIZE, -1)
    output = model(tokens, positions, None, labels=labels)

    def loss_of(output):
        loss = output.mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides the other in place

    return output, loss_of


def train_step(ddp, optimizer, scheduler, step):
    """One step of the global batch through the host's schedule; the loss, on every rank, and the gradient norm."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    ddp.config.finalize_model_grads_func = finalize_model_grads
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = [micro_batch(step, i) for i in range(replica, MICRO_BATCHES, replicas)]
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter(mine), model=[ddp], num_microbatches=len(mine),
        seq_length=LENGTH, micro_batch_size=MICRO_SIZE, forward_only=False,
    )  # fmt: skip
    ok, norm, zeros = optimizer.step()
    assert ok and (zeros is None or zeros >= 0)
    scheduler.step(1)
    total = sum((entry["loss"] for entry in losses), torch.zeros(()))  # losses are on a pipeline's last stage
    total = total.clone()
    dist.all_reduce(total)
    return total.item() / MICRO_BATCHES / parallel_state.get_tensor_model_parallel_world_size(), float(norm)


def train(completep, *, sharded, steps=STEPS, config=None, **layout):
    ddp = wrap(build(completep, **layout), sharded)
    optimizer = host.build_optimizer(optimizer_config(sharded, **(config or {})), [ddp], completep)
    scheduler = scheduler_of(optimizer)
    curve = [train_step(ddp, optimizer, scheduler, step) for step in range(steps)]
    return [loss for loss, _ in curve], [norm for _, norm in curve]


def lr_factor(step):
    """The scheduler's learning rate over its maximum before step `step`, and its slope towards the minimum."""
    if step <= WARMUP:
        return step / WARMUP
    done = (step - WARMUP) / (DECAY_STEPS - WARMUP)
    return (MIN_LR + (1 - done) * (LR - MIN_LR)) / LR


def train_plainly(model, completep):
    """The same training in a few lines: torch's AdamW on the groups made for DeepSpeed."""
    roles = finish(model, completep)
    groups = build_param_groups(
        model, roles, ratios_of(model.config, completep), completep, lr=LR, weight_decay=DECAY, eps=EPS
    )
    optimizer = torch.optim.AdamW(groups)
    base = [group["lr"] for group in groups]
    losses = []
    for step in range(STEPS):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * lr_factor(step)
        optimizer.zero_grad()
        total = 0.0
        for index in range(MICRO_BATCHES):
            output, loss_of = forward(iter([micro_batch(step, index)]), model)
            loss = loss_of(output)[0] / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(total)
    return losses


def whole_weights_and_reference(tied):
    model = build(section(), tied=tied)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, train_plainly(model, section())


def layout_curves(weights, layout):
    return {
        (tied, sharded): train(section(), sharded=sharded, tied=tied, weights=weights[tied], **layout)
        for tied in (False, True)
        for sharded in (False, True)
    }


LAYOUTS = {
    "one rank": (1, {}),
    "data parallel": (2, {}),
    "tensor parallel": (2, {"tensor_parallel": 2}),
    "pipeline parallel": (2, {"pipeline_parallel": 2}),
}


@pytest.fixture(scope="module")
def references(workers):
    return {tied: workers(1).run(whole_weights_and_reference, tied)[0] for tied in (False, True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_as_torch_does(workers, references, name):
    ranks, layout = LAYOUTS[name]
    weights = {tied: reference[0] for tied, reference in references.items()}
    for curves in workers(ranks).run(layout_curves, weights, layout):
        for (tied, _), (losses, norms) in curves.items():
            assert losses == pytest.approx(references[tied][1], abs=1e-5)
            assert losses[0] - losses[-1] > 0.05  # it has trained, so there was something to differ in
            assert min(norms) > CLIP  # and the clip was in force


def states(model, optimizer, scheduler, sharding, is_loading):
    metadata = {"distrib_optim_sharding_type": sharding}
    sharded = model.sharded_state_dict(metadata=metadata)
    return {
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata),
        "scheduler": scheduler.state_dict(),
        **host.checkpoint_state(section()),
    }


def group_values(optimizer):
    keys = ("lr_mult", "lr", "max_lr", "min_lr", "weight_decay", "wd_mult", "eps", "betas", "default_config")
    return [{key: group[key] for key in keys} for group in optimizer.param_groups]


def interrupt_and_resume(folder, sharding, sharded):
    """Weights of six steps, and of three, a checkpoint and three more; and every group before and after it."""
    from megatron.core import dist_checkpointing

    def start():
        model = build(section())
        ddp = wrap(model, sharded)
        optimizer = host.build_optimizer(optimizer_config(sharded), [ddp], section())
        return model, ddp, optimizer, scheduler_of(optimizer)

    model, ddp, optimizer, scheduler = start()
    for step in range(3):
        train_step(ddp, optimizer, scheduler, step)
    dist_checkpointing.save(states(model, optimizer, scheduler, sharding, False), folder)
    saved = group_values(optimizer)
    for step in range(3, 6):
        train_step(ddp, optimizer, scheduler, step)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}

    model, ddp, optimizer, scheduler = start()
    state = dist_checkpointing.load(states(model, optimizer, scheduler, sharding, True), folder)
    host.check_checkpoint_state(state, section())
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    host.check_groups(optimizer, [ddp], section())
    loaded = group_values(optimizer)
    for step in range(3, 6):
        train_step(ddp, optimizer, scheduler, step)
    return [n for n, p in model.named_parameters() if not torch.equal(p, expected[n])], saved, loaded


FORMATS = ("dp_zero_gather_scatter", "dp_reshardable", "fully_reshardable")


@pytest.mark.parametrize("sharding", [*FORMATS, None])
def test_a_resumed_run_is_the_uninterrupted_one(workers, tmp_path, sharding):
    for different, saved, loaded in workers(2).run(interrupt_and_resume, str(tmp_path), sharding, sharding is not None):
        assert different == []
        assert loaded == saved
