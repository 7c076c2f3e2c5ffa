"""The part of the JSON that is DeepSpeed's, which by itself ignores unknown keys and fails where it uses a value."""

import copy
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import ConfigDict, Field, create_model

from ds_plugin.config import SECTIONS, PluginConfig, say_once
from ds_plugin.config import split_config as split_sections
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import Rate, Steps, nearest, parse_section
from ds_plugin.deepspeed_engine import optimizer_check

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_Object, _Flag, _Name, _Number = dict[str, Any], bool, str, Annotated[float, Field(ge=0, le=1e15)]


def _model(kinds: Mapping[Any, str], extra: Any = "allow") -> Any:
    """A pydantic model of values of each kind at the keys that are listed; DeepSpeed takes or refuses the others."""
    fields: dict[str, Any] = {name: (kind, None) for kind, names in kinds.items() for name in names.split()}
    return create_model("DeepSpeed", __config__=ConfigDict(strict=True, extra=extra), **fields)


_Pair = tuple[Rate, Rate] | Annotated[list[Rate], Field(min_length=2, max_length=2)]
_Hyperparameters = _model({Rate: "lr eps weight_decay", _Pair: "betas"})
#: every key that DeepSpeed reads at the top level, and those below it that this project's own code reads
_JSON = _model(
    {
        _Object: "activation_checkpointing autotuning checkpoint comet comms_logger compile csv_monitor "
        "data_efficiency data_types expert_parallel flops_profiler hybrid_engine pipeline tensor_parallel tensorboard "
        "timers torch_autocast wandb weight_quantization",
        _model({_Name: "type", _Hyperparameters: "params", _Flag: "legacy_fusion"}, "forbid"): "optimizer",
        _model({_Name: "type", _Object: "params"}, "forbid"): "scheduler",
        _model({Annotated[int, Field(ge=0, le=3)]: "stage", _Object | None: "offload_optimizer"}): "zero_optimization",
        _Object | None: "aio",
        _model({_Flag: "enabled"}) | None: "bf16 bfloat16 fp16",
        _Flag: "dataloader_drop_last disable_allgather disable_python_gc dump_state managed_gradient_accumulation "
        "memory_breakdown prescale_gradients use_data_before_expert_parallelism wall_clock_breakdown "
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
        Steps | None: f"{' '.join(_BATCH)} vocabulary_size",
        Annotated[float, Field(ge=1)] | None: "steps_per_print",  # Accelerate writes infinity
        Steps: "data_parallel_size sequence_parallel_size",
        _Number: "gradient_clipping gradient_predivide_factor",
        _Name | None: "communication_data_type log_level seq_parallel_communication_data_type",
        _Name: "gradient_allreduce_op",
        _Object | _Flag: "datastates_ckpt",
    }
)
KNOWN = frozenset(_JSON.model_fields)


def split_config(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], PluginConfig]:
    """As `ds_plugin.config.split_config`, and what is DeepSpeed's is looked at: see `check`."""
    config, sections = split_sections(source)
    check(config)
    return config, sections


def check(config: Mapping[str, Any], ranks: int | None = None, *, auto: bool = False) -> None:
    """``config``: what DeepSpeed will be given. A key that it does not know is a warning, on rank 0.

    ``ranks``: data-parallel ones, if they are known. ``auto``: the scheduler's ``total_num_steps`` may be "auto" yet.
    Where DeepSpeed is not installed, it is not asked. Raises ConfigError: a value of the wrong type or out of range, a
    wrong optimizer or scheduler, or a section that DeepSpeed cannot read."""
    parse_section(_JSON, "", config)
    if ranks is not None:
        batch_sizes(config, ranks)
    try:
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError:
        return
    optimizer_check.check(config, auto=auto)
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, model in models.items():  # their errors in this project's words, with the nearest key
        if config.get(name) is not None:
            parse_section(model, name, config[name])
    sections = {name: value for name, value in config.items() if name not in _BATCH}  # `ranks` are not known to all
    if (error := _refusal(sections)) is not None:
        where = (f"{name}: {value!r}" for name, value in sections.items() if _refusal({name: value}) == error)
        said = f"cannot be read by DeepSpeed {version('deepspeed')}, which says: {error}"
        raise ConfigError(f"{next(where, 'the JSON')} {said}")
    for key in (key for key in config if key not in KNOWN):  # mostly no error, since a newer one may know them
        if (lower := key.lower().replace("-", "_")) in KNOWN:
            raise ConfigError(f'{key}: DeepSpeed does not know this key and ignores it; did you mean "{lower}"?')
        hint = f'did you mean "{g}"?' if (g := nearest(key, [*KNOWN, *SECTIONS])) else "remove it if it means nothing"
        say_once(f"{key}: DeepSpeed {version('deepspeed')} does not know this key and ignores it; {hint}")


def batch_sizes(config: Mapping[str, Any], ranks: int) -> tuple[int, int]:
    """Samples of a step and of a micro-batch: given two of the three keys, DeepSpeed works out the third. Raises
    ConfigError: two are missing, or they do not fit one another on so many data-parallel ranks."""
    batch, micro, steps = (config.get(name) for name in _BATCH)
    if batch is None and micro is None:
        raise ConfigError(f"{_BATCH[1]}: missing; write the samples per rank and micro-batch, e.g. 8")
    unit = (micro or 1) * (steps or 1) * ranks
    batch = batch or unit
    if batch % unit or (batch != unit and micro and steps):
        given = "".join(f" x {name} {config[name]}" for name in _BATCH[1:] if config.get(name) is not None)
        nearby = unit if micro and steps else f"{max(1, batch // unit) * unit} or {(batch // unit + 1) * unit}"
        what = f"{batch} does not fit {ranks} data-parallel rank(s){given} = {unit}"
        raise ConfigError(f"train_batch_size: {what}; write {nearby}, or another number of ranks")
    return batch, micro or batch // unit


def _refusal(sections: Mapping[str, Any]) -> str | None:
    """What DeepSpeed says to these sections, in one line; None if it takes them."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig({**copy.deepcopy(dict(sections)), "train_micro_batch_size_per_gpu": 1})
    except pydantic.ValidationError as error:
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
    except Exception as error:  # assertions, and whatever else a value of the wrong type ends in
        return optimizer_check.line_of(error)
    return None
