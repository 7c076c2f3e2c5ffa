"""What the methods read of a DeepSpeed engine. No collective but where it is said."""

from collections.abc import Sequence
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError
from ds_plugin.deepspeed_engine import compat
from ds_plugin.weight_averaging.finite import finite_everywhere, is_sound


class EngineReadings:
    """A DeepSpeed engine as the stability instruments see it (`loss_statistics.Readings`)."""

    def __init__(self, engine: Any):
        self._engine, self.device = engine, engine.device

    @property
    def step(self) -> int:
        return int(self._engine.global_steps)

    def gradient_norm(self) -> torch.Tensor | float | None:
        """Of the last step; fp32 without ZeRO has none. What fp16 skips says nothing: it looks for its loss scale."""
        if self._engine.fp16_enabled() and not self._engine.was_step_applied():
            return None
        return self._engine.get_global_grad_norm()

    def adam_variances(self) -> list[tuple[torch.Tensor, int]]:
        """This rank's second moments of Adam, the live tensors; some may be empty, ZeRO's padding in them is zero. Each
        with the number of ranks on which it lies: 1 where ZeRO shards it. None before the first step, from other
        optimizers, or where they are not in memory between two steps."""
        engine, key = self._engine, compat.ADAM_VARIANCE
        elsewhere = any(compat.is_on(engine, name) for name in compat.UPDATES_OUTSIDE_STEP)
        if engine.optimizer is None or elsewhere or engine.zero_nvme_offload_optimizer():
            return []
        compat.need(engine, "seq_dp_world_size")
        sharded = compat.wrapper_of(engine) in ("zero3", "zero12", "bf16")
        ranks = 1 if sharded else int(engine.seq_dp_world_size)
        experts = {} if sharded else compat.ranks_of_experts(engine)
        # by the state, not the param groups: ZeRO 3 leaves those empty between two steps
        states = [(p, entry) for each in optimizers(engine) for p, entry in each.state.items()]
        return [(entry[key].detach(), experts.get(id(p), ranks)) for p, entry in states if key in entry]


def optimizers(engine: Any) -> list[Any]:
    """What holds ``state`` and ``param_groups`` of this rank's masters: under an offload ratio below 1 there are two.
    Raises StateError: this DeepSpeed's has no state where it is looked for."""
    compat.need(engine.optimizer, compat.OPTIMIZER_STATE)
    second = getattr(engine.optimizer, compat.ZERO3_SECOND_OPTIMIZER, None)
    return [engine.optimizer, *([] if second is None else [second])]


def refuse_unknown_norm(engine: Any) -> None:
    """Raise ConfigError for the one setting under which ranks could disagree about a step, and nothing would show it:
    ZeRO 1/2 with ``compute_grad_norm`` off."""
    if not getattr(engine.optimizer, "compute_grad_norm", True):
        what = "zero_optimization.compute_grad_norm is false, so no rank hears of a step that was not finite"
        raise ConfigError(f"weight_averaging: {what}; write true, or leave it out")


def step_was_finite(engine: Any, masters: Sequence[torch.Tensor] = ()) -> bool | torch.Tensor | None:
    """Whether the last step was finite, the same on all ranks. None: only the masters can tell, which all ranks hold.

    DeepSpeed has the gradient norm under ZeRO and in 16 bits, and skips the step itself if it is not finite - unless
    bf16's ``check_grad_overflow`` is off under ZeRO 1/2. One on an accelerator is the answer as it is, which `is_sound`
    reads: nobody has waited for it. In fp32 without ZeRO there is none, and any step is applied: ranks that hold
    different parts of the model, or different experts, which a norm leaves out there, then exchange 4 bytes."""
    norm = engine.get_global_grad_norm()
    if compat.has_experts(engine) and int(engine.zero_optimization_stage()) == 0:
        return finite_everywhere(masters, engine.device)
    if isinstance(norm, torch.Tensor) and norm.device.type != "cpu":
        return norm
    if norm is not None:
        return is_sound(torch.as_tensor(norm, dtype=torch.float64))
    cut = int(engine.mp_world_size) > 1 or (compat.is_pipeline(engine) and int(engine.num_stages) > 1)
    return finite_everywhere(masters, engine.device) if cut else None
