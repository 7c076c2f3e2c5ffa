"""The full-length pass holds what a step at full length holds, and ends on all ranks or on none."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

import ds_plugin
from ds_plugin import full_length_pass
from tests.distributed import pipelined, plain
from tests.layouts import Layout
from tests.live_bytes import LiveBytes

ROWS, WIDTH = 48, 1024  # so that activations, gradients and Adam's state are all a good part of the whole
BUCKET = 20_000  # elements; DeepSpeed's own is larger than all of this
WARMUP = {"sequence_length_warmup": {**plain.WARMUP, "duration": {"steps": 1000}}}


def _batch(step):
    generator = torch.Generator().manual_seed(step + 100 * dist.get_rank())
    tokens = torch.randint(0, plain.VOCAB, (ROWS, plain.LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _peak(sections, zero, precision, accumulation, offload):
    """Of two steps, and what lives after the first one's first micro-batch began."""
    config = plain.host_config(zero, precision, accumulation, **sections)
    config["train_micro_batch_size_per_gpu"] = ROWS
    config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if zero == 3:
        config["zero_optimization"] |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    with LiveBytes() as bytes_of:
        engine = plain.make(config, WIDTH)
        engine.train()
        peaks = []
        for step in range(2):
            bytes_of.peak = 0
            for micro in range(accumulation):
                engine.backward(engine(*_batch(step * accumulation + micro)))
                engine.step()
            peaks.append(bytes_of.peak)
    return peaks


def _both(*case):
    short, _ = _peak(WARMUP, *case)
    _, step = _peak({}, *case)
    return short, step


@pytest.mark.parametrize(
    ("zero", "precision", "accumulation", "offload"),
    [
        (0, "fp32", 1, False),
        (0, "bf16", 2, False),
        (1, "bf16", 2, False),
        (2, "fp32", 1, False),
        (2, "bf16", 2, True),
        (3, "fp32", 1, False),
        (3, "bf16", 2, True),
    ],
)
def test_the_first_short_step_needs_what_a_full_one_needs(workers, zero, precision, accumulation, offload):
    """At the peak, in bytes: the weights' copies, gradients, buckets, Adam's state and activations of a real step."""
    for short, step in workers(2).run(_both, zero, precision, accumulation, offload):
        assert short == pytest.approx(step, rel=0.02)
