"""The stability instruments of arXiv 2108.06084: the loss ratio and Adam's variance. They cost a few operations on a
scalar on the device per micro-batch: no sync, no collective. For a report all ranks exchange one small vector; where
the variance is asked for, each reads its own shard of Adam's state."""

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from ds_plugin.core.errors import StateError

THRESHOLDS = (1.2, 1.5)  # the loss ratios above which the paper counts a step
#: elements of Adam's state that are read at a time: on a CPU 1 MB, which stays in the cache (16 MB, new from the
#: system, take up to three times as long); on an accelerator 16 MB, for few kernels
CHUNK_CPU, CHUNK_DEVICE = 2**18, 2**22
_ERRORS = 2.0  # standard errors that a ratio must stand out by before anything is done about it
_ABSENT = -1.0  # in place of the largest sqrt(v), which is never negative, on a rank without such state


class LossRatio:
    """``loss_t / min(loss_1 .. loss_(t-1))`` step by step, the largest, and how many were above each threshold.

    The lowest is of the steps that were not longer: a longer context makes a lower loss, and a short step after a long
    one, as in the carry mode, is no spike. Where lengths only grow, it is the paper's ratio. ``beyond_noise`` is the
    last ratio less what noise may have done: two standard errors off the loss, and as many on top of the lowest. A mean
    over a handful of labels is as often 20 % off."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"lowest": [], "highest": None, "above": [0] * len(THRESHOLDS)}
        # by length: loss and standard error; only those that no shorter one undercuts
        self._lowest: dict[int, tuple[float, float]] = {at: (loss, error) for at, loss, error in state["lowest"]}
        self.highest: float | None = state["highest"]
        self.above = list(state["above"])
        self.beyond_noise: float | None = None

    def feed(self, loss: float | None, length: int = 0, error: float = 0.0) -> float | None:
        """The ratio of the next step's loss, all ranks' mean with its standard error, at ``length`` tokens a sample.
        None: it is the first, not known, or not above 0. One that is not finite has an infinite ratio, also as the
        first. Neither is ever the lowest."""
        ratio = self.beyond_noise = None
        if loss is not None and not math.isfinite(loss):
            ratio = self.beyond_noise = math.inf
        elif loss is not None and loss > 0:
            lowest = min((low for at, low in self._lowest.items() if at <= length), default=None)
            if lowest is not None:
                ratio = loss / lowest[0]
                self.beyond_noise = (loss - _ERRORS * error) / (lowest[0] + _ERRORS * lowest[1])
            if lowest is None or loss < lowest[0]:
                kept = {at: low for at, low in self._lowest.items() if at < length or low[0] < loss}
                self._lowest = {**kept, length: (loss, error)}
        if ratio is not None:
            self.highest = max(ratio, self.highest) if self.highest is not None else ratio
            self.above = [n + (ratio > threshold) for n, threshold in zip(self.above, THRESHOLDS, strict=True)]
        return ratio

    def state(self) -> dict[str, Any]:
        """For Python's json, which keeps floats exactly (and infinity as ``Infinity``)."""
        lowest = [[length, *low] for length, low in sorted(self._lowest.items())]
        return {"lowest": lowest, "highest": self.highest, "above": list(self.above)}


@dataclass
class Correlation:
    """Pearson's correlation of pairs that come one at a time (Welford's update: no sums of squares that cancel).
    ``Correlation(*correlation.state())`` goes on from it."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: float | None, y: float | None) -> None:
        """One pair, unless a number in it is missing or not finite."""
        if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
            return
        self.count += 1
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x += dx / self.count
        self.mean_y += dy / self.count
        self.xx += dx * (x - self.mean_x)
        self.yy += dy * (y - self.mean_y)
        self.xy += dx * (y - self.mean_y)

    @property
    def value(self) -> float | None:
        """In [-1, 1]; None with fewer than two pairs, or when all x or all y are equal."""
        scale = math.sqrt(self.xx) * math.sqrt(self.yy)
        return max(-1.0, min(1.0, self.xy / scale)) if scale > 0 else None

    def state(self) -> list[float]:
        return list(astuple(self))


class Readings(Protocol):
    """What the instruments read of a framework's training, on this rank."""

    @property
    def device(self) -> torch.device: ...  # where losses and gradient norms are
    @property
    def step(self) -> int: ...  # optimizer steps so far, equal on all ranks
    # the last step's, of the whole model, below 0 or not finite if it was not finite; None: not known
    def gradient_norm(self) -> torch.Tensor | float | None: ...
    # Adam's second moments, the live tensors, each with the number of ranks on which it lies; none where there are none
    # or they are not in this process
    def adam_variances(self) -> list[tuple[torch.Tensor, int]]: ...


