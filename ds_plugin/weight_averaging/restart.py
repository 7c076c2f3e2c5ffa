"""Start the optimizer's moments again, for a restart from the average."""

from collections.abc import Sequence
from typing import Any

import torch

from ds_plugin.core.errors import StateError, raise_on_all_ranks, warn
from ds_plugin.weight_averaging.finite import finite_everywhere

#: what begins at zero in torch's and DeepSpeed's Adam, AdamW and Lamb, and in SGD with momentum
ZERO_AT_START = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})


def to_reset(optimizers: Sequence[Any], device: torch.device, *, keep: bool) -> list[dict[str, Any]]:
    """The dictionaries, live, of the moments and step counts that a restart starts again, by `zero_`: all, or with
    ``keep`` none if all moments are finite on all ranks. One NaN would stay for ever, so then all start again: moments
    share their step counts, and one of zero at a high count would take far too large steps. Every rank calls it.
    Raises StateError: the optimizer keeps something else, of which it is not known how it begins."""
    entries = [entry for optimizer in optimizers for entry in optimizer.state.values()]
    tensors = [(key, value) for entry in entries for key, value in entry.items() if torch.is_tensor(value)]
    if keep and finite_everywhere([value for _, value in tensors if value.is_floating_point()], device):
        return []
    with raise_on_all_ranks():
        if unknown := sorted({key for key, _ in tensors} - ZERO_AT_START):
            what = f"the optimizer keeps {', '.join(unknown)}, which cannot be reset"
            raise StateError(f"restart_from_average: {what}; give moments='keep', which needs finite ones")
    if keep:
        warn("weight averaging: the optimizer's moments were not finite: they start again at zero")
    # apex's kind of Adam counts steps in its groups
    return entries + [group for each in optimizers for group in each.param_groups if "step" in group]


def zero_(states: Sequence[dict[str, Any]]) -> None:
    """Set moments and step counts to zero, in place: DeepSpeed holds references to these tensors elsewhere."""
    for state in states:
        for key in ZERO_AT_START & state.keys():
            if torch.is_tensor(state[key]):
                state[key].zero_()
            elif state[key] is not None:
                state[key] = type(state[key])(0)
