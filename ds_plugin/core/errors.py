"""The errors a user can cause, and what ranks tell each other outside the training step: without communication there is
one rank. Each message names the field or file, the value it got and what to write instead.

torch is imported when it is needed: errors are raised before it is."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

T = TypeVar("T")
OTHERS_WAIT_SECONDS = 5.0  # in which the other ranks leave the message of an error to rank 0


class PluginError(Exception):
    """Base of everything below: safe to show to a user without a traceback."""

    on_every_rank = False  # set by `raise_on_all_ranks`: one rank can speak for all


class ConfigError(PluginError, ValueError):
    """A setting that is unknown, of the wrong type, out of range, or in conflict with another."""


class DataError(PluginError, ValueError):
    """Training data that is missing, empty or unreadable."""


class CheckpointError(PluginError, RuntimeError):
    """A checkpoint (or one of its shards) that is missing, damaged, or belongs to another run or model."""


class StateError(PluginError, RuntimeError):
    """A call that makes no sense now, such as a training step while the averaged weights are swapped in."""


def say(error: Exception) -> int:
    """Print the error that ends a framework's script, once though every rank may have raised it; the exit code, 2.
    Without a collective: a rank may be alone with it. The launcher ends all as soon as one is gone, so the first speaks
    first."""
    rank, told = os.environ.get("RANK", "0"), getattr(error, "on_every_rank", False)
    if rank != "0":
        time.sleep(OTHERS_WAIT_SECONDS)
    if rank == "0" or not told:
        print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr, flush=True)
    return 2


def this_rank() -> int:
    """This process's global rank; 0 without communication."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def gathered(mine: T) -> list[T]:
    """``mine`` of every rank, by rank; every rank calls it. What rank 0 has, on all: ``gathered(mine)[0]``."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def warn(text: str, *args: object) -> None:
    """In rank 0's log."""
    if this_rank() == 0:
        logging.getLogger("ds_plugin").warning(text, *args)


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run a block that holds no collective; if it fails on any rank, fail on every rank with the same error: a file
    missing on one node would leave the others waiting in the next collective.

    The first failing rank's error wins; an unexpected exception is re-raised on its rank with its own traceback. Costs
    one small all-gather of Python objects: for set-up, save and load, never for the training step."""
    caught: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it
        caught = error
    expected = isinstance(caught, PluginError)
    mine = None if caught is None else (type(caught) if expected else None, type(caught).__name__, str(caught))
    reports: list[Any] = gathered(mine)
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    if isinstance(caught, PluginError):
        caught.on_every_rank = len(reports) == 1
    if caught is not None and (not expected or len(reports) == 1):
        raise caught
    kind, name, message = reports[failed[0]]
    if kind is None:
        raise RuntimeError(f"rank {failed[0]} failed with {name}: {message}") from caught
    everywhere = kind(message if len(failed) == len(reports) else f"{message} (seen on rank {failed[0]})")
    everywhere.on_every_rank = True
    raise everywhere from caught


def from_rank_0(read: Callable[[], T]) -> T:
    """What ``read`` returns on rank 0, on every rank: a file that not all ranks see must not divide them."""
    with raise_on_all_ranks():
        mine = read() if this_rank() == 0 else None
    return cast(T, gathered(mine)[0])
