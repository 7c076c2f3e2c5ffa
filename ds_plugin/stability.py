"""The stability instruments of arXiv 2108.06084: the loss ratio and Adam's variance.

Between two reports they cost one addition of a scalar on the device per micro-batch: no host sync, no collective. A
report reads the shard of Adam's state that the rank holds anyway, and all ranks exchange one small vector.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from ds_plugin import compat
from ds_plugin.errors import StateError

THRESHOLDS = (1.2, 1.5)  # the loss ratios above which the paper counts a step
# Elements of Adam's state that are read at a time. On a host 1 MB of temporary memory, which stays in the cache; 16 MB
# come anew from the system each time, which takes up to three times as long. On a device 16 MB, for few kernels.
_CHUNK_HOST, _CHUNK_DEVICE = 2**18, 2**22
_ABSENT = -1.0  # in place of the largest sqrt(v), which is never negative, on a rank without such state


class LossRatio:
    """``loss_t / min(loss_1 .. loss_(t-1))`` step by step, the largest, and how many were above each threshold."""

    def __init__(self) -> None:
        self.lowest: float | None = None
        self.last: float | None = None
        self.highest: float | None = None
        self.above = [0] * len(THRESHOLDS)

    def feed(self, loss: float | None) -> float | None:
        """The ratio of the next step's loss, all ranks' mean. None: there is none.

        So it is for the first loss, for a step whose loss is not known (None), and for a loss of zero or below, of
        which a ratio says nothing; that one is never the lowest either. A loss that is not finite has an infinite
        ratio, also as the first, and never is the lowest.
        """
        ratio = None
        if loss is not None and not math.isfinite(loss):
            ratio = math.inf
        elif loss is not None and loss > 0:
            ratio = loss / self.lowest if self.lowest is not None else None
            self.lowest = min(loss, self.lowest) if self.lowest is not None else loss
        self.last = ratio
        if ratio is not None:
            self.highest = max(ratio, self.highest) if self.highest is not None else ratio
            self.above = [n + (ratio > threshold) for n, threshold in zip(self.above, THRESHOLDS, strict=True)]
        return ratio

    def state(self) -> dict[str, Any]:
        """Everything, for Python's json, which keeps floats exactly (and infinity as ``Infinity``)."""
        return {"lowest": self.lowest, "last": self.last, "highest": self.highest, "above": list(self.above)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self.lowest, self.last, self.highest = state["lowest"], state["last"], state["highest"]
        self.above = list(state["above"])


class Correlation:
    """Pearson's correlation of pairs that come one at a time (Welford's update: no sums of squares that cancel)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean_x = self._mean_y = self._xx = self._yy = self._xy = 0.0

    def add(self, x: float | None, y: float | None) -> None:
        """One pair. It is left out if a number in it is missing or not finite."""
        if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
            return
        self.count += 1
        dx, dy = x - self._mean_x, y - self._mean_y
        self._mean_x += dx / self.count
        self._mean_y += dy / self.count
        self._xx += dx * (x - self._mean_x)
        self._yy += dy * (y - self._mean_y)
        self._xy += dx * (y - self._mean_y)

    @property
    def value(self) -> float | None:
        """In [-1, 1]; None with fewer than two pairs, or when all x or all y are equal."""
        scale = math.sqrt(self._xx) * math.sqrt(self._yy)
        return max(-1.0, min(1.0, self._xy / scale)) if scale > 0 else None

    def state(self) -> list[float]:
        """Everything, for Python's json."""
        return [self.count, self._mean_x, self._mean_y, self._xx, self._yy, self._xy]

    def load_state(self, state: list[float]) -> None:
        """Take over a saved state."""
        self.count = int(state[0])
        self._mean_x, self._mean_y, self._xx, self._yy, self._xy = state[1:]


def adam_variance(engine: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """This rank's part of Adam's ``sqrt(v)``: l1 norm and largest element, float64 scalars on the engine's device.

    The l1 norms of all ranks add up to the model's, the largest of the maxima is the model's. No gather, no host sync,
    no temporary of the state's size. None: this rank holds no such state (see `compat.adam_variances`). Ranks of one
    tensor-parallel group each count what they replicate (the norms' weights), pipeline stages a tied weight.
    """
    norms, maxima = [], []
    for variance in compat.adam_variances(engine):
        for chunk in variance.reshape(-1).split(_CHUNK_HOST if variance.is_cpu else _CHUNK_DEVICE):
            if chunk.numel() == 0:
                continue
            # torch.sum adds up pairwise: 1e-8 off for millions of elements in float32. torch.linalg.vector_norm(v,
            # ord=0.5) needs no temporary at all, but adds up in sequence and is 8 % off for 30 million on a CPU.
            norms.append(chunk.float().sqrt().sum().double().to(engine.device))
            maxima.append(chunk.max().double().sqrt().to(engine.device))
    if not norms:
        return None
    return torch.stack(norms).sum() / compat.optimizer_state_copies(engine), torch.stack(maxima).max()


@dataclass(frozen=True)
class Report:
    """What the instruments say after a step; equal on all ranks. None: not known.

    ``loss_ratio`` is the last step's, ``max_loss_ratio`` the largest since the report before. ``variance_l1`` and
    ``variance_max`` are of sqrt(v) after the last step.
    """

    step: int
    loss_ratio: float | None
    max_loss_ratio: float | None
    variance_l1: float | None
    variance_max: float | None
    ratios: tuple[float | None, ...] = ()  # of every step since the report before, oldest first


class Summed(Protocol):
    """Integers of this rank since the last exchange that are added up over all ranks by the next one."""

    def mine(self) -> Sequence[int]:
        """As many on every rank."""

    def exchanged(self, totals: Sequence[float]) -> None:
        """Their sums, on every rank; `mine` begins anew."""


class StabilityMonitor:
    """The instruments on one engine, read every ``interval`` optimizer steps by one collective over all ranks."""

    def __init__(
        self,
        engine: Any,
        interval: int,
        extra: Callable[[], Mapping[str, float]] = dict,
        *,
        variance: bool = True,
        summed: Summed | None = None,
    ):
        """``extra``: numbers that must be equal on all ranks, such as the length, by name; the same names on all ranks.
        ``summed``: numbers that are added up over all of them.
        ``variance=False`` leaves Adam's state alone: the loss ratio only.

        Raises:
            StateError: this DeepSpeed keeps the optimizer's state in a way not known.
        """
        assert interval >= 1
        if variance:
            compat.adam_variances(engine)  # so that it raises now and not at the first report
        self.variance = variance
        self.engine = engine
        self.interval = interval
        self.extra = extra
        self.summed = summed
        self.loss_ratio = LossRatio()
        self.with_l1, self.with_max = Correlation(), Correlation()
        self._ratios: list[float | None] = []  # of the interval's steps whose losses have been exchanged
        # Slots of the steps whose losses have not: the first `_closed` are complete, the one after them is open.
        self._sums = torch.zeros(interval, dtype=torch.float64, device=engine.device)
        self._counts = [0] * interval
        self._closed = 0

    def record(self, loss: torch.Tensor) -> None:
        """Book one micro-batch's unscaled loss on the open step: any shape, its mean counts. No sync, no collective.

        A rank that computes no loss (an earlier pipeline stage) never calls it.
        """
        self._sums[self._closed].add_(loss.detach().mean(dtype=torch.float64))
        self._counts[self._closed] += 1

    def close_step(self) -> Report | None:
        """The optimizer step is over; every rank calls it. A `Report` if it was the interval's last one.

        Raises:
            StateError: on all ranks, if a number of ``extra`` or the step differs between them.
        """
        self._closed += 1
        return self.report() if len(self._ratios) + self._closed >= self.interval else None

    def report(self) -> Report | None:
        """Report now and start a new interval, as at the end of a run; None if no step has been closed since the last.

        Every rank calls it. Raises as `close_step` does.
        """
        if not self._ratios and not self._closed:
            return None
        l1, maximum = self._exchange(adam_variance(self.engine) if self.variance else None)
        known = [ratio for ratio in self._ratios if ratio is not None]
        report = Report(
            self.engine.global_steps, self._ratios[-1], max(known, default=None), l1, maximum, tuple(self._ratios)
        )
        self._ratios = []
        self.with_l1.add(report.loss_ratio, l1)
        self.with_max.add(report.loss_ratio, maximum)
        return report

    def summary(self) -> dict[str, Any]:
        """For summary.json: the paper's numbers over all steps reported so far. No collective."""
        counts = zip(THRESHOLDS, self.loss_ratio.above, strict=True)
        return {
            **{f"steps_above_{threshold}": count for threshold, count in counts},
            "max_loss_ratio": self.loss_ratio.highest,
            "pearson_variance_l1": self.with_l1.value,
            "pearson_variance_max": self.with_max.value,
        }

    def state(self) -> dict[str, Any]:
        """What a resume needs, for Python's json; equal on all ranks. **Every rank calls it**: it holds a collective.

        The losses of an interval that is not over are exchanged now and the ratios kept until its report, which so is
        bitwise the one of a run that was not saved. An open step is left out, as DeepSpeed leaves out its gradients.
        """
        if self._closed:
            self._exchange(None)
        return {
            "loss_ratio": self.loss_ratio.state(),
            "with_l1": self.with_l1.state(),
            "with_max": self.with_max.state(),
            "ratios": list(self._ratios),
        }

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over a saved state; None starts afresh. What was recorded since is dropped.

        If it is already as long as this run's interval, which may be another, the report comes with the next step.
        """
        self.loss_ratio, self.with_l1, self.with_max = LossRatio(), Correlation(), Correlation()
        self._ratios = []
        if state:
            self.loss_ratio.load_state(state["loss_ratio"])
            self.with_l1.load_state(state["with_l1"])
            self.with_max.load_state(state["with_max"])
            self._ratios = list(state["ratios"])
        self._sums.zero_()
        self._counts, self._closed = [0] * self.interval, 0

    def _exchange(self, variance: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[float | None, float | None]:
        """Feed the closed steps' global losses to the loss ratio; the global l1 norm and maximum of the variances.

        One vector per rank, in float64 (token counts do not fit float32): the losses' sums and counts by slot, l1 norm
        and maximum, the numbers to compare, those to add up. Every rank works out the same from the same table: on the
        host, and rank after rank, since in which order a GPU adds up depends on its kind.
        """
        n, device = self.interval, self.engine.device
        equal = {"step": self.engine.global_steps, **self.extra()}
        absent = torch.tensor([0.0, _ABSENT], dtype=torch.float64, device=device)
        sums = self.summed.mine() if self.summed is not None else ()
        counts_and_equal = torch.tensor([*self._counts, *equal.values(), *sums], dtype=torch.float64, device=device)
        vector = torch.cat([self._sums, torch.stack(variance) if variance else absent, counts_and_equal])
        table = vector.new_empty(dist.get_world_size() * len(vector))
        dist.all_gather_into_tensor(table, vector)
        rows = table.view(-1, len(vector)).cpu().numpy()  # the one host sync of the interval

        last = 2 * n + 2 + len(equal)
        _refuse_different(rows[:, 2 * n + 2 : last], list(equal))
        totals = rows.sum(axis=0).tolist()  # row by row: only along the fast axis does numpy add in pairs
        if self.summed is not None:
            self.summed.exchanged(totals[last:])
        for slot in range(self._closed):
            count = totals[n + 2 + slot]
            self._ratios.append(self.loss_ratio.feed(totals[slot] / count if count else None))
        # the open step moves to the first slot
        self._sums[: self._closed] = 0
        self._sums = self._sums.roll(-self._closed)
        self._counts = self._counts[self._closed :] + [0] * self._closed
        self._closed = 0
        maximum = float(rows[:, n + 1].max())  # NaN if one is
        return (None, None) if maximum == _ABSENT else (totals[n], maximum)


def _refuse_different(numbers: np.ndarray, names: list[str]) -> None:
    """``numbers``: [ranks, names]. Raises StateError for the first name whose number differs from rank 0's."""
    differing = np.argwhere((numbers != numbers[0]).T)
    if len(differing):
        column, rank = differing[0]
        raise StateError(
            f"{names[column]} is {numbers[rank, column]:.17g} on rank {rank} and {numbers[0, column]:.17g} on rank 0, "
            "so they train different runs; give all ranks the same JSON and the same checkpoint"
        )
