"""What the instruments read of Megatron-LM's training (`loss_statistics.Readings`)."""

import functools
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

    def adam_variances(self) -> list[tuple[torch.Tensor, int]]:
        groups = [group for inner in self.inner() for group in inner.param_groups]
        experts = {id(p) for group in groups if group.get("is_expert_parallel") for p in group["params"]}
        ranks, ranks_of_experts = self._copies()
        return [
            (entry[_VARIANCE].detach(), ranks_of_experts if id(p) in experts else ranks)
            for inner in self.inner()
            for p, entry in inner.state.items()
            if torch.is_tensor(entry.get(_VARIANCE))
        ]

    def _copies(self) -> tuple[int, int]:
        """On how many ranks the state lies, and that of experts: on all data-parallel ranks, unless it is sharded, by
        layers or, in each instance of the distributed optimizer, by elements."""
        from megatron.core import parallel_state

        if hasattr(self._optimizer, LAYER_WISE_GATHER):
            return 1, 1
        of_all = functools.partial(parallel_state.get_data_parallel_world_size, with_context_parallel=True)
        members = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        if all(getattr(member.config, "use_distributed_optimizer", False) for member in members):
            instances = int(of_all() // of_all(partial_data_parallel=True))
            return instances, instances
        return int(of_all()), int(parallel_state.get_expert_data_parallel_world_size())

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
