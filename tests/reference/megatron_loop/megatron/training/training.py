"""The training loop of Megatron-LM reduced to its calls: the names, signatures and order that the hooks rely on.

Underneath is the real megatron-core: schedules, DistributedDataParallel, optimizer, scheduler, rerun iterators. What
the hooks do not touch is left out (timers, rerun, most of the logging), and a checkpoint is one file for each rank.
`RECORD` holds what a test wants to see.
"""

from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches, init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

RECORD = defaultdict(list)
_ARGS = None


def get_args():
    return _ARGS


def print_rank_last(message):
    if is_last_rank():
        RECORD["printed"].append(message)


class Writer:
    """TensorBoard's and W&B's in one."""

    def add_scalar(self, tag, value, step):
        RECORD["tensorboard"].append((tag, value, step))

    def log(self, values, step):
        RECORD["wandb"].append((values, step))


def is_last_rank():
    return dist.get_rank() == dist.get_world_size() - 1


def get_tensorboard_writer():
    return Writer() if is_last_rank() else None


def get_wandb_writer():
    return Writer() if is_last_rank() else None


def initialize_megatron(args):
    global _ARGS
    _ARGS = args
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    args.data_parallel_size = parallel_state.get_data_parallel_world_size()
    args.consumed_train_samples = args.consumed_valid_samples = 0
    init_num_microbatches_calculator(
        dist.get_rank(), None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    model_parallel_cuda_manual_seed(args.seed)


def num_floating_point_operations(args, batch_size):
    return batch_size * (1000 * args.seq_length + args.seq_length**2)


def pretrain(args, dataset_provider, model_provider, model_type, forward_step_func):
    initialize_megatron(args)
    model, optimizer, scheduler = setup_model_and_optimizer(model_provider, model_type, checkpointing_context={})
    config = model[0].config
    train_iterator, valid_iterator, test_iterator = build_train_valid_test_data_iterators(dataset_provider)
    iteration = train(forward_step_func, model, optimizer, scheduler, train_iterator, valid_iterator, config)
    evaluate_and_print_results(
        f"iteration {iteration} on test set", forward_step_func, test_iterator, model, iteration, None, config,
        verbose=True, write_to_tensorboard=not args.skip_train,
    )  # fmt: skip


def setup_model_and_optimizer(model_provider_func, model_type, checkpointing_context=None):
    args = get_args()
    network = model_provider_func(
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage()
    )
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = [DistributedDataParallel(network.config, ddp_config, network)]
    config = OptimizerConfig(lr=args.lr, min_lr=args.min_lr, weight_decay=0.1, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(config, model, config_overrides=get_standard_config_overrides(config=config))
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=args.lr, min_lr=args.min_lr, lr_warmup_steps=0,
        lr_decay_steps=args.lr_decay_iters * args.global_batch_size, lr_decay_style="linear", start_wd=0.1, end_wd=0.1,
        wd_incr_steps=1, wd_incr_style="constant",
    )  # fmt: skip
    args.iteration = args.num_floating_point_operations_so_far = 0
    if args.load is not None:
        args.iteration, args.num_floating_point_operations_so_far = load_checkpoint(
            model, optimizer, scheduler, checkpointing_context=checkpointing_context
        )
    return model, optimizer, scheduler


def build_train_valid_test_data_iterators(provider):
    """Ranks above the first of a tensor-parallel group read no data."""
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        return None, None, None
    return tuple(RerunDataIterator(iter(loader)) for loader in provider())


def train(forward_step_func, model, optimizer, scheduler, train_iterator, valid_iterator, config):
    args = get_args()
    config.finalize_model_grads_func = finalize_model_grads
    iteration, operations = args.iteration, args.num_floating_point_operations_so_far
    while iteration < args.train_iters:
        args.curr_iteration = iteration
        losses, skipped, _, leave, _, norm, _, _ = train_step(
            forward_step_func, train_iterator, model, optimizer, scheduler, config, get_forward_backward_func(),
            iteration=iteration,
        )  # fmt: skip
        if leave:
            break
        iteration += 1
        batch = args.data_parallel_size * args.micro_batch_size * get_num_microbatches()
        args.consumed_train_samples += batch
        operations += num_floating_point_operations(args, batch)
        training_log(losses, optimizer.param_groups[0]["lr"], iteration, skipped, norm, batch)
        RECORD["weights"].append({n: p.detach().clone() for n, p in model[0].module.named_parameters()})
        if args.eval_interval and iteration % args.eval_interval == 0:
            evaluate_and_print_results(
                f"iteration {iteration}", forward_step_func, valid_iterator, model, iteration, None, config,
                verbose=False, write_to_tensorboard=True, non_loss_data_func=None,
            )  # fmt: skip
        if args.save and iteration % args.save_interval == 0:
            save_checkpoint(iteration, model, optimizer, scheduler, operations, {}, train_data_iterator=train_iterator)
            compute_throughputs_and_append_to_progress_log(iteration, operations)
    RECORD["operations"].append(operations)
    return iteration


def train_step(
    forward_step_func, data_iterator, model, optimizer, scheduler, config, forward_backward_func, iteration=None
):
    args = get_args()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reduced = forward_backward_func(
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    data_iterator is None or data_iterator.advance()
    applied, norm, zeros = optimizer.step()
    if applied and iteration not in args.overflows:  # as a loss scaler would find, after the fact
        scheduler.step(increment=get_num_microbatches() * args.micro_batch_size * args.data_parallel_size)
        skipped = 0
    else:
        skipped = 1
    return _mean(reduced), skipped, False, False, 0, norm, zeros, None


def training_log(losses, learning_rate, iteration, skipped, norm, batch):
    args = get_args()
    RECORD["lr"].append(learning_rate)
    RECORD["losses"].append(losses.get("lm loss"))
    RECORD["tokens of the log"].append(batch * args.seq_length)
    print_rank_last(f" iteration {iteration} | consumed samples: {args.consumed_train_samples:12d} | skipped {skipped}")


def compute_throughputs_and_append_to_progress_log(iteration, operations):
    args = get_args()
    RECORD["progress"].append((iteration, args.consumed_train_samples * args.seq_length, operations))


def evaluate_and_print_results(
    prefix, forward_step_func, data_iterator, model, iteration, process_non_loss_data_func, config,
    verbose=False, write_to_tensorboard=True, non_loss_data_func=None,
):  # fmt: skip
    args = get_args()
    writer = get_tensorboard_writer() if write_to_tensorboard else None
    wandb_writer = get_wandb_writer()
    for chunk in model:
        chunk.eval()
    total = []
    with torch.no_grad():
        for _ in range(args.eval_iters):
            reduced = get_forward_backward_func()(
                forward_step_func=forward_step_func,
                data_iterator=data_iterator,
                model=model,
                num_microbatches=args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=True,
            )
            data_iterator is None or data_iterator.advance()
            args.consumed_valid_samples += args.global_batch_size
            total.append(_mean(reduced).get("lm loss"))
    for chunk in model:
        chunk.train()
    weights = {n: p.detach().clone() for n, p in model[0].module.named_parameters()}
    RECORD["evaluations"].append((prefix, total, write_to_tensorboard, args.consumed_valid_samples, weights))
    if writer:
        writer.add_scalar("lm loss validation", total[-1], iteration)
        writer.add_scalar("lm loss validation vs samples", total[-1], args.consumed_train_samples)
        if wandb_writer and is_last_rank():
            wandb_writer.log({"lm loss validation": total[-1]}, iteration)
    print_rank_last(f" validation loss at {prefix} | lm loss value: {total}")


def save_checkpoint(
    iteration,
    model,
    optimizer,
    opt_param_scheduler,
    operations,
    checkpointing_context=None,
    train_data_iterator=None,
):
    args = get_args()
    folder = Path(args.save) / f"iter_{iteration:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "model": [chunk.state_dict() for chunk in model],
        "adam": [member.optimizer.state_dict() for member in getattr(optimizer, "chained_optimizers", ())],
        "scheduler": opt_param_scheduler.state_dict() if opt_param_scheduler is not None else None,
        "run": (args.consumed_train_samples, args.consumed_valid_samples, operations),
    }
    RECORD["saves"].append((args.save, args.no_save_optim, args.save_retain_interval, checkpointing_context))
    torch.save(state, folder / f"rank_{dist.get_rank()}.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(args.save) / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    dist.barrier()


def load_checkpoint(model, optimizer, scheduler, checkpointing_context=None):
    args = get_args()
    tracker = Path(args.load) / "latest_checkpointed_iteration.txt"
    if not tracker.exists() and not args.ckpt_step:
        return 0, 0
    iteration = args.ckpt_step or int(tracker.read_text())
    folder = Path(args.load) / f"iter_{iteration:07d}"
    state = torch.load(folder / f"rank_{dist.get_rank()}.pt", weights_only=True)
    for chunk, saved in zip(model, state["model"], strict=True):
        chunk.load_state_dict(saved)
    if args.finetune:
        return 0, 0
    for member, saved in zip(optimizer.chained_optimizers, state["adam"], strict=True):
        member.optimizer.load_state_dict(saved)
    scheduler.load_state_dict(state["scheduler"])
    args.consumed_train_samples, args.consumed_valid_samples, operations = state["run"]
    return iteration, operations


def _mean(reduced):
    """Over micro-batches and data-parallel ranks, on the last pipeline stage; elsewhere there is nothing."""
    found = {}
    for key in reduced[0] if reduced else ():
        summed = torch.stack([entry[key].view(-1) for entry in reduced]).sum(dim=0)
        dist.all_reduce(summed, group=parallel_state.get_data_parallel_group())
        found[key] = (summed[0] / summed[1]).item()
    return found
