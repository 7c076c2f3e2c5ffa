"""An iteration's forward and backward passes at full length before the first short one, so that an out-of-memory shows
at once: Megatron-LM's own, by its schedule, with its reduction of gradients. The optimizer does not step."""

import contextlib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_plugin.core.errors import PluginError
from ds_plugin.core.full_length_pass import SAYS, full_length_pass, peak, state_to_come
from ds_plugin.core.patch import replaced
from megatron_patches.megatron_on_cpu import on_cpu
from megatron_patches.training_loop.batches import cut
from megatron_patches.training_loop.options import set_to

Passes = Callable[..., Any]
PASSES = "forward_backward_func"  # of train_step's arguments
_GIVEN = ("data_iterator", "model", "optimizer", "config")
_WITHOUT = ', or write "preflight": false'
_MEANS = "a smaller --micro-batch-size, more recomputation or a wider layout"
_KEEP = """
    qk_clip log_max_attention_logit dsa_indexer_loss_coeff fine_grained_activation_offloading moe_routing_trace_path
    save_tokens_per_expert_interval save_activations_interval save_dgrads_interval
"""  # largest logits, losses for the log, traces, what the first pass has shown


def rehearsed(
    passes: Passes,
    given: Mapping[str, Any],
    shape: Mapping[str, int],
    options: Any,
    untraced: Callable[[], contextlib.AbstractContextManager[None]],
) -> Passes:
    """``passes``, Megatron's forward and backward passes of an iteration, made once at the full ``shape`` before, on
    the next micro-batch, with room taken for the optimizer's state. ``given``: what the iteration has, the training
    data's iterators, the model's chunks, the optimizer and their config. ``shape``: of the options ``seq_length`` and
    ``micro_batch_size``, which are others in a short iteration. ``untraced``: what else is to be around those passes.
    Gradients, buffers, random streams and sums for the log are put back: the run that follows is bit for bit the run
    without them. Raises PluginError: an iteration has other parts than in the tested versions; torch.OutOfMemoryError,
    with a note that names the remedies."""
    length = shape["seq_length"]
    if (why := left_out(options)) is not None:
        _print(f"none at {length} tokens, since {why}")
        return passes
    need(given, _GIVEN, "train_step")
    iterators, model, optimizer, config = (given[name] for name in _GIVEN)
    first = iter((True,))

    def with_preflight(**settings: Any) -> Any:
        if next(first, False):
            need(settings, ("data_iterator", "seq_length"), PASSES)
            longest = {"data_iterator": repeated(iterators, length), **shape}
            if settings.get("decoder_seq_length") is not None:  # Megatron-Bridge says it twice
                longest["decoder_seq_length"] = length
            room = functools.partial(adams_state, optimizer)
            with untraced(), leaving_no_trace(options, shape, config):
                with full_length_pass(model, room, length=length, means=_MEANS):
                    passes(**{**settings, **longest})
            for chunk in model:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            known = getattr(options, "optimizer", "adam") == "adam"
            device = torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())
            _print(f"an iteration at {length} tokens fits{'' if known else ', the optimizer aside'}{peak(device)}")
        return passes(**settings)

    return with_preflight


def with_passes(
    train_step: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], passes: Passes
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of ``train_step``, as they were given, with ``passes`` for its own."""
    if PASSES in kwargs:
        return args, {**kwargs, PASSES: passes}
    place = list(train_step.parameters).index(PASSES)
    return (*args[:place], passes, *args[place + 1 :]), kwargs


def left_out(options: Any) -> str | None:
    """Why there is none with these options, which keep more of a pass than is put back here; None: there is one."""
    if getattr(options, "fp8", None) and getattr(options, "fp8_recipe", "delayed") == "delayed":
        return "--fp8-recipe delayed keeps the largest values of earlier passes"
    kept = (name.replace("_", "-") for name in _KEEP.split() if getattr(options, name, None))
    return next((f"--{option} keeps something of every pass" for option in kept), None)


def repeated(iterators: Any, length: int) -> Any:
    """The iterators' next micro-batch without end, each time another dictionary: forward steps write into it."""
    if isinstance(iterators, list):
        return [repeated(each, length) for each in iterators]
    if iterators is None:
        return None
    batch = iterators.iterable.ahead()
    return (cut(batch, length) for _ in itertools.count())


def adams_state(optimizer: Any) -> list[torch.Tensor]:
    """Tensors as large as the state that Adam makes in its first step; none for state that is kept in CPU memory."""
    if hasattr(optimizer, "chained_optimizers"):
        return [tensor for single in optimizer.chained_optimizers for tensor in adams_state(single)]
    config, inner = optimizer.config, optimizer.optimizer
    if config.optimizer != "adam" or getattr(config, "optimizer_cpu_offload", False) or inner is None:
        return []

    def kinds(parameter: torch.Tensor) -> list[torch.dtype]:
        found = [getattr(config, name, torch.float32) for name in ("exp_avg_dtype", "exp_avg_sq_dtype")]
        if getattr(inner, "master_weights", False):  # TransformerEngine's: whole, or the bits that bf16 lacks
            rest = getattr(inner, "store_param_remainders", False) and parameter.dtype == torch.bfloat16
            found.append(torch.int16 if rest else config.main_params_dtype)
        return found

    return state_to_come((p for group in inner.param_groups for p in group["params"] if not inner.state.get(p)), kinds)


@contextlib.contextmanager
def leaving_no_trace(options: Any, shape: Mapping[str, int], config: Any) -> Iterator[None]:
    """Megatron-LM at the full ``shape``; its timers, checks of losses and gradients, and sums know nothing of it."""
    machine = importlib.import_module("megatron.core.rerun_state_machine").get_rerun_state_machine()
    quiet = replaced(machine, "validate_result", lambda *args, **kwargs: None)  # it would keep the largest values
    with set_to(options, **shape), replaced(config, "timers", None), quiet:
        yield
    # what layers have summed up for the log, in which there was nothing before
    if getattr(config, "num_moe_experts", None):  # as Bridge calls them, too
        importlib.import_module("megatron.core.transformer.moe.moe_utils").clear_aux_losses_tracker()
    if getattr(options, "mtp_num_layers", None):
        prediction = importlib.import_module("megatron.core.transformer.multi_token_prediction")
        for value in prediction.MTPLossLoggingHelper.tracker.values():  # by names that differ between versions
            if torch.is_tensor(value):
                value.zero_()


def _print(said: str) -> None:
    if dist.get_rank() == 0:
        print(f"{SAYS}: {said}", flush=True)


def need(given: Mapping[str, Any], names: Sequence[str], function: str, otherwise: str = _WITHOUT) -> None:
    """Raise PluginError if a call of ``function`` of Megatron-LM's has not all these arguments, by these names."""
    if lacking := [name for name in names if name not in given]:
        what = f"Megatron-LM's loop, or a function in its place, calls {function} without {', '.join(lacking)}"
        raise PluginError(f"{what}; use a tested version (core 0.16 to 0.20){otherwise}")
