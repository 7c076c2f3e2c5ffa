"""Whether the optimizer step that was just applied is fit for a snapshot, known almost without communication."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_plugin import compat
from ds_plugin.errors import ConfigError
from ds_plugin.weight_averaging import window


def refuse_unknown(engine: Any) -> None:
    """Refuse the one setting under which ranks could disagree about a step, and nothing would show it.

    Raises:
        ConfigError: ZeRO 1/2 with ``compute_grad_norm`` off.
    """
    if not getattr(engine.optimizer, "compute_grad_norm", True):
        raise ConfigError(
            "weight_averaging: zero_optimization.compute_grad_norm is false; the norm tells every rank, at no cost, "
            "that a step was not finite and must not be averaged; write true, or leave it out"
        )


def step_was_finite(engine: Any, masters: Sequence[torch.Tensor] = ()) -> bool | torch.Tensor | None:
    """Whether the last step was finite, the same on all ranks. None: only the masters can tell, which all ranks hold.

    DeepSpeed has the gradient norm under ZeRO and in 16 bits, and skips the step itself if it is not finite - unless
    bf16's ``check_grad_overflow`` is off under ZeRO 1/2. The norm is a scalar that may lie on the accelerator: then it
    is the answer as it is, one element that nobody has waited for, which `is_sound` reads. In fp32 without ZeRO it has
    none, and applies any step. If the model is cut there, by a pipeline or tensor parallelism, its parts must hear of
    each other: 4 bytes. So must ranks with different experts without ZeRO, where the norm, if there is one, leaves
    those out.
    """
    if compat.has_experts(engine) and int(engine.zero_optimization_stage()) == 0:
        return finite_everywhere(masters, engine.device)
    norm = engine.get_global_grad_norm()
    if isinstance(norm, torch.Tensor) and norm.device.type != "cpu":
        return norm
    if norm is not None:
        return is_sound(torch.as_tensor(norm, dtype=torch.float64))
    if not compat.is_model_parallel(engine):
        return None
    return finite_everywhere(masters, engine.device)


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
