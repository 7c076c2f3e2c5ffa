"""Which checkpoint a run goes on from."""

import json

import pytest

from ds_plugin.core.errors import CheckpointError
from launch_scripts.gpt.saved import FORMAT, latest_tag, read_saved

SAVED = {"seed": 3, "model.pipeline_parallel": 1, "steps": 2, "seconds": 0.0, "flops": 1.0, "step": 2}
SAVED |= {"format": FORMAT, "metrics": {"rows": 2, "first": "1,", "sha256": ""}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(SAVED | {"model.pipeline_parallel": 2}), "model.pipeline_parallel 2, this run has 1"),
        (json.dumps(SAVED | {"format": 0}), f"has format 0, this version reads {FORMAT}"),
        (json.dumps({name: value for name, value in SAVED.items() if name != "flops"}), "damaged .*flops"),
        (json.dumps(SAVED | {"metrics": []}), "damaged"),
        (json.dumps(SAVED | {"step": "2"}), "damaged .*step"),
        (json.dumps(SAVED | {"metrics": {"first": "1,"}}), "damaged .*rows"),
        (json.dumps([SAVED]), "damaged"),
        ("[" * 100000, "nested too deep"),
        ('{"format": 1' + "0" * 5000 + "}", "damaged .*digits"),
        ("", "damaged"),
        (None, "cannot be read .No such file"),
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


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_latest_that_cannot_be_read_names_the_tags(tmp_path, content):
    for tag in ("step00000010", "step00000020"):
        (tmp_path / tag).mkdir()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    said = "latest (cannot be read|names no checkpoint).*give --tag one of step00000010, step00000020"
    with pytest.raises(CheckpointError, match=said):
        latest_tag(tmp_path)
    (tmp_path / "latest").write_text("step00000010\n")
    assert latest_tag(tmp_path) == "step00000010"
