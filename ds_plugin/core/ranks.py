"""What ranks tell each other outside the training step. Without communication there is one rank.

torch is imported when it is needed: errors, which build on this, are raised before it is.
"""

import logging
from typing import TypeVar

T = TypeVar("T")


def this_rank() -> int:
    """This rank's number."""
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
