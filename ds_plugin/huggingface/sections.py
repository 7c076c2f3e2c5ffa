"""The methods' sections on their way from a user's JSON to ``deepspeed.initialize``, and what ``"auto"`` means there.

Accelerate refuses an ``"auto"`` that it does not know in the JSON, so the sections are out of it while it looks.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from ds_plugin.config import SECTIONS
from ds_plugin.core.errors import ConfigError, warn
from ds_plugin.core.json_files import nested
from ds_plugin.core.settings_model import parse_section
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig

AUTO = "auto"
given: dict[str, Any] = {}  # those that enable() was given, which no DeepSpeed JSON holds
#: a sample's length in tokens by the names of training arguments (TRL's), then of a model's configuration
_ARGUMENTS = ("max_length", "max_seq_length", "model_max_length")
_CONFIGURATION = ("max_position_embeddings", "n_positions", "max_sequence_length")


def of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections in a DeepSpeed config, as they are written."""
    return {name: config[name] for name in SECTIONS if name in config}


def with_given(found: dict[str, Any]) -> dict[str, Any]:
    """``found`` in a DeepSpeed config, and those that `enable` was given. Raises ConfigError: both have one."""
    if both := sorted(found.keys() & given.keys()):
        raise ConfigError(f"{both[0]}: stands in the DeepSpeed JSON and in the one given to enable(); remove one")
    return {**copy.deepcopy(given), **found}  # `resolve` writes into them


@contextlib.contextmanager
def out_of(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The sections, which the config does not have inside the block and has again after it."""
    taken = of(config)
    for name in taken:
        del config[name]
    try:
        yield copy.deepcopy(taken)
    finally:
        config.update(taken)


def resolve(sections: dict[str, Any], model: Any, arguments: Any, steps: int | None = None) -> dict[str, Any]:
    """The sections with a number for every ``"auto"`` that has one.

    ``sequence_length_warmup.end_length``: the training arguments' ``max_length`` (TRL), else how many positions the
    model's configuration gives it. ``arguments``: of the Trainer, or None; ``steps``: of its run, for a
    ``duration.share``.

    Raises:
        ConfigError: any other field is ``"auto"``, or nothing says how long samples are.
    """
    warmup = sections.get("sequence_length_warmup")
    if isinstance(warmup, dict) and warmup.get("end_length") == AUTO:
        warmup["end_length"] = _sample_length(arguments, getattr(model, "config", None))
    for where, value, _ in nested(sections):
        if value == AUTO:
            what = f'{where}: "auto" follows from nothing that the training arguments or the model say'
            raise ConfigError(f"{what}; write a value")
    if steps is not None and isinstance(warmup, dict) and warmup.get("enabled"):
        section = parse_section(SequenceLengthWarmupConfig, "sequence_length_warmup", warmup)
        if (in_run := section.in_run(steps=steps)) is not section:
            sections["sequence_length_warmup"] = in_run.model_dump(mode="json")
    return sections


def _sample_length(arguments: Any, configuration: Any) -> int:
    for owner, name in (*((arguments, n) for n in _ARGUMENTS), *((configuration, n) for n in _CONFIGURATION)):
        length = getattr(owner, name, None)
        if isinstance(length, int) and not isinstance(length, bool):
            warn("sequence_length_warmup.end_length: %d, from %s.%s", length, type(owner).__name__, name)
            return length
    names = ", ".join((*_ARGUMENTS, *_CONFIGURATION))
    what = f'"auto", and neither training arguments nor model configuration have one of {names}'
    raise ConfigError(f"sequence_length_warmup.end_length: {what}; write the samples' length in tokens")
