"""The stability instruments the naive way: whole lists of losses, and Adam's state gathered parameter by parameter."""

import functools
import math
import operator

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state


def ratios(losses):
    """Loss over the lowest loss before it, for each step but the first; losses are positive and finite."""
    return [loss / min(losses[:t]) for t, loss in enumerate(losses) if t > 0]


def mean_losses(micro_losses, accumulation):
    """Global loss of each step from this rank's losses of all micro-batches; every rank calls it."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, micro_losses)
    steps = len(micro_losses) // accumulation
    windows = [slice(step * accumulation, (step + 1) * accumulation) for step in range(steps)]
    return [math.fsum(x for losses in ranks for x in losses[w]) / (accumulation * len(ranks)) for w in windows]


def exchanged(rows, slots):
    """What a report makes of the table of all ranks' vectors, number by number: (losses, l1 norm, maximum).

    A row: ``slots`` sums of finite losses, their squares', how many those are, l1 norm, maximum (-1: no such state),
    how many losses there were. Added up rank after rank, without ``sum``, which compensates rounding from Python 3.12
    on.
    """

    def total(column):
        return functools.reduce(operator.add, (row[column] for row in rows))

    losses = []
    for slot in range(slots):
        finite, count = total(2 * slots + slot), total(3 * slots + 2 + slot)
        known = finite > 0 and math.isfinite(total(slot))
        losses.append(None if not count else total(slot) / finite if known else math.inf)
    maximum = max((row[3 * slots + 1] for row in rows), key=lambda value: (math.isnan(value), value))
    return (losses, None, None) if maximum == -1 else (losses, total(3 * slots), maximum)


def full_variances(engine):
    """Adam's v of every parameter of this rank's model, whole, by name; every rank calls it."""
    named = dict(engine.module.named_parameters())
    optimizer = engine.optimizer
    if engine.zero_optimization() or type(optimizer).__name__ == "BF16_Optimizer":
        return {name: safe_get_full_optimizer_state(p, "exp_avg_sq").clone() for name, p in named.items()}
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in 16 bits: the state is of the masters, in the parameters' order
        pairs = zip(
            [p for group in optimizer.fp16_groups for p in group],
            [p for group in optimizer.fp32_groups for p in group],
            strict=True,
        )
        masters = {id(low): master for low, master in pairs}
        return {name: optimizer.state[masters[id(p)]]["exp_avg_sq"].clone() for name, p in named.items()}
    return {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in named.items()}


def variance(tensors):
    """l1 norm and largest element of sqrt(v) over whole tensors, in float64."""
    everything = torch.cat([v.flatten().double() for v in tensors]).sqrt()
    return everything.sum().item(), everything.max().item()
