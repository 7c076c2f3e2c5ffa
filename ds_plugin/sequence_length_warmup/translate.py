"""DeepSpeed's own sequence length curricula, read as our section. Pure: a dict in, a dict out.

There are two: the top-level ``curriculum_learning``, which DeepSpeed 0.19.8 refuses, and a seqlen metric of
``data_efficiency.data_sampling.curriculum_learning``. Both ask for the length of the optimizer step that comes next,
counted from 1, as ours does.
"""

import copy
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ds_plugin.config_model import SectionConfig, parse_section
from ds_plugin.errors import ConfigError

OURS = "sequence_length_warmup"
LEGACY = "curriculum_learning"
SAMPLING = "data_efficiency.data_sampling"
BLOCK = f"{SAMPLING}.curriculum_learning"

#: metrics that stand for the length, by the names Megatron-DeepSpeed gave them, and our mode for each
METRICS = {"seqlen": "truncate", "seqlen_truncate": "truncate", "seqlen_reshape": "carry"}

# 3e4 is a float to JSON and a fine number of steps to DeepSpeed.
Whole = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v), Field(ge=1)]


class _Curriculum(SectionConfig):
    """What both kinds have."""

    min_difficulty: Whole = Field(description="the first length in tokens, e.g. 8")
    max_difficulty: Whole = Field(description="the full length in tokens, e.g. 1024")
    schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"] = Field(
        description='"fixed_linear", "fixed_root" or "fixed_discrete"'
    )
    schedule_config: dict[str, Any] = {}


class _Legacy(_Curriculum):
    enabled: bool
    curriculum_type: Literal["seqlen"] = Field(description='"seqlen"')


class _Metric(_Curriculum):
    difficulty_type: Literal["value"] = "value"  # a percentile ranks samples and says no length
    clustering_type: str = "single_cluster"
    index_to_sample_path: str | None = None
    index_to_metric_path: str | None = None


class _Block(SectionConfig):
    enabled: bool
    curriculum_metrics: dict[str, Any] = Field(description='{"seqlen": {...}}')
    data_cluster_path: str | None = None


class _Growing(SectionConfig):
    total_curriculum_step: Whole = Field(description="the optimizer steps until the full length, e.g. 1000")
    difficulty_step: Whole = Field(description="what lengths are multiples of, e.g. 8")
    root_degree: Whole | None = None


class _Discrete(SectionConfig):
    difficulty: list[Whole] = Field(description="the lengths, e.g. [64, 256, 1024]", min_length=2)
    max_step: list[Whole] = Field(description="the last step of each length but the last, e.g. [1000, 5000]")


