"""Start the optimizer's moments again, for a restart from the average."""

from collections.abc import Sequence
from typing import Any

import torch

from ds_plugin import compat
from ds_plugin.errors import StateError

#: what begins at zero in torch's and DeepSpeed's Adam, AdamW and Lamb, and in SGD with momentum
ZERO_AT_START = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})


def moments(engine: Any) -> list[dict[str, Any]]:
    """The dictionaries, live, that hold this rank's moments and step counts; `zero_` starts them again.

    Raises:
        StateError: the optimizer keeps something else, of which it is not known how it begins.
    """
    optimizer = engine.optimizer
    compat.need(optimizer, compat.OPTIMIZER_STATE)
    second = getattr(optimizer, compat.ZERO3_SECOND_OPTIMIZER, None)
    owners = [optimizer] if second is None else [optimizer, second]
    found = [entry for owner in owners for entry in getattr(owner, compat.OPTIMIZER_STATE).values()]
    for entry in found:
        unknown = sorted(key for key, value in entry.items() if key not in ZERO_AT_START and torch.is_tensor(value))
        if unknown:
            raise StateError(
                f"restart_from_average: the optimizer keeps {', '.join(unknown)}, which cannot be reset; give "
                "moments='keep'"
            )
    # apex's kind of Adam counts steps in its groups
    return found + [group for owner in owners for group in owner.param_groups if "step" in group]


def zero_(states: Sequence[dict[str, Any]]) -> None:
    """Set moments and step counts to zero, in place: DeepSpeed holds references to these tensors elsewhere."""
    for state in states:
        for key in ZERO_AT_START & state.keys():
            if torch.is_tensor(state[key]):
                state[key].zero_()
            elif state[key] is not None:
                state[key] = type(state[key])(0)
