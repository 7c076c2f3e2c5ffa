"""Weight averaging the naive way: gather every fp32 master on every rank, keep whole snapshots, average at the end."""

import math

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param


def full_masters(engine):
    """Every parameter's fp32 master, whole, by name. All ranks call it."""
    named = dict(engine.module.named_parameters())
    optimizer = engine.optimizer
    if engine.zero_optimization() or type(optimizer).__name__ == "BF16_Optimizer":
        return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in named.items()}
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in 16 bits: whole masters beside the parameters, in the same order
        pairs = zip(
            [p for group in optimizer.fp16_groups for p in group],
            [p for group in optimizer.fp32_groups for p in group],
            strict=True,
        )
        masters = {id(low): master for low, master in pairs}
        return {name: masters[id(p)].detach().clone() for name, p in named.items()}
    return {name: p.detach().clone() for name, p in named.items()}


def full_parameters(engine):
    """Every parameter the model computes with, whole, by name."""
    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p] if hasattr(p, "ds_id") else []):
            found[name] = p.detach().clone()
    return found


def mean(snapshots):
    """The mean of whole snapshots: add oldest to newest, divide once."""
    result = {}
    for name in snapshots[0]:
        total = torch.zeros_like(snapshots[0][name])
        for snapshot in snapshots:
            total = total + snapshot[name]
        result[name] = total / len(snapshots)
    return result


def weighted_mean(snapshots, weights):
    """The weighted mean of whole snapshots: add oldest to newest, each times its share of the sum of the weights.

    The mean of those that have a weight, where they all have the same.
    """
    kept = [(snapshot, weight) for snapshot, weight in zip(snapshots, weights, strict=True) if weight]
    if len({weight for _, weight in kept}) == 1:
        return mean([snapshot for snapshot, _ in kept])
    shares, result = [weight / math.fsum(weights) for _, weight in kept], {}
    for name in snapshots[0]:
        total = torch.zeros_like(snapshots[0][name])
        for (snapshot, _), share in zip(kept, shares, strict=True):
            total = total + snapshot[name] * share
        result[name] = total
    return result


def last_block(snapshots, window):
    """The mean of the last whole block of ``window`` snapshots; of what there is, before the first is whole."""
    end = len(snapshots) // window * window
    return mean(snapshots[end - window : end] if end else snapshots)


def ema(snapshots, horizon):
    """The running average: the n-th snapshot moves it by 1 / min(n, horizon) of the way."""
    average = dict(snapshots[0])
    for n, snapshot in enumerate(snapshots[1:], start=2):
        average = {name: a + (snapshot[name] - a) * (1 / min(n, horizon)) for name, a in average.items()}
    return average
