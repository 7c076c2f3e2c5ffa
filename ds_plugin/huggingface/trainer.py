"""The Trainer's part: what it reads is cut, what it evaluates is evaluated on the average too, what it logs and saves
has the methods' in it. Each function is called with the Trainer's own in front; without a method it calls only that."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_plugin.core import rng
from ds_plugin.core.errors import ConfigError, StateError, warn
from ds_plugin.deepspeed_engine import attach, monitor
from ds_plugin.deepspeed_engine.engine import Plugin
from ds_plugin.deepspeed_engine.publish import AVERAGED
from ds_plugin.huggingface import sections
from ds_plugin.huggingface.adapters import form_of

Own = Callable[..., Any]
#: the prefix of the second evaluation's metrics: ``eval_averaged_loss``
SUFFIX = "_averaged"
#: by accelerator, whose it is: what prepares the model knows only that
_trainers: "weakref.WeakKeyDictionary[Any, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


def of_accelerator(accelerator: Any) -> Any:
    """The Trainer that made this Accelerator; None: a loop's own."""
    found = _trainers.get(accelerator)
    return found() if found is not None else None


def steps_of(trainer: Any) -> int | None:
    """Optimizer steps of a Trainer's run, which it has worked out before its model is prepared; None: not known."""
    state, arguments = getattr(trainer, "state", None), getattr(trainer, "args", None)
    return max(getattr(state, "max_steps", 0) or 0, getattr(arguments, "max_steps", 0) or 0) or None


def refuse(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for sections that no Trainer can follow."""
    warmup = given.get("sequence_length_warmup")
    if isinstance(warmup, Mapping) and warmup.get("enabled") and warmup.get("mode") == "carry":
        what = "needs a loop that reads batches through the plugin, and a Trainer reads its own"
        raise ConfigError(f'sequence_length_warmup.mode: "carry" {what}; write "truncate"')


def create_accelerator(own: Own, trainer: Any) -> None:
    """Remember whose the Accelerator is; say so where a Trainer has no DeepSpeed for the methods to be in."""
    own(trainer)
    _trainers[trainer.accelerator] = weakref.ref(trainer)
    if trainer.is_deepspeed_enabled:
        return
    remedy = 'give TrainingArguments(deepspeed="config.json")'
    if sections.given:
        what = f"enable() was given {', '.join(sections.given)}, and this Trainer does not use DeepSpeed"
        raise ConfigError(f"{what}; {remedy}")
    warn("this Trainer does not use DeepSpeed, and none of ds_plugin's methods is in it; %s", remedy)


def get_batch_samples(own: Own, trainer: Any, batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
    """The micro-batches of a step, each cut before its labels are counted: the Trainer divides the loss by them."""
    plugin = _plugin(trainer)
    if plugin is None:
        _refuse_late(trainer)
        return own(trainer, batches, *args, **kwargs)
    samples, items = own(trainer, map(plugin.cut, batches), *args, **kwargs)
    plugin.begin_step(len(samples))
    return samples, items


def evaluation_loop(own: Own, trainer: Any, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
    """Evaluate the training weights and then, if there is one, the average: one pass over the data each."""
    output = own(trainer, dataloader, description, *args, **kwargs)
    plugin = _plugin(trainer)
    if plugin is None or not plugin.has_average or description == "Prediction":
        return output
    names = ("prediction_loss_only", "ignore_keys", "metric_key_prefix")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given["metric_key_prefix"] = given.get("metric_key_prefix", "eval") + SUFFIX
    streams = rng.capture()  # a pass draws from them; training goes on as if there had been one
    try:
        with plugin.averaged_weights():
            output.metrics.update(own(trainer, dataloader, description, **given).metrics)
    finally:
        rng.restore(streams)
    return output


def determine_best_metric(own: Own, trainer: Any, metrics: Mapping[str, float], *args: Any, **kwargs: Any) -> bool:
    """Before the first snapshot there is no average that could be the best."""
    metric, plugin = trainer.args.metric_for_best_model or "", _plugin(trainer)
    waits = plugin is not None and plugin.averager is not None and not plugin.has_average
    if waits and "averaged_" in metric and f"eval_{metric.removeprefix('eval_')}" not in metrics:
        return False
    return bool(own(trainer, metrics, *args, **kwargs))


def log(own: Own, trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    """Of a training step, also its length, the tokens so far and, at reports, the loss ratio: to every logger."""
    plugin = _plugin(trainer)
    if plugin is not None and "loss" in logs:
        report = plugin.warmup.report if plugin.warmup is not None else None
        measured = {"loss_ratio": report and report.loss_ratio, **monitor.measured(plugin)}
        logs.update({name: value for name, value in measured.items() if value is not None})
    own(trainer, logs, *args, **kwargs)


def save_model(own: Own, trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
    """The average beside the model, in ``averaged/``: a folder that ``from_pretrained`` loads. With every checkpoint as
    well, by ``weight_averaging.save_average``, in DeepSpeed's folder."""
    own(trainer, output_dir, _internal_call)
    plugin = _plugin(trainer)
    if plugin is None or not plugin.has_average or _internal_call:
        return
    processor = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)

    def beside(folder: Path) -> None:
        if processor is not None:
            processor.save_pretrained(folder)

    folder = Path(output_dir if output_dir is not None else trainer.args.output_dir) / AVERAGED
    plugin.publish(folder, replace=True, form=form_of(trainer.model, beside))


#: by method of the Trainer's: what is in its place, and why
HOOKS: dict[str, tuple[Own, str]] = {
    "create_accelerator_and_postprocess": (create_accelerator, "knows a Trainer by its Accelerator"),
    "get_batch_samples": (get_batch_samples, "cuts what is trained before its labels are counted"),
    "evaluation_loop": (evaluation_loop, "evaluates the average, too"),
    "_determine_best_metric": (determine_best_metric, "waits for the first average"),
    "log": (log, "length, tokens and loss ratio"),
    "save_model": (save_model, "writes the average beside the model"),
}


def _plugin(trainer: Any) -> Plugin | None:
    try:
        return attach.get_plugin(trainer.deepspeed) if trainer.deepspeed is not None else None
    except StateError:
        return None


def _refuse_late(trainer: Any) -> None:
    """Sections, and an engine that was built without them."""
    if not trainer.is_deepspeed_enabled:
        return
    found = sections.of(trainer.accelerator.deepspeed_plugin.deepspeed_config)
    if on := [name for name, section in found.items() if isinstance(section, Mapping) and section.get("enabled")]:
        what = f"{on[0]} is enabled in the DeepSpeed JSON, and the model was prepared before enable() was called"
        raise StateError(f"{what}; call ds_plugin.huggingface.enable() before the Trainer is made")
