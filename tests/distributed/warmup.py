"""What the tests of sequence length warmup on the plain engine share: batches whose tokens are numbers of their own."""

import torch
import torch.distributed as dist

import ds_plugin
from tests.distributed import plain

MICROS = 3  # accumulation steps
LINEAR = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4, "warmup_type": "linear"}}


def section(**changes):
    """Lengths of 4 + 12 * t / 8, floored to 4: 4 4 8 8 8 12 12 16, then full; unless ``changes`` has others."""
    return {"sequence_length_warmup": {**plain.WARMUP, **changes}}


def source(first):
    """This rank's full-length micro-batches from the ``first``-th on; every token is a number of its own."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    micro = first
    while True:
        sample = (micro * ranks + rank) * plain.MICRO + torch.arange(plain.MICRO)
        numbers = sample[:, None] * plain.LENGTH + torch.arange(plain.LENGTH)
        yield {"input_ids": numbers % plain.VOCAB, "labels": numbers}
        micro += 1


def run(engine, batches, steps):
    """Train; every step's length, the loss of each micro-batch, and the number of every token that was trained."""
    plugin, rows = ds_plugin.get_plugin(engine), []
    engine.train()
    for _ in range(steps):
        length, seen, losses = plugin.length, [], []
        for _ in range(engine.gradient_accumulation_steps()):
            batch = next(batches)
            assert batch["input_ids"].shape == (plain.MICRO, length)
            seen += batch["labels"].flatten().tolist()
            loss = engine(batch["input_ids"], batch["labels"] % plain.VOCAB)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        ledger = plugin.ledger
        rows.append((length, losses, seen, ledger.read, ledger.trained, ledger.carried, engine.get_lr()[0]))
    return rows


def carry(zero=0, **changes):
    changes = {"mode": "carry", "interleave": 2, "learning_rate": {"by": "tokens"}, **changes}
    engine = plain.make(plain.deepspeed_config(zero, accumulation=MICROS, **section(**changes)))
    return engine, ds_plugin.get_plugin(engine).batches(source)
