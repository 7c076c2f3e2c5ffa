"""A small GPT with CompleteP on megatron-core's own optimizer and schedules, in any layout; its tests train it.

The model has m_N = m_L = 2, so every multiplier is a power of two and the forward and the folded mode can be compared
to the last bits.
"""

import torch
import torch.distributed as dist

from ds_plugin.completep.config import CompletePConfig
from megatron_patches import megatron_on_cpu
from megatron_patches.completep import finish, prepare
from megatron_patches.completep import optimizer as ours
from megatron_patches.models import gpt

VOCAB, LENGTH, STEPS, MICRO_BATCHES, MICRO_SIZE = 64, 8, 6, 4, 2
SIZE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": LENGTH}
LR, MIN_LR, DECAY, EPS, CLIP = 0.01, 0.001, 0.1, 1e-4, 0.2  # an eps and a clip that matter, so that they are seen
WARMUP, DECAY_STEPS = 2, 20


def section(**changes):
    return CompletePConfig.model_validate({"enabled": True, "base_width": 16, "base_depth": 2, **changes})


def build(completep, *, tied=False, tensor_parallel=1, pipeline_parallel=1, vp_stage=None, weights=None):
    """This rank's stage of the model, or one of its two chunks; `weights` are those of the whole model, by name."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    megatron_on_cpu.enable()
    cfg = gpt.GPTConfig.model_validate({**SIZE, "tie_embeddings": tied, "tensor_parallel": tensor_parallel})
    virtual = None if vp_stage is None else 2
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel, virtual)
    gpt.initialize_parallel(cfg, 1234)
    config = gpt.transformer_config(cfg, torch.float32)
    config.pipeline_model_parallel_size, config.pipeline_dtype = pipeline_parallel, torch.float32
    config.virtual_pipeline_model_parallel_size = virtual
    config, spec = prepare(config, gpt.layer_spec(cfg), completep)
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    model = GPTModel(
        config, spec, VOCAB, LENGTH, share_embeddings_and_output_weights=tied, vp_stage=vp_stage,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
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
    ours.check_scheduler(scheduler)
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


def train_step(ddp, optimizer, scheduler, step, config=None):
    """One step of the global batch through Megatron's schedule; the loss, on every rank, and the gradient norm.

    ``config``: where the loop sets how gradients are reduced, if not on the model's own."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    (ddp.config if config is None else config).finalize_model_grads_func = finalize_model_grads
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
    optimizer = ours.build_optimizer(optimizer_config(sharded, **(config or {})), [ddp], completep)
    scheduler = scheduler_of(optimizer)
    curve = [train_step(ddp, optimizer, scheduler, step) for step in range(steps)]
    return [loss for loss, _ in curve], [norm for _, norm in curve]


def group_values(optimizer):
    keys = ("lr_mult", "lr", "max_lr", "min_lr", "weight_decay", "wd_mult", "eps", "betas", "default_config")
    return [{key: group[key] for key in keys} for group in optimizer.param_groups]


# lr, min lr, wd, eps of the base: 0.01, 0.001, 0.1, 1e-4; m_N = m_L = 2, alpha 1.
GROUPS = {
    "embedding": (0.01, 0.001, 0.1, 1e-4),
    "hidden": (0.005, 0.0005, 0.2, 2.5e-5),
    "block_norm": (0.01, 0.001, 0.0, 2.5e-5),
    "block_bias": (0.01, 0.001, 0.0, 2.5e-5),
    "final_norm": (0.01, 0.001, 0.0, 1e-4),
    "unembedding": (0.01, 0.001, 0.1, 1e-4),
}
# The branches' last layers hold half the weights, the output layer too: lr and min lr / 2, wd and eps x 2.
FOLDED_GROUPS = {
    **GROUPS,
    "branch_out": (0.0025, 0.00025, 0.4, 5e-5),
    "branch_out_bias": (0.005, 0.0005, 0.0, 5e-5),
    "unembedding": (0.005, 0.0005, 0.2, 2e-4),
}
# batch_ratio 2, token_ratio 8: lr and wd / 2, eps x 2, 1 - beta / 4; embeddings' eps / m_N; logits absorbed.
COMPLETED_GROUPS = {
    "embedding": (0.005, 0.0005, 0.05, 1e-4),
    "hidden": (0.0025, 0.00025, 0.1, 5e-5),
    "block_norm": (0.005, 0.0005, 0.0, 5e-5),
    "block_bias": (0.005, 0.0005, 0.0, 5e-5),
    "final_norm": (0.005, 0.0005, 0.0, 2e-4),
    "unembedding": (0.0025, 0.00025, 0.1, 2e-4),
}
