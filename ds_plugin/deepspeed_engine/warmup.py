"""Sequence length warmup on a DeepSpeed engine: what length the step has, and what becomes of every token."""

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from ds_plugin.core.errors import CheckpointError, ConfigError, StateError, gathered, raise_on_all_ranks, warn
from ds_plugin.core.loss_statistics import Report, StabilityMonitor
from ds_plugin.deepspeed_engine import compat, preflight
from ds_plugin.deepspeed_engine.readings import EngineReadings
from ds_plugin.deepspeed_engine.scheduler import SequenceLengthScheduler
from ds_plugin.sequence_length_warmup import slicing
from ds_plugin.sequence_length_warmup.batches import Batches, Source
from ds_plugin.sequence_length_warmup.carry import CarryOrder, TokenSpan, shifts_labels
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.hold import Hold
from ds_plugin.sequence_length_warmup.ledger import Ledger, TokenCounts
from ds_plugin.sequence_length_warmup.mask import BlockDiagonalCausalMask, check_model
from ds_plugin.sequence_length_warmup.schedule import layout_multiple
from ds_plugin.sequence_length_warmup.slicing import ByName, Shorten, argument_names, is_encoder_decoder
from ds_plugin.sequence_length_warmup.token_lr import TokenScheduler


class SequenceLengthWarmup:
    """The method's state on one engine.

    Batches are shortened by a hook outside the module, so that ``torch.compile`` never traces the schedule; in
    pipelines by the engine's batch function; or by `Batches` where they are read. All look at shapes only: no device
    sync, no collective, but for a first look (`ByName.LOOKS`, `_first`)."""

    def __init__(self, engine: Any, config: SequenceLengthWarmupConfig, shorten: Shorten | None = None):
        """Nothing changes on the engine before `install`. Raises ConfigError: the layout does not divide the lengths,
        the model or scheduler cannot do what the section asks for, or ranks were given different ones."""
        if (whole := compat.run_steps(engine)) is not None:
            by_tokens = config.learning_rate.by == "tokens"  # the scheduler then counts batches at full length
            tokens = whole * int(engine.train_batch_size()) * config.end_length
            config = config.in_run(tokens=tokens) if by_tokens else config.in_run(steps=whole)
        self.engine, self.config, self.full = engine, config, config.end_length
        ulysses, settings = compat.sequence_parallel_size(engine), getattr(engine.module, "config", None)
        #: over how many ranks each sample is divided before the engine sees it
        self.parts = ulysses * int(getattr(settings, "context_parallel_size", 1))
        multiple = math.lcm(layout_multiple(engine.module), ulysses)
        with raise_on_all_ranks():  # a user's schedule may be importable on some ranks only
            self.scheduler = SequenceLengthScheduler(config, layout_multiple=multiple)
        _refuse_different({"section": config.model_dump(mode="json"), "lengths": self.scheduler.lengths()})
        replicas = int(engine.dp_world_size)
        self.tokens = TokenCounts(replicas=replicas, copies=dist.get_world_size() // replicas)
        read, equal = EngineReadings(engine), lambda: {"length": self.length}
        self.monitor = StabilityMonitor(read, config.report_interval, equal, config.reads_variance, self.tokens)
        self.report: Report | None = None  # the newest
        self.hold = Hold(config)
        self.carries, self.folds = config.mode == "carry", config.tokens_per_step == "constant"
        self._folded = 0  # parts of a sample beyond its first, of all steps
        order = {"full": self.full, "multiple_of": self.scheduler.multiple_of, "interleave": config.windows}
        self.order = CarryOrder(**order) if self.carries else None
        self.shifts_labels = shifts_labels(engine.module) if config.shifts_labels is None else config.shifts_labels
        self._span: TokenSpan | None = None
        self.loads: int | None = 0  # of checkpoints, each of which `Batches` read anew after; None: detached
        self._reads = False  # whether batches are cut where they are read
        self._recorded = self._trained = False  # a loss, a forward pass: in the accumulation step that is open
        self._first = True  # no forward pass has been cut yet
        self._short = self._unread = False  # whether it was said: samples are shorter than a step, no variance is known
        self._rehearsed = not config.preflight
        #: what `cut_batch` wants to know of the micro-batches
        self.samples: dict[str, Any] = {"micro_batch": int(engine.train_micro_batch_size_per_gpu())}
        self._names = [] if compat.is_pipeline(engine) else argument_names(engine.module.forward)
        self._shorten = self._checked_shorten(shorten)
        by_tokens = config.learning_rate.by == "tokens"
        self._token_scheduler = TokenScheduler(engine.lr_scheduler, self.batches_trained) if by_tokens else None
        self._start_at_the_engines_step()

    def _checked_shorten(self, given: Shorten | None) -> Shorten | None:
        """What cuts the arguments of forward; None in pipelines, which have none: their batch function cuts."""
        module, mode = self.engine.module, self.config.mode
        if compat.is_pipeline(self.engine):
            if mode == "mask":
                what = "is not supported in DeepSpeed's pipeline engine, whose stages pass on what the model defines"
                raise ConfigError(f'sequence_length_warmup.mode: "mask" {what}; write "truncate" or "carry"')
            if given is not None:
                what = "a pipeline's micro-batches have no forward arguments; cut them in engine.set_batch_fn(...)"
                raise ConfigError(f"shorten: {what}, or read them from ds_plugin.get_plugin(engine).batches(...)")
            return None
        self.samples["encoder_decoder"] = is_encoder_decoder(module)
        parts = 'mode: "carry"' if self.carries else 'tokens_per_step: "constant"' if self.folds else None
        if parts and self.samples["encoder_decoder"]:
            what = f"and {type(module).__name__} is an encoder-decoder, whose targets end elsewhere than their sources"
            raise ConfigError(f'sequence_length_warmup.{parts} {what}; write "mode": "truncate" alone')
        if given is not None:
            if parts:
                what = "cuts samples by their tensors' names, and a function that shortens was given"
                raise ConfigError(f"sequence_length_warmup.{parts} {what}; leave one of the two out")
            return given
        if mode == "mask":
            check_model(module)
            return BlockDiagonalCausalMask(self._names)
        return ByName(module.forward, fold=self.full if self.folds else None, **self.samples)

    def install(self, undo: contextlib.ExitStack) -> None:
        """Put hook and scheduler on the engine; ``undo`` takes them off, and ends the `Batches` read through it."""
        undo.callback(setattr, self, "loads", None)
        if self._shorten is not None:
            handle = self.engine.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
            undo.callback(handle.remove)
        if self._token_scheduler is not None:
            self.engine.lr_scheduler = self._token_scheduler
            undo.callback(self._give_scheduler_back, self._token_scheduler)

    def _give_scheduler_back(self, ours: TokenScheduler) -> None:
        if self.engine.lr_scheduler is ours:  # a user's own, set since, is left alone
            self.engine.lr_scheduler = ours.scheduler

    # -- which length ------------------------------------------------------------------------------------------------

    @property
    def span(self) -> TokenSpan:
        """What each sample of the optimizer step that comes next, or runs, is trained on; constant within it."""
        if self._span is None:
            length = self.scheduler.update_difficulty(self.position)
            whole = TokenSpan(self.engine.global_steps, 0, length)
            self._span = whole if self.order is None else self.order.peek(length)
        return self._span

    @property
    def length(self) -> int:
        """Length in tokens of the optimizer step that comes next, or runs; in the mask mode, of a fragment."""
        return self.span.length

    @property
    def position(self) -> int:
        """Where the schedule stands: the step or nominal token that comes next, less what adaptive pacing has held."""
        done = self.engine.global_steps if self.config.duration.unit == "steps" else self.tokens.nominal
        return done + 1 - self.hold.lag

    @property
    def open_windows(self) -> list[int]:
        """For `Batches`."""
        return [window for window, _ in self.order.open] if self.order is not None else []

    def batches_trained(self, *, with_open_step: bool) -> float:
        """Nominal tokens trained, in full-length batches; what learning rates by tokens follow."""
        tokens = self.tokens.nominal + (self._nominal(self.span) if with_open_step else 0)
        return tokens / (self.engine.train_batch_size() * self.full)

    @property
    def ledger(self) -> Ledger:
        """What became of the tokens; exact at reports and saves, see `TokenCounts.ledger`. No collective."""
        if self.order is None and not self.folds:
            return self.tokens.ledger()
        batch, carried = int(self.engine.train_batch_size()), self.order.carried if self.order is not None else 0
        # a model that shifts its labels itself has no logits for the first token of a span that begins within a sample:
        # those were computed for the span before
        cuts = self.order.cuts if self.order is not None else self._folded
        untrained = cuts * batch if self.shifts_labels else 0
        return replace(self.tokens.ledger(carried * batch), untrained_targets=untrained)

    def describe(self) -> str:
        """The schedule in one line."""
        c, lengths = self.config, self.scheduler.lengths()
        steps = f"{c.duration.total:,} {c.duration.unit}, in {len(lengths)} lengths"
        text = f"sequence length warmup: {lengths[0]} to {lengths[-1]} tokens over {steps}, multiples of "
        text += f"{self.scheduler.multiple_of}, {c.schedule}, mode {c.mode}"
        text += ", learning rates by tokens" if c.learning_rate.by == "tokens" else ""
        text += ", as many samples as keep a step's tokens" if self.folds else ""
        text += ", held while unstable" if c.pacing == "adaptive" else ""
        lost = ", one target of a sample lost at each cut (the model shifts its labels)"
        return text + (lost if (self.carries or self.folds) and self.shifts_labels else "")

    # -- batches -----------------------------------------------------------------------------------------------------

    def batches(self, source: Source) -> Batches:
        """This rank's micro-batches, each cut to its step's length: see `Batches`."""
        if not (self._shorten is None or isinstance(self._shorten, ByName)):
            what = "batches(...) cuts samples by their tensors' names, and a function that shortens was given"
            raise ConfigError(f"shorten: {what}; leave it out, or give the samples to engine(...) as they are")
        self._reads = True
        return Batches(self, source)

    def cut_samples(self, batch: Any, *, exact: bool) -> tuple[Any, int, int]:
        """A micro-batch as the step trains it, nested in any way, and its tokens before and after; see `cut_batch`."""
        if self.folds:
            return slicing.fold_batch(batch, self.length, full=self.full, **self.samples)
        given = {**self.samples, "full": self.full, "exact": exact}
        return slicing.cut_batch(batch, self.length, self.span.offset, **given)

    def cut(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """One micro-batch of the step that comes next, by argument name, cut before its labels are used or counted. In
        the mask mode, which cuts nothing, the batch itself. Raises ConfigError: as `slicing.cut_batch` does; in the
        first micro-batch, on every rank. StateError: the carry mode, or samples that are divided over ranks, which are
        cut by `batches`."""
        if self.config.mode == "mask":
            return batch
        self._refuse_uncut()
        if not isinstance(batch, Mapping):
            what = f"a micro-batch is a {type(batch).__name__}, which has no argument names"
            raise ConfigError(f"sequence_length_warmup: {what}; give a dict such as the model's forward takes")
        self._reads = True
        (), cut, read, trained = self._cut_arguments((), dict(batch), self.length)
        self.count(read, trained)
        if type(batch) is dict:
            return cut
        whole: Any = copy.copy(batch)  # for its own kind: users read batch.input_ids
        whole.update(cut)
        return whole

    def _cut_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any], length: int, trains: bool = True) -> Any:
        assert self._shorten is not None
        first, self._first = self._first and trains, self._first and not trains
        # what cannot be cut in a run shows in its first batch; every rank says so
        with raise_on_all_ranks() if first else contextlib.nullcontext():
            return self._shorten(args, kwargs, length)

    def _refuse_uncut(self) -> None:
        if self.carries or self.parts > 1:
            what = f"mode {self.config.mode!r}" if self.parts == 1 else f"samples divided over {self.parts} ranks"
            remedy = "read them from ds_plugin.get_plugin(engine).batches(from_micro_batch)"
            raise StateError(f"sequence_length_warmup: {what} needs batches cut where they are read; {remedy}")

    def _before_forward(self, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.engine.module.training:
            return None  # evaluation is always at full length
        length, whole = self.length, (args, kwargs)
        # Without gradients nothing is trained, as for the log-probabilities of a batch that is trained as well: it is
        # cut to the same length, so that they belong to the same tokens, and not counted.
        trains = torch.is_grad_enabled()
        if self._reads:
            self._check_cut(slicing.named(self._names, args, kwargs), length)  # counted where they were read
        else:
            self._refuse_uncut()
            args, kwargs, read, trained = self._cut_arguments(args, kwargs, length, trains)
            if trains:
                self.count(read, trained)
        if trains:
            self._trained = True
            if not self._rehearsed:
                self._rehearsed = True
                self._preflight(*whole, length)
        return args, kwargs

    def count(self, read: int, trained: int) -> None:
        """Book a micro-batch on this rank."""
        self.tokens.add(read, trained)
        whole = self.samples["micro_batch"] * self.length
        if trained == read < whole and read % self.length and not self._short:  # not fewer samples, the last ones
            self._short = True
            what = f"a micro-batch holds {read} tokens where a step of length {self.length} has room for {whole}"
            warn("sequence length warmup: %s: samples that are shorter are trained whole", what)

    def _check_cut(self, given: dict[str, Any], length: int) -> None:
        for name in slicing.TOKEN_NAMES:
            shape: Any = getattr(given.get(name), "shape", ())
            tokens = shape[1] * self.parts if len(shape) > 1 else length
            if tokens > length or (tokens < length and self.carries):  # samples may be shorter otherwise
                what = f"{name} has {shape[1]} tokens a sample, the step trains {length} over {self.parts} rank(s)"
                raise StateError(f"sequence_length_warmup: {what}; give engine(...) the batches of plugin.batches(...)")

    def _preflight(self, args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> None:
        """Once, before the first short step: will the longest fit?"""
        if length == self.full or self.config.mode == "mask":
            return  # the step itself is as large as any
        if not self._reads:  # samples may be longer than the longest that is trained
            assert self._shorten is not None
            args, kwargs, _, _ = self._shorten(args, kwargs, self.full)
        if self._reads or isinstance(self._shorten, ByName):  # or shorter, cut or padded to the longest of a few
            with raise_on_all_ranks():  # ranks may have read samples of other lengths
                try:
                    given = slicing.named(self._names, args, kwargs)
                    if self._reads and self.folds:  # the samples' first parts come first
                        given = preflight.first_rows(given, self.full // length)
                    grown = preflight.lengthened(given, self.full // self.parts, **self.samples)
                except ConfigError as error:
                    raise ConfigError(f'{error}; or leave out the preflight, by "preflight": false') from None
            args, kwargs = slicing.as_given(self._names, grown, args, kwargs)
        preflight.run(self.engine, args, kwargs, self.full)

    # -- the end of a step -------------------------------------------------------------------------------------------

    def record(self, loss: Any) -> None:
        """Note a micro-batch's loss, which stays on the device."""
        if torch.is_tensor(loss):
            self.monitor.record(loss)
            self._recorded = True

    def after_step(self, applied: bool) -> None:
        """The engine has finished an optimizer step, applied or skipped."""
        if self.hold.on and not self._recorded and not compat.is_pipeline(self.engine):
            remedy = "call engine.backward(loss), or loss.backward() on the model's own loss"
            what = f'"adaptive" and this step has no known loss; {remedy}, or write "schedule"'
            raise StateError(f"sequence_length_warmup.pacing: {what}")
        self._recorded = False
        trained_before, length = self.tokens.nominal, self.length
        self._book(self.span, applied)
        self._span = None
        report = self.monitor.close_step(length)
        self.report = report or self.report
        if report is not None:
            if self.config.reads_variance and applied and report.variance_max is None and not self._unread:
                self._unread = True
                what = "no second moments of Adam are in memory: variance and adaptive.variance_max have no effect"
                warn("sequence length warmup: step %d, %s", report.step, what)
            self.hold.judge(report, length, self.full)
        self.hold.step(self.tokens.nominal - trained_before)
        self._span = None  # the report has asked for the length already

    def _nominal(self, span: TokenSpan) -> int:
        """Tokens that the step with this span stands for, over all data-parallel ranks."""
        return int(self.engine.train_batch_size()) * (self.full if self.config.keeps_tokens else span.length)

    def _book(self, span: TokenSpan, applied: bool) -> None:
        if compat.is_pipeline(self.engine):  # most stages read nothing; all know what is read, and that it is whole
            samples = int(self.engine.train_batch_size()) // self.tokens.replicas
            trained = self.full if self.folds else span.length
            self.tokens.add(samples * self.full if span.offset == 0 else 0, samples * trained)
        elif not self._trained:
            what = "an optimizer step without a forward pass of the engine; call engine(...), not engine.module(...)"
            raise StateError(f"sequence_length_warmup: {what}")
        self._trained = False
        self.tokens.close(self._nominal(span), applied)
        if self.order is not None:
            self.order.advance(span)
        self._folded += self.full // span.length - 1 if self.folds else 0

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a resume needs, JSON types only, equal on all ranks. Every rank calls it."""
        stability = self.monitor.state()  # its exchange completes the ledger
        tokens = {"ledger": asdict(self.ledger), "nominal": self.tokens.nominal}
        cuts = {"order": self.order.state() if self.order is not None else None, "folded": self._folded}
        return {**tokens, **self._counted_in(), **self.hold.state(), **cuts, "stability": stability}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError for a state that this run cannot go on from: what is read and carried in another mode
        or batch size, or a length held in another unit."""
        for name, value in self._counted_in().items() if state.get("order") or self.carries else ():
            if (saved := state.get(name)) != value:
                what = f"the checkpoint was trained with {name} {saved!r}, in which what was read is counted"
                raise CheckpointError(f"sequence_length_warmup: {what}, this run has {value!r}; resume with {saved!r}")
        self.hold.check_state(state)

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over a saved state. None: the steps so far were another's; they count as full-length ones."""
        self._trained = self._recorded = False
        self.hold.load_state(state)
        self._folded = state.get("folded", 0) if state else 0
        if self.order is not None:
            self.order.load_state(state["order"] if state else None)
        if state:
            self.tokens.load_state(state)
        else:
            self._start_at_the_engines_step()
        self.monitor.load_state(state.get("stability") if state else None)
        self.report = self._span = None
        self.loads = (self.loads or 0) + 1

    def _start_at_the_engines_step(self) -> None:
        """Take the steps an engine has made without us for ones at full length, read and trained."""
        steps, batch = int(self.engine.global_steps), int(self.engine.train_batch_size()) * self.full
        self.tokens.start_at(read=steps * batch, trained=(steps - int(self.engine.skipped_steps)) * batch)
        if self.order is not None:
            self.order.windows_read = steps

    def _counted_in(self) -> dict[str, Any]:
        """What carried tokens are counted in."""
        batch, multiple = int(self.engine.train_batch_size()), self.scheduler.multiple_of
        return {"mode": self.config.mode, "train_batch_size": batch, "end_length": self.full, "multiple_of": multiple}


def _refuse_different(mine: Mapping[str, Any]) -> None:
    """Compare the section and the lengths it leads to, once: later nothing is communicated for it."""
    first, *others = gathered(mine)
    for rank, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != first[name]:
                what = f"ranks disagree: the {name} of rank {rank} is {value}, of rank 0 {first[name]}"
                raise ConfigError(f"sequence_length_warmup: {what}; give all one JSON, and a schedule without chance")
