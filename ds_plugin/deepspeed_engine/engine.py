"""The methods on a DeepSpeed engine. The only file that knows the order of a training step:

forward    the batch is shortened (training mode only)               sequence_length_warmup
backward   refused while the average is swapped in                   weight_averaging
           its loss is noted (`backward`)
step       refused while the average is swapped in                   weight_averaging
           the framework's step, which takes an optimizer step at the end of an accumulation step:
             that one waits for the last snapshot's copy, on the device (`compat.TAKE_STEP`)
           after it:
             1. the step's tokens are booked                         sequence_length_warmup
             2. if the loss has stayed too high: a restart           weight_averaging
             3. if it was applied, finite and one is due: a snapshot weight_averaging
save       our files first, then DeepSpeed's, then ``latest``
load       our manifest is checked first, then DeepSpeed loads, then our state
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError, StateError, raise_on_all_ranks
from ds_plugin.core.files import write_text
from ds_plugin.core.replaced import replaced
from ds_plugin.core.seals import Sealer
from ds_plugin.deepspeed_engine import checkpoint, compat, publish, readings
from ds_plugin.deepspeed_engine.backward import BackwardPasses
from ds_plugin.deepspeed_engine.completep import CompleteP
from ds_plugin.deepspeed_engine.masters import find_shards
from ds_plugin.deepspeed_engine.pipeline import PipelineLengths
from ds_plugin.deepspeed_engine.ranks import warn
from ds_plugin.deepspeed_engine.readings import EngineReadings
from ds_plugin.deepspeed_engine.warmup import SequenceLengthWarmup
from ds_plugin.sequence_length_warmup.batches import Source, WholeBatches
from ds_plugin.sequence_length_warmup.ledger import Ledger
from ds_plugin.sequence_length_warmup.slicing import Shorten
from ds_plugin.sequence_length_warmup.token_lr import TokenScheduler
from ds_plugin.weight_averaging import restart
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.spike import SpikeWatch


class Plugin:
    """The methods on one engine. Made by `attach.initialize` or `attach`, found again by `get_plugin`.

    The constructor builds them and `install` puts them on: what refuses, refuses before the engine is changed.
    """

    def __init__(self, engine: Any, config: PluginConfig, shorten: Shorten | None = None):
        self.engine, self.config = engine, config
        self._own: dict[str, Callable[..., Any]] = {}  # the engine's methods that ours stand in for
        self._undo = contextlib.ExitStack()
        self._pipeline: PipelineLengths | None = None
        self._scheduler: TokenScheduler | None = None
        self._passes: BackwardPasses | None = None
        self.sealer = Sealer()
        #: whether a checkpoint's files are compared with what was saved, before anything is loaded
        self.verify = True
        with self._undone_on_error():
            section = config.sequence_length_warmup
            self.warmup = SequenceLengthWarmup(engine, section, shorten) if section is not None else None
            self.averager, self.spikes = self._build_averaging()
            self.completep = CompleteP(engine, config.completep) if config.completep is not None else None
            if self.warmup is not None and self.warmup.config.learning_rate.by == "tokens":
                self._scheduler = TokenScheduler(engine.lr_scheduler, self.warmup.batches_trained)
            if compat.is_pipeline(engine):
                self._pipeline = PipelineLengths(engine, self.warmup) if self.warmup is not None else None
            elif self.warmup is not None or self.averager is not None:
                heard = self.warmup is not None or self.spikes is not None
                self._passes = BackwardPasses(engine, self._refuse_while_swapped, self._record if heard else None)

    def _build_averaging(self) -> tuple[WeightAverager | None, SpikeWatch | None]:
        engine, config = self.engine, self.config.weight_averaging
        if config is None:
            return None, None
        compat.need(engine, compat.TAKE_STEP)
        shards = find_shards(engine)
        readings.refuse_unknown_norm(engine)
        if config.save_average:
            publish.refuse(engine)
        averager = WeightAverager(config, shards)
        self._undo.callback(averager.close)
        if config.restart is None:
            return averager, None
        return averager, SpikeWatch(EngineReadings(engine), config.restart, every_rank=not compat.is_pipeline(engine))

    def resume(self, folder: str | Path, tag: str | None) -> None:
        """Restore the methods beside an engine that was loaded already, before `install`. See `checkpoint.resume`."""
        with self._undone_on_error():
            checkpoint.resume(self, Path(folder), tag)

    def install(self) -> None:
        """Everything that changes the engine, and nowhere else. Undone by `detach`, and here on any error."""
        with self._undone_on_error():
            for part in (self.warmup, self._pipeline, self.completep, self._passes):
                if part is not None:
                    part.install(self._undo)
            for name, method in self._methods().items():
                self._own[name] = getattr(self.engine, name)
                self._undo.enter_context(replaced(self.engine, name, method))
            if self.averager is not None:
                take_step = functools.partial(self._take_step, getattr(self.engine, compat.TAKE_STEP))
                self._undo.enter_context(replaced(self.engine, compat.TAKE_STEP, take_step))
            if self._scheduler is not None:
                self.engine.lr_scheduler = self._scheduler
                self._undo.callback(self._give_scheduler_back, self._scheduler)

    def _methods(self) -> dict[str, Callable[..., Any]]:
        """What stands in for which methods of the engine."""
        methods: dict[str, Callable[..., Any]] = {}
        if self.warmup is not None:
            methods |= dict.fromkeys(("set_train_batch_size", "set_train_micro_batch_size"), self._refuse_other_batch)
        if self._passes is not None:
            methods["step"] = self._step
        elif self.warmup is not None or self.averager is not None:
            methods["train_batch"] = self._train_batch
        if self.config != PluginConfig():  # CompleteP alone has no state, but its recipe must not change on a resume
            methods |= {"save_checkpoint": self._save_checkpoint, "load_checkpoint": self._load_checkpoint}
        return methods

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put the engine back as it was, and let go of memory, files and threads."""
        try:
            self._undo.close()
        finally:
            self.warmup = self.averager = self.completep = self.spikes = None
            self._pipeline = self._scheduler = self._passes = None

    def _give_scheduler_back(self, scheduler: TokenScheduler) -> None:
        if self.engine.lr_scheduler is scheduler:  # a user's own, set since, is left alone
            self.engine.lr_scheduler = scheduler.scheduler

    @property
    def length(self) -> int | None:
        """Length in tokens of the next optimizer step; None without sequence length warmup."""
        return self.warmup.length if self.warmup is not None else None

    @property
    def ledger(self) -> Ledger | None:
        """Tokens read and trained so far over all data-parallel ranks; None without sequence length warmup.

        Where ranks read different numbers of tokens it is exact after each report (every ``report_interval`` steps) and
        save; see `TokenCounts.ledger`. No collective.
        """
        return self.warmup.ledger if self.warmup is not None else None

    def batches(self, source: Source) -> Iterator[Any]:
        """This rank's micro-batches, each of its step's length; without sequence length warmup, all of them whole.

        ``source(n)`` returns an iterator over full-length micro-batches from the n-th of the run on. The carry mode
        needs them to be read here, other modes can; after a checkpoint was loaded it goes on from the right one.
        """
        if self.warmup is not None and self.warmup.config.mode != "mask":
            return self.warmup.batches(source)
        return WholeBatches(self.engine, source)

    @property
    def has_average(self) -> bool:
        """Whether there is a snapshot, so that `averaged_weights` can be entered."""
        return self.averager is not None and bool(self.averager.steps)

    def describe(self) -> list[str]:
        """One line for each enabled method, with the numbers a user wants to see before the first step."""
        methods = (self.warmup, self.completep, self.averager)
        return [method.describe() for method in methods if method is not None]

    @contextlib.contextmanager
    def averaged_weights(self, horizon: int | None = None) -> Iterator[None]:
        """Inside the ``with`` block the model computes with the averaged weights; after it, all is bitwise as before.

        Every rank enters it, between optimizer steps. Backward passes, steps and checkpoints are refused inside.
        ``horizon``: which of the averages, in mode ema; the first of ``horizons`` if not given.

        Raises:
            StateError: averaging is off, there is no snapshot or no such horizon, or an accumulation step is open.
        """
        with self._between_steps().averaged_weights(horizon):
            yield

    def restart_from_average(self, moments: Literal["keep", "reset"] = "keep", horizon: int | None = None) -> None:
        """Make the average the training weights, as after a loss spike. Every rank calls it, between optimizer steps.

        Nothing brings the old weights back. The snapshots are forgotten: they are of the path that was left. The step
        count, learning rate schedule and data go on. ``moments``: Adam's (or another momentum's) are kept, or start
        again at zero with the step count, as in a new optimizer; so do moments that were to be kept and are not finite
        on some rank, which the log says. ``horizon``: as in `averaged_weights`.

        Raises:
            StateError: as `averaged_weights` does, or the average is swapped in, or the optimizer has a state that
                cannot be reset. Nothing has changed then.
            ConfigError: ``moments`` is neither.
        """
        averager = self._between_steps()
        if moments not in ("keep", "reset"):
            raise ConfigError(f"restart_from_average: moments={moments!r}; give 'keep' or 'reset'")
        states = restart.to_reset(readings.optimizers(self.engine), self.engine.device, keep=moments == "keep")
        averager.restart(horizon)
        restart.zero_(states)
        if states and moments == "keep":
            step = self.engine.global_steps
            warn("weight averaging: step %d, the optimizer's moments were not finite: they start again at zero", step)

    def publish(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        horizon: int | None = None,
        max_shard_bytes: int = 5 * 10**9,
    ) -> list[Path]:
        """Write the average into a new ``folder`` as safetensors, in Hugging Face's layout; returns its weight files.

        Every rank calls it, between optimizer steps, and writes its share of every file: all must see the folder. It
        appears whole, or not at all; only a kill leaves a hidden ``.<name>.*.tmp`` beside it. Names are the model's
        own; what tensor parallelism and pipeline stages divide is whole. What the optimizer does not train, and
        persistent buffers, are written as they are; a tied parameter once, under its first name. A model of
        transformers' has its configuration beside it.

        ``dtype``: of all floating-point tensors; each one's own in the model if not given, which is then what
        `averaged_weights` computes with, bit for bit. ``horizon``: as there. ``max_shard_bytes``: of one file.

        Raises:
            StateError: as `averaged_weights` does, or the model is laid out in a way that is not known.
            ConfigError: a wrong argument, ``folder`` holds something, or experts or DeepSpeed's AutoTP are in use.
            PluginError: the folder cannot be written, such as on a full disk.
        """
        return publish.publish(
            self.engine, self._between_steps(), folder, dtype=dtype, horizon=horizon, max_shard_bytes=max_shard_bytes
        )

    def save_averaged_checkpoint(
        self, save_dir: str | Path, tag: str | None = None, horizon: int | None = None, **client: Any
    ) -> None:
        """Save the average by DeepSpeed's own ``save_checkpoint``, in a form that its ``zero_to_fp32`` reads.

        ``tag``: ``averaged_global_step{N}`` if not given. ``latest`` is left as it is, and a resume from the tag is
        refused: the step count and moments in it belong to other weights. ``client``: further arguments of
        ``save_checkpoint``. Every rank calls it, between optimizer steps; ``horizon``: as in `averaged_weights`.

        Raises:
            StateError: as `averaged_weights` does.
            ConfigError: the tag exists, or ``zero_to_fp32`` cannot read such checkpoints (stage 0, BF16_Optimizer,
                tensor or pipeline parallelism; `publish` takes them).
        """
        averager = self._between_steps()
        with raise_on_all_ranks():
            publish.refuse_checkpoint(self.engine)
            if "save_latest" in client:
                raise ConfigError("save_averaged_checkpoint: save_latest would name a resume point; leave it out")
        tag = str(tag) if tag is not None else f"averaged_global_step{self.engine.global_steps}"
        with averager.averaged_weights(horizon):
            publish.mark_checkpoint(self.engine, averager, Path(save_dir) / tag, horizon)
            self._own["save_checkpoint"](str(save_dir), tag=tag, save_latest=False, **client)

    def _between_steps(self) -> WeightAverager:
        """The averager, if the weights may be exchanged now."""
        if self.averager is None:
            raise StateError(
                'weight_averaging is not enabled; add "weight_averaging": {"enabled": true, "interval": 10} to the JSON'
            )
        if self._passes is not None and self._passes.open:
            what = "the averaged weights can be swapped in between optimizer steps, not within an accumulation step"
            raise StateError(f"weight_averaging: {what}; finish it first")
        return self.averager

    def detach(self) -> None:
        """Leave the engine as DeepSpeed made it (param groups and the model excepted); the window is dropped."""
        self._refuse_while_swapped("detach()")
        self.close()

    # -- the engine's methods, wrapped -------------------------------------------------------------------------------

    def _refuse_while_swapped(self, what: str) -> None:
        if self.averager is not None:
            self.averager.refuse_while_swapped(what)

    def _refuse_other_batch(self, size: int) -> None:
        raise StateError(
            f"sequence_length_warmup: the batch size cannot be changed (to {size}) during the run: batch-size ramp-up "
            "changes how many tokens a step has, too; use one of the two"
        )

    def _train_batch(self, data_iter: Any = None) -> Any:
        self._refuse_while_swapped("engine.train_batch()")
        before = self.engine.global_steps
        if self._pipeline is None:
            loss = self._own["train_batch"](data_iter)
        else:
            with self._pipeline.training(data_iter):
                loss = self._own["train_batch"]()
        if self.engine.global_steps != before:
            for micro_loss in compat.pipeline_losses(self.engine):
                self._record(micro_loss)
            self._close_step()
        return loss

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_while_swapped("engine.step()")
        before = self.engine.global_steps
        result = self._own["step"](*args, **kwargs)
        if self.engine.global_steps != before:  # the accumulation step is over
            self._forget_open_step()
            self._close_step()
        return result

    def _take_step(self, take_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Masters change in here alone: neither a micro-batch before the last nor a pipeline's passes wait for a
        snapshot."""
        assert self.averager is not None
        self.averager.before_step()
        return take_step(*args, **kwargs)

    def _forget_open_step(self) -> None:
        if self._passes is not None:
            self._passes.open = False

    def _record(self, loss: Any) -> None:
        for instruments in (self.warmup, self.spikes):
            if instruments is not None:
                instruments.record(loss)

    def _close_step(self) -> None:
        applied, step, length = self.engine.was_step_applied(), self.engine.global_steps, self.length or 0
        if self.warmup is not None:
            self.warmup.after_step(applied)
        if self.averager is None:
            return
        if self.spikes is not None:
            if self.spikes.close_step(length):
                self._restart_after_spike(self.spikes, self.averager, step)
            if self.spikes.since is not None:
                return  # the loss is too high at present: no snapshot
        if applied and self.averager.due(step):
            known = readings.step_was_finite(self.engine, self.averager.masters())
            self.averager.snapshot(step, finite=known)

    def _restart_after_spike(self, spikes: SpikeWatch, averager: WeightAverager, step: int) -> None:
        assert spikes.since is not None
        averager.forget_from(spikes.since)
        steps = list(averager.steps)
        said = "there is no snapshot from before to go back to"
        if steps:
            self.restart_from_average(spikes.config.moments)
            spikes.restarted(step)
            said = f"training goes back to the average of steps {steps[0]} to {steps[-1]}"
        if steps or spikes.told != spikes.since:
            text = "weight averaging: step %d, the loss is above %g times its lowest without a break: %s"
            warn(text, step, spikes.config.loss_ratio, said)
        spikes.told = spikes.since

    def _bound(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """A call of the engine's own method, all of its arguments by name."""
        self._refuse_while_swapped(f"{name}()")
        call = inspect.signature(self._own[name]).bind(*args, **kwargs)
        call.apply_defaults()
        return call

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        call = self._bound("save_checkpoint", args, kwargs)
        averager = self.averager if self.averager is not None and self.averager.config.save_average else None
        if averager is not None and averager.steps:
            self._between_steps()
        tag, root = call.arguments["tag"], Path(call.arguments["save_dir"])
        call.arguments["tag"] = tag = str(tag) if tag is not None else f"global_step{self.engine.global_steps}"
        save_id = checkpoint.save(self, root / tag)
        latest = call.arguments["save_latest"] and not self.engine.checkpoint_engine.is_decoupled()
        if latest:  # DeepSpeed would write it in place; a crash there would leave it empty
            call.arguments["save_latest"] = False
        result = self._own["save_checkpoint"](*call.args, **call.kwargs)
        if latest:
            with raise_on_all_ranks():
                if dist.get_rank() == 0:
                    write_text(root / "latest", tag)
        if averager is not None:
            publish.publish_with_checkpoint(self.engine, averager, root / tag)
        checkpoint.seal(self, root / tag, save_id)
        return result

    def _load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        call = self._bound("load_checkpoint", args, kwargs)
        given, root = call.arguments, Path(call.arguments["load_dir"])
        universal = bool(self.engine.load_universal_checkpoint())
        tag = given["tag"] if given["tag"] is not None else checkpoint.latest_tag(root, universal=universal)
        if tag is None:  # nothing to load; DeepSpeed says so in its own way
            return self._own["load_checkpoint"](*call.args, **call.kwargs)
        given["tag"] = tag = str(tag)
        weights_only, optimizer_too = given["load_module_only"], given["load_optimizer_states"]
        manifest = checkpoint.check(
            self,
            root / tag,
            same_model=given["custom_load_fn"] is None and given["load_module_strict"],
            same_run=not weights_only,
            same_optimizer=optimizer_too,
            universal=universal,
        )
        if manifest is not None:
            checkpoint.verify(self, root / tag)
        groups = self.completep.state() if universal and self.completep is not None else []
        result = self._own["load_checkpoint"](*call.args, **call.kwargs)
        if result[0] is None:
            return result
        self._forget_open_step()
        if universal and self.completep is not None:
            assert manifest is not None  # check() insists on one
            self.completep.load_state(manifest["state"]["completep"] if optimizer_too and not weights_only else groups)
        if not weights_only:
            checkpoint.load(self, root / tag, manifest)
            return result
        if self.warmup is not None:  # DeepSpeed starts at step 0: another run
            self.warmup.load_state(None)
        if self.averager is not None:
            self.averager.reset()
        if self.spikes is not None:
            self.spikes.load_state(None)
        return result
