"""The methods in the training loop of Megatron-LM's ``megatron.training.training``, for one run.

The loop calls its parts by their names in that module, so that each can be wrapped; the wrappers are the methods below,
which take Megatron-LM's function first. What a run is made of comes with its own calls:

setup_model_and_optimizer    the options are checked; model and optimizer are taken note of; the state is loaded
build_..._data_iterators     training batches are cut to the iteration's length, validation batches can be seen again
train_step                   ``args.seq_length`` is the iteration's length, before the first short one once the full
                             one; after it tokens are booked, losses looked at, training goes back to the average if
                             they stay too high, else a snapshot is taken
num_floating_point_operations, training_log, compute_throughputs_and_append_to_progress_log
                             count what was trained; the log and the writers have the instruments' figures
evaluate_and_print_results   at full length, on the weights and then on their average, on the same batches
get_tensorboard_writer, get_wandb_writer
                             the average's figures have names of their own
save_checkpoint              our files first, with ``save_average`` the average's weights, then Megatron-LM's
"""

import contextlib
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_plugin.completep.supported import unwrapped
from ds_plugin.core.errors import ConfigError, raise_on_all_ranks
from ds_plugin.core.loss_statistics import Report
from ds_plugin.core.patch import replaced
from ds_plugin.weight_averaging import restart
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.finite import finite_everywhere
from ds_plugin.weight_averaging.spike import SpikeWatch
from megatron_patches.training_loop import preflight, state
from megatron_patches.training_loop.batches import Carry, Cut, Replay
from megatron_patches.training_loop.lengths import Lengths
from megatron_patches.training_loop.masks import masked
from megatron_patches.training_loop.options import check_options, iterations_of, layout_multiple
from megatron_patches.training_loop.readings import LoopReadings, losses_of
from megatron_patches.weight_averaging.masters import find_megatron_shards

Stock = Callable[..., Any]  # Megatron-LM's own function
TRAINING = "megatron.training.training"
_REPORTED = ("loss_ratio", "max_loss_ratio", "variance_l1", "variance_max")
_SAMPLES = re.compile(r"consumed samples:[^|]*\|")  # in the line that Megatron-LM prints of an iteration