def translate(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config in which our section stands for DeepSpeed's, and one note for each section that was translated.

    ``config`` itself is never changed. Without notes the result equals it.

    Raises:
        ConfigError: a curriculum of lengths that cannot be ours, two sections that set the length, or dynamic batching
            together with the warmup.
    """
    new, notes = copy.deepcopy(dict(config)), []
    legacy = new.pop(LEGACY, None)
    legacy_on = legacy is not None and _switched_on(legacy)
    if LEGACY in config and not legacy_on:
        notes.append(f"{LEGACY} is off and left out: DeepSpeed 0.19.8 refuses the key, even with the value null")
    sampling = _at(new, "data_efficiency", "data_sampling")
    # This switch alone turns DeepSpeed's sampler on, whatever "enabled" says above it.
    block_on = bool(_at(sampling, "curriculum_learning").get("enabled"))
    ours_on = bool(_at(new, OURS).get("enabled"))
    metric = _length_metric(new)
    given = [(OURS, ours_on or (OURS in new and (legacy_on or metric))), (LEGACY, legacy_on), (BLOCK, block_on)]
    names = [name for name, present in given if present]
    if len(names) > 1:
        raise ConfigError(
            f'{names[1]}: "enabled": true, and {names[0]} is given too: both set the length (or the samples) of a '
            "step; remove one of the two"
        )
    if legacy_on:
        _translate_into(new, notes, LEGACY, legacy, _Legacy)
    elif metric is not None:
        block = sampling.pop("curriculum_learning")
        _translate_into(
            new, notes, f"{BLOCK}.curriculum_metrics.{metric}", block["curriculum_metrics"][metric], _Metric
        )
    if _at(new, OURS).get("enabled") and _at(sampling, "dynamic_batching").get("enabled"):
        raise ConfigError(
            f"{SAMPLING}.dynamic_batching.enabled: True changes the batch size, and {OURS} (or what becomes it) the "
            'length: do not ramp both; write "enabled": false in one of them'
        )
    return new, notes


def _length_metric(config: Mapping[str, Any]) -> str | None:
    """The metric of DeepSpeed's sampler that stands for the length; None if there is none, or a switch is off.

    Other metrics choose samples: alone they are DeepSpeed's affair, beside the length they would be lost.
    """
    efficiency = _at(config, "data_efficiency")
    sampling = _at(efficiency, "data_sampling")
    block = _at(sampling, "curriculum_learning")
    metrics = [name for name in _at(block, "curriculum_metrics") if name in METRICS]
    if not (metrics and efficiency.get("enabled") and sampling.get("enabled") and block.get("enabled")):
        return None
    parsed = parse_section(_Block, BLOCK, block)
    for other in parsed.curriculum_metrics:
        if other != metrics[0]:
            raise ConfigError(
                f"{BLOCK}.curriculum_metrics: {other!r} beside {metrics[0]!r}, which becomes {OURS} and turns "
                f"DeepSpeed's sampler off; remove {other!r}, or keep it and remove {metrics[0]!r}"
            )
    return metrics[0]


def _translate_into(new: dict[str, Any], notes: list[str], path: str, raw: Any, model: type[_Curriculum]) -> None:
    try:
        old = parse_section(model, path, raw)
        section, remarks = _section(path, old)
    except ConfigError as error:
        raise ConfigError(f'{error}; or write "{OURS}" in its place, which is what it is read as') from None
    if isinstance(old, _Metric):
        remarks.append("DeepSpeed's curriculum sampler is off: the order of samples is the data loader's")
        if old.clustering_type != "single_cluster":
            remarks.append(f"samples are cut to the length; clustering_type {old.clustering_type!r} chose short ones")
        if METRICS[path.rpartition(".")[2]] == "carry":
            section["mode"] = "carry"
            remarks.append(
                "reshape trained a sample's pieces as more rows of one step; carry trains every token once too, but "
                "in later steps, so that early steps are smaller"
            )
    else:
        remarks.append("the model gets shortened batches and no argument curriculum_seqlen")
    new[OURS] = section
    notes.append("; ".join([f'{path} is read as "{OURS}": {json.dumps(section)}', *remarks]))


def _section(path: str, old: _Curriculum) -> tuple[dict[str, Any], list[str]]:
    """Bounds and schedule, and what a user should know about them."""
    low, high = old.min_difficulty, old.max_difficulty
    if low > high:
        raise ConfigError(f"{path}.min_difficulty: {low} is above max_difficulty {high}; write at most {high}")
    if old.schedule_type == "custom":
        raise ConfigError(
            f"{path}.schedule_type: 'custom' takes a function, and JSON holds none; write \"schedule\": "
            f'"package.module:function" of a function (share of the duration, start, end) -> length in "{OURS}"'
        )
    section: dict[str, Any] = {"enabled": True, "start_length": low, "end_length": high}
    if old.schedule_type == "fixed_discrete":
        discrete = parse_section(_Discrete, f"{path}.schedule_config", old.schedule_config)
        lengths, boundaries = discrete.difficulty, discrete.max_step
        for key, values in (("difficulty", lengths), ("max_step", boundaries)):
            if values != sorted(set(values)):
                raise ConfigError(f"{path}.schedule_config.{key}: {values} do not rise; put them in order")
        if len(boundaries) != len(lengths) - 1:
            raise ConfigError(
                f"{path}.schedule_config.max_step: {boundaries} are {len(boundaries)} for {len(lengths)} difficulties "
                f"{lengths}; write one less than difficulties, the last step of each but the last"
            )
        if high != lengths[-1]:  # DeepSpeed stops there, or never gets there
            raise ConfigError(f"{path}.max_difficulty: {high}, but the last difficulty is {lengths[-1]}; write that")
        if low > lengths[0]:
            raise ConfigError(f"{path}.min_difficulty: {low}, but the first difficulty is {lengths[0]}; write that")
        section |= {"start_length": lengths[0], "schedule": "discrete", "duration": {"steps": boundaries[-1]}}
        section |= {"lengths": lengths, "boundaries": boundaries, "multiple_of": math.gcd(8, *lengths)}
        return section, []
    growing = parse_section(_Growing, f"{path}.schedule_config", old.schedule_config)
    remarks, step = [], growing.difficulty_step
    section |= {"schedule": "linear", "duration": {"steps": growing.total_curriculum_step}}
    if old.schedule_type == "fixed_root":
        if growing.root_degree is None:
            raise ConfigError(f"{path}.schedule_config.root_degree: missing for 'fixed_root'; write e.g. 2")
        section |= {"schedule": "root", "root_degree": growing.root_degree}
    elif growing.root_degree is not None:
        remarks.append(f"root_degree {growing.root_degree} has no effect in 'fixed_linear', and had none")
    # DeepSpeed comes to a max_difficulty that is no multiple of the step late, in one shorter stride. Ours has to
    # divide the full length, so strides get finer; every length stays less than one difficulty_step from DeepSpeed's.
    section["multiple_of"] = math.gcd(step, high)
    if high % step:
        remarks.append(
            f"difficulty_step {step} does not divide max_difficulty {high}, so lengths are multiples of "
            f"{section['multiple_of']} only: choose a max_difficulty that it divides if the samples can be that long"
        )
    return section, remarks


def _at(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The object under ``keys``; an empty one if it is absent or no object (which is for its owner to refuse)."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _switched_on(legacy: Any) -> bool:
    if not isinstance(legacy, dict) or not isinstance(legacy.get("enabled", False), bool):
        value = f".enabled: {legacy['enabled']!r}" if isinstance(legacy, dict) else f": {legacy!r}"
        raise ConfigError(f'{LEGACY}{value} is no switch; write {{"enabled": false}} or "{OURS}", which it is read as')
    return bool(legacy.get("enabled"))
