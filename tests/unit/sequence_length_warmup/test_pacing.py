"""Lengths by step, worked out by hand from: start + floor((end - start) * step / duration), floored to the multiple."""

import math
import sys
from types import ModuleType

import pytest

from ds_plugin.core.errors import ConfigError
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule

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


def lengths_of(positions, start=8, end=64, duration=7, multiple=1, **changes):
    given = {"start_length": start, "end_length": end, "duration": {"steps": duration}, "multiple_of": multiple}
    schedule = LengthSchedule(config(**given, **changes))
    return [schedule.length_at(position) for position in positions]


@pytest.mark.parametrize(("start", "end", "duration", "multiple", "expected"), TABLE)
def test_linear(start, end, duration, multiple, expected):
    assert lengths_of(expected, start, end, duration, multiple) == list(expected.values())


def test_lengths_never_fall_and_stay_in_bounds():
    for start, end, duration, multiple, _ in TABLE:
        lengths = lengths_of(range(1, duration + 3), start, end, duration, multiple)
        assert lengths == sorted(lengths)
        assert all(start <= length <= end and length % multiple == 0 for length in lengths)
        assert lengths[-1] == end


def config(**changes):
    return SequenceLengthWarmupConfig.model_validate(
        {"enabled": True, "start_length": 8, "end_length": 64, "duration": {"steps": 7}, **changes}
    )


def test_scheduler_is_deepspeeds_and_a_function_of_the_step():
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    from ds_plugin.deepspeed_engine.scheduler import SequenceLengthScheduler

    scheduler = SequenceLengthScheduler(config())
    assert isinstance(scheduler, CurriculumScheduler)
    assert [scheduler.update_difficulty(step) for step in (1, 7, 9)] == [16, 64, 64]
    assert scheduler.state["current_difficulty"] == 64
    assert scheduler.update_difficulty(2) == 24  # DeepSpeed's own class would stay at the end for ever
    assert scheduler.get_difficulty(3) == 32


def test_layout_joins_multiple_of():
    assert LengthSchedule(config(), layout_multiple=16).length_at(1) == 16
    assert LengthSchedule(config(), layout_multiple=16).length_at(3) == 32
    with pytest.raises(ConfigError, match="64 is not divisible by 24.*3 parts"):
        LengthSchedule(config(), layout_multiple=3)


def test_root_is_exact():
    # 8 + 56 * sqrt(t / 16): t=1 -> 8 + 14 = 22, t=4 -> 36, t=9 -> 50, t=16 -> 64
    root = {"schedule": "root", "root_degree": 2}
    assert lengths_of((1, 4, 9, 16, 17), duration=16, **root) == [22, 36, 50, 64, 64]
    # 56 * (t / 27) ** (1/3): t=1 -> 18.67, t=8 -> 37.3, t=27 -> 56; in floats 27 ** (1/3) is 3.0000000000000004 or less
    assert lengths_of((0, 1, 8, 27), duration=27, **root | {"root_degree": 3}) == [8, 26, 45, 64]
    # degree 1 is the linear schedule
    span = {"end": 256, "duration": 37}
    assert lengths_of(range(40), **span, **root | {"root_degree": 1}) == lengths_of(range(40), **span)


def test_sinusoidal():
    # 8 + 100 * sin(pi/2 * t/3): sin 0, 30, 60, 90 degrees: 8, 8 + 50, 8 + 86.6, 8 + 100
    found = lengths_of((0, 1, 2, 3, 4), end=108, duration=3, schedule="sinusoidal")
    assert found == [8, 58, 94, 108, 108]
    naive = [min(8 + int(1016 * math.sin(math.pi / 2 * t / 977)), 1024) for t in range(978)]  # as the authors have it
    assert lengths_of(range(978), end=1024, duration=977, schedule="sinusoidal") == naive


def test_exponential():
    # 16 * (256 / 16) ** (t / 4): twice as long at each step, to the last token: in floats 64 may be 63.99...
    given = {"start": 16, "end": 256, "duration": 4, "schedule": "exponential"}
    assert lengths_of((0, 1, 2, 3, 4, 5), **given) == [16, 32, 64, 128, 256, 256]
    naive = [int(8 * 128 ** (t / 977)) for t in range(1, 977)]
    assert lengths_of(range(1, 977), end=1024, duration=977, schedule="exponential") == naive


def test_a_paper_by_name():
    named = SequenceLengthWarmupConfig.model_validate({"enabled": True, "preset": "skyladder", "end_length": 64})
    assert (named.mode, named.schedule, named.start_length) == ("mask", "sinusoidal", 8)
    run = named.in_run(steps=1000)
    assert run.duration.steps == 620 and LengthSchedule(run).length_at(620) == 64 > LengthSchedule(run).length_at(500)
    assert named.in_run(tokens=1000).duration.tokens == 620 and named.in_run() is named
    again = SequenceLengthWarmupConfig.model_validate(run.model_dump(mode="json"))
    assert again == run  # what is saved is read back, the preset's name with it
    mine = config(preset="skyladder", mode="truncate", duration={"steps": 3})  # what is said goes before
    assert (mine.mode, mine.schedule, mine.duration.steps) == ("truncate", "sinusoidal", 3)
    assert config(duration={"share": 0.001}).in_run(steps=10).duration.steps == 1


def test_a_share_of_a_run_that_is_not_known():
    with pytest.raises(ConfigError, match=r"duration.share: 0.5 of a run whose length.*total_num_steps.*write"):
        LengthSchedule(config(duration={"share": 0.5}))
    with pytest.raises(ConfigError, match="duration.steps: .*1000000, got 5000000"):
        config(duration={"share": 0.5}).in_run(steps=10**7)
    for duration, words in (({}, "got none"), ({"steps": 2, "share": 0.5}, "got steps 2 and share 0.5")):
        with pytest.raises(ValueError, match=f"needs one of steps, tokens and share, {words}"):
            config(duration=duration)
    discrete = {"schedule": "discrete", "lengths": [8, 64], "boundaries": [5], "duration": {"share": 0.5}}
    with pytest.raises(ValueError, match="duration.share: the boundaries of a discrete schedule"):
        config(**discrete)


