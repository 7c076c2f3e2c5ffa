"""What a run measures, through DeepSpeed's own monitor: TensorBoard, W&B, Comet, CSV files.

DeepSpeed counts its series in samples. W&B drops a value whose step lies before the last one it was given, and Comet
thins a series by that count; so everything here is written when it is measured, at ``engine.global_samples``.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from ds_plugin.core.ranks import warn
from ds_plugin.deepspeed_engine.warmup import SequenceLengthWarmup
from ds_plugin.sequence_length_warmup.ledger import Ledger

PREFIX = "Run/"


class Measured(Protocol):
    """What of a `Plugin` is written."""

    engine: Any
    warmup: SequenceLengthWarmup | None
    trained_length: int | None

    @property
    def ledger(self) -> Ledger | None: ...


def log(plugin: Measured, values: Mapping[str, Any]) -> None:
    """Write the methods' state after the last step, and ``values`` (numbers; None: not measured), which win."""
    engine = plugin.engine
    if engine.monitor.enabled:
        events = {**measured(plugin), **values}.items()
        step = engine.global_samples
        engine.monitor.write_events([(f"{PREFIX}{k}", float(v), step) for k, v in events if v is not None])


def log_settings(engine: Any, settings: Mapping[str, Any]) -> None:
    """Send what a run was started with, JSON types only, to whichever monitors have a place for it."""
    flat = dict(_flat("", settings))

    def comet(experiment: Any) -> None:
        experiment.log_parameters(flat)

    def wandb(module: Any) -> None:
        module.config.update(flat, allow_val_change=True)

    def tensorboard(writer: Any) -> None:
        text = f"<pre>{json.dumps(settings, indent=1, default=str)}</pre>"
        writer.add_text(f"{PREFIX}settings", text, engine.global_samples)

    _each(engine, tensorboard, wandb, comet)


def log_image(engine: Any, name: str, png: Path) -> None:
    """Send a figure to whichever monitors show figures."""
    name = f"{PREFIX}{name}"

    def comet(experiment: Any) -> None:
        experiment.log_image(str(png), name=name, step=engine.global_samples)

    def wandb(module: Any) -> None:
        module.log({name: module.Image(str(png))}, step=engine.global_samples)

    def tensorboard(writer: Any) -> None:
        from PIL import Image

        with Image.open(png) as image:
            pixels = np.array(image.convert("RGB"))
        writer.add_image(name, pixels, engine.global_samples, dataformats="HWC")
        writer.flush()

    _each(engine, tensorboard, wandb, comet)


def _each(engine: Any, tensorboard: Callable, wandb: Callable, comet: Callable) -> None:
    """Call each with the object of its library, if DeepSpeed has opened it: on rank 0. A service that fails is said."""
    monitor = engine.monitor
    if not monitor.enabled or dist.get_rank() != 0:
        return
    sinks: list[tuple[Callable, Any]] = []
    if (writer := getattr(getattr(monitor, "tb_monitor", None), "summary_writer", None)) is not None:
        sinks.append((tensorboard, writer))
    if getattr(monitor, "wandb_monitor", None) is not None:
        import wandb as module

        sinks.append((wandb, module))
    if (experiment := getattr(getattr(monitor, "comet_monitor", None), "experiment", None)) is not None:
        sinks.append((comet, experiment))
    for send, sink in sinks:
        try:
            send(sink)
        except Exception as error:  # the run does not depend on it
            warn("monitor: %s did not take it (%s: %s)", send.__name__, type(error).__name__, error)


def measured(plugin: Measured) -> dict[str, Any]:
    """The methods' state after the last step (None: not measured). No collective, no device sync."""
    state: dict[str, Any] = {}
    if plugin.warmup is None:
        return state
    ledger, report = plugin.ledger, plugin.warmup.report
    if ledger is not None:
        state |= {"tokens_trained": ledger.trained, "tokens_read": ledger.read, "tokens_carried": ledger.carried}
    state["length"] = plugin.trained_length
    if report is not None and report.step == plugin.engine.global_steps:
        state["loss_ratio"] = report.loss_ratio
        state |= {"adam_variance_l1": report.variance_l1, "adam_variance_max": report.variance_max}
    return state


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested sections as ``section.key``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
