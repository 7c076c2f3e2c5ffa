"""Whether the optimizer step that was just applied is fit for a snapshot."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ds_plugin.weight_averaging import window


def is_sound(finite: bool | torch.Tensor) -> bool:
    """What an answer says that may be a gradient norm: finite, and not below 0, DeepSpeed's mark of one that is not."""
    if isinstance(finite, torch.Tensor) and finite.is_floating_point():
        return 0 <= float(finite) < math.inf
    return bool(finite)


def finite_everywhere(masters: Sequence[torch.Tensor], device: torch.device) -> bool:
    """Whether all ranks' masters are finite; each looks at its own, and 4 bytes are exchanged. Every rank calls it."""
    finite = torch.tensor([window.all_finite(masters)], dtype=torch.int32, device=device)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite.item())
