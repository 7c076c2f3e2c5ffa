"""The methods on a DeepSpeed engine. The only file that knows the order of a training step:

forward    the batch is shortened (training mode only)               sequence_length_warmup
backward   refused while the average is swapped in                   weight_averaging
           its loss is noted (`backward`)
step       refused while the average is swapped in                   weight_averaging
           the framework's step; an optimizer step in it waits for the last snapshot's copy, on the device
           after that one:
             1. the step's tokens are booked                         sequence_length_warmup
             2. if the loss has stayed too high: a restart           weight_averaging
             3. if it was applied, finite and one is due: a snapshot weight_averaging
save       our files first, then DeepSpeed's, then ``latest``
load       our manifest is checked first, then DeepSpeed loads, then our state
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ds_plugin.config import PluginConfig
from ds_plugin.core.errors import ConfigError, StateError, raise_on_all_ranks, this_rank
from ds_plugin.core.files import write_text
from ds_plugin.core.patch import replaced
from ds_plugin.deepspeed_engine import checkpoint, compat, monitor, publish, readings
from ds_plugin.deepspeed_engine.backward import BackwardPasses
from ds_plugin.deepspeed_engine.completep import CompleteP
from ds_plugin.deepspeed_engine.masters import find_shards
from ds_plugin.deepspeed_engine.pipeline import PipelineLengths
from ds_plugin.deepspeed_engine.readings import EngineReadings
from ds_plugin.deepspeed_engine.warmup import SequenceLengthWarmup
from ds_plugin.sequence_length_warmup.batches import Source, WholeBatches
from ds_plugin.sequence_length_warmup.ledger import Ledger
from ds_plugin.sequence_length_warmup.slicing import Shorten
from ds_plugin.weight_averaging import restart
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.spike import SpikeWatch


class Plugin:
    """The methods on one engine. Made by `attach.initialize` or `attach`, found again by `get_plugin`. They are all
    built, and restored, before any is put on: what refuses, refuses before the engine is changed."""

    def __init__(
        self,
        engine: Any,
        config: PluginConfig,
        shorten: Shorten | None = None,
        *,
        resume_from: str | Path | None = None,
        tag: str | None = None,
    ):
        """``resume_from``, ``tag``: see `checkpoint.resume`. Whatever is raised, the engine is as it was."""
        self.engine, self.config = engine, config
        self.trained_length: int | None = None  # of the last step, in tokens; None without sequence length warmup
        self._own: dict[str, Callable[..., Any]] = {}  # the engine's methods that ours stand in for
        #: compares a checkpoint's files with what was saved before anything is loaded; ``sealer.verify = False``: not
        self.sealer = checkpoint.sealer(engine)
        self._loads = 0  # of checkpoints
        with contextlib.ExitStack() as undo:
            self._build(shorten, undo)
            if resume_from is not None:
                checkpoint.resume(self, Path(resume_from), tag)
            self._install(undo)
            self._undo = undo.pop_all()

    def _build(self, shorten: Shorten | None, undo: contextlib.ExitStack) -> None:
        engine, config, pipeline = self.engine, self.config, compat.is_pipeline(self.engine)
        warmup, averaging, completep = config.sequence_length_warmup, config.weight_averaging, config.completep
        self.warmup = SequenceLengthWarmup(engine, warmup, shorten) if warmup is not None else None
        self.averager: WeightAverager | None = None
        self.spikes: SpikeWatch | None = None
        if averaging is not None:
            compat.need(engine, compat.TAKE_STEP)
            shards = find_shards(engine)
            readings.refuse_unknown_norm(engine)
            if averaging.save_average:
                publish.refuse(engine)
            self.averager = WeightAverager(averaging, shards)
            undo.callback(self.averager.close)
            if averaging.restart is not None:
                self.spikes = SpikeWatch(EngineReadings(engine), averaging.restart, every_rank=not pipeline)
        self.completep = CompleteP(engine, completep) if completep is not None else None
        self._pipeline = PipelineLengths(engine, self.warmup) if pipeline and self.warmup is not None else None
        self._passes: BackwardPasses | None = None
        if not pipeline and (warmup is not None or averaging is not None):
            heard = self.warmup is not None or self.spikes is not None
            self._passes = BackwardPasses(engine, self._refuse_while_swapped, self._record if heard else None)

    def _install(self, undo: contextlib.ExitStack) -> None:
        """Everything that changes the engine, and nowhere else."""
        for part in (self.warmup, self._pipeline, self.completep, self._passes):
            if part is not None:
                part.install(undo)
        methods: dict[str, Callable[..., Any]] = {}
        if self.warmup is not None:
            methods |= dict.fromkeys(("set_train_batch_size", "set_train_micro_batch_size"), self._refuse_other_batch)
        if self._passes is not None:
            methods["step"] = self._step
        elif self.warmup is not None or self.averager is not None:
            methods["train_batch"] = self._train_batch
        if self.config != PluginConfig():  # CompleteP alone has no state, but its recipe must not change on a resume
            methods |= {"save_checkpoint": self._save_checkpoint, "load_checkpoint": self._load_checkpoint}
        for name, method in methods.items():
            self._own[name] = getattr(self.engine, name)
            undo.enter_context(replaced(self.engine, name, method))
        if self.averager is not None:  # masters change in there alone: nothing else waits for a snapshot
            undo.enter_context(compat.before_steps(self.engine, self.averager.before_step))

    def detach(self) -> None:
        """Leave the engine as DeepSpeed made it (param groups and the model excepted); the window is dropped."""
        self._refuse_while_swapped("detach()")
        try:
            self._undo.close()
        finally:
            self.warmup = self.averager = self.completep = self.spikes = self._pipeline = self._passes = None

    @property
    def length(self) -> int | None:
        """Length in tokens of the next optimizer step; None without sequence length warmup."""
        return self.warmup.length if self.warmup is not None else None

    @property
    def ledger(self) -> Ledger | None:
        """Tokens read and trained so far over all data-parallel ranks, exact after each report and save (see
        `TokenCounts.ledger`); None without sequence length warmup. No collective."""
        return self.warmup.ledger if self.warmup is not None else None

    def batches(self, source: Source) -> Iterator[Any]:
        """This rank's micro-batches, each of its step's length; without sequence length warmup, all of them whole. It
        goes on from the right one after a checkpoint was loaded. ``source(n)`` returns an iterator over full-length
        micro-batches from the n-th of the run on."""
        if self.warmup is not None and self.warmup.config.mode != "mask":
            return self.warmup.batches(source)
        return WholeBatches(self.engine, source, lambda: self._loads)

    def cut(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A micro-batch, by argument name, cut to the length of the step that it is for; without sequence length
        warmup, the batch itself.

        ``engine(...)`` cuts what it is given. A loop that reads or counts labels outside the model cuts first, every
        micro-batch of a step, and gives ``engine(...)`` what is returned. Raises as `SequenceLengthWarmup.cut` does.
        """
        return self.warmup.cut(batch) if self.warmup is not None else batch

    def begin_step(self, micro_batches: int) -> None:
        """Say how many micro-batches the accumulation step that begins has, in a loop that divides its losses by that
        itself (``engine.backward(loss, scale_wrt_gas=False)``): the step's loss is then their sum."""
        if self._passes is not None:
            self._passes.micro_batches = micro_batches

    @property
    def has_average(self) -> bool:
        """Whether there is a snapshot, so that `averaged_weights` can be entered."""
        return self.averager is not None and bool(self.averager.steps)

    def describe(self) -> list[str]:
        """One line for each enabled method, with the numbers a user wants to see before the first step."""
        return [method.describe() for method in (self.warmup, self.completep, self.averager) if method is not None]

    def log(self, **values: Any) -> None:
        """Write the last step's length, tokens and loss ratio through the engine's own monitor, and ``values``, as
        ``Run/<name>`` at ``engine.global_samples``; nothing without a monitor in the JSON. Call it after a step or an
        evaluation, on every rank: ``plugin.log(eval_loss_averaged=loss)``. No device sync of its own."""
        monitor.log(self, values)

    @contextlib.contextmanager
    def averaged_weights(self, horizon: int | None = None) -> Iterator[None]:
        """Inside the ``with`` block the model computes with the averaged weights; after it, all is bitwise as before.

        Every rank enters it, between optimizer steps, which are refused inside, as are backward passes and checkpoints.
        ``horizon``: which of the averages, in mode ema; the first of ``horizons`` if not given. Raises StateError:
        averaging is off, there is no snapshot or no such horizon, or an accumulation step is open."""
        with self._between_steps().averaged_weights(horizon):
            yield

    def restart_from_average(self, moments: Literal["keep", "reset"] = "keep", horizon: int | None = None) -> None:
        """Make the average the training weights, as after a loss spike. Every rank calls it, between optimizer steps.

        The old weights are lost, and the snapshots of them. Step count, learning rate schedule and data go on.
        ``moments``: the optimizer's are kept, or start again at zero with their step count; so do moments that are not
        finite on some rank, which the log says. ``horizon``: as in `averaged_weights`.

        Raises StateError, with nothing changed, as `averaged_weights` does, or the average is swapped in, or the
        optimizer has a state that cannot be reset; ConfigError: ``moments`` is neither."""
        averager = self._between_steps()
        if moments not in ("keep", "reset"):
            raise ConfigError(f"restart_from_average: moments={moments!r}; give 'keep' or 'reset'")
        states = restart.to_reset(readings.optimizers(self.engine), self.engine.device, keep=moments == "keep")
        averager.restart(horizon)
        restart.zero_(states)

    def publish(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        horizon: int | None = None,
        max_shard_bytes: int = 5 * 10**9,
        replace: bool = False,
        form: publish.Form | None = None,
    ) -> list[Path]:
        """Write the average into a new ``folder`` as safetensors, in Hugging Face's layout; returns its weight files.

        Every rank calls it, between optimizer steps, and must see the folder, which appears whole or not at all; only a
        kill leaves a hidden ``.<name>.*.tmp`` beside it. Every tensor is whole and under the model's own name, a tied
        one under its first; untrained parameters and persistent buffers as they are; a transformers model's
        configuration beside them. ``dtype``: of all floating-point tensors; if not given each one's own in the model,
        so bit for bit what `averaged_weights` computes with. ``horizon``: as there. ``max_shard_bytes``: of one file.

        ``replace``: what the folder holds goes when the new average is whole. ``form``: see `publish.Form`.

        Raises StateError: as `averaged_weights` does, or the model is laid out in a way that is not known. ConfigError:
        a wrong argument, ``folder`` holds something, or experts or DeepSpeed's AutoTP are in use. PluginError: the
        folder cannot be written, such as on a full disk."""
        given: dict[str, Any] = {"dtype": dtype, "horizon": horizon, "max_shard_bytes": max_shard_bytes}
        return publish.publish(self.engine, self._between_steps(), folder, replace=replace, form=form, **given)

    def save_averaged_checkpoint(
        self, save_dir: str | Path, tag: str | None = None, horizon: int | None = None, **client: Any
    ) -> None:
        """Save the average by DeepSpeed's own ``save_checkpoint``, in a form that its ``zero_to_fp32`` reads.

        Every rank calls it, between optimizer steps. ``latest`` is left as it is, and a resume from the tag is refused:
        its moments belong to other weights. ``tag``: ``averaged_global_step{N}`` if not given. ``horizon``: as in
        `averaged_weights`. ``client``: further arguments of ``save_checkpoint``.

        Raises StateError as `averaged_weights` does; ConfigError: the tag exists, or ``zero_to_fp32`` cannot read such
        checkpoints (stage 0, BF16_Optimizer, tensor or pipeline parallelism; `publish` takes them)."""
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
            raise StateError('weight_averaging is not enabled; write "weight_averaging": {"enabled": true, ...}')
        if self._passes is not None and self._passes.open:
            raise StateError(
                "weight_averaging: only between optimizer steps, not within an accumulation step; finish it"
            )
        return self.averager

    # -- the engine's methods, wrapped -------------------------------------------------------------------------------

    def _refuse_while_swapped(self, what: str) -> None:
        if self.averager is not None:
            self.averager.refuse_while_swapped(what)

    def _refuse_other_batch(self, size: int) -> None:
        what = f"the batch size cannot be changed (to {size}) during the run: that changes a step's tokens, too"
        raise StateError(f"sequence_length_warmup: {what}, as batch-size ramp-up does; use one of the two")

    @contextlib.contextmanager
    def _around_step(self, what: str) -> Iterator[None]:
        """Around a call that may end an accumulation step, after which the methods have their turn."""
        self._refuse_while_swapped(what)
        before = self.engine.global_steps
        yield
        if self.engine.global_steps != before:
            self._end_accumulation()
            self._close_step()

    def _train_batch(self, data_iter: Any = None) -> Any:
        with self._around_step("engine.train_batch()"):
            if self._pipeline is None:
                return self._own["train_batch"](data_iter)
            with self._pipeline.training(data_iter):
                return self._own["train_batch"]()

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        with self._around_step("engine.step()"):
            return self._own["step"](*args, **kwargs)

    def _end_accumulation(self) -> None:
        if self._passes is not None:
            self._passes.open = False

    def _record(self, loss: Any) -> None:
        for instruments in (self.warmup, self.spikes):
            if instruments is not None:
                instruments.record(loss)

    def _close_step(self) -> None:
        applied, step, length = self.engine.was_step_applied(), self.engine.global_steps, self.length or 0
        if compat.is_pipeline(self.engine):
            compat.need(self.engine, compat.PIPELINE_LOSSES)
            for micro_loss in getattr(self.engine, compat.PIPELINE_LOSSES):
                self._record(micro_loss)
        if self.warmup is not None:
            self.trained_length = length
            self.warmup.after_step(applied)
        if self.averager is None:
            return
        if self.spikes is not None:
            if self.spikes.close_step(length):
                moments = self.spikes.config.moments
                self.spikes.go_back(self.averager, lambda: self.restart_from_average(moments), step)
            if self.spikes.since is not None:
                return  # the loss is too high at present: no snapshot
        if applied and self.averager.due(step):
            known = readings.step_was_finite(self.engine, self.averager.masters())
            self.averager.snapshot(step, finite=known)

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
        given, root = call.arguments, Path(call.arguments["save_dir"])
        given["tag"] = tag = str(given["tag"] if given["tag"] is not None else f"global_step{self.engine.global_steps}")
        save_id = checkpoint.save(self, root / tag)
        if latest := given["save_latest"] and not self.engine.checkpoint_engine.is_decoupled():
            given["save_latest"] = False  # DeepSpeed would write it in place; a crash there would leave it empty
        result = self._own["save_checkpoint"](*call.args, **call.kwargs)
        if latest:
            with raise_on_all_ranks():
                if this_rank() == 0:
                    write_text(root / "latest", tag)
        if averager is not None:
            publish.publish_with_checkpoint(self.engine, averager, root / tag)
        checkpoint.seal(self, root / tag, save_id)
        return result

    def _load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        call = self._bound("load_checkpoint", args, kwargs)
        given, root = call.arguments, Path(call.arguments["load_dir"])
        tag = given["tag"] if given["tag"] is not None else checkpoint.latest_tag(self.engine, root)
        if tag is None:  # nothing to load; DeepSpeed says so in its own way
            return self._own["load_checkpoint"](*call.args, **call.kwargs)
        given["tag"], folder = str(tag), root / str(tag)
        run, optimizer_too = not given["load_module_only"], given["load_optimizer_states"]
        same_model = given["custom_load_fn"] is None and given["load_module_strict"]
        manifest = checkpoint.check(self, folder, same_model=same_model, same_run=run, same_optimizer=optimizer_too)
        if manifest is not None:
            self.sealer.check(folder)
        completep = self.completep if self.engine.load_universal_checkpoint() else None
        groups = completep.state() if completep is not None else []
        result = self._own["load_checkpoint"](*call.args, **call.kwargs)
        if result[0] is None:
            return result
        self._loads += 1
        self._end_accumulation()
        if completep is not None:
            assert manifest is not None  # check() insists on one
            completep.load_state(manifest["state"]["completep"] if run and optimizer_too else groups)
        # of weights alone, DeepSpeed starts at step 0: another run
        checkpoint.load(self, folder, manifest if run else None)
        return result
