"""The length schedule as a DeepSpeed ``CurriculumScheduler``: what DeepSpeed's own code can hold and query."""

from deepspeed.runtime.data_pipeline import constants as names
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule


class SequenceLengthScheduler(LengthSchedule, CurriculumScheduler):
    """`LengthSchedule` behind DeepSpeed's interface, in its ``custom`` schedule: its own compute in floats, and stop
    updating at the end, so that a resume cannot ask about earlier steps. Raises as `LengthSchedule` does."""

    def __init__(self, config: SequenceLengthWarmupConfig, *, layout_multiple: int = 1):
        described = {
            names.CURRICULUM_LEARNING_MIN_DIFFICULTY: config.start_length,
            names.CURRICULUM_LEARNING_MAX_DIFFICULTY: config.end_length,
            names.CURRICULUM_LEARNING_SCHEDULE_TYPE: names.CURRICULUM_LEARNING_SCHEDULE_CUSTOM,
        }
        CurriculumScheduler.__init__(self, described)
        LengthSchedule.__init__(self, config, layout_multiple=layout_multiple)
        self.set_custom_get_difficulty(self.length_at)

    def update_difficulty(self, position: int) -> int:
        """As DeepSpeed's, but a pure function of the position, so that it also goes back on a resume."""
        self.state[names.CURRICULUM_LEARNING_CURRENT_DIFFICULTY] = self.length_at(position)
        return self.state[names.CURRICULUM_LEARNING_CURRENT_DIFFICULTY]
