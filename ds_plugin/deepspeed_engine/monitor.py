"""What a run measures, through DeepSpeed's own monitor: TensorBoard, W&B, Comet, CSV files.

DeepSpeed counts its series in samples. W&B drops a value whose step lies before the last one it was given, and Comet
thins a series by that count; so everything here is written when it is measured, at ``engine.global_samples``."""

from collections.abc import Mapping
from typing import Any

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
