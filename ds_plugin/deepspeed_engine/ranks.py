"""What ranks tell each other outside the training step. Without communication there is one rank."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ds_plugin.core.errors import raise_on_all_ranks

T = TypeVar("T")


def this_rank() -> int:
    """This rank's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(mine: T) -> list[T]:
    """``mine`` of every rank, by rank. Every rank calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def from_rank_0(read: Callable[[], T]) -> T:
    """What ``read`` returns on rank 0, on every rank: a file that not all ranks see must not divide them."""
    box: list[Any] = [None]
    with raise_on_all_ranks():
        if this_rank() == 0:
            box = [read()]
    dist.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


def warn(text: str, *args: object) -> None:
    """Rank 0's log."""
    if this_rank() == 0:
        logging.getLogger("ds_plugin").warning(text, *args)