def adam_variance(readings: Readings) -> tuple[torch.Tensor, torch.Tensor] | None:
    """This rank's part of Adam's ``sqrt(v)``: l1 norm and largest element, float64 scalars on its device; None: it has
    none. The ranks' norms add up to the model's (what tensor-parallel ranks or pipeline stages replicate is counted on
    each), the largest of the maxima is the model's. No gather, no sync, no temporary of the state's size."""
    norms, maxima = [], []
    for variance, ranks in readings.adam_variances():
        for chunk in variance.reshape(-1).split(CHUNK_CPU if variance.is_cpu else CHUNK_DEVICE):
            if not chunk.numel():
                continue
            # torch.sum adds up pairwise, 1e-8 off for millions of elements in float32. torch.linalg.vector_norm(v,
            # ord=0.5), without a temporary, adds up in sequence: 8 % off for 30 million on a CPU.
            norms.append(chunk.float().sqrt().sum().double().to(readings.device) / ranks)
            maxima.append(chunk.max().double().sqrt().to(readings.device))
    if not norms:
        return None
    return torch.stack(norms).sum(), torch.stack(maxima).max()


@dataclass(frozen=True)
class Report:
    """What the instruments say after a step; equal on all ranks. None: not known."""

    step: int
    loss_ratio: float | None  # the last step's
    max_loss_ratio: float | None  # the largest since the report before
    variance_l1: float | None  # of sqrt(v) after the last step
    variance_max: float | None
    beyond_noise: tuple[float | None, ...] = ()  # see `LossRatio`: of every step since the report before, oldest first


