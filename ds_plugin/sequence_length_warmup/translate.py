"""DeepSpeed's own sequence length curricula, read as our section: the top-level ``curriculum_learning``, which version
0.19.8 refuses, and a seqlen metric of ``data_efficiency.data_sampling``. Both count the next step from 1, as ours."""

import copy
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ds_plugin.core.errors import ConfigError
from ds_plugin.core.json_files import nested, object_at
from ds_plugin.core.settings_model import SectionConfig, parse_section
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig

OURS, LEGACY = "sequence_length_warmup", "curriculum_learning"
BLOCK = "data_efficiency.data_sampling.curriculum_learning"
#: metrics that stand for the length, by the names Megatron-DeepSpeed gave them, and our settings for each
METRICS: dict[str, dict[str, str]] = {"seqlen": {}, "seqlen_truncate": {}, "seqlen_reshape": {"mode": "carry"}}
_RESHAPED = "; reshape trained a sample's pieces as more rows of one step, carry trains them in later steps"
# 3e4 is a float to JSON and a fine number of steps to DeepSpeed
Whole = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v), Field(ge=1)]


class _Curriculum(SectionConfig):
    min_difficulty: Whole = Field(description="the first length in tokens, e.g. 8")
    max_difficulty: Whole = Field(description="the full length in tokens, e.g. 1024")
    schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete"] = Field(description='e.g. "fixed_linear"')
    schedule_config: dict[str, Any] = {}
    difficulty_type: Literal["value"] = "value"  # a percentile ranks samples and says no length
    clustering_type: str = "single_cluster"
    index_to_sample_path: str | None = None
    index_to_metric_path: str | None = None


class _Legacy(_Curriculum):  # the removed section
    enabled: bool
    curriculum_type: Literal["seqlen"] = Field(description='"seqlen"')


class _Linear(SectionConfig):
    total_curriculum_step: Whole = Field(description="the optimizer steps until the full length, e.g. 1000")
    difficulty_step: Whole = Field(description="what lengths are multiples of, e.g. 8")
    root_degree: Whole | None = None  # without effect here, as in DeepSpeed


class _Root(_Linear):
    root_degree: Whole = Field(description="the degree of the root, e.g. 2")


class _Discrete(SectionConfig):
    difficulty: list[Whole] = Field(description="the lengths, e.g. [64, 256, 1024]", min_length=2)
    max_step: list[Whole] = Field(description="the last step of each length but the last, e.g. [1, 5]", min_length=1)


_KINDS: dict[str, type[SectionConfig]] = {"fixed_linear": _Linear, "fixed_root": _Root, "fixed_discrete": _Discrete}


def translate(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy with our section in place of DeepSpeed's, and a note for each section that was translated or ignored.
    Raises ConfigError: a curriculum that cannot be ours, two sections that set the length, or dynamic batching too."""
    new, ignored = copy.deepcopy(dict(config)), f"DeepSpeed reads a curriculum at {BLOCK} alone and ignores this one"
    notes = [f"{p}: {ignored}; move it there" for p, *_ in nested(config) if p.endswith(f".{LEGACY}") and p != BLOCK]
    removed, sampling = new.pop(LEGACY, None), object_at(new, "data_efficiency", "data_sampling")
    removed_on = removed.get("enabled", False) is not False if isinstance(removed, dict) else removed is not None
    if LEGACY in config and not removed_on:
        notes.append(f"{LEGACY} is off and left out: DeepSpeed 0.19.8 refuses the key, even with the value null")
    block = object_at(sampling, LEGACY)
    metrics = object_at(block, "curriculum_metrics")
    switched = all(part.get("enabled") for part in (object_at(new, "data_efficiency"), sampling, block))
    metric = next((name for name in metrics if name in METRICS and switched), None)  # others choose samples
    if block.get("enabled") and not switched and METRICS.keys() & metrics:
        off = "data_efficiency" if sampling.get("enabled") else "data_efficiency.data_sampling"
        notes.append(f'{BLOCK}: DeepSpeed ignores its lengths, since {off} is not on; write "enabled": true there, too')
    ours_on = object_at(new, OURS).get("enabled") or (OURS in new and (removed_on or metric))
    # the block's switch alone turns DeepSpeed's sampler on, whatever "enabled" says above it
    given = [name for name, on in ((OURS, ours_on), (LEGACY, removed_on), (BLOCK, block.get("enabled"))) if on]
    if len(given) > 1:
        said = "both set the length (or the samples) of a step; remove one of the two"
        raise ConfigError(f'{given[1]}: "enabled": true, and {given[0]} is given too: {said}')
    if metric is not None and (others := metrics.keys() - {metric}):
        said = f"becomes {OURS} and turns DeepSpeed's sampler off; remove one of the two"
        raise ConfigError(f"{BLOCK}.curriculum_metrics: {min(others)!r} beside {metric!r}, which {said}")
    if metric is not None:
        del sampling[LEGACY]
        remark = f"DeepSpeed's sampler is off: the data loader orders the samples{_RESHAPED if METRICS[metric] else ''}"
        new[OURS] = _section(f"{BLOCK}.curriculum_metrics.{metric}", metrics[metric], _Curriculum) | METRICS[metric]
        notes.append(f'{BLOCK}.curriculum_metrics.{metric} is read as "{OURS}": {json.dumps(new[OURS])}; {remark}')
    elif removed_on:
        new[OURS] = _section(LEGACY, removed, _Legacy)
        remark = "the model gets shortened batches and no argument curriculum_seqlen"
        notes.append(f'{LEGACY} is read as "{OURS}": {json.dumps(new[OURS])}; {remark}')
    if object_at(new, OURS).get("enabled") and object_at(sampling, "dynamic_batching").get("enabled"):
        said = f'changes the batch size, and {OURS} the length: do not ramp both; write "enabled": false in one of them'
        raise ConfigError(f"data_efficiency.data_sampling.dynamic_batching.enabled: True {said}")
    return new, notes


def _section(path: str, raw: Any, model: type[_Curriculum]) -> dict[str, Any]:
    """Ours, validated."""
    try:
        old = parse_section(model, path, raw)
        schedule: Any = parse_section(_KINDS[old.schedule_type], f"{path}.schedule_config", old.schedule_config)
        section: dict[str, Any] = {"enabled": True, "schedule": old.schedule_type.removeprefix("fixed_")}
        section |= {"start_length": old.min_difficulty, "end_length": old.max_difficulty}
        if isinstance(schedule, _Discrete):  # the difficulties alone count
            lengths, boundaries = schedule.difficulty, schedule.max_step
            section |= {"start_length": max(old.min_difficulty, lengths[0]), "duration": {"steps": boundaries[-1]}}
            section |= {"lengths": lengths, "boundaries": boundaries, "multiple_of": math.gcd(8, *lengths)}
        else:
            # ours has to divide the full length: strides get finer, less than one difficulty_step from DeepSpeed's
            strides = math.gcd(schedule.difficulty_step, old.max_difficulty)
            section |= {"multiple_of": strides, "duration": {"steps": schedule.total_curriculum_step}}
            section |= {"root_degree": schedule.root_degree} if isinstance(schedule, _Root) else {}
        parse_section(SequenceLengthWarmupConfig, OURS, section)
    except ConfigError as error:
        remedy = 'write that section in its place, which takes functions, too, "schedule": "package.module:function"'
        raise ConfigError(f'{path} is read as "{OURS}": {error}; or {remedy}') from None
    return section