@dataclass(eq=False)
class Loop(state.Methods):
    """Made before the script runs."""

    _ready: bool = False  # model, optimizer and state are there
    _last: int = 0  # tokens of a sample in the iteration that ran last
    _parts: int = 1  # into how many a sample was cut there
    _rehearsed: bool = False  # the full length
    _loaded: tuple[Path, int] | None = None
    _validation: list[Replay] = field(default_factory=list)
    _losses: Sequence[Any] = ()  # of the iteration's micro-batches
    _new: Report | None = None  # of the instruments, after the iteration that ran last
    _mark: str = ""  # behind the names of what is written, while an average is evaluated

    def setup_model_and_optimizer(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        """Raises ConfigError for what a method cannot go with, before the model is built."""
        options, section = self.options(), self.sections.sequence_length_warmup
        with raise_on_all_ranks():
            check_options(self.sections, options)
            if section is not None:
                section = section.in_run(steps=iterations_of(options))
                sizes = {"layout_multiple": layout_multiple(options), "batch": options.global_batch_size}
                self.lengths = Lengths(section, full=options.seq_length, **sizes)
                self._last = options.seq_length
        model, optimizer, scheduler = stock(*args, **kwargs)
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
            counted = scheduler.step  # Megatron-LM counts by the size of a micro-batch, in which there are more samples
            scheduler.step = lambda increment: counted(increment=increment // lengths.parts)
        if self._loaded is not None:
            state.load(self, *self._loaded)
        self._ready = True
        if dist.get_rank() == 0:
            print("\n".join(self._describe()), flush=True)
        return model, optimizer, scheduler

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

    def load_checkpoint(self, stock: Stock, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse what no run can go on from, and remember what was loaded: our state follows."""
        read = state.check(self, model)
        found, options = stock(model, *args, **kwargs), self.options()
        if (iteration := found[0]) > 0 and not options.finetune:
            counted_anew = getattr(options, "override_ckpt_iteration", None) is not None
            self._loaded = (Path(options.load), read if counted_anew and read is not None else iteration)
        return found

    def build_train_valid_test_data_iterators(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        options, lengths = self.options(), self.lengths
        with contextlib.ExitStack() as stack:
            if lengths is not None and (first := lengths.first_window) is not None:  # of which a part is still open
                stack.enter_context(replaced(options, "consumed_train_samples", first * options.global_batch_size))
                if not first:  # else Megatron-LM takes 0 for a number that was not saved
                    stack.enter_context(replaced(options, "iteration", 0))
            train, valid, test = stock(*args, **kwargs)
        with raise_on_all_ranks():
            if lengths is not None and lengths.config.mode != "mask":
                for iterator in _each(train):
                    iterator.iterable = self._cut(iterator.iterable, lengths)
                    iterator.iterable.check_first(lengths.full)
            if self.averager is not None:
                for iterator in [*_each(valid), *_each(test)]:
                    iterator.iterable = Replay(iterator.iterable)
                    self._validation.append(iterator.iterable)
        return train, valid, test

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

    def train_step(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        if self.averager is not None:
            self.averager.refuse_while_swapped("a training step")
        if self._hears:
            given = inspect.signature(stock).bind(*args, **kwargs).arguments
            preflight.need(given, ["forward_backward_func"], "train_step", otherwise="")
            args, kwargs = preflight.with_passes(stock, args, kwargs, self._heard(given["forward_backward_func"]))
        if self.lengths is not None:
            self._last, self._parts = self.lengths.tokens, self.lengths.parts
            if self.lengths.config.preflight and not self._rehearsed and self._last < self.lengths.full:
                self._rehearsed = True
                stock = functools.partial(preflight.before, stock, self._full_shape(), self.options())
        with self._at_length(self._last), self._of_parts():
            result = stock(*args, **kwargs)
        _, skipped, _, leaves, _, norm, *_ = result
        if not leaves:
            self._after_step(applied=not skipped, norm=norm)
        return result

    @property
    def _hears(self) -> bool:
        """Whether somebody wants to know the losses."""
        return self.lengths is not None or self.spikes is not None

    def _heard(self, passes: Stock) -> Stock:
        """Megatron-LM's passes; what they return is kept."""

        def heard(**settings: Any) -> Any:
            self._losses = passes(**settings)
            return self._losses

        return heard

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

    def _after_step(self, *, applied: bool, norm: float | None) -> None:
        options, averager, length = self.options(), self.averager, 0
        if self._hears:
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
        off = self.lengths is None
        return contextlib.nullcontext() if off else replaced(self.options(), "seq_length", length)

    def _full_shape(self) -> dict[str, int]:
        """Of a micro-batch before it is cut, by Megatron-LM's names."""
        return {"seq_length": self.options().seq_length, "micro_batch_size": self.options().micro_batch_size}

    def _of_parts(self) -> contextlib.AbstractContextManager[None]:
        """Micro-batches of more, shorter samples, where a step keeps its tokens."""
        if self._parts == 1:
            return contextlib.nullcontext()
        return replaced(self.options(), "micro_batch_size", self.options().micro_batch_size * self._parts)

    def num_floating_point_operations(self, stock: Stock, options: Any, batch_size: int, *args: Any, **kw: Any) -> Any:
        with self._at_length(self._last):
            return stock(options, batch_size * self._parts, *args, **kw)

    def training_log(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        """At the iteration's length, for its throughputs; to each writer what the methods have to say."""
        with self._at_length(self._last * self._parts):
            result = stock(*args, **kwargs)
        iteration, every = self.options().curr_iteration + 1, getattr(self.options(), "tensorboard_log_interval", 1)
        if self.lengths is not None and (self._new is not None or iteration % every == 0):
            training = importlib.import_module(TRAINING)
            values: dict[str, float] = {"sequence length": self.lengths.last, "trained tokens": self.lengths.trained}
            if (report := self._new) is not None:
                values |= {name.replace("_", " "): getattr(report, name) for name in _REPORTED}
            values = {name: value for name, value in values.items() if value is not None}
            if (writer := training.get_tensorboard_writer()) is not None:
                for name, value in values.items():
                    writer.add_scalar(name, value, iteration)
            if (writer := training.get_wandb_writer()) is not None:
                writer.log(values, iteration)
        return result

    def compute_throughputs_and_append_to_progress_log(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        """At the mean length, which times the samples is the tokens that were trained."""
        samples = self.options().consumed_train_samples
        mean = self.lengths.trained / samples if self.lengths is not None and samples else self._last
        with self._at_length(mean):
            return stock(*args, **kwargs)

    def print_rank_last(self, stock: Stock, message: Any) -> Any:
        if self.lengths is not None:
            said = f" sequence length: {self.lengths.last:5d} | trained tokens: {self.lengths.trained:14d} |"
            if (report := self.lengths.report) is not None and report.loss_ratio is not None:
                said += f" loss ratio: {report.loss_ratio:.4f} |"
            message = _SAMPLES.sub(rf"\g<0>{said}", str(message), count=1)
        return stock(message)

    def evaluate_and_print_results(self, stock: Stock, prefix: str, *args: Any, **kwargs: Any) -> Any:
        if self.averager is None or not (steps := self.averager.steps):
            return stock(prefix, *args, **kwargs)
        for source in self._validation:
            source.record()
        result = stock(prefix, *args, **kwargs)
        options = self.options()
        with replaced(options, "consumed_valid_samples", options.consumed_valid_samples):
            for horizon in self.averager.config.horizons or (None,):
                for source in self._validation:
                    source.replay()
                over = f", horizon {horizon}" if horizon else ""
                said = f"{prefix} | average of steps {steps[0]} to {steps[-1]}{over}"
                with replaced(self, "_mark", f", averaged{over}"), self.averager.averaged_weights(horizon):
                    stock(said, *args, **kwargs)
        for source in self._validation:
            source.forget()
        return result

    def get_tensorboard_writer(self, stock: Stock) -> Any:
        writer = stock()  # None: another rank has it
        return _Marked(writer, self._mark) if self._mark and writer is not None else writer

    get_wandb_writer = get_tensorboard_writer

    def save_checkpoint(self, stock: Stock, iteration: int, *args: Any, **kwargs: Any) -> Any:
        if self.averager is not None:
            self.averager.refuse_while_swapped("save_checkpoint()")
        if not self._ready:  # Megatron-LM only converts what it has read
            return stock(iteration, *args, **kwargs)
        root = Path(self.options().save)
        save_id = state.save(self, root, iteration)
        if self.averager is not None and self.averager.config.save_average and self.averager.steps:
            self._save_averages(self.averager, stock, iteration, *args, **kwargs)
        result = stock(iteration, *args, **kwargs)
        state.seal(self, root, iteration, save_id)
        return result

    def _save_averages(self, averager: WeightAverager, stock: Stock, *args: Any, **kwargs: Any) -> None:
        """The weights alone, by Megatron-LM's own function and format."""
        options = self.options()
        call = inspect.signature(stock).bind(*args, **kwargs)
        # nothing of the run's own checkpoints: neither its state nor what is kept from one save to the next
        for name in ("optimizer", "opt_param_scheduler", "checkpointing_context", "train_data_iterator"):
            if name in call.arguments:
                call.arguments[name] = None
        # earlier ones are removed with the run's: Megatron-LM would do it in a thread that reads args.save later
        changed = {"no_save_optim": True, "no_save_rng": True, "save_retain_interval": None}
        for horizon in averager.config.horizons or (None,):
            root = Path(options.save, state.AVERAGED, f"horizon_{horizon}" if horizon is not None else "")
            state.mark_average(self, root, call.arguments["iteration"])  # first: a save may be cut off
            with contextlib.ExitStack() as stack:
                stack.enter_context(averager.averaged_weights(horizon))
                for name, value in {**changed, "save": str(root)}.items():
                    stack.enter_context(replaced(options, name, value))
                stock(*call.args, **call.kwargs)


class _Marked:
    """A writer of TensorBoard's or W&B's that puts ``mark`` behind each name."""

    def __init__(self, writer: Any, mark: str):
        self._writer, self._mark = writer, mark

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> None:
        self._writer.add_scalar(tag + self._mark, *args, **kwargs)

    def log(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._writer.log({name + self._mark: value for name, value in values.items()}, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def _each(iterators: Any) -> list[Any]:
    """The iterators there are: one, lists of them, or None where a rank reads no data."""
    if isinstance(iterators, list):
        return [found for part in iterators for found in _each(part)]
    if iterators is None:
        return []
    if not hasattr(iterators, "iterable"):
        raise ConfigError(f"Megatron-LM's {type(iterators).__name__} has no 'iterable' to wrap; use a tested version")
    return [iterators]
