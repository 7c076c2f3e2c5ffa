"""What the instruments read of Megatron-LM's training (`loss_statistics.Readings`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_patches.megatron_on_cpu import on_cpu
from megatron_patches.weight_averaging.masters import LAYER_WISE_GATHER

_VARIANCE = "exp_avg_sq"  # Adam's second moments, in torch's, apex's and TransformerEngine's


class LoopReadings:
    """Of one run's optimizer and loop. ``step``: iterations so far, with the one that has just been made."""

    def __init__(self, optimizer: Any, step: Callable[[], int]):
        self._optimizer, self._step = optimizer, step
        self.norm: float | None = None  # the last iteration's gradient norm; None: not known, or fp16 skipped it
        self.device = torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())

    @property
    def step(self) -> int:
        return self._step()

    def gradient_norm(self) -> float | None:
        return self.norm

    def adam_variances(self) -> list[torch.Tensor]:
        found = [entry.get(_VARIANCE) for inner in self.inner() for entry in inner.state.values()]
        return [value.detach() for value in found if torch.is_tensor(value)]

    def state_copies(self) -> int:
        """1 where the state is sharded, by elements or by layers, else the data-parallel ranks."""
        from megatron.core import parallel_state

        if hasattr(self._optimizer, LAYER_WISE_GATHER):
            return 1
        members = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        if all(getattr(member.config, "use_distributed_optimizer", False) for member in members):
            return 1
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))

    def inner(self) -> list[Any]:
        """The torch optimizers under Megatron's, that have something to train on this rank."""
        members, found = [self._optimizer], []
        while members:
            member = members.pop(0)
            if hasattr(member, "chained_optimizers"):
                members += member.chained_optimizers
            elif member.optimizer is not None:
                found.append(member.optimizer)
        return found


def losses_of(micro_batches: Sequence[Any]) -> list[torch.Tensor]:
    """Each micro-batch's mean loss on this rank, on its device, of what Megatron-LM's schedule returns: by name the
    loss, or its sum over tokens and their number, the model's own first; nothing on a stage that has no loss, or from
    a script whose losses are something else."""
    found = []
    for losses in micro_batches:
        first = next(iter(losses.values()), None) if isinstance(losses, dict) else None
        if not torch.is_tensor(first) or first.numel() not in (1, 2):
            return []
        flat = first.detach().reshape(-1)
        found.append(flat[0] / flat[1] if len(flat) == 2 else flat[0])
    return found
