"""The folder of a run: what guards it, and numbers that come back as they went."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_plugin.core.errors import CheckpointError, ConfigError, DataError
from ds_plugin.core.files import atomic_path, atomic_write, replace_folder
from launch_scripts.gpt.folder import COLUMNS, RunFolder, read_metrics
from tests.unit.gpt.test_hold import full_disk

HEADER = (
    "step,tokens_trained,tokens_read,tokens_carried,length,length_held,lr,train_loss,eval_loss,eval_loss_averaged,"
    "tokens_per_second,flops,loss_ratio,adam_variance_l1,adam_variance_max"
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path, "first", resume=False)


def log(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        folder.append({"step": step, "train_loss": step / 10})


def test_columns_are_what_users_plot():
    assert ",".join(COLUMNS) == HEADER


def test_new_folder(tmp_path: Path):
    folder = RunFolder.open(tmp_path / "runs", "first", resume=False)
    assert folder.path == tmp_path / "runs" / "first" and folder.path.is_dir()
    RunFolder.open(tmp_path / "runs", "first", resume=False)  # empty still: nothing to protect


@pytest.mark.parametrize("held", ["metrics.csv", "summary.json", "checkpoints"])
def test_a_run_is_not_overwritten(folder: RunFolder, tmp_path: Path, held: str):
    (folder.path / held).mkdir() if held == "checkpoints" else (folder.path / held).write_text("kept")
    before = {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    with pytest.raises(ConfigError, match=rf"already holds a run \({held}\); use --resume .* or another --name"):
        RunFolder.open(tmp_path, "first", resume=False)
    assert before == {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}


def test_resume_needs_a_checkpoint(folder: RunFolder, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"checkpoints/latest' does not exist.*check --name \('first'\)"):
        RunFolder.open(tmp_path, "first", resume=True)
    with pytest.raises(CheckpointError):
        RunFolder.open(tmp_path, "never", resume=True)
    assert not (tmp_path / "never").exists()
    folder.checkpoints.mkdir()
    (folder.checkpoints / "latest").write_text("step10")
    assert RunFolder.open(tmp_path, "first", resume=True).path == folder.path


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    for resume in (False, True):
        with pytest.raises(ConfigError if not resume else CheckpointError, match="runs/first"):
            RunFolder.open(tmp_path / "runs", "first", resume=resume)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", ".hidden", "a\n", "\udcff"])
def test_bad_names(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="cannot name a folder"):
        RunFolder.open(tmp_path, name, resume=False)


def test_name_of_a_file(tmp_path: Path):
    (tmp_path / "first").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.open(tmp_path, "first", resume=False)


def test_metrics_round_trip_bitwise(folder: RunFolder):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, math.pi * 1e-5, -0.0, math.inf]
    for step, value in enumerate(values, start=1):
        folder.append({"step": step, "lr": value})
    read = read_metrics(folder.metrics)
    assert [v.hex() for v in read["lr"]] == [v.hex() for v in values]
    assert read["step"] == [1, 2, 3, 4, 5, 6, 7] and all(type(step) is int for step in read["step"])
    assert read["train_loss"] == [None] * 7
    folder.append({"step": 8, "lr": math.nan})
    assert math.isnan(read_metrics(folder.metrics)["lr"][-1])


def test_file_as_written(folder: RunFolder):
    folder.append(
        {"step": np.int64(1), "tokens_read": 2**40, "length": torch.tensor(64), "train_loss": np.float32(0.5)}
    )
    folder.append({"step": 2, "eval_loss": torch.tensor(1.25), "lr": None})
    # read while the run goes on: every row is flushed
    assert folder.metrics.read_text() == f"{HEADER}\n1,,1099511627776,,64,,,0.5,,,,,,,\n2,,,,,,,,1.25,,,,,,\n"


@pytest.mark.parametrize("row", [{"step": 1, "los": 2.0}, {"train_loss": 1.0}, {"step": None}])
def test_bad_rows(folder: RunFolder, row: dict):
    with pytest.raises(ValueError, match="a row of metrics.csv"):
        folder.append(row)


def resumed(folder: RunFolder, step: int, seal: dict) -> tuple[RunFolder, str | None]:
    """The folder as the next process sees it, and what is said about metrics.csv."""
    folder.close()
    again = RunFolder(folder.path)
    return again, again.go_on_from(step, json.loads(json.dumps(seal)))


def test_resume_cuts_later_rows_when_the_next_is_written(folder: RunFolder):
    log(folder, 1, 2)
    seal = folder.seal()
    log(folder, 3, 4)
    whole = folder.metrics.read_text()
    again, said = resumed(folder, 2, seal)
    assert said is None and folder.metrics.read_text() == whole
    log(again, 3)
    assert folder.metrics.read_text() == "".join(whole.splitlines(keepends=True)[:4])
    assert again.seal() == resumed(again, 3, again.seal())[0].seal()
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "metrics.csv"]


def test_unfinished_last_line(folder: RunFolder):
    log(folder, 1, 2)
    seal = folder.seal()
    folder.close()
    with open(folder.metrics, "a") as stream:
        stream.write("3,1")  # of 3,12345,...: the machine went down
    assert read_metrics(folder.metrics)["step"] == [1, 2]
    again, said = resumed(folder, 2, seal)
    log(again, 3)
    assert said is None and read_metrics(folder.metrics)["step"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("left", "said"),
    [(None, "lacks 3 of the 3"), ("", "lacks 3 of the 3"), ("step,tok", "lacks 3 of the 3"), (2, "lacks 1 of the 3")],
)
def test_rows_that_were_lost_are_said(folder: RunFolder, left: str | int | None, said: str):
    log(folder, 1, 2, 3)
    seal = folder.seal()
    text = folder.metrics.read_text()
    folder.metrics.unlink()
    if left is not None:
        folder.metrics.write_text("".join(text.splitlines(keepends=True)[: left + 1]) if left == 2 else str(left))
    again, found = resumed(folder, 3, seal)
    assert found is not None and said in found and "up to step 3" in found
    log(again, 4)
    assert read_metrics(folder.metrics)["step"] == ([1, 2, 4] if left == 2 else [4])
    assert resumed(again, 4, again.seal())[1] is None  # the next resume finds what this run has left


@pytest.mark.parametrize("which", ["another run's", "changed", "a row too many", "doubled", "a folder", "not UTF-8"])
def test_metrics_that_are_not_this_runs_are_refused(folder: RunFolder, which: str):
    log(folder, 1, 2, 3)
    seal = folder.seal()
    header, *rows = folder.metrics.read_text().splitlines(keepends=True)
    wrong = {
        "another run's": [header, *(row.replace("0.1", "0.7") for row in rows)],
        "changed": [header, rows[0], rows[1].replace("0.2", "0.25"), rows[2]],
        "a row too many": [header, rows[0].replace("1,", "0,", 1), *rows],
        "doubled": [header, *rows, *rows],
        "not UTF-8": [],
    }
    folder.metrics.unlink()
    if which == "a folder":
        folder.metrics.mkdir()
    else:
        folder.metrics.write_bytes("".join(wrong[which]).encode() or b"\xff\n")
    before = folder.metrics.stat().st_mtime_ns
    with pytest.raises(DataError, match="metrics: .*metrics.csv'"):
        resumed(folder, 3, seal)
    assert folder.metrics.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n1,2\n", "has the columns"),
        (HEADER + "\n1,,,,,x" + 9 * "," + "\n", "line 2 of .* is damaged"),
        (HEADER + "\n1" + 14 * "," + "\n2,,\n", "line 3 of .* is damaged"),
    ],
)
def test_damaged_metrics(folder: RunFolder, text: str, message: str):
    folder.metrics.write_text(text)
    with pytest.raises(DataError, match=message):
        read_metrics(folder.metrics)


def test_missing_metrics(folder: RunFolder):
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(folder.metrics)


def test_a_full_disk_leaves_what_was_there(folder: RunFolder):
    log(folder, 1, 2)
    folder.write_summary({"loss": 0.1})
    whole = folder.metrics.read_text()
    with full_disk(len(whole) + 5):  # half a line fits
        with pytest.raises(OSError):
            log(folder, 3)
        assert folder.metrics.read_text() == whole
        with pytest.raises(OSError):
            folder.write_summary({"loss": "x" * 1000})
    assert json.loads(folder.summary.read_text()) == {"loss": 0.1}
    log(folder, 3)
    assert read_metrics(folder.metrics)["step"] == [1, 2, 3]
    assert resumed(folder, 3, folder.seal())[1] is None
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "metrics.csv", "summary.json"]


def test_a_resume_sweeps_what_a_killed_run_has_left_once_it_is_not_refused(folder: RunFolder):
    log(folder, 1)
    seal = folder.seal()
    tag = folder.checkpoints / "step00000001"
    tag.mkdir(parents=True)
    left = [folder.path / "..averaged.0a1b.tmp", folder.checkpoints / ".latest.4.tmp", tag / ".run.5.tmp.json"]
    for path in left:
        path.write_text("x")
    again, _ = resumed(folder, 1, seal)
    assert all(path.exists() for path in left)
    again.sweep()
    assert not any(path.exists() for path in left) and tag.exists()


def test_summary(folder: RunFolder):
    folder.write_summary({"loss": 0.1, "data": Path("a/b")})
    folder.write_summary({"loss": 0.2, "data": Path("a/b")})
    assert json.loads(folder.summary.read_text()) == {"loss": 0.2, "data": "a/b"}


# ------------------------------------------------------------------------------------------------------ atomic files


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path: Path):
    target = tmp_path / "state.bin"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, fail)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    atomic_write(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_atomic_write_of_nothing(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "x", lambda path: None)


def test_atomic_write_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("sync")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    atomic_write(tmp_path / "x", lambda path: path.write_text("x"))
    assert events == ["sync", "rename", "sync"]  # the content, the name, the folder


def test_several_atomic_paths_go_in_place_last_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order = []
    replace = os.replace

    def noted_replace(source: Path, target: Path) -> None:
        order.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted_replace)
    with atomic_path(tmp_path / "complete") as mark, atomic_path(tmp_path / "content.bin") as content:
        assert content.suffix == ".bin"
        mark.write_text("x")
        content.write_text("y")
    assert order == ["content.bin", "complete"]


def test_a_folder_is_replaced_and_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also after kills: between the renames the old one lies whole as ``x.previous``, later the new one is there."""
    final, previous, rename = tmp_path / "x", tmp_path / "x.previous", os.rename

    def staging(text: str) -> Path:
        folder = tmp_path / f".{text}"
        folder.mkdir()
        (folder / "file").write_text(text)
        return folder

    def killed(at: int) -> None:
        done = []

        def stop(old: Path, new: Path) -> None:
            if len(done) == at:
                raise KeyboardInterrupt
            done.append(new)
            rename(old, new)

        monkeypatch.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(tmp_path / ".new", final)
        monkeypatch.undo()

    replace_folder(staging("old"), final)
    staging("new")
    killed(0)
    assert (final / "file").read_text() == "old" and not previous.exists()
    killed(1)
    assert (previous / "file").read_text() == "old" and not final.exists()
    replace_folder(tmp_path / ".new", final)
    assert (final / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["x"]
    previous.mkdir()
    (previous / "file").touch()  # of a kill after both renames
    replace_folder(staging("newest"), final)
    assert (final / "file").read_text() == "newest" and [path.name for path in tmp_path.iterdir()] == ["x"]
