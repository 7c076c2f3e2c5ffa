"""Learning rates by tokens: the JSON's scheduler, moved by what has been trained instead of by the count of steps, by
which it would have decayed before the model has seen its data (arXiv 2108.06084, section 4). One scheduler step is here
a full-length batch's worth of tokens; all the scheduler's settings keep their meaning."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError

#: DeepSpeed's schedulers: step(position) computes the learning rates of that position, whole or not
_BY_POSITION = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")


class TokenScheduler:
    """Stands in for the engine's LR scheduler; what it does not define is the wrapped scheduler's."""

    def __init__(self, scheduler: Any, trained: Callable[..., float]):
        """``trained(with_open_step=...)``: tokens trained so far in full-length batches, the step that has just ended
        left out or not. DeepSpeed's schedulers count from -1, one step behind; torch's count from 0. Raises
        ConfigError: there is no scheduler, or its learning rates cannot be asked for by position."""
        kind, by = type(scheduler).__name__, 'sequence_length_warmup.learning_rate.by: "tokens"'
        if scheduler is None:
            raise ConfigError(f'{by}, but there is no scheduler; add a "scheduler" to the JSON, or write "by": "steps"')
        torchs = hasattr(scheduler, "_get_closed_form_lr") or isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        if kind not in _BY_POSITION and not torchs:
            what = f"{by} and the scheduler is {kind}, whose learning rates follow from the ones before"
            known = f"{', '.join(_BY_POSITION)}, LambdaLR or CosineAnnealingLR"
            raise ConfigError(f'{what}, not from a position; write one of {known}, or "by": "steps"')
        self.scheduler, self._trained, self._counts_from_0 = scheduler, trained, kind not in _BY_POSITION
        if self._counts_from_0:  # torch's schedulers say at each step that they would rather count themselves
            warnings.filterwarnings("ignore", message=re.escape("The epoch parameter in `scheduler.step()`"))

    def step(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's call after an applied step; its own arguments, a count of steps, are put aside."""
        position = self._trained(with_open_step=self._counts_from_0)
        # DeepSpeed's logarithmic warmup reaches its peak at the last whole step before its end, and would go beyond it
        last = getattr(self.scheduler, "warmup_num_steps", 0) - 1
        if getattr(self.scheduler, "warmup_type", None) == "log" and last < position < last + 1:
            position = float(last)
        self.scheduler.step(position)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # while unpickling or copying, before __init__
            raise AttributeError(name)
        return getattr(self.scheduler, name)
