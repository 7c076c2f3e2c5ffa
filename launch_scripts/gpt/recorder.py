"""Keeps the record of a run: metrics, checkpoints, the report. One object, so that the training loop stays readable.

The training loss is read from the device once every ``log_interval`` steps (one reduction, one sync), not every step.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

import ds_plugin
from ds_plugin.cli import env
from ds_plugin.core import rng
from ds_plugin.core.errors import CheckpointError, PluginError, StateError, raise_on_all_ranks
from ds_plugin.core.files import write_text
from ds_plugin.sequence_length_warmup.plan import plan
from launch_scripts.gpt import monitors, report
from launch_scripts.gpt.corpus import Corpus
from launch_scripts.gpt.export import export_average
from launch_scripts.gpt.flops import Flops
from launch_scripts.gpt.folder import RunFolder, read_metrics
from launch_scripts.gpt.progress import Progress
from launch_scripts.gpt.saved import FORMAT, latest_tag, read_saved, tags
from launch_scripts.gpt.settings import Settings

_MONITORED = (
    "length",
    "length_held",
    "lr",
    "train_loss",
    "eval_loss",
    "eval_loss_averaged",
    "tokens_trained",
    "tokens_read",
    "tokens_carried",
    "tokens_per_second",
    "flops",
    "loss_ratio",
    "adam_variance_l1",
    "adam_variance_max",
)
_MONITORS = ("tensorboard", "wandb", "comet", "csv_monitor")


class Standstill:
    """Ends a run that gets nowhere: ``most`` steps in a row without an update."""

    def __init__(self, most: int):
        self.most, self._in_a_row = most, 0

    def book(self, step: int, *, skipped: bool) -> None:
        """The step is over. Raises StateError: as many in a row have been skipped."""
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row >= self.most:
            raise StateError(
                f"step {step}: {self.most} steps in a row were skipped, since gradients were not finite; go on from an "
                "earlier checkpoint with a lower learning rate or in bf16, or raise training.skipped_in_a_row"
            )


def shortfalls(plugin: Any, *, steps: int, batch: int) -> list[str]:
    """What a run of ``steps`` steps, of ``batch`` samples each, is too short for."""
    warmup, averager, lines = plugin.warmup, plugin.averager, []
    if warmup is not None:
        planned = plan(warmup.scheduler, batch, steps=steps)
        last = steps if warmup.config.duration.unit == "steps" else planned.trained
        if last < warmup.config.duration.total:
            lines.append(
                f"note: {steps} steps end the run within the sequence length warmup of "
                f"{warmup.config.duration.total:,} {warmup.config.duration.unit}; it reaches "
                f"{warmup.scheduler.length_at(last)} of {warmup.config.end_length} tokens"
            )
    if averager is not None and averager.first_step() > steps:
        lines.append(
            f"note: {steps} steps end the run before the first snapshot, at step {averager.first_step()}: nothing "
            "will be averaged"
        )
    return lines


class Recorder:
    """One run's record. Every rank makes one and calls it alike; rank 0 writes what is common to all."""

    def __init__(self, engine: Any, run: Settings, folder: RunFolder, text: Corpus, progress: Progress):
        self.engine, self.run, self.folder, self.text, self.progress = engine, run, folder, text, progress
        self.plugin = ds_plugin.get_plugin(engine)
        self.first = dist.get_rank() == 0
        too_short = shortfalls(self.plugin, steps=run.training.steps, batch=engine.train_batch_size())
        for line in [*self.plugin.describe(), *too_short]:
            progress.message(line)
        monitors.log_settings(engine, self._settings())
        self.started = self._window_started = time.monotonic()
        self._earlier_seconds = 0.0  # of the run before a resume
        self._window_tokens = 0
        self._losses: list[torch.Tensor] = []  # micro-batch losses of the step that runs
        self._unread: list[tuple[dict[str, Any], torch.Tensor]] = []  # rows whose loss is still on the device
        self._rows: list[dict[str, Any]] = []  # rows with their loss, not written yet; the last may be the step's own
        self._unwritten: list[dict[str, Any]] = []  # rows for metrics.csv; more than none where the disk is full
        self._said = False  # that they wait
        self._row: dict[str, Any] = {}
        self._skipped = 0  # steps before this one, as the engine counts them
        self._standstill = Standstill(run.training.skipped_in_a_row)
        self._flops, self._per_token = 0.0, Flops(engine.module, run.model)
        self._trained_before = 0

    @property
    def finished(self) -> bool:
        """Whether the run has all its steps or all its tokens."""
        tokens, limit = self.run.training.tokens, self.run.step_limit
        enough = tokens is not None and self._tokens()[0] >= tokens
        return enough or (limit is not None and self.engine.global_steps >= limit)

    # -- one step ----------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Note what this step is trained with."""
        if not self._unread:
            self._window_started, self._window_tokens = time.monotonic(), self._tokens()[0]
        self._losses = []
        self._trained_before, self._skipped = self._tokens()[0], self.engine.skipped_steps
        self._row = {
            "length": self.plugin.length or self.run.model.seq_length,
            "lr": self.engine.get_lr()[0],
        }
        if (warmup := self.plugin.warmup) is not None and warmup.config.pacing == "adaptive":
            self._row["length_held"] = int(warmup.hold.holding)

    def loss(self, loss: torch.Tensor) -> None:
        """One micro-batch's loss, or the mean over a step's, left on the device."""
        self._losses.append(loss.detach())

    def after_step(self) -> None:
        """Close the step's row, before it is evaluated; read the losses that wait when it is time.

        Raises:
            StateError: on every rank, so many steps in a row had no update that the run gets nowhere.
        """
        self._standstill.book(self.engine.global_steps, skipped=self.engine.skipped_steps > self._skipped)
        trained, read = self._tokens()
        step, cfg = self.engine.global_steps, self.run.training
        length = self._row["length"] if not self._full_length() else self.run.model.seq_length
        self._flops += (trained - self._trained_before) * self._per_token.per_token(length)
        self._row |= {"step": step, "tokens_trained": trained, "tokens_read": read, "flops": self._flops}
        if self.plugin.ledger is not None:
            self._row["tokens_carried"] = self.plugin.ledger.carried
        warmup = self.plugin.warmup
        if warmup is not None and warmup.report is not None and warmup.report.step == step:
            self._row["loss_ratio"] = warmup.report.loss_ratio
            self._row["adam_variance_l1"] = warmup.report.variance_l1
            self._row["adam_variance_max"] = warmup.report.variance_max
        self._unread.append((self._row, torch.stack(self._losses).mean().float()))
        if self.finished or any(step % n == 0 for n in (cfg.log_interval, cfg.eval_interval, cfg.save_interval)):
            self._read()

    def evaluation(self, loss: float) -> None:
        """The loss of the weights as trained, after this step."""
        self._row["eval_loss"] = loss

    def averaged_evaluation(self, loss: float) -> None:
        """The loss of the averaged weights, measured while they were swapped in."""
        self._row["eval_loss_averaged"] = loss

    def write(self) -> None:
        """Write the rows whose loss has been read. Where that fails they wait for the next time, and `save`."""
        if not self._rows:
            return
        for row in self._rows if self.first else []:
            self.progress.step(row)
        # monitors are given the step that has just ended: see `monitor`
        self.plugin.log(**{name: self._rows[-1].get(name) for name in _MONITORED})
        self._unwritten, self._rows = [*self._unwritten, *self._rows] if self.first else [], []
        try:
            self._append()
        except OSError as error:
            if not self._said:
                self.progress.message(f"{self.folder.metrics} cannot be written ({error}): its rows wait in memory")
            self._said = True

    def _append(self) -> None:
        while self._unwritten:
            self.folder.append(self._unwritten[0])
            del self._unwritten[0]
        self._said = False

    def _read(self) -> None:
        losses = torch.stack([loss for _, loss in self._unread])
        dist.all_reduce(losses)  # tensor-parallel ranks hold equal values: the mean over ranks is the mean over data
        values = (losses / dist.get_world_size()).tolist()
        rate = (self._tokens()[0] - self._window_tokens) / (time.monotonic() - self._window_started)
        for (row, _), value in zip(self._unread, values, strict=True):
            self._rows.append(row | {"train_loss": value, "tokens_per_second": rate})
        self._row = self._rows[-1]
        self._unread = []
        if not all(math.isfinite(value) for value in values):
            self.progress.message(f"step {self.engine.global_steps}: the training loss is not finite")

    def _settings(self) -> dict[str, Any]:
        """All of the JSON but for the monitors' own sections, one of which may hold a key to a service."""
        own = {"model": self.run.model.model_dump(mode="json"), "training": self.run.training.model_dump(mode="json")}
        return own | {name: value for name, value in self.run.deepspeed.items() if name not in _MONITORS}

    def _full_length(self) -> bool:
        """Whether samples are trained whole: no warmup, or one that only confines attention."""
        return self.plugin.warmup is None or self.plugin.warmup.config.mode == "mask"

    def _tokens(self) -> tuple[int, int]:
        """Tokens trained and read so far, all data-parallel ranks together."""
        if self.plugin.ledger is not None:
            return self.plugin.ledger.trained, self.plugin.ledger.read
        samples = self.engine.train_batch_size()
        read = self.engine.global_steps * samples * self.run.model.seq_length
        return read - self.engine.skipped_steps * samples * self.run.model.seq_length, read

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A DeepSpeed checkpoint with the methods' state and this rank's random streams in the same tag folder.

        Where every rank knows that it cannot be written, training goes on to the next save. Raises CheckpointError at
        the last one, or when a rank fails alone.
        """
        try:
            self._save()
        except CheckpointError as error:
            if self.finished or not error.on_every_rank:
                raise
            self.progress.message(f"step {self.engine.global_steps} is not saved: {error}")

    def _save(self) -> None:
        tag = f"step{self.engine.global_steps:08d}"
        path = self.folder.checkpoints / tag
        with raise_on_all_ranks(), _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            rng.save(path / f"rng_rank_{dist.get_rank():05d}.safetensors")
            if self.first:
                self._append()
                state = {"format": FORMAT, **self._identity(), "steps": self.run.training.steps}
                state |= {"seconds": self._seconds(), "flops": self._flops}
                state |= {"step": self.engine.global_steps, "metrics": self.folder.seal()}
                write_text(path / "run.json", json.dumps(state, indent=1))
        try:
            self.engine.save_checkpoint(str(self.folder.checkpoints), tag=tag)
        except PluginError:
            raise
        except (OSError, RuntimeError) as error:  # torch's own error of a full disk is a RuntimeError
            raise CheckpointError(
                f"'{path}' cannot be written ({error}); earlier checkpoints are as they were: make room, and go on "
                "from the last one with --resume"
            ) from error

    def resume(self, tag: str | None = None, *, verify: bool = True) -> None:
        """Go on from a checkpoint: the engine, the methods, the random streams and metrics.csv. Writes nothing.

        Raises:
            CheckpointError: it is missing, damaged, or was trained on other data or with another batch or seed.
            DataError: metrics.csv is damaged or another run's.
        """
        root = self.folder.checkpoints
        lost = None
        with raise_on_all_ranks():
            tag = tag or latest_tag(root)
            path = root / tag
            if tag in (".", "..") or "/" in tag or not path.is_dir():
                raise CheckpointError(f"resume: '{path}' is no checkpoint of this run; give --tag one of {tags(root)}")
            saved = read_saved(path / "run.json", self._identity())
            if self.first:
                lost = self.folder.go_on_from(saved["step"], saved["metrics"])
        self.plugin.sealer.verify = verify
        self.engine.load_checkpoint(str(root), tag=tag)
        with raise_on_all_ranks():
            if self.engine.global_steps != saved["step"]:
                raise CheckpointError(
                    f"resume: '{path / 'run.json'}' is of step {saved['step']}, the rest of the checkpoint of step "
                    f"{self.engine.global_steps}; give another --tag, one of {tags(root)}"
                )
            rng.load(path / f"rng_rank_{dist.get_rank():05d}.safetensors")
            if self.first:
                self.folder.sweep()
        self._earlier_seconds, self._flops = saved["seconds"], saved["flops"]
        for line in filter(None, [self._other_steps(saved["steps"]), lost]):
            self.progress.message(f"note: {line}")
        self.progress.message(f"resumed from step {self.engine.global_steps}")

    def _other_steps(self, steps: int) -> str | None:
        if steps == self.run.training.steps:
            return None
        return (
            f"this run was started for {steps} steps and goes on to {self.run.training.steps}: what depends on that "
            "number changes here (a scheduler's total_num_steps; the sample order, if the data is passed a different "
            "number of times)"
        )

    def _identity(self) -> dict[str, Any]:
        """What must not change within a run: its model and its samples."""
        return {
            "data": self.text.prefix.name,
            "data_tokens": self.text.tokens,
            "seed": self.run.training.seed,
            "split": self.run.training.split,
            "train_batch_size": self.engine.train_batch_size(),
            "world_size": dist.get_world_size(),
            "completep": self.run.plugin.to_dict().get("completep"),
            **{f"model.{name}": value for name, value in self.run.model.model_dump(mode="json").items()},
        }

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self.started

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the averaged weights, summary.json and report.png."""
        averaged: list[Path] = []
        if self.plugin.warmup is not None:
            self.plugin.warmup.monitor.report()  # the steps since the last one; every rank calls it
        if self.plugin.has_average:
            averaged = [export_average(self.plugin, self.folder.path / "averaged.safetensors")]
        with raise_on_all_ranks(), _writing(self.folder.path):
            if self.first:
                self._write_results(averaged)

    def _write_results(self, averaged: list[Path]) -> None:
        self.folder.settle()
        metrics = read_metrics(self.folder.metrics)
        first, last = ({name: column[i] for name, column in metrics.items() if column} for i in (0, -1))
        trained, read = self._tokens()
        ledger, warmup = self.plugin.ledger, self.plugin.warmup
        summary = {
            "steps": self.engine.global_steps,
            "tokens_trained": trained,
            "tokens_read": read,
            "tokens_carried": ledger.carried if ledger is not None else 0,
            "tokens_discarded": ledger.discarded if ledger is not None else read - trained,
            "targets_untrained": ledger.untrained_targets if ledger is not None else 0,
            "flops": self._flops,
            "stability": warmup.monitor.summary() if warmup is not None else None,
            "restarts": self.plugin.spikes.restarts if self.plugin.spikes is not None else None,
            "train_loss": last.get("train_loss"),
            "eval_loss": last.get("eval_loss"),
            "eval_loss_averaged": last.get("eval_loss_averaged"),
            "averaged_steps": self.plugin.averager.steps if self.plugin.averager is not None else [],
            "averaged_weights": [path.name for path in averaged],
            "unigram_entropy": self.text.unigram_entropy,
            "first_length": first.get("length") if first.get("step") == 1 else None,
            "last_length": last.get("length"),
            "zero_stage": int(self.engine.zero_optimization_stage()),
            "precision": str(self.run.dtype).removeprefix("torch."),
            "world_size": dist.get_world_size(),
            "tensor_parallel": self.run.model.tensor_parallel,
            "pipeline_parallel": self.run.model.pipeline_parallel,
            "parameters": self._per_token.parameters,
            "data": {
                "source": self.text.source,
                "tokens": self.text.tokens,
                "documents": self.text.documents,
                "left_out": self.text.left_out,
            },
            "methods": self.run.plugin.to_dict(),
            "wall_seconds": round(self._seconds(), 1),
            "versions": env.versions(),
        }
        self.folder.write_summary(summary)
        report.draw(
            self.folder.metrics,
            self.folder.figure,
            title=f"{self.folder.path.name}: {self.run.model.num_layers} layers, width {self.run.model.hidden_size}",
            unigram_entropy=self.text.unigram_entropy,
        )
        monitors.log_image(self.engine, "report", self.folder.figure)
        self.progress.message(_ending(summary, self.folder))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the file system refuses, as our own error. Nothing is half-written then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"'{path}' cannot be written ({error}); earlier checkpoints are as they were: make room, and go on from "
            "the last one with --resume"
        ) from error


def _ending(summary: dict[str, Any], folder: RunFolder) -> str:
    losses = {"evaluation loss": summary["eval_loss"], "averaged": summary["eval_loss_averaged"]}
    text = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if value is not None)
    return (
        f"done: {text or 'no evaluation is recorded'} (unigram entropy {summary['unigram_entropy']:.4f}) "
        f"after {summary['tokens_trained']:,} tokens; see {folder.figure} and {folder.summary}"
    )