@dataclass(eq=False)
class StabilityMonitor:
    """The instruments on one training, read every ``interval`` optimizer steps by one collective over all ranks.

    A step's loss is the mean over its micro-batches that have one: without labels the mean is NaN, the gradient 0. So a
    step is infinite only if no micro-batch of any rank had a finite loss, or if its gradient norm was not finite.
    ``extra``: numbers by name that must be equal on all ranks. ``variance``: reports hold Adam's, at a pass over its
    state each; raises StateError where that lies in a way not known. ``summed``: a `TokenCounts`, to be added up too.
    """

    readings: Readings
    interval: int
    extra: Callable[[], Mapping[str, float]] = dict
    variance: bool = False
    summed: Any = None

    def __post_init__(self) -> None:
        if self.variance:
            self.readings.adam_variances()  # so that it raises now and not at the first report
        self.load_state(None)

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over a saved state; None starts afresh. What was recorded since is dropped. If it is already as long as
        this run's interval, which may be another, the report comes with the next step."""
        state = state or {"loss_ratio": None, "with_l1": [], "with_max": [], "ratios": []}
        self.loss_ratio = LossRatio(state["loss_ratio"])
        self.with_l1, self.with_max = Correlation(*state["with_l1"]), Correlation(*state["with_max"])
        #: of the interval's steps whose losses have been exchanged: the ratio, and how much of it is beyond noise
        self._ratios: list[tuple[float | None, float | None]] = [(ratio, beyond) for ratio, beyond in state["ratios"]]
        n, self._closed = self.interval, 0  # steps whose losses have not: their slots come first, then the open one's
        self._lengths, self._counts = [0] * n, [0] * n  # tokens of a sample; micro-batches with a mean
        # of the finite means: their sum, the sum of their squares, how many they are
        self._booked = torch.zeros(3, n, dtype=torch.float64, device=self.readings.device)

    def record(self, loss: torch.Tensor) -> None:
        """Book one micro-batch's unscaled loss on the open step: any shape, its mean counts. No sync, no collective."""
        mean = loss.detach().mean(dtype=torch.float64)
        finite = mean.abs() < math.inf  # not so a NaN; isfinite takes twice the kernels
        mean = torch.where(finite, mean, 0.0)
        self._booked[:, self._closed] += torch.stack([mean, mean * mean, finite])
        self._counts[self._closed] += 1

    def close_step(self, length: int = 0) -> Report | None:
        """The optimizer step is over; every rank calls it. A `Report` if it was the interval's last one. ``length``: of
        its samples in tokens. Raises StateError, on all ranks, if ``extra`` or the step differs between them."""
        self._book_gradient_norm()
        self._lengths[self._closed] = length
        self._closed += 1
        return self.report() if len(self._ratios) + self._closed >= self.interval else None

    def report(self) -> Report | None:
        """Report now and start a new interval, as at the end of a run; None if no step has been closed since the last.
        Every rank calls it. Raises as `close_step` does."""
        if not self._ratios and not self._closed:
            return None
        l1, maximum = self._exchange(variance=self.variance)
        ratios, beyond_noise = zip(*self._ratios, strict=True)
        self._ratios = []
        self.with_l1.add(ratios[-1], l1)
        self.with_max.add(ratios[-1], maximum)
        largest = max((ratio for ratio in ratios if ratio is not None), default=None)
        return Report(self.readings.step, ratios[-1], largest, l1, maximum, beyond_noise)

    def summary(self) -> dict[str, Any]:
        """For summary.json: the paper's numbers over all steps reported so far. No collective."""
        return {
            **{f"steps_above_{at}": n for at, n in zip(THRESHOLDS, self.loss_ratio.above, strict=True)},
            "max_loss_ratio": self.loss_ratio.highest,
            "pearson_variance_l1": self.with_l1.value,
            "pearson_variance_max": self.with_max.value,
        }

    def state(self) -> dict[str, Any]:
        """What a resume needs, for Python's json; equal on all ranks. **Every rank calls it**: it holds a collective.
        The losses of an interval that is not over are exchanged now and the ratios kept until its report, which so is
        bitwise that of a run that was not saved. An open step is left out, as DeepSpeed leaves out its gradients."""
        if self._closed:
            self._exchange()
        parts = {name: getattr(self, name).state() for name in ("loss_ratio", "with_l1", "with_max")}
        return {**parts, "ratios": list(self._ratios)}

    def _book_gradient_norm(self) -> None:
        """A norm that is not finite makes the step's sum infinite; one below 0 is DeepSpeed's mark of such. No sync."""
        norm, booked = self.readings.gradient_norm(), self._booked[0, self._closed]
        if isinstance(norm, torch.Tensor):
            booked.add_(torch.where((torch.isfinite(norm) & (norm >= 0)).reshape(()), 0.0, math.inf))
        elif norm is not None and not 0 <= norm < math.inf:
            booked.fill_(math.inf)

    def _exchange(self, *, variance: bool = False) -> tuple[float | None, float | None]:
        """Feed the closed steps' losses to the loss ratio; returns the l1 norm and maximum of the variances.

        One float64 vector per rank (token counts do not fit float32): by slot `_booked`; with ``variance`` l1 norm and
        maximum; by slot how many losses there were; the numbers to compare; those to add up. Every rank works out the
        same from the same table, on the CPU: in which order a GPU adds up depends on its kind."""
        n, device = self.interval, self.readings.device
        equal = {"step": self.readings.step, **self.extra()}
        parts = [self._booked.flatten()]
        if variance:
            found = adam_variance(self.readings)
            absent = torch.tensor([0.0, _ABSENT], dtype=torch.float64, device=device)
            parts.append(absent if found is None else torch.stack(found))
        mine = self.summed.mine() if self.summed is not None else ()
        parts.append(torch.tensor([*self._counts, *equal.values(), *mine], dtype=torch.float64, device=device))
        vector = torch.cat(parts)
        table = vector.new_empty(dist.get_world_size() * len(vector))
        dist.all_gather_into_tensor(table, vector)
        rows = table.view(-1, len(vector)).cpu().numpy()  # the one sync of the interval

        ends = np.cumsum([n, n, n, 2 * variance, n, len(equal)])
        _refuse_different(rows[:, ends[4] : ends[5]], list(equal))
        totals = rows.sum(axis=0)  # row by row: only along the fast axis does numpy add in pairs
        total, squares, finite, variances, counts, _, sums = (part.tolist() for part in np.split(totals, ends))
        if self.summed is not None:
            self.summed.exchanged(sums)
        for slot in range(self._closed):
            loss, error = _mean(total[slot], squares[slot], finite[slot], counts[slot])
            ratio = self.loss_ratio.feed(loss, self._lengths[slot], error)
            self._ratios.append((ratio, self.loss_ratio.beyond_noise))
        # the closed steps' slots are free; what is in the open one moves to the first
        self._booked[:, : self._closed] = 0
        self._booked = self._booked.roll(-self._closed, dims=1)
        self._counts = self._counts[self._closed :] + [0] * self._closed
        self._closed = 0
        maximum = float(rows[:, 3 * n + 1].max()) if variance else _ABSENT  # NaN if one is
        return (None, None) if maximum == _ABSENT else (variances[0], maximum)


def _mean(total: float, squares: float, finite: float, count: float) -> tuple[float | None, float]:
    """A step's loss, the mean of ``finite`` out of ``count`` micro-batches' (None: nobody has computed one), and its
    standard error, of which a single micro-batch tells nothing: 0."""
    if not count and math.isfinite(total):
        return None, 0.0
    if not finite or not math.isfinite(total):
        return math.inf, 0.0
    mean = total / finite
    spread = max(0.0, squares / finite - mean * mean)
    return mean, math.sqrt(spread / (finite - 1)) if finite > 1 else 0.0


def _refuse_different(numbers: np.ndarray, names: list[str]) -> None:
    """``numbers``: [ranks, names]. Raises StateError for the first name whose number differs from rank 0's."""
    for column, rank in np.argwhere((numbers != numbers[0]).T):
        what = f"{names[column]} is {numbers[rank, column]:.17g} on rank {rank} and {numbers[0, column]:.17g} on rank 0"
        raise StateError(f"{what}, so they train different runs; give all ranks the same JSON and the same checkpoint")
