"""The JSON file: one section per method, taken out before DeepSpeed reads the rest."""

import copy
import functools
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.json_files import read_json, trouble
from ds_plugin.core.settings_model import SectionConfig, nearest, parse_section
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.translate import translate
from ds_plugin.weight_averaging.config import WeightAveragingConfig

SECTIONS: dict[str, type[SectionConfig]] = {
    "sequence_length_warmup": SequenceLengthWarmupConfig,
    "completep": CompletePConfig,
    "weight_averaging": WeightAveragingConfig,
}


@dataclass(frozen=True)
class PluginConfig:
    """The three sections, validated. One that is absent or ``"enabled": false`` is None: the method is off."""

    sequence_length_warmup: SequenceLengthWarmupConfig | None = None
    completep: CompletePConfig | None = None
    weight_averaging: WeightAveragingConfig | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "PluginConfig":
        """The three sections of a DeepSpeed config, as `split_config` reads them; raises as it does."""
        return split_config(raw)[1]

    def to_dict(self) -> dict[str, Any]:
        """The enabled sections with every default filled in, for logs and saved state (JSON types only)."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        return {name: section.model_dump(mode="json") for name, section in sections.items() if section is not None}


def load_json(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A config given as a path or a mapping, as a dict of its own (the caller's is never changed). Raises ConfigError:
    the file cannot be read as a JSON object (`read_json` says why), or `trouble` finds a value that is no setting."""
    config, where = source, ""
    if isinstance(source, (str, Path)):
        where, remedy = f"{source}: ", "give a file with a JSON object"
        config = read_json(Path(source), error=ConfigError, remedy=remedy)
    if not isinstance(config, Mapping):
        raise ConfigError(f"the config is a {type(config).__name__}; give a path or a dict")
    judged = dict(config)
    if judged.get("steps_per_print") == math.inf:  # as Accelerate writes it
        del judged["steps_per_print"]
    if wrong := trouble(judged, settings=True):
        raise ConfigError(f"{where}{wrong}; write another value")
    return copy.deepcopy(dict(config))


def split_config(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], PluginConfig]:
    """Separate our sections from DeepSpeed's: ``(config for deepspeed.initialize, validated sections)``.

    DeepSpeed's own sequence length curricula are read as ``sequence_length_warmup``, which the log says once.
    Raises ConfigError as `load_json` does, or for a wrong field in one of the sections, a misspelt section name, or a
    curriculum that cannot be translated."""
    config, notes = translate(load_json(source))
    for note in notes:
        say_once(note)
    refuse_misspelt(config)
    parsed = {name: parse_section(model, name, config.pop(name)) for name, model in SECTIONS.items() if name in config}
    return config, PluginConfig(**{name: section for name, section in parsed.items() if section.enabled})  # type: ignore


def refuse_misspelt(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is nearly a section's name."""
    for key in config:
        # only a near-identical name is a misspelling for certain: "completion" is not
        guess = nearest(key.lower().replace("-", "_"), SECTIONS, cutoff=0.85) if key not in SECTIONS else None
        if guess:
            raise ConfigError(f'{key}: unknown section (DeepSpeed would ignore it); did you mean "{guess}"?')


@functools.cache
def say_once(note: str) -> None:
    """Log on rank 0 (as launchers number ranks: nothing is initialized yet), each text once in a process, until
    ``say_once.cache_clear()``."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("ds_plugin").warning("%s", note)
