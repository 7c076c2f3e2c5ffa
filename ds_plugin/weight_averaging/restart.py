"""Start the optimizer's moments again, for a restart from the average."""

from collections.abc import Sequence
from typing import Any

import torch

from ds_plugin.core.errors import StateError, raise_on_all_ranks
from ds_plugin.weight_averaging.finite import finite_everywhere

#: what begins at zero in torch's and DeepSpeed's Adam, AdamW and Lamb, and in SGD with momentum
ZERO_AT_START = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})


def to_reset(optimizers: Sequence[Any], device: torch.device, *, keep: bool) -> list[dict[str, Any]]:
    """What a restart starts again, as `moments` gives and refuses it: all, or with ``keep`` nothing if all is finite.

    One NaN in a moment would make every later step NaN, so then all ranks start all of theirs again: moments share
    their step counts, and one of zero at a high count would take far too large steps. Every rank calls it, with what
    has ``state`` and ``param_groups`` of its masters; to keep costs a pass over the state and 4 bytes on ``device``.
    """
    if keep:
        kept = [value for entry in _entries(optimizers) for value in entry.values() if torch.is_tensor(value)]
        if finite_everywhere([value for value in kept if value.is_floating_point()], device):
            return []
    with raise_on_all_ranks():
        return moments(optimizers)


def moments(optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    """The dictionaries, live, that hold this rank's moments and step counts; `zero_` starts them again. Raises
    StateError: the optimizer keeps something else, of which it is not known how it begins."""
    found = _entries(optimizers)
    tensors = {key for entry in found for key, value in entry.items() if torch.is_tensor(value)}
    if unknown := sorted(tensors - ZERO_AT_START):
        raise StateError(
            f"restart_from_average: the optimizer keeps {', '.join(unknown)}, which cannot be reset; give "
            "moments='keep', which needs finite ones"
        )
    # apex's kind of Adam counts steps in its groups
    return found + [group for each in optimizers for group in each.param_groups if "step" in group]


def _entries(optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    return [entry for optimizer in optimizers for entry in optimizer.state.values()]


def zero_(states: Sequence[dict[str, Any]]) -> None:
    """Set moments and step counts to zero, in place: DeepSpeed holds references to these tensors elsewhere."""
    for state in states:
        for key in ZERO_AT_START & state.keys():
            if torch.is_tensor(state[key]):
                state[key].zero_()
            elif state[key] is not None:
                state[key] = type(state[key])(0)
