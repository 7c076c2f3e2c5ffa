"""Sequence length warmup in DeepSpeed's pipeline engine, whose stages send each other tensors of a remembered shape."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from ds_plugin.core.errors import StateError, raise_on_all_ranks
from ds_plugin.core.patch import replaced
from ds_plugin.deepspeed_engine import compat, preflight
from ds_plugin.deepspeed_engine.warmup import SequenceLengthWarmup
from ds_plugin.sequence_length_warmup.batches import Batches


class PipelineLengths:
    """Cuts micro-batches in the engine's batch function, and has the engine forget shapes when they change: on every
    rank, as each knows the length of every step."""

    def __init__(self, engine: Any, warmup: SequenceLengthWarmup):
        compat.need(engine, *compat.PIPELINE_BATCHES, "reset_activation_shape", "set_batch_fn", "set_dataiterator")
        if warmup.config.preflight:
            compat.need(engine, compat.PIPELINE_RUN, compat.PIPELINE_INSTRUCTIONS, compat.PIPELINE_BUFFERS)
            compat.need(engine, "num_stages", "stage_id", "micro_batches")
            compat.need(engine.module, compat.PIPELINE_MICRO_OFFSET)
        self.engine, self.warmup = engine, warmup
        self._users: Callable[[Any], Any] | None = None  # the batch function that ours stands in for
        self._length: int | None = None  # of the activations the engine remembers
        self._rehearsed = not warmup.config.preflight
        self._kept: list[Any] = []  # a micro-batch that was read ahead, from the user's batch function

    def install(self, undo: contextlib.ExitStack) -> None:
        """Take the place of the engine's batch function; ``undo`` gives it back, or what `set_batch_fn` made of it."""
        self._users = self.engine.batch_fn
        self.engine.batch_fn = self._batch
        undo.callback(lambda: setattr(self.engine, "batch_fn", self._users))
        evaluate = functools.partial(self._evaluate, self.engine.eval_batch)
        undo.enter_context(replaced(self.engine, "eval_batch", evaluate))
        # a user's function sees every micro-batch first, at full length; once for each step that trains a part of it,
        # so that in the carry mode it must not change its argument
        undo.enter_context(replaced(self.engine, "set_batch_fn", functools.partial(setattr, self, "_users")))

    @contextlib.contextmanager
    def training(self, data_iter: Any) -> Iterator[None]:
        """Around one step on micro-batches of ``data_iter`` (None: the engine's own); before the first short one, the
        preflight. Raises StateError: the carry mode needs `Batches`; ConfigError: one has not the full length."""
        source = data_iter if data_iter is not None else self.engine.data_iterator  # None where no data is loaded
        # there, a stage may still be given its batches by the user's function, from another rank
        needed = source is not None or (self._loads() and self._users is None)
        if self.warmup.carries and needed and not isinstance(source, Batches):
            remedy = "give train_batch(...) ds_plugin.get_plugin(engine).batches(from_micro_batch)"
            raise StateError(f'sequence_length_warmup: mode "carry" has to read the batches itself; {remedy}')
        if data_iter is not None:
            self.engine.set_dataiterator(data_iter)
        source = self.engine.data_iterator
        try:
            if isinstance(source, Batches):  # cut here, after the user's batch function
                self.engine.data_iterator = source.whole()
            if not self._rehearsed and self.warmup.length < self.warmup.full:
                self._rehearsed = True
                self._preflight()
            self._expect(self.warmup.length)
            yield
        finally:
            self.engine.data_iterator = source
            self._kept.clear()

    def _evaluate(self, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._expect(self.warmup.full)
        return evaluate(*args, **kwargs)

    def _loads(self) -> bool:
        return bool(self.engine.is_first_stage() or self.engine.is_last_stage())

    def _expect(self, length: int) -> None:
        if length != self._length:
            self.engine.reset_activation_shape()
            self._length = length

    def _batch(self, batch: Any) -> Any:
        training = self.engine.module.training
        if training and self._kept:
            batch = self._kept.pop()
        elif self._users is not None:
            batch = self._users(batch)
        return batch if batch is None or not training else self._cut(batch)

    def _cut(self, batch: Any) -> Any:
        """To exactly the step's length: stages that load nothing expect it of every micro-batch."""
        return self.warmup.cut_samples(batch, exact=True)[0]

    def _preflight(self) -> None:
        """Once, before the first short step: will the longest fit? The micro-batch it reads is put back."""
        engine, reader, whole = self.engine, self.engine.data_iterator, None
        with raise_on_all_ranks():  # what cannot be cut in a run shows in its first batch; every rank says so
            if self._loads():
                whole = next(reader) if reader is not None else None
                if self._users is not None:
                    whole = self._users(whole)
                self._cut(whole)
                self._kept.append(whole)
        engine.batch_fn = None  # the user's function has seen the micro-batch, and nothing is to be cut
        try:
            with preflight.passes_of_a_step(engine, self.warmup.full):
                run_passes(engine, whole)
        finally:
            engine.batch_fn = self._batch
            if reader is not None:
                engine.data_iterator = itertools.chain([None], reader)  # the None gives way to what was kept
        self._length = None


def run_passes(engine: Any, micro_batch: Any) -> None:
    """One step's forward and backward passes and its reductions, all on one micro-batch (None on stages that load no
    data). Every rank calls it, between two steps; what the engine keeps of a step is put back. With one micro-batch
    more than there are stages, as many are in flight as in any step while gradients have accumulated already."""
    from deepspeed.runtime.pipe import schedule

    kept, offset = dict(vars(engine)), getattr(engine.module, compat.PIPELINE_MICRO_OFFSET)
    engine.reset_activation_shape()
    engine.module.train()
    engine.data_iterator = itertools.repeat(micro_batch) if micro_batch is not None else None
    engine.total_loss = engine.total_additional_losses = None
    setattr(engine, compat.PIPELINE_COMPUTE_LOSS, True)
    instructions = {**getattr(engine, compat.PIPELINE_INSTRUCTIONS), schedule.OptimizerStep: lambda *_, **__: None}
    setattr(engine, compat.PIPELINE_INSTRUCTIONS, instructions)
    count = min(engine.micro_batches, engine.num_stages + 1)
    steps = schedule.TrainSchedule(micro_batches=count, stages=engine.num_stages, stage_id=engine.stage_id)
    try:
        getattr(engine, compat.PIPELINE_RUN)(steps)
    finally:
        vars(engine).clear()
        vars(engine).update(kept)
        for slots in getattr(engine, compat.PIPELINE_BUFFERS).values():  # they hold on to activations of full length
            slots[:] = [None] * engine.num_pipe_buffers
        setattr(engine.module, compat.PIPELINE_MICRO_OFFSET, offset)
        engine.reset_activation_shape()
