"""The methods in one Megatron training run, whoever drives its loop: Megatron-LM's script, or Megatron-Bridge.

An adapter says what happens: `begin` before the model is built, `take` once there are a model and an optimizer,
`reading_on` and `over_data` around its loaders, `step`, `passes` and `after_step` in an iteration, `evaluated` for an
evaluation, `saved` and `save_averages` for a checkpoint. ``options()`` has the run's settings by Megatron-LM's names.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ds_plugin.completep.supported import unwrapped
from ds_plugin.core.errors import ConfigError, PluginError, StateError, raise_on_all_ranks
from ds_plugin.core.loss_statistics import Report
from ds_plugin.core.patch import Change, replaced
from ds_plugin.weight_averaging import restart
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.finite import finite_everywhere
from ds_plugin.weight_averaging.spike import SpikeWatch
from megatron_patches.training_loop import preflight, state
from megatron_patches.training_loop.batches import Carry, Cut, Replay
from megatron_patches.training_loop.lengths import Lengths
from megatron_patches.training_loop.masks import masked
from megatron_patches.training_loop.options import check_options, iterations_of, layout_multiple, set_to
from megatron_patches.training_loop.readings import LoopReadings, losses_of
from megatron_patches.weight_averaging.masters import find_megatron_shards

Stock = Callable[..., Any]  # the framework's own function
_REPORTED = ("loss_ratio", "max_loss_ratio", "variance_l1", "variance_max")


@dataclass(eq=False)
class Core(state.Methods):
    """Made before the run begins."""

    _last: int = 0  # tokens of a sample in the iteration that ran last
    _parts: int = 1  # into how many a sample was cut there
    _rehearsed: bool = False  # the full length
    _loaded: tuple[Path, int] | None = None
    _validation: list[Replay] = field(default_factory=list)
    _losses: Sequence[Any] = ()  # of the iteration's micro-batches
    _new: Report | None = None  # of the instruments, after the iteration that ran last
    _mark: str = ""  # behind the names of what is written, while an average is evaluated

    def begin(self) -> None:
        """Raises ConfigError, on every rank, for what a method cannot go with."""
        options, section = self.options(), self.sections.sequence_length_warmup
        with raise_on_all_ranks():
            check_options(self.sections, options)
            if section is not None:
                section = section.in_run(steps=iterations_of(options))
                sizes = {"layout_multiple": layout_multiple(options), "batch": options.global_batch_size}
                self.lengths = Lengths(section, full=options.seq_length, **sizes)
                self._last = options.seq_length

    def take(self, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        """Take note of what is trained, and take over the methods' state of the checkpoint it was loaded from."""
        if self.sections.weight_averaging is not None and optimizer is not None:
            self.averager = WeightAverager(self.sections.weight_averaging, find_megatron_shards(optimizer, model))
            averager, take_step = self.averager, optimizer.step

            def after_the_copy(*args: Any, **kwargs: Any) -> Any:
                averager.before_step()
                return take_step(*args, **kwargs)

            optimizer.step = after_the_copy
        if optimizer is not None:
            self._watch(model, optimizer)
        lengths = self.lengths
        if lengths is not None and scheduler is not None and lengths.config.learning_rate.by == "tokens":
            step = scheduler.step
            scheduler.step = lambda increment: step(increment=lengths.increment(increment // lengths.parts))
        elif lengths is not None and scheduler is not None and lengths.config.tokens_per_step == "constant":
            counted = scheduler.step  # the loops count by the size of a micro-batch, in which there are more samples
            scheduler.step = lambda increment: counted(increment=increment // lengths.parts)
        if self._loaded is not None:
            state.load(self, *self._loaded)
        if dist.get_rank() == 0:
            print("\n".join(self._describe()), flush=True)

    def _watch(self, model: Sequence[Any], optimizer: Any) -> None:
        """The instruments, and in the mask mode the models' masks."""
        self._readings = LoopReadings(optimizer, lambda: self.options().curr_iteration + 1)
        if self.averager is not None and (restart := self.averager.config.restart) is not None:
            self.spikes = SpikeWatch(self._readings, restart, every_rank=False)
        if self.lengths is not None:
            self.lengths.watch(self._readings)
            if self.lengths.config.mode == "mask":
                with raise_on_all_ranks():
                    for chunk in model:
                        masked(unwrapped(chunk), self.lengths)

    @contextlib.contextmanager
    def reading_on(self) -> Iterator[None]:
        """While the loaders are built. In the carry mode they begin with the first window that is still needed."""
        options, lengths = self.options(), self.lengths
        with contextlib.ExitStack() as stack:
            if lengths is not None and (first := lengths.first_window) is not None:  # of which a part is still open
                stack.enter_context(set_to(options, consumed_train_samples=first * options.global_batch_size))
                if not first:  # else Megatron-LM takes 0 for a number that was not saved
                    stack.enter_context(set_to(options, iteration=0))
            yield

    def over_data(self, train: Any, *evaluated: Any) -> None:
        """Cut the training batches to the iteration's length, and keep the others to be seen again. Each is an iterator
        of Megatron's, a list of them, or None. Raises DataError, on every rank, for batches that cannot be cut."""
        lengths = self.lengths
        with raise_on_all_ranks():
            if lengths is not None and lengths.config.mode != "mask":
                for iterator in _each(train):
                    iterator.iterable = self._cut(iterator.iterable, lengths)
                    iterator.iterable.check_first(lengths.full)
            for iterator in _each(list(evaluated)) if self.sections.weight_averaging is not None else []:
                iterator.iterable = Replay(iterator.iterable)
                self._validation.append(iterator.iterable)

    def _cut(self, source: Any, lengths: Lengths) -> Cut:
        if lengths.order is None:
            fold = lengths.full if lengths.config.tokens_per_step == "constant" else None
            return Cut(source, lambda: self.options().seq_length, fold=fold)
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        return Carry(source, lengths, get_num_microbatches)

    def _describe(self) -> list[str]:
        options, lines = self.options(), []
        if self.lengths is not None:
            lines.append(self.lengths.describe(iterations=iterations_of(options)))
        if self.averager is not None:
            lines.append(self.averager.describe())
        if (c := self.sections.completep) is not None:
            where = "folded into the weights" if c.residual == "folded" else "in the forward pass"
            lines.append(f"completep: recipe {c.recipe}, base {c.base_width} x {c.base_depth}, multipliers {where}")
        return lines

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around an iteration, at its length."""
        if self.averager is not None:
            self.averager.refuse_while_swapped("a training step")
        if self.lengths is not None:
            self._last, self._parts = self.lengths.tokens, self.lengths.parts
        options, more = self.options(), {}
        if self._parts > 1:  # micro-batches of more, shorter samples, where a step keeps its tokens
            more = {"micro_batch_size": options.micro_batch_size * self._parts}
        with self._at_length(self._last), self.at(**more):
            yield

    def passes(self, stock: Stock, given: Mapping[str, Any]) -> Stock:
        """An iteration's forward and backward passes: ``stock``, what it returns kept, and before the first short one
        once at the full length. ``given``: what `preflight.rehearsed` needs. Called in `step`."""
        if self.lengths is not None and self.lengths.config.preflight and not self._rehearsed:
            if self._last < self.lengths.full:
                self._rehearsed = True
                samples = self.options().micro_batch_size // self._parts
                shape = {"seq_length": self.lengths.full, "micro_batch_size": samples}
                stock = preflight.rehearsed(stock, given, shape, self.options(), self.untraced)

        def heard(**settings: Any) -> Any:
            found = settings.get("seq_length", self._last)
            if self.lengths is not None and found != self._last:
                what = f"the loop gives its passes seq_length {found}, and {self._last} was set: it reads another place"
                raise PluginError(f"sequence_length_warmup: {what}; use a tested version (core 0.16 to 0.20)")
            self._losses = stock(**settings)
            return self._losses

        return heard

    def untraced(self) -> contextlib.AbstractContextManager[None]:
        """Around passes that are not the iteration's: what else the loop sums up of one knows nothing of them."""
        return contextlib.nullcontext()

    @property
    def hears(self) -> bool:
        """Whether somebody wants to know the losses."""
        return self.lengths is not None or self.spikes is not None

    def _record(self, *, applied: bool, norm: float | None) -> None:
        """Tell the instruments of an iteration; a tensor-parallel group's first rank tells of its losses."""
        from megatron.core import parallel_state

        readings, losses, self._losses = self._readings, self._losses, ()
        readings.norm = None if self.options().fp16 and not applied else norm
        monitors = [each.monitor for each in (self.lengths, self.spikes) if each is not None]
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for loss in losses_of(losses):
                for monitor in filter(None, monitors):
                    monitor.record(loss)

    def after_step(self, *, applied: bool, norm: float | None) -> None:
        """An iteration is over: book its tokens, look at its losses, go back to the average or take a snapshot."""
        options, averager, length = self.options(), self.averager, 0
        if self.hears:
            self._record(applied=applied, norm=norm)
        if self.lengths is not None:
            from megatron.core.num_microbatches_calculator import get_num_microbatches

            copies = options.data_parallel_size * getattr(options, "gtp_weight_remat_size", 1)
            samples = options.micro_batch_size * copies * get_num_microbatches()  # over all ranks
            length = self.lengths.length
            self._new = self.lengths.booked(samples, applied)
        iteration = options.curr_iteration + 1
        if averager is not None and self.spikes is not None:
            if self.spikes.close_step(length):
                self.spikes.go_back(averager, self._restart, iteration)
            if self.spikes.since is not None:
                return  # the loss is too high at present: no snapshot
        if averager is not None and applied and averager.due(iteration):
            if norm is not None:  # all ranks have the same
                finite: Any = math.isfinite(norm)
            else:  # the masters are looked at, and all ranks told
                device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
                finite = finite_everywhere(averager.shards.tensors(), device)
            averager.snapshot(iteration, finite=finite)

    def _restart(self) -> None:
        """The average becomes the training weights; moments as the section says."""
        assert self.averager is not None and self.spikes is not None
        keep, readings = self.spikes.config.moments == "keep", self._readings
        states = restart.to_reset(readings.inner(), readings.device, keep=keep)
        self.averager.restart()
        restart.zero_(states)

    def _at_length(self, length: float) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.lengths is None else self.at(seq_length=length)

    def at(self, **values: Any) -> contextlib.AbstractContextManager[None]:
        """The run's settings have these values in the block."""
        return set_to(self.options(), **values)

    def figures(self) -> dict[str, float]:
        """What the loggers are to have of the iteration that ran last, if anything."""
        every = getattr(self.options(), "tensorboard_log_interval", 1)
        if self.lengths is None or (self._new is None and (self.options().curr_iteration + 1) % every):
            return {}
        values: dict[str, Any] = {"sequence length": self.lengths.last, "trained tokens": self.lengths.trained}
        if (report := self._new) is not None:
            values |= {name.replace("_", " "): getattr(report, name) for name in _REPORTED}
        return {name: value for name, value in values.items() if value is not None}

    def line(self) -> str:
        """What a line of the log is to have of it."""
        if self.lengths is None:
            return ""
        said = f" sequence length: {self.lengths.last:5d} | trained tokens: {self.lengths.trained:14d} |"
        if self.lengths.ratio is not None:
            said += f" loss ratio: {self.lengths.ratio:.4f} |"
        return said

    def evaluated(self, run: Callable[[str], Any], prefix: str) -> Any:
        """``run(prefix)``, an evaluation; again on the averages and the same batches. Returns what the first did."""
        if self.averager is None or not (steps := self.averager.steps):
            return run(prefix)
        for source in self._validation:
            source.record()
        result = run(prefix)
        with set_to(self.options(), consumed_valid_samples=self.options().consumed_valid_samples):
            for horizon in self.averager.config.horizons or (None,):
                for source in self._validation:
                    source.replay()
                over = f", horizon {horizon}" if horizon else ""
                with replaced(self, "_mark", f", averaged{over}"), self.averager.averaged_weights(horizon):
                    run(f"{prefix} | average of steps {steps[0]} to {steps[-1]}{over}")
        for source in self._validation:
            source.forget()
        return result

    def saved(self, iteration: int, save: Callable[[], Any], save_average: Callable[[], Any]) -> Any:
        """``save()``, the framework's checkpoint, with the methods' state beside it; before it ``save_average()``, the
        weights alone in the same format, for each average that is to be saved, as the models' weights."""
        if self.averager is not None:
            self.averager.refuse_while_swapped("save_checkpoint()")
        root = Path(self.options().save)
        save_id = state.save(self, root, iteration)
        if self.averager is not None and self.averager.config.save_average and self.averager.steps:
            for horizon in self.averager.config.horizons or (None,):
                folder = Path(root, state.AVERAGED, f"horizon_{horizon}" if horizon is not None else "")
                state.mark_average(self, folder, iteration)  # first: a save may be cut off
                with self.averager.averaged_weights(horizon), set_to(self.options(), save=str(folder)):
                    save_average()
                state.seal(self, folder, iteration, save_id)
        result = save()
        state.seal(self, root, iteration, save_id)
        return result


class Marked:
    """A writer of TensorBoard's, W&B's, MLflow's or Comet's that puts ``mark`` behind each name."""

    def __init__(self, writer: Any, mark: str):
        self._writer, self._mark = writer, mark

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> None:
        self._writer.add_scalar(tag + self._mark, *args, **kwargs)

    def log(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._writer.log({name + self._mark: value for name, value in values.items()}, *args, **kwargs)

    def log_metrics(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._writer.log_metrics({name + self._mark: value for name, value in values.items()}, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def no_step(why: str) -> Change:
    """Refuses any torch optimizer's step until it is reverted, once the methods know the optimizer that trains."""
    hooks: list[Any] = []

    def refuse(optimizer: Any, args: Any, kwargs: Any) -> None:
        raise StateError(f"megatron_patches: {type(optimizer).__name__} steps, but {why}")

    return Change(
        "torch.optim.Optimizer.step",
        lambda: hooks.append(register_optimizer_step_pre_hook(refuse)),
        lambda: hooks.pop().remove(),
        reason="no step before the methods know the optimizer",
    )


def _each(iterators: Any) -> list[Any]:
    """The iterators there are: one, lists of them, or None where a rank reads no data."""
    if isinstance(iterators, list):
        return [found for part in iterators for found in _each(part)]
    if iterators is None:
        return []
    if not hasattr(iterators, "iterable"):
        raise ConfigError(f"Megatron-LM's {type(iterators).__name__} has no 'iterable' to wrap; use a tested version")
    return [iterators]
