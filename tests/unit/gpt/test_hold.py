"""A folder that one process holds; what makes files whole is in tests/unit/gpt/test_folder.py."""

import contextlib
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_plugin.core.errors import StateError
from launch_scripts.gpt import hold
from launch_scripts.gpt.hold import LOCK, hold_folder, sweep_temporaries

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys
from launch_scripts.gpt.hold import hold_folder
hold_folder(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def hold_elsewhere(folder: Path) -> subprocess.Popen:
    """Another process that holds the folder, until its stdin is closed or it is killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=environment, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond ``size`` bytes within the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_one_process_holds_a_folder_until_it_ends(tmp_path: Path):
    with hold_elsewhere(tmp_path) as other:
        text = (tmp_path / LOCK).read_text()
        with pytest.raises(StateError, match=rf"'{tmp_path}' is in use by process {other.pid} on .* since .*; wait"):
            hold_folder(tmp_path)
        assert (tmp_path / LOCK).read_text() == text
        other.kill()  # no last words
    hold_folder(tmp_path)
    assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
    hold_folder(tmp_path)  # this process has it
    with pytest.raises(AssertionError):
        hold_elsewhere(tmp_path)


def test_a_lock_of_a_folder_that_was_moved_away_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between opening and locking, another start moves the folder aside."""
    folder, flock = tmp_path / "run", hold.fcntl.flock
    folder.mkdir()

    def moved_first(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        if not (tmp_path / "moved").exists():
            folder.rename(tmp_path / "moved")
            folder.mkdir()

    monkeypatch.setattr(hold.fcntl, "flock", moved_first)
    hold_folder(folder)
    with pytest.raises(AssertionError):
        hold_elsewhere(folder)
    hold_elsewhere(tmp_path / "moved").kill()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def none(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(hold.fcntl, "flock", none)
    with caplog.at_level(logging.WARNING):
        hold_folder(tmp_path)
    assert "cannot be locked" in caplog.text


def test_temporaries_of_killed_processes_are_swept(tmp_path: Path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [f".state.{gone.pid}.tmp.safetensors", f".run.{gone.pid}.tmp", "..averaged.0123456789abcdef.tmp"]
    mine, other = f".idx.{os.getpid()}.tmp", [".hidden", "run.5.tmp", ".notes.tmp", ".x.7.tmp.d.json", "run.json"]
    (tmp_path / left[2] / "inner").mkdir(parents=True)
    for name in [*left[:2], mine, *other]:
        (tmp_path / name).write_text("x")
    assert sweep_temporaries(tmp_path, idle_seconds=60) == []  # another start may be writing them
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert sweep_temporaries(tmp_path, idle_seconds=60) == sorted(left)  # this process lives
    assert sweep_temporaries(tmp_path) == [mine]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(other)
