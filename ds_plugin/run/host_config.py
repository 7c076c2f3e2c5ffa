"""The part of the JSON that is DeepSpeed's: checked before anything starts, and no key left out in silence.

DeepSpeed takes what it knows from the file and ignores the rest; a value of another type fails where it is first used.
"""

import copy
import functools
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import pydantic

from ds_plugin.config import SECTIONS
from ds_plugin.config_model import nearest, parse_section
from ds_plugin.errors import ConfigError

Kind = tuple[Callable[[Any], bool], str]  # whether a value is one, and what to write


def is_number(value: object, *, whole: bool = False) -> bool:
    """Whether it is finite and at least 0; JSON's ``true`` is none."""
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


def _or_null(kind: Kind) -> Kind:
    """For what DeepSpeed takes null for absent in."""
    return lambda value: value is None or kind[0](value), kind[1]


_OBJECT: Kind = (lambda value: isinstance(value, Mapping), "a JSON object {...}, or leave it out")
_FLAG: Kind = (lambda value: isinstance(value, bool), "true or false")
_COUNT: Kind = (lambda value: is_number(value, whole=True) and value > 0, "a whole number, 1 or more")
_NUMBER: Kind = (is_number, "a number, 0 or more")
_NAME: Kind = (lambda value: isinstance(value, str), "a name in quotes")

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
#: every key that DeepSpeed reads at the top level, and those below it that this project's own code reads
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(
        (
            "activation_checkpointing", "autotuning", "checkpoint", "comet", "comms_logger", "compile", "csv_monitor",
            "data_efficiency", "data_types", "expert_parallel", "flops_profiler", "hybrid_engine",
            "optimizer", "optimizer.params", "pipeline", "scheduler", "scheduler.params", "tensor_parallel",
            "tensorboard", "timers", "torch_autocast", "wandb", "weight_quantization", "zero_optimization",
        ),
        _OBJECT,
    ),
    **dict.fromkeys(("aio", "bf16", "bfloat16", "fp16", "zero_optimization.offload_optimizer"), _or_null(_OBJECT)),
    **dict.fromkeys(
        (
            "bf16.enabled", "dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state",
            "fp16.enabled", "managed_gradient_accumulation", "memory_breakdown", "prescale_gradients",
            "use_data_before_expert_parallelism", "wall_clock_breakdown", "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
        ),
        _FLAG,
    ),
    **dict.fromkeys((*_BATCH, "steps_per_print", "vocabulary_size"), _or_null(_COUNT)),
    **dict.fromkeys(("data_parallel_size", "sequence_parallel_size"), _COUNT),
    **dict.fromkeys(
        (
            "gradient_clipping", "gradient_predivide_factor", "optimizer.params.eps", "optimizer.params.lr",
            "optimizer.params.weight_decay",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(
        ("communication_data_type", "log_level", "seq_parallel_communication_data_type"), _or_null(_NAME)
    ),
    **dict.fromkeys(("gradient_allreduce_op", "optimizer.type", "scheduler.type"), _NAME),
    "datastates_ckpt": (lambda value: isinstance(value, (bool, Mapping)), "a JSON object {...}, true or false"),
    "zero_optimization.stage": (lambda value: is_number(value, whole=True) and value <= 3, "0, 1, 2 or 3"),
}  # fmt: skip
KNOWN = frozenset(path for path in _KINDS if "." not in path)


def check(config: Mapping[str, Any]) -> None:
    """``config``: what DeepSpeed will be given. A key that it does not know is a warning, on rank 0.

    Raises:
        ConfigError: a value is of the wrong type, an optimizer, a scheduler or a parameter of it is not known, or
            DeepSpeed cannot read its sections.
    """
    check_types(config)
    _check_named(config)
    _check_as_deepspeed_does(config)
    _warn_of_unknown(config)


def check_types(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for the values that are of another type than DeepSpeed's, all of them at once."""
    wrong = []
    for path, (is_one, what) in _KINDS.items():
        *parents, name = path.split(".")
        section: Any = config
        for parent in parents:
            section = section.get(parent) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping) and name in section and not is_one(section[name]):
            wrong.append(f"{path}: {section[name]!r}; write {what}")
    if wrong:
        raise ConfigError("; ".join(wrong))


def _check_named(config: Mapping[str, Any]) -> None:
    """What DeepSpeed looks up by name only when it builds the engine: its own, else one of torch's."""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from torch import optim

    torchs = {n: kind for n, kind in vars(optim).items() if inspect.isclass(kind) and kind is not optim.Optimizer}
    name = (config.get("optimizer") or {}).get("type")
    if name is not None and name not in torchs and name.lower() not in DEEPSPEED_OPTIMIZERS:
        raise ConfigError(f"optimizer.type: {name!r} is not known; {_write_one_of(name, 'AdamW', torchs)}")
    section = config.get("scheduler") or {}
    name = section.get("type")
    schedulers = {**vars(optim.lr_scheduler), **vars(lr_schedules)}  # DeepSpeed's come first
    schedulers = {n: kind for n, kind in schedulers.items() if inspect.isclass(kind) and hasattr(kind, "step")}
    schedulers = {n: kind for n, kind in schedulers.items() if n not in ("Optimizer", "LRScheduler", "_LRScheduler")}
    if name is not None and name not in schedulers:
        raise ConfigError(f"scheduler.type: {name!r} is not known; {_write_one_of(name, 'WarmupCosineLR', schedulers)}")
    if name is not None:
        known = list(inspect.signature(schedulers[name]).parameters)[1:]  # the first is the optimizer
        for key in section.get("params") or {}:
            if key not in known:
                raise ConfigError(
                    f"scheduler.params.{key} is not known to {name}; {_write_one_of(key, known[0], known)}"
                )


def _write_one_of(name: str, usual: str, known: Iterable[str]) -> str:
    guess = nearest(name, known)
    return f'did you mean "{guess}"?' if guess else f'write "{usual}", or another of {", ".join(sorted(known))}'


def _warn_of_unknown(config: Mapping[str, Any]) -> None:
    """Say on rank 0, once in a process, which keys DeepSpeed will ignore; no error, since a newer one may know them."""
    for key in config:
        if key not in KNOWN:
            guess = nearest(key, [*KNOWN, *SECTIONS])
            hint = f'did you mean "{guess}"?' if guess else "remove it if it means nothing to you"
            _warn(f"{key}: DeepSpeed {version('deepspeed')} does not know this key and ignores it; {hint}")


@functools.cache
def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("ds_plugin").warning("%s", text)


def _check_as_deepspeed_does(config: Mapping[str, Any]) -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, model in models.items():  # their errors in this project's words, with the nearest key
        if config.get(name) is not None:
            parse_section(model, name, config[name])
    sections = {name: value for name, value in config.items() if name not in _BATCH}  # those need all ranks' layout
    error = _refusal(sections)
    if error is not None:
        alone = [name for name, value in sections.items() if _refusal({name: value}) == error]
        where = f"{alone[0]}: {sections[alone[0]]!r}" if alone else "the JSON"
        raise ConfigError(f"{where} cannot be read by DeepSpeed {version('deepspeed')}, which says: {error}")


def _refusal(sections: Mapping[str, Any]) -> str | None:
    """What DeepSpeed says to these sections, in one line; None if it takes them."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig({**copy.deepcopy(dict(sections)), "train_micro_batch_size_per_gpu": 1})
    except pydantic.ValidationError as error:
        found = error.errors()
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in found)
    except Exception as error:  # assertions, and whatever else a value of the wrong type ends in
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
