"""Whether the optimizer step that was just applied is fit for a snapshot, known without any communication."""

import math
from typing import Any

from ds_plugin.errors import ConfigError


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


def step_was_finite(engine: Any) -> bool | None:
    """Whether the gradient norm of the last step was finite: one value, the same on all ranks. None: there is none.

    DeepSpeed has it under ZeRO and in 16 bits, and skips the step itself if it is not finite - unless bf16's
    ``check_grad_overflow`` is off under ZeRO 1/2. In fp32 without ZeRO it has none, and applies any step. The norm is a
    scalar that may lie on the accelerator: reading it waits for the step, on the steps of a snapshot only.
    """
    norm = engine.get_global_grad_norm()
    if norm is None:
        return None
    value = float(norm)
    return math.isfinite(value) and value >= 0  # DeepSpeed marks an invalid norm by -1
