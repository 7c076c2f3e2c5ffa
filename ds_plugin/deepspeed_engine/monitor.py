"""What a run measures, through DeepSpeed's own monitor: TensorBoard, W&B, Comet, CSV files.

DeepSpeed counts its series in samples. W&B drops a value whose step lies before the last one it was given, and Comet
thins a series by that count; so everything here is written when it is measured, at ``engine.global_samples``."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ds_plugin.core.errors import warn

PREFIX = "Run/"


def log(plugin: Any, values: Mapping[str, Any]) -> None:
    """Write the methods' state after the last step, and ``values`` (numbers; None: not measured), which win."""
    engine = plugin.engine
    if engine.monitor.enabled:
        step, found = engine.global_samples, {**measured(plugin), **values}
        engine.monitor.write_events([(f"{PREFIX}{k}", float(v), step) for k, v in found.items() if v is not None])


def measured(plugin: Any) -> dict[str, Any]:
    """The methods' state after the last step (None: not measured). No collective, no device sync."""
    warmup = plugin.warmup
    if warmup is None:
        return {}
    ledger, report = warmup.ledger, warmup.report
    state = {"tokens_trained": ledger.trained, "tokens_read": ledger.read, "tokens_carried": ledger.carried}
    state["length"] = plugin.trained_length
    if report is not None and report.step == plugin.engine.global_steps:
        state["loss_ratio"] = report.loss_ratio
        state |= {"adam_variance_l1": report.variance_l1, "adam_variance_max": report.variance_max}
    return state


def log_settings(engine: Any, settings: Mapping[str, Any]) -> None:
    """Send what a run was started with, JSON types only, to whichever monitors have a place for it."""
    flat, text = dict(_flat("", settings)), f"<pre>{json.dumps(settings, indent=1, default=str)}</pre>"
    _each(
        engine,
        tensorboard=lambda writer: writer.add_text(f"{PREFIX}settings", text, engine.global_samples),
        wandb=lambda module: module.config.update(flat, allow_val_change=True),
        comet=lambda experiment: experiment.log_parameters(flat),
    )


def log_image(engine: Any, name: str, png: Path) -> None:
    """Send a figure to whichever monitors show figures."""
    name, step = f"{PREFIX}{name}", engine.global_samples

    def tensorboard(writer: Any) -> None:
        from PIL import Image

        with Image.open(png) as image:
            writer.add_image(name, np.array(image.convert("RGB")), step, dataformats="HWC")
        writer.flush()

    _each(
        engine,
        tensorboard=tensorboard,
        wandb=lambda module: module.log({name: module.Image(str(png))}, step=step),
        comet=lambda experiment: experiment.log_image(str(png), name=name, step=step),
    )


def _each(engine: Any, **sends: Callable[[Any], Any]) -> None:
    """Call each with the object of its library, if DeepSpeed has opened it: on rank 0. A service that fails is said."""
    monitor = engine.monitor
    if not monitor.enabled or dist.get_rank() != 0:
        return
    sinks = {
        "tensorboard": getattr(getattr(monitor, "tb_monitor", None), "summary_writer", None),
        "comet": getattr(getattr(monitor, "comet_monitor", None), "experiment", None),
    }
    if getattr(monitor, "wandb_monitor", None) is not None:
        import wandb

        sinks["wandb"] = wandb
    for name, sink in sinks.items():
        try:
            if sink is not None:
                sends[name](sink)
        except Exception as error:  # the run does not depend on it
            warn("monitor: %s did not take it (%s: %s)", name, type(error).__name__, error)


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested sections as ``section.key``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
