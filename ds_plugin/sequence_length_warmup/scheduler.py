"""The length schedule as a DeepSpeed ``CurriculumScheduler``: what DeepSpeed's own code can hold and query."""

import math

import torch
from deepspeed.runtime.data_pipeline import constants as names
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

from ds_plugin.errors import ConfigError
from ds_plugin.sequence_length_warmup import pacing
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig


class SequenceLengthScheduler(CurriculumScheduler):
    """Length of a sample by optimizer step. Stateless: the length is a function of the step alone.

    It derives from the host's class with the ``custom`` schedule and supplies the difficulty itself, because the host's
    own linear schedule computes in floats and stops updating once it has reached the end (so it cannot be asked about
    an earlier step, as a resume does).
    """

    def __init__(self, config: SequenceLengthWarmupConfig, *, layout_multiple: int = 1):
        """``layout_multiple``: what the parallel layout divides a sample by (`layout_multiple()` below finds it).

        Raises:
            ConfigError: the full length is not divisible by it.
        """
        self.multiple_of = math.lcm(config.multiple_of, layout_multiple)
        if config.end_length % self.multiple_of:
            raise ConfigError(
                f"sequence_length_warmup.end_length: {config.end_length} is not divisible by {self.multiple_of}, the "
                f"least common multiple of multiple_of {config.multiple_of} and the {layout_multiple} parts the "
                f"parallel layout cuts a sample into; write a multiple of {self.multiple_of}"
            )
        super().__init__(
            {
                names.CURRICULUM_LEARNING_MIN_DIFFICULTY: config.start_length,
                names.CURRICULUM_LEARNING_MAX_DIFFICULTY: config.end_length,
                names.CURRICULUM_LEARNING_SCHEDULE_TYPE: names.CURRICULUM_LEARNING_SCHEDULE_CUSTOM,
            }
        )
        self.config = config
        self.set_custom_get_difficulty(self.length_at)

    def length_at(self, step: int) -> int:
        """Length in tokens of optimizer step ``step``, counted from 1."""
        c = self.config
        return pacing.linear(
            step, start=c.start_length, end=c.end_length, duration=c.duration.steps, multiple_of=self.multiple_of
        )

    def update_difficulty(self, global_steps: int) -> int:
        """As the host's, but a pure function of the step, so that it also goes back on a resume."""
        self.state[names.CURRICULUM_LEARNING_CURRENT_DIFFICULTY] = self.length_at(global_steps)
        return self.state[names.CURRICULUM_LEARNING_CURRENT_DIFFICULTY]


def layout_multiple(module: torch.nn.Module) -> int:
    """The number of equal parts a megatron-core model's layout cuts each sample into; 1 for any other model.

    Sequence parallelism scatters a sample over the tensor-parallel ranks, inside the model.
    """
    config = getattr(module, "config", None)
    return getattr(config, "tensor_model_parallel_size", 1) if getattr(config, "sequence_parallel", False) else 1
