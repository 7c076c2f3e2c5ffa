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
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_plugin.core.patch import replaced
from megatron_patches.training_loop import preflight, state
from megatron_patches.training_loop.core import Core, Marked, Stock
from megatron_patches.training_loop.options import set_to

TRAINING = "megatron.training.training"
_SAMPLES = re.compile(r"consumed samples:[^|]*\|")  # in the line that Megatron-LM prints of an iteration
_signature = functools.lru_cache(maxsize=1)(inspect.signature)  # of the one train_step, asked for in each iteration


@dataclass(eq=False)
class Loop(Core):
    """The methods are what the loop calls by name."""

    _ready: bool = False  # model, optimizer and state are there
    container: Any = None  # of the settings, which Megatron-LM's newer loops are given beside their arguments

    def setup_model_and_optimizer(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        """Raises ConfigError for what a method cannot go with, before the model is built."""
        self.begin()
        self.container = kwargs.get("cfg_container")
        model, optimizer, scheduler = stock(*args, **kwargs)
        self.take(model, optimizer, scheduler)
        self._ready = True
        return model, optimizer, scheduler

    def load_checkpoint(self, stock: Stock, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse what no run can go on from, and remember what was loaded: our state follows."""
        read = state.check(self, model)
        found, options = stock(model, *args, **kwargs), self.options()
        if (iteration := found[0]) > 0 and not options.finetune:
            counted_anew = getattr(options, "override_ckpt_iteration", None) is not None
            self._loaded = (Path(options.load), read[1] if counted_anew and read is not None else iteration)
        return found

    def build_train_valid_test_data_iterators(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        with self.reading_on():
            train, valid, test = stock(*args, **kwargs)
        self.over_data(train, valid, test)
        return train, valid, test

    @contextlib.contextmanager
    def at(self, **values: Any) -> Iterator[None]:
        """Also in the container's parts, where they say what the arguments do."""
        parts = [getattr(self.container, name, None) for name in ("model", "train")]
        with contextlib.ExitStack() as stack:
            for name, value in values.items():
                given = getattr(self.options(), name)
                for part in (part for part in parts if getattr(part, name, None) == given):
                    stack.enter_context(replaced(part, name, value))
            stack.enter_context(super().at(**values))
            yield

    def train_step(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        with self.step():
            if self.hears:
                given = _signature(stock).bind(*args, **kwargs).arguments
                preflight.need(given, [preflight.PASSES], "train_step", otherwise="")
                passes = self.passes(given[preflight.PASSES], given)
                args, kwargs = preflight.with_passes(_signature(stock), args, kwargs, passes)
            result = stock(*args, **kwargs)
        _, skipped, _, leaves, _, norm, *_ = result
        if not leaves:
            self.after_step(applied=not skipped, norm=norm)
        return result

    def num_floating_point_operations(self, stock: Stock, options: Any, batch_size: int, *args: Any, **kw: Any) -> Any:
        with self._at_length(self._last):
            return stock(options, batch_size * self._parts, *args, **kw)

    def training_log(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:
        """At the iteration's length, for its throughputs; to each writer what the methods have to say."""
        with self._at_length(self._last * self._parts):
            result = stock(*args, **kwargs)
        if values := self.figures():
            training, iteration = importlib.import_module(TRAINING), self.options().curr_iteration + 1
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
        if said := self.line():
            message = _SAMPLES.sub(rf"\g<0>{said}", str(message), count=1)
        return stock(message)

    def evaluate_and_print_results(self, stock: Stock, prefix: str, *args: Any, **kwargs: Any) -> Any:
        return self.evaluated(lambda said: stock(said, *args, **kwargs), prefix)

    def get_tensorboard_writer(self, stock: Stock) -> Any:
        writer = stock()  # None: another rank has it
        return Marked(writer, self._mark) if self._mark and writer is not None else writer

    get_wandb_writer = get_tensorboard_writer

    def save_checkpoint(self, stock: Stock, iteration: int, *args: Any, **kwargs: Any) -> Any:
        if not self._ready:  # Megatron-LM only converts what it has read
            return stock(iteration, *args, **kwargs)
        save_average = functools.partial(self._save_average, stock, iteration, *args, **kwargs)
        return self.saved(iteration, lambda: stock(iteration, *args, **kwargs), save_average)

    def _save_average(self, stock: Stock, *args: Any, **kwargs: Any) -> None:
        """The weights alone, by Megatron-LM's own function and format."""
        call = inspect.signature(stock).bind(*args, **kwargs)
        # nothing of the run's own checkpoints: neither its state nor what is kept from one save to the next
        for name in ("optimizer", "opt_param_scheduler", "checkpointing_context", "train_data_iterator"):
            if name in call.arguments:
                call.arguments[name] = None
        # earlier ones are removed with the run's: Megatron-LM would do it in a thread that reads args.save later
        with set_to(self.options(), no_save_optim=True, no_save_rng=True, save_retain_interval=None):
            stock(*call.args, **call.kwargs)
