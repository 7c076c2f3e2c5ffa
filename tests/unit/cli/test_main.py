"""The `ds-plugin` command: whose script is run, and errors in one line."""

import json

import pytest

from ds_plugin.cli.main import framework_of, main
from megatron_patches.training_loop import script


@pytest.fixture
def started(monkeypatch):
    """What would have been run by Megatron-LM's door."""
    given = []
    monkeypatch.setattr(script, "run", lambda arguments: given.append(arguments) or 0)
    return given


@pytest.mark.parametrize("line", ["import megatron.core", "from megatron.training import pretrain"])
def test_a_megatron_script_is_told_by_its_imports(tmp_path, started, line):
    path = tmp_path / "train.py"
    path.write_text(f"def main():\n    {line}\n")
    assert main(["run", "--config", "methods.json", str(path), "--lr", "1", "--help"]) == 0
    assert started == [[str(path), "--lr", "1", "--help", "--ds-plugin-config", "methods.json"]]


def test_whose_script_it_is_can_be_said(tmp_path, started):
    path = tmp_path / "train.py"
    path.write_text("from mine import train\n")
    assert main(["run", "--framework", "megatron", str(path)]) == 0
    assert started == [[str(path)]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("def", "is not a Python script"),
        ("import deepspeed", "ds_plugin.initialize"),
        ("import torch", "--framework megatron"),
    ],
)
def test_what_cannot_be_run_is_one_error(tmp_path, capsys, started, text, said):
    path = tmp_path / "train.py"
    if text is not None:
        path.write_text(text)
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run: ") and said in error and error.count("\n") == 1
    assert not started


def test_a_relative_import_names_no_framework(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("from .megatron import train\nimport megatron.core\n")
    assert framework_of(path) == "megatron"
    path.write_text("from . import megatron\n")
    with pytest.raises(Exception, match="imports no framework"):
        framework_of(path)


def test_every_command_describes_itself(capsys):
    for command in ("run", "plan", "rules", "coord-check", "lr-transfer", "tune-warmup", "merge", "to-universal"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and f"ds-plugin {command}" in capsys.readouterr().out


def test_the_json_is_given_by_config(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"steps_per_print": 1}))
    assert main(["translate-config", "--config", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"steps_per_print": 1}
