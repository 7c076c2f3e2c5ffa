"""Lengths by step, worked out by hand from: start + floor((end - start) * step / duration), floored to the multiple."""

import pytest

from ds_plugin.errors import ConfigError
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.pacing import linear
from ds_plugin.sequence_length_warmup.scheduler import SequenceLengthScheduler

TABLE = [
    # start, end, duration, multiple, {step: length}
    # 8 + 56 * t / 7 = 8 + 8t
    (8, 64, 7, 8, {1: 16, 2: 24, 3: 32, 6: 56, 7: 64, 8: 64, 1000: 64}),
    # 8 + 248 t / 150: t=4 -> 14.6, t=5 -> 16.26, t=149 -> 254.3, the last increment at 150
    (8, 256, 150, 8, {1: 8, 4: 8, 5: 16, 75: 128, 149: 248, 150: 256, 151: 256}),
    # a start below the multiple: the first multiple at or above it, never 0 (8 + 120 t / 60 = 8 + 2t)
    (8, 128, 60, 16, {1: 16, 3: 16, 4: 16, 12: 32, 59: 112, 60: 128}),
    # a start between multiples: 20 -> 24 at least
    (20, 64, 44, 8, {1: 24, 4: 24, 5: 24, 12: 32, 44: 64}),
    # fewer steps than increments: 8 + 56 t / 2
    (8, 64, 2, 8, {1: 32, 2: 64, 3: 64}),
    # a duration of one step is over at once
    (8, 64, 1, 8, {1: 64, 2: 64}),
    # start = end
    (64, 64, 10, 8, {1: 64, 5: 64, 11: 64}),
    # the multiple is the whole length
    (8, 64, 10, 64, {1: 64, 10: 64}),
    # multiple 1: 1 + 9 t / 10
    (1, 10, 10, 1, {1: 1, 2: 2, 5: 5, 9: 9, 10: 10}),
]


@pytest.mark.parametrize(("start", "end", "duration", "multiple", "expected"), TABLE)
def test_linear(start, end, duration, multiple, expected):
    found = {t: linear(t, start=start, end=end, duration=duration, multiple_of=multiple) for t in expected}
    assert found == expected


def test_lengths_never_fall_and_stay_in_bounds():
    for start, end, duration, multiple, _ in TABLE:
        lengths = [
            linear(t, start=start, end=end, duration=duration, multiple_of=multiple) for t in range(1, duration + 3)
        ]
        assert lengths == sorted(lengths)
        assert all(start <= length <= end and length % multiple == 0 for length in lengths)
        assert lengths[-1] == end


def config(**changes):
    return SequenceLengthWarmupConfig.model_validate(
        {"enabled": True, "start_length": 8, "end_length": 64, "duration": {"steps": 7}, **changes}
    )


def test_scheduler_is_deepspeeds_and_a_function_of_the_step():
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    scheduler = SequenceLengthScheduler(config())
    assert isinstance(scheduler, CurriculumScheduler)
    assert [scheduler.update_difficulty(step) for step in (1, 7, 9)] == [16, 64, 64]
    assert scheduler.state["current_difficulty"] == 64
    assert scheduler.update_difficulty(2) == 24  # the host's own class would stay at the end for ever
    assert scheduler.get_difficulty(3) == 32


def test_layout_joins_multiple_of():
    assert SequenceLengthScheduler(config(), layout_multiple=16).length_at(1) == 16
    assert SequenceLengthScheduler(config(), layout_multiple=16).length_at(3) == 32
    with pytest.raises(ConfigError, match="64 is not divisible by 24.*3 parts"):
        SequenceLengthScheduler(config(), layout_multiple=3)
