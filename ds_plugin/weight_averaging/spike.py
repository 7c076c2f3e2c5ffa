"""When the loss rises and stays up: from which step on, so that training can go back to the average from before it
(arXiv 2505.12082)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_plugin.core.errors import StateError, warn
from ds_plugin.core.loss_statistics import Readings, StabilityMonitor
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import RestartConfig


class SpikeWatch:
    """Watches the `LossRatio` of all ranks' loss; one small collective every ``patience`` steps, no sync between."""

    def __init__(self, readings: Readings, config: RestartConfig, *, every_rank: bool = True):
        """``every_rank``: each has losses, and a step without is an error; in a pipeline the last stage has them."""
        self.config = config
        self.monitor = StabilityMonitor(readings, config.patience)
        self.since: int | None = None  # the first step of those without a break, up to the last look, that were above
        self.restarts: list[int] = []  # steps after which training went back to the average
        self.told: int | None = None  # the `since` of the spike that the log has told of
        self._every_rank = every_rank
        self._recorded = False

    def record(self, loss: Any) -> None:
        if torch.is_tensor(loss):
            self.monitor.record(loss)
            self._recorded = True

    def close_step(self, length: int = 0) -> bool:
        """An optimizer step is over, of samples of ``length`` tokens; every rank calls it. Whether the loss has been
        above for ``patience`` steps. Raises StateError: no loss came in this step."""
        if self._every_rank and not self._recorded:
            remedy = 'call engine.backward(loss), or loss.backward() on the model\'s loss, or leave "restart" out'
            raise StateError(f"weight_averaging.restart: this step's loss is not known; {remedy}")
        self._recorded = False
        report = self.monitor.close_step(length)
        if report is None:
            return False
        first = report.step - len(report.beyond_noise) + 1
        for step, ratio in enumerate(report.beyond_noise, start=first):
            above = ratio is not None and ratio > self.config.loss_ratio
            self.since = (self.since if self.since is not None else step) if above else None
        return self.since is not None and report.step - self.since + 1 >= self.config.patience

    def go_back(self, averager: WeightAverager, restart: Callable[[], None], step: int) -> None:
        """After a spike, optimizer step ``step``: forget its snapshots and ``restart()`` from the average of those
        before it, if there are any; the log says which, or, once for a spike, that there are none."""
        assert self.since is not None
        averager.forget_from(self.since)
        steps = list(averager.steps)
        said = "there is no snapshot from before to go back to"
        if steps:
            restart()
            self.restarts.append(step)
            self.since = None
            said = f"training goes back to the average of steps {steps[0]} to {steps[-1]}"
        if steps or self.told != self.since:
            text = "weight averaging: step %d, the loss is above %g times its lowest without a break: %s"
            warn(text, step, self.config.loss_ratio, said)
        self.told = self.since

    def state(self) -> dict[str, Any]:
        """What a resume needs, in JSON types. It holds a collective."""
        return {"monitor": self.monitor.state(), "since": self.since, "restarts": list(self.restarts)}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        self.monitor.load_state(state["monitor"] if state else None)
        self.since = state["since"] if state else None
        self.restarts = list(state["restarts"]) if state else []
        self._recorded = False
