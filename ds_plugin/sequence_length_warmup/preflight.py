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
from ds_plugin.sequence_length_warmup.batch import find_sides, positions, refuse_unknown
from ds_plugin.sequence_length_warmup.nested import leaves, rebuilt

MEANS = "a smaller train_micro_batch_size_per_gpu, activation checkpointing or a higher ZeRO stage"


def run(engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call ``engine.module`` and differentiate the mean of its output by its parameters; the result is dropped.

    Gradients are asked for by `torch.autograd.grad`, which leaves ``.grad`` and the hooks alone that the host reduces
    gradients in, and each is let go as soon as it is there, as ZeRO does. Buffers and random streams are put back: the
    run that follows is bit for bit the run without it; the graph that arguments come with (embeddings) is left for the
    step. Reentrant activation checkpointing can only be run backward into
    ``.grad``: there the forward pass has to do, which the log says.
    """
    args, kwargs = rebuilt((args, kwargs), (_without_graph(leaf.value) for leaf in leaves((args, kwargs))))
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


def lengthened(
    arguments: Mapping[str, Any], full: int, *, micro_batch: int | None = None, encoder_decoder: bool = False
) -> dict[str, Any]:
    """A short micro-batch's arguments, repeated along the sequence until its samples are ``full`` long; a decoder's
    side, if there is an encoder's, stays as it is. ``micro_batch``, ``encoder_decoder``: as for `batch.cut_batch`.

    Raises:
        ConfigError: there are no tokens, or it is not known which of an argument's dimensions are positions.
    """
    found = leaves(arguments)
    sides = find_sides(found, micro_batch=micro_batch, encoder_decoder=encoder_decoder)
    times = -(-full // sides.main.positions)
    values = []
    for leaf in found:
        value, where = leaf.value, positions(leaf, sides)
        if where is None and sides.main.positions != full:
            refuse_unknown(leaf, sides)
        for dimension, side in (where or {}).items():
            if side is sides.main and side.positions < full:
                value = torch.cat([value] * times, dim=dimension).narrow(dimension, 0, full)
        values.append(value)
    return dict(rebuilt(arguments, iter(values)))


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


def _without_graph(value: Any) -> Any:
    graph = torch.is_tensor(value) and value.grad_fn is not None
    return value.detach().requires_grad_() if graph else value


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
