"""The part of the JSON that is DeepSpeed's, which by itself ignores unknown keys and fails where it uses a value."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Annotated, Any

import pydantic
from pydantic import ConfigDict, Field, create_model

from ds_plugin.config import SECTIONS, say_once
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import nearest, parse_section

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_Object, _Flag, _Name, _Count = dict[str, Any], bool, str, Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _model(kinds: Mapping[Any, str]) -> Any:
    """A pydantic model of values of each kind at the keys that are listed; DeepSpeed takes or refuses the others."""
    fields: dict[str, Any] = {name: (kind, None) for kind, names in kinds.items() for name in names.split()}
    return create_model("DeepSpeed", __config__=ConfigDict(strict=True, extra="allow"), **fields)


_Switched = _model({_Flag: "enabled"})
_Zero = _model({Annotated[int, Field(ge=0, le=3)]: "stage", _Object | None: "offload_optimizer"})
_Optimizer = _model({_Name: "type", _model({_Number: "lr eps weight_decay"}): "params"})
#: every key that DeepSpeed reads at the top level, and those below it that this project's own code reads
_JSON = _model(
    {
        _Object: "activation_checkpointing autotuning checkpoint comet comms_logger compile csv_monitor "
        "data_efficiency data_types expert_parallel flops_profiler hybrid_engine pipeline tensor_parallel tensorboard "
        "timers torch_autocast wandb weight_quantization",
        _Optimizer: "optimizer",
        _model({_Name: "type", _Object: "params"}): "scheduler",
        _Zero: "zero_optimization",
        _Object | None: "aio",
        _Switched | None: "bf16 bfloat16 fp16",
        _Flag: "dataloader_drop_last disable_allgather disable_python_gc dump_state managed_gradient_accumulation "
        "memory_breakdown prescale_gradients use_data_before_expert_parallelism wall_clock_breakdown "
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
        _Count | None: f"{' '.join(_BATCH)} steps_per_print vocabulary_size",
        _Count: "data_parallel_size sequence_parallel_size",
        _Number: "gradient_clipping gradient_predivide_factor",
        _Name | None: "communication_data_type log_level seq_parallel_communication_data_type",
        _Name: "gradient_allreduce_op",
        _Object | _Flag: "datastates_ckpt",
    }
)
KNOWN = frozenset(_JSON.model_fields)


def check(config: Mapping[str, Any]) -> None:
    """``config``: what DeepSpeed will be given. A key that it does not know is a warning, on rank 0.

    Raises:
        ConfigError: a value of the wrong type, an unknown optimizer or scheduler or parameter of it, or a section that
            DeepSpeed cannot read.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    parse_section(_JSON, "", config)
    _check_named(config)
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, model in models.items():  # their errors in this project's words, with the nearest key
        if config.get(name) is not None:
            parse_section(model, name, config[name])
    sections = {name: value for name, value in config.items() if name not in _BATCH}  # those need all ranks' layout
    if (error := _refusal(sections)) is not None:
        alone = [f"{name}: {value!r}" for name, value in sections.items() if _refusal({name: value}) == error]
        where = alone[0] if alone else "the JSON"
        raise ConfigError(f"{where} cannot be read by DeepSpeed {version('deepspeed')}, which says: {error}")
    for key in (key for key in config if key not in KNOWN):  # no error, since a newer one may know them
        guess = nearest(key, [*KNOWN, *SECTIONS])
        hint = f'did you mean "{guess}"?' if guess else "remove it if it means nothing to you"
        say_once([f"{key}: DeepSpeed {version('deepspeed')} does not know this key and ignores it; {hint}"])


def _check_named(config: Mapping[str, Any]) -> None:
    """What DeepSpeed looks up by name only when it builds the engine: its own, else one of torch's."""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from torch import optim

    def classes(names: Mapping[str, Any], method: str) -> dict[str, Any]:
        bases = (optim.Optimizer, optim.lr_scheduler.LRScheduler)
        return {n: k for n, k in names.items() if inspect.isclass(k) and hasattr(k, method) and k not in bases}

    if (name := (config.get("optimizer") or {}).get("type")) is not None and name.lower() not in DEEPSPEED_OPTIMIZERS:
        _check_known("optimizer.type", name, "AdamW", classes(vars(optim), "zero_grad"))
    section = config.get("scheduler") or {}
    if (name := section.get("type")) is not None:
        # DeepSpeed's come first
        schedulers = classes({**vars(optim.lr_scheduler), **vars(lr_schedules)}, "get_last_lr")
        _check_known("scheduler.type", name, "WarmupCosineLR", schedulers)
        known = list(inspect.signature(schedulers[name]).parameters)[1:]  # the first is the optimizer
        for key in section.get("params") or {}:
            _check_known(f"scheduler.params of {name}", key, known[0], known)


def _check_known(field: str, name: str, usual: str, known: Iterable[str]) -> None:
    if name not in known:
        guess = nearest(name, known)
        hint = f'did you mean "{guess}"?' if guess else f'write "{usual}", or another of {", ".join(sorted(known))}'
        raise ConfigError(f"{field}: {name!r} is not known; {hint}")


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
