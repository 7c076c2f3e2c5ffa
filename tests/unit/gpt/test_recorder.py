"""What the record says before the first step."""

from types import SimpleNamespace

import pytest

from ds_plugin.core.errors import StateError
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from launch_scripts.gpt.recorder import Standstill, shortfalls


@pytest.mark.parametrize(
    ("steps", "parts"),
    [(20, []), (19, ["warmup of 20", "56 of 64"]), (11, ["32 of 64", "first snapshot, at step 12"])],
)
def test_a_run_that_is_too_short_is_told(steps, parts):
    """Lengths 8 + 56 t / 20, floored to 8: 56 at step 19, 32 at step 11. Snapshots every 4 steps from step 10 on."""
    warmup = SequenceLengthWarmupConfig.model_validate({"end_length": 64, "duration": {"steps": 20}})
    averaging = WeightAveragingConfig.model_validate({"interval": 4, "start_step": 10})
    plugin = SimpleNamespace(
        warmup=SimpleNamespace(config=warmup, scheduler=LengthSchedule(warmup)),
        averager=WeightAverager(averaging, SimpleNamespace(tensors=list, refresh=None)),
    )
    text = " ".join(shortfalls(plugin, steps=steps, batch=2))
    assert all(part in text for part in parts) and bool(text) == bool(parts), text


def test_a_run_that_gets_nowhere_ends():
    """Three steps in a row that change nothing; one that does begins the count anew."""
    standstill = Standstill(3)
    for step, skipped in enumerate((0, 1, 1, 0, 0, 1, 1), start=1):
        standstill.book(step, skipped=bool(skipped))
    with pytest.raises(StateError, match="step 8: 3 steps in a row were skipped"):
        standstill.book(8, skipped=True)
