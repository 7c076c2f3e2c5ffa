"""The passes of one step at full length before the first short one: an out-of-memory shows at once, not hours later.
They are the framework's own, with room held for what the optimizer's first step will keep."""

import contextlib
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from ds_plugin.core import rng
from ds_plugin.core.errors import PluginError, StateError, raise_on_all_ranks

SAYS = "sequence length warmup: preflight"
_LOOK_EVERY = 0.2  # seconds
_UNWIND = 2.0  # seconds in which a rank that is not waiting may fail, or end, by itself
_FAILED = "failed"
_COUNT = itertools.count()  # every rank counts the same blocks


@contextlib.contextmanager
def full_length_pass(
    modules: Iterable[torch.nn.Module], room: Callable[[], list[torch.Tensor]], *, length: int, means: str
) -> Iterator[None]:
    """Around the passes at ``length`` tokens, on every rank: ``room()`` is held, and the modules' buffers and this
    rank's random streams are afterwards what they were. All ranks go on, or none. Raises torch.OutOfMemoryError with a
    note that says where it came from and by which ``means`` a step fits; nothing made in the block is kept."""
    held: list[torch.Tensor] = []
    with ending_together():
        streams = rng.capture()
        # by named_buffers: in Megatron's DDP, "buffers" is a list
        buffers = [buffer for module in modules for _, buffer in module.named_buffers()]
        values: list[torch.Tensor] = []
        try:
            values += [buffer.clone() for buffer in buffers]
            held += room()
            yield
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they would keep the activations while the error is known
            what = f"the preflight, a step at the full length of {length} tokens, does not fit, as at the warmup's end"
            error.add_note(f'sequence_length_warmup: {what}; use {means}, or write "preflight": false to find out then')
            raise
        finally:
            held.clear()  # an error's traceback would keep it
            rng.restore(streams)
            with torch.no_grad():
                for buffer, value in zip(buffers, values, strict=False):  # none where there was no room for them
                    buffer.copy_(value)


def state_to_come(
    parameters: Iterable[torch.Tensor], kinds: Callable[[torch.Tensor], Sequence[torch.dtype]]
) -> list[torch.Tensor]:
    """Empty tensors as large as what an optimizer's first step makes for its masters: one of each ``kinds(master)``."""
    return [torch.empty_like(each, dtype=kind) for each in parameters for kind in kinds(each)]


def peak(device: torch.device) -> str:
    """The fullest accelerator's memory, since the process began; every rank calls it. Nothing on a CPU."""
    if device.type == "cpu":
        return ""
    torch.accelerator.empty_cache()  # the run's own tensors do not go into the pieces of what is no longer needed
    most = torch.tensor(torch.accelerator.max_memory_allocated(device), device=device, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    _, total = torch.accelerator.get_memory_info(device)
    return f", with at most {most.item() / 2**30:.1f} of {total / 2**30:.1f} GiB allocated on an accelerator"


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """All ranks leave the block, or all of them end with the error of the one that failed in it.

    The others wait in collectives that it never joins, for half an hour, and no exception reaches a thread that waits
    there. So each rank looks into the process group's store from another thread, and where it finds an error, prints it
    and ends the process. Raises StateError: a collective has told by an error of its own that another rank failed."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    store = dist.PrefixStore(f"ds_plugin/ending_together/{next(_COUNT)}", dist.distributed_c10d._get_default_store())
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_EVERY):
            if (said := _word(store)) is not None and not over.wait(_UNWIND):
                print(f"{said}; rank {dist.get_rank()} ends with it", file=sys.stderr, flush=True)
                os._exit(1)

    thread = threading.Thread(target=watch, name="ds_plugin: other ranks' errors", daemon=True)
    thread.start()
    try:
        yield
        with raise_on_all_ranks():  # the ranks that are through wait here, and still look
            pass
    except BaseException as error:
        own = isinstance(error, (torch.OutOfMemoryError, PluginError))  # it failed as well, whoever was first
        if not own and (said := _word(store)) is not None:
            raise StateError(f"{said}; rank {dist.get_rank()} ends with it") from error
        with contextlib.suppress(RuntimeError):
            store.set(_FAILED, f"rank {dist.get_rank()} failed with {type(error).__name__}: {error}")
        raise
    finally:
        over.set()
        thread.join()


def _word(store: dist.Store) -> str | None:
    """The error of a rank that failed; None: none has."""
    try:
        return store.get(_FAILED).decode() if store.check([_FAILED]) else None
    except RuntimeError:
        return "the rank that kept the process group's store has ended"
