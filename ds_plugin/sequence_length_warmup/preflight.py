"""One forward and backward pass at full length before the first step, so that an out-of-memory shows at once.

A warmup's first steps are small: without this, the first step that does not fit comes hours later.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.utils import logger

from ds_plugin import compat
from ds_plugin.run import rng
from ds_plugin.sequence_length_warmup.batch import COMPANION_NAMES, MASK_NAMES, TOKEN_NAMES

MEANS = "a smaller train_micro_batch_size_per_gpu, activation checkpointing or a higher ZeRO stage"


def run(engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call ``engine.module`` and differentiate the mean of its output by its parameters; the result is dropped.

    Gradients are asked for by `torch.autograd.grad`, which leaves ``.grad`` and the hooks alone that the host reduces
    gradients in, and each is let go as soon as it is there, as ZeRO does. Buffers and random streams are put back: the
    run that follows is bit for bit the run without it. Reentrant activation checkpointing can only be run backward into
    ``.grad``: there the forward pass has to do, which the log says.
    """
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    hooks = [p.register_hook(lambda grad: grad.new_zeros(()).expand_as(grad)) for p in parameters]
    try:
        with untouched(engine.module), compat.autocast(engine):
            output = engine.module(*args, **kwargs)
            means = [tensor.mean(dtype=torch.float32) for tensor in _floating(output) if tensor.requires_grad]
            if means:
                torch.autograd.grad(torch.stack(means).sum(), parameters, allow_unused=True)
    except RuntimeError as error:
        if "compatible with .grad()" not in str(error):
            raise
        logger.warning(
            "sequence length warmup: the preflight ran the full length forward only, because activations are "
            "recomputed by a reentrant checkpoint"
        )
    finally:
        for hook in hooks:
            hook.remove()


def lengthened(arguments: Mapping[str, Any], length: int, full: int) -> dict[str, Any]:
    """A short micro-batch's arguments, repeated along the sequence until they are ``full`` long."""
    times = -(-full // length)
    grown = {}
    for name, value in arguments.items():
        if torch.is_tensor(value) and value.dim() >= 2:
            if name in MASK_NAMES:
                for dim in (-1, -2):
                    if value.shape[dim] == length:
                        value = torch.cat([value] * times, dim=dim).narrow(dim, 0, full)
            elif name in TOKEN_NAMES + COMPANION_NAMES and value.shape[1] == length:
                value = torch.cat([value] * times, dim=1)[:, :full]
        grown[name] = value
    return grown


@contextlib.contextmanager
def remedy(length: int, means: str) -> Iterator[None]:
    """An out-of-memory in the block says that it came from the preflight, and by which ``means`` a step fits."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            f"sequence_length_warmup: the preflight, a step at the full length of {length} tokens, does not fit, and "
            f'neither will training at the end of the warmup; use {means}, or write "preflight": false to find out then'
        )
        raise


@contextlib.contextmanager
def untouched(module: torch.nn.Module) -> Iterator[None]:
    """The module's buffers and this rank's random streams are afterwards what they were before the block."""
    streams = rng.capture()
    # by named_buffers: in Megatron's DDP, "buffers" is a list
    buffers = [(buffer, buffer.clone()) for _, buffer in module.named_buffers()]
    try:
        yield
    finally:
        rng.restore(streams)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _floating(output: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(output):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floating(value)
