"""The run's settings and figure, through DeepSpeed's own monitor; its numbers go by `Plugin.log`."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ds_plugin.core.errors import warn
from ds_plugin.deepspeed_engine.monitor import PREFIX


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