def test_discrete():
    given = {"schedule": "discrete", "lengths": [8, 32, 64], "boundaries": [5, 10]}
    assert lengths_of((1, 5, 6, 10, 11, 99), duration=10, **given) == [8, 8, 32, 32, 64, 64]


def squared(share, start, end):
    return start + (end - start) * share**2


def test_a_users_schedule():
    name = f"{__name__}:squared"
    import sys

    sys.modules.setdefault(__name__, sys.modules[squared.__module__])
    scheduler = LengthSchedule(config(schedule=name, duration={"steps": 4}))
    # 8 + 56 * (t/4)^2 = 11.5, 22, 39.5, 64
    assert [scheduler.length_at(t) for t in (1, 2, 3, 4, 5)] == [8, 16, 32, 64, 64]


def not_a_number(share, start, end):
    return float("nan")


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        ("no.such.module:f", ["'no.such.module:f'", "cannot be imported", "package.module:function"]),
        ("math:nothing", ["'math:nothing'", "cannot be imported"]),
        ("math:pi", ["'math:pi'", "not a function", "3.14"]),
        ("math:sqrt", ["'math:sqrt'", "one argument", "start_length, end_length"]),
        (f"{__name__}:not_a_number", ["nan", "not a finite number"]),
    ],
)
def test_a_users_schedule_that_cannot_be_used(schedule, parts):
    import sys

    sys.modules.setdefault(__name__, sys.modules[squared.__module__])
    with pytest.raises(ConfigError) as caught:
        LengthSchedule(config(schedule=schedule))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_few_distinct_lengths():
    # 8 to 64 in three: 8, 36 -> 32, 64; each length is floored to one of them
    scheduler = LengthSchedule(config(max_distinct_lengths=3))
    assert scheduler.lengths() == [8, 32, 64]
    assert [scheduler.length_at(t) for t in range(1, 8)] == [8, 8, 32, 32, 32, 32, 64]
    assert LengthSchedule(config(max_distinct_lengths=2)).lengths() == [8, 64]
    assert LengthSchedule(config(max_distinct_lengths=99)).lengths() == list(range(16, 65, 8))


def test_lengths_that_divide_the_full_one():
    constant = {"tokens_per_step": "constant", "multiple_of": 8, "duration": {"steps": 12}, "end_length": 96}
    # 8 + 88 t / 12: 15, 22, 30, 37, 44, 52, 59, 66, 74, 81, 88, 96; of 8, 16, 24, 32, 48, 96 the largest below
    found = [LengthSchedule(config(**constant)).length_at(t) for t in range(1, 13)]
    assert found == [8, 16, 24, 32, 32, 48, 48, 48, 48, 48, 48, 96]
    # from 40 on the first multiple is 40, which does not divide 96: 32 does
    assert LengthSchedule(config(**constant, start_length=40)).lengths() == [32, 48, 96]
    for other in ({"mode": "carry"}, {"mode": "mask"}, {"max_distinct_lengths": 4}):
        with pytest.raises(ValueError, match='tokens_per_step: "constant" cuts samples into equal parts, and m'):
            config(**constant, **other)


def test_tokens_count_from_one():
    scheduler = LengthSchedule(config(duration={"tokens": 7000}))
    # 8 + 56 * token / 7000: 16 from token 1000 on
    assert [scheduler.length_at(token) for token in (1, 999, 1000, 6999, 7000)] == [8, 8, 16, 56, 64]


PLANS = [
    # lengths of config(): 16, 24, 32, 40, 48, 56, 64, 64, ... with 10 samples a step
    ({}, {"steps": 3}, (3, 720, 1920)),
    ({}, {"steps": 9}, (9, 4080, 5760)),
    ({}, {"tokens": 721}, (4, 1120, 2560)),
    ({}, {"tokens": 4080}, (9, 4080, 5760)),
    ({"mode": "mask"}, {"steps": 3}, (3, 1920, 1920)),
    ({"tokens_per_step": "constant"}, {"steps": 3}, (3, 1920, 1920)),
    # 16 of window 0, 24 of window 1 (64 in three of 24, 24, 16), 32 of window 2
    ({"mode": "carry"}, {"steps": 3}, (3, 720, 1920)),
    # a duration in tokens: 8, then 8 + 56 * 81 / 700 = 14.5 -> 8, 8 + 56 * 161 / 700 = 20.9 -> 16
    ({"duration": {"tokens": 700}}, {"steps": 3}, (3, 320, 1920)),
]


@pytest.mark.parametrize(("changes", "end", "expected"), PLANS)
def test_a_run_planned(changes, end, expected):
    from ds_plugin.sequence_length_warmup.plan import plan

    found = plan(LengthSchedule(config(**changes)), 10, **end)
    assert (found.steps, found.trained, found.read) == expected


def test_a_function_that_fails_in_the_middle_is_known_before_training(monkeypatch):
    module = ModuleType("schedules_of_mine")
    module.broken = lambda share, start, end: None if 0.3 < share < 0.6 else start + share * (end - start)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    given = {"enabled": True, "end_length": 128, "duration": {"steps": 100}, "schedule": "schedules_of_mine:broken"}
    with pytest.raises(ConfigError, match="sequence_length_warmup.schedule: 'schedules_of_mine:broken'"):
        LengthSchedule(SequenceLengthWarmupConfig.model_validate(given))
