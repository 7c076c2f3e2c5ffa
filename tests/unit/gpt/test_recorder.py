"""What the record says before the first step, and which checkpoint it goes on from."""

import json
from types import SimpleNamespace

import pytest

from ds_plugin.core.errors import CheckpointError
from ds_plugin.sequence_length_warmup.config import SequenceLengthWarmupConfig
from ds_plugin.sequence_length_warmup.schedule import LengthSchedule
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from launch_scripts.gpt.recorder import FORMAT, Recorder, read_saved


@pytest.mark.parametrize(
    ("steps", "parts"),
    [(20, []), (19, ["warmup of 20", "56 of 64"]), (11, ["32 of 64", "first snapshot, at step 12"])],
)
def test_a_run_that_is_too_short_is_told(steps, parts):
    """Lengths 8 + 56 t / 20, floored to 8: 56 at step 19, 32 at step 11. Snapshots every 4 steps from step 10 on."""
    warmup = SequenceLengthWarmupConfig.model_validate({"end_length": 64, "duration": {"steps": 20}})
    averaging = WeightAveragingConfig.model_validate({"interval": 4, "start_step": 10})
    record = Recorder.__new__(Recorder)
    record.engine = SimpleNamespace(train_batch_size=lambda: 2)
    record.run = SimpleNamespace(training=SimpleNamespace(steps=steps))
    record.plugin = SimpleNamespace(
        warmup=SimpleNamespace(config=warmup, scheduler=LengthSchedule(warmup)),
        averager=WeightAverager(averaging, SimpleNamespace(tensors=list, refresh=None)),
    )
    text = " ".join(record._shortfalls())
    assert all(part in text for part in parts) and bool(text) == bool(parts), text


SAVED = {"seed": 3, "model.pipeline_parallel": 1, "steps": 2, "seconds": 0.0, "flops": 1.0, "step": 2}
SAVED |= {"format": FORMAT, "metrics": {"rows": 2, "first": "1,", "sha256": ""}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(SAVED | {"model.pipeline_parallel": 2}), "model.pipeline_parallel 2, this run has 1"),
        (json.dumps(SAVED | {"format": 0}), f"has format 0, this version reads {FORMAT}"),
        (json.dumps({name: value for name, value in SAVED.items() if name != "flops"}), "cannot be read .*flops"),
        (json.dumps(SAVED | {"metrics": []}), "cannot be read .*metrics"),
        (json.dumps([SAVED]), "cannot be read"),
        ("[" * 100000, "cannot be read .*Recursion"),
        ('{"format": 1' + "0" * 5000 + "}", "cannot be read .*digits"),
        ("", "cannot be read"),
        (None, "cannot be read .*No such file"),
    ],
)
def test_a_run_json_of_another_run_or_damaged(tmp_path, text, message):
    path, identity = tmp_path / "run.json", {"seed": 3, "model.pipeline_parallel": 1}
    path.write_text(json.dumps(SAVED))
    assert read_saved(path, identity) == SAVED
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_saved(path, identity)
