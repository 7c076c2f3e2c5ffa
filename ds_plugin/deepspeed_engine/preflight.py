"""DeepSpeed's passes at full length before the first short step; see `full_length_pass`."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker
from deepspeed.utils import logger

from ds_plugin.core.errors import ConfigError, this_rank
from ds_plugin.core.full_length_pass import SAYS, full_length_pass, peak, state_to_come
from ds_plugin.core.patch import replaced
from ds_plugin.deepspeed_engine import compat
from ds_plugin.deepspeed_engine.backward import loss_of
from ds_plugin.deepspeed_engine.masters import find_shards
from ds_plugin.deepspeed_engine.readings import optimizers
from ds_plugin.sequence_length_warmup.nested import leaves, rebuilt
from ds_plugin.sequence_length_warmup.slicing import find_sides, positions, refuse_unknown

_MEANS = "a smaller train_micro_batch_size_per_gpu, activation checkpointing or a higher ZeRO stage"


@contextlib.contextmanager
def passes_of_a_step(engine: Any, length: int) -> Iterator[None]:
    """Around forward and backward passes, reductions included, which are no step of the run: room is held for the
    optimizer's state, and gradients, buffers and random streams are put back. Rank 0's log says how it went. Every rank
    calls it, between two steps. Raises as `full_length_pass`."""
    to_come = _state_to_come(engine)

    def room() -> list[torch.Tensor]:
        masters, kept = to_come or ([], 0)
        return state_to_come(masters, lambda master: [master.dtype] * kept)

    with contextlib.ExitStack() as undo:
        # DeepSpeed's own streams; the others are kept with the buffers
        undo.callback(get_cuda_rng_tracker().set_states, get_cuda_rng_tracker().get_states())
        with full_length_pass([engine.module], room, length=length, means=_MEANS), compat.dropped_gradients(engine):
            yield
    most, aside = peak(engine.device), ", the optimizer aside" if to_come is None else ""
    if this_rank() == 0:
        logger.info(f"{SAYS}: a step at {length} tokens fits{aside}{most}")


def run(engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> None:
    """Call the engine's forward and backward pass, twice where gradients are accumulated, and under ZeRO 3, which
    gathers parameters ahead once it has seen their order. The run that follows is bit for bit the run without it; the
    graph that arguments come with (embeddings) is left for the step. Raises as `passes_of_a_step`."""
    if engine.optimizer is None:
        return  # nothing is trained
    count = 2 if int(engine.zero_optimization_stage()) == 3 else min(int(engine.gradient_accumulation_steps()), 2)
    redirected = vars(engine.module).get("forward")  # for one call, as Lightning does to its training_step
    with passes_of_a_step(engine, length), compat.plain_backward(engine):
        for index in range(count):
            own = (_without_graph(leaf.value) for leaf in leaves((args, kwargs)))
            own_args, own_kwargs = rebuilt((args, kwargs), own)
            try:
                with replaced(engine, compat.BOUNDARY, index == count - 1):
                    output = engine.forward(*own_args, **own_kwargs)
                    if (loss := _scalar(output)) is not None:
                        engine.backward(loss)
            finally:
                if redirected is not None:
                    vars(engine.module)["forward"] = redirected
            del output, loss, own_args, own_kwargs


def _state_to_come(engine: Any) -> tuple[list[torch.Tensor], int] | None:
    """Masters, and of how many tensors each the optimizer does not keep yet; None: it is not known what it keeps."""
    try:
        masters, kept = find_shards(engine).tensors(), compat.kept_by(engine.basic_optimizer)
    except ConfigError:  # they are not in memory, or change elsewhere
        return None
    started = any(each.state for each in optimizers(engine))
    return None if kept is None else (masters, 0 if started else kept)


def _scalar(output: Any) -> torch.Tensor | None:
    """What to differentiate: the loss, or where the model returns none, the mean of all it returns."""
    if (loss := loss_of(output)) is not None:
        return loss
    found = [leaf.value for leaf in leaves(output) if torch.is_tensor(leaf.value) and leaf.value.is_floating_point()]
    means = [tensor.mean(dtype=torch.float32) for tensor in found if tensor.requires_grad]
    return torch.stack(means).sum() if means else None


def first_rows(arguments: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """Of every tensor of a folded micro-batch (`fold_batch`) the rows of its samples' first of ``parts`` parts."""
    rows = find_sides(leaves(arguments)).known[0].rows
    values = (leaf.value for leaf in leaves(arguments))
    kept = (v[: rows // parts] if torch.is_tensor(v) and v.dim() and v.shape[0] == rows else v for v in values)
    return dict(rebuilt(arguments, kept))


def lengthened(arguments: Mapping[str, Any], full: int, **samples: Any) -> dict[str, Any]:
    """A short micro-batch's arguments, repeated along the sequence until its samples are ``full`` long; a decoder's
    side, if there is an encoder's, stays as it is. ``samples``: as for `slicing.find_sides`.
    Raises ConfigError: there are no tokens, or it is not known which of an argument's dimensions are positions."""
    found = leaves(arguments)
    sides = find_sides(found, **samples)
    main = sides.known[0]
    times = -(-full // main.positions)
    values = []
    for leaf in found:
        value, where = leaf.value, positions(leaf, sides)
        if where is None and main.positions != full:
            refuse_unknown(leaf, sides)
        for dimension, side in (where or {}).items():
            if side is main and side.positions < full:
                value = torch.cat([value] * times, dim=dimension).narrow(dimension, 0, full)
        values.append(value)
    return dict(rebuilt(arguments, iter(values)))


def _without_graph(value: Any) -> Any:
    graph = torch.is_tensor(value) and value.grad_fn is not None
    return value.detach().requires_grad_() if graph else value
