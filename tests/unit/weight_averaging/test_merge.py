"""Merging as a whole: its weights and its command, threads, memory, a kill, a full disk."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from ds_plugin.cli.main import main
from ds_plugin.core.errors import CheckpointError, ConfigError, PluginError
from ds_plugin.weight_averaging.merge import inputs
from ds_plugin.weight_averaging.merge.merge import merge, parse_weights
from tests.unit.weight_averaging.folders import INDEX, SHARDS, altered, naive, read, same, weights_of, write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean", [1, 1, 1]),
        ("wma", [1, 2, 3]),
        ("cosine", [0.5, 1, 0.5]),
        ("1e-300,1e-300,1e-300", [1e-300] * 3),
        ("1e308,1e308,1e308", [1e308] * 3),
        ("minus-sqrt", [(1 / 3) ** 0.5, (2 / 3) ** 0.5 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5]),
        ("0.1,0,2", [0.1, 0, 2]),
        ("0,0,2", [0, 0, 2]),
    ],
)
def test_weights(tmp_path, checkpoints, text, expected):
    assert parse_weights(text, 3) == pytest.approx(expected)
    merge(checkpoints, tmp_path / "out", weights=text)
    same(read(tmp_path / "out"), naive(checkpoints, parse_weights(text, 3)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,0.5", "2 numbers for 3 checkpoints"),
        ("0.5,nan,1", "finite numbers"),
        ("1,inf,1", "finite numbers"),
        ("1,-1,1", "not negative"),
        ("0,0,0", "one of them positive"),
        ("newest", "mean, minus-sqrt, cosine, wma"),
        ("linear", "write 'wma'.*'mean'"),
    ],
)
def test_weights_refused(tmp_path, checkpoints, text, message):
    with pytest.raises(ConfigError, match=message):
        merge(checkpoints, tmp_path / "out", weights=text)
    assert not (tmp_path / "out").exists()


def test_one_line_and_exit_code_2(tmp_path, checkpoints, capsys):
    assert main(["merge", *map(str, checkpoints), "--out", str(tmp_path / "out"), "--weights", "1,2"]) == 2
    assert capsys.readouterr().err == "error: --weights has 2 numbers for 3 checkpoints; give one for each\n"
    assert main(["merge", str(tmp_path / "lost"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no checkpoint at" in capsys.readouterr().err
    assert main(["merge", str(checkpoints[0]), "--out", str(tmp_path / "out"), "--dtype", "int8"]) == 2
    assert "--dtype is 'int8'; write fp32, bf16, fp16" in capsys.readouterr().err


def test_the_command(tmp_path, checkpoints, capsys):
    arguments = ["merge", *map(str, checkpoints), "--out", str(tmp_path / "out"), "--workers", "2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(name in line for line in lines) for name in SHARDS)
    assert lines[-1] == f"{tmp_path / 'out'}: the mean of 3 checkpoints"
    assert main(arguments) == 2
    assert "out holds config.json; give a new folder" in capsys.readouterr().err


def test_an_output_folder_with_other_content_is_refused(tmp_path, checkpoints, monkeypatch):
    before = read(checkpoints[0])
    with pytest.raises(ConfigError, match="step1 holds config.json; give a new folder"):
        merge(checkpoints, checkpoints[0])
    same(read(checkpoints[0]), before)
    with pytest.raises(PluginError, match="config.json cannot be read or written: Not a directory"):
        merge(checkpoints, checkpoints[0] / "config.json")
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="is a mount point"):
        patched.setattr(os.path, "ismount", lambda path: True)
        merge(checkpoints, tmp_path / "out")
    merge(checkpoints, tmp_path / "out")  # an empty folder is a new one
    with pytest.raises(ConfigError, match="out holds config.json"):
        merge(checkpoints, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_stay_apart(tmp_path, monkeypatch, dtype):
    """What one thread writes stays as it is while others work, however slow the disk is, and in whichever order."""
    monkeypatch.setattr(inputs, "CHUNK", 7)
    folders = []
    for n in (1, 2):
        tensors = [{f"{s}": torch.randn(61).to(dtype), f"{s}.count": torch.arange(20)} for s in (1, 2)]
        folders.append(write(tmp_path / f"step{n}", tensors))
    pwrite, threads, slowness = os.pwrite, set(), random.Random(1)

    def slow(file, view, offset):
        threads.add(threading.get_ident())
        before = bytes(view)
        time.sleep(slowness.uniform(0, 0.01))
        assert bytes(view) == before
        return pwrite(file, view[: max(1, len(view) // 2)], offset)  # a disk may take a part

    monkeypatch.setattr(os, "pwrite", slow)
    merge(folders, tmp_path / "out", workers=3)
    assert len(threads) > 1
    same(read(tmp_path / "out"), naive(folders, [1, 1]))


def test_a_thread_that_fails_ends_all_and_leaves_nothing(tmp_path, checkpoints, monkeypatch):
    """Its error is the one that is raised, and the pieces that nobody has begun are left."""
    monkeypatch.setattr(inputs, "CHUNK", 2_000)
    pwrite, written = os.pwrite, []

    def failing(file, view, offset):
        written.append(offset)
        if len(written) == 3:
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.01)
        return pwrite(file, view, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(PluginError, match="out cannot be read or written: Input/output error"):
        merge(checkpoints, tmp_path / "out")
    assert len(written) < 20
    assert not list(tmp_path.glob("*out*"))


SLOW = """
import os, sys, time
from ds_plugin.weight_averaging.merge.merge import merge
pwrite = os.pwrite
def slow(file, view, offset):
    os.write(1, b"writing" + bytes([10]))  # whole, of either thread
    time.sleep(600)
os.pwrite = slow
merge({folders!r}, {out!r})
"""


def test_a_killed_merge_is_swept_and_a_live_one_is_not(tmp_path, checkpoints):
    out = tmp_path / "out"
    code = SLOW.format(folders=[str(c) for c in checkpoints], out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        staging = tmp_path / ".out.merging"
        before = sorted(path.name for path in staging.iterdir())
        assert SHARDS[0] in before and not out.exists()
        with pytest.raises(ConfigError, match="another merge writes --out .*out; wait for it"):
            merge(checkpoints, out)
        assert sorted(path.name for path in staging.iterdir()) == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (staging / "left").mkdir()
    (staging / "left" / "over").touch()
    merge(checkpoints, out)
    assert {path.name for path in out.iterdir()} == {*SHARDS, INDEX, "config.json"}
    same(read(out), naive(checkpoints, [1, 1, 1]))
    assert not list(tmp_path.glob(".out*"))


def test_a_full_disk_leaves_nothing(tmp_path, checkpoints, monkeypatch):
    def full(file, view, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(PluginError, match=r"out is full; make room"):
        patched.setattr(os, "pwrite", full)
        merge(checkpoints, tmp_path / "out")
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patched, pytest.raises(PluginError, match=r"needs [\d.]+ MB, its disk has 0.0 MB"):
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        merge(checkpoints, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_checkpoint_that_shrinks_meanwhile(tmp_path, checkpoints, monkeypatch):
    pwrite = os.pwrite

    def shrink(file, view, offset):
        os.truncate(checkpoints[1] / SHARDS[0], 5000)
        return pwrite(file, view, offset)

    monkeypatch.setattr(os, "pwrite", shrink)
    with pytest.raises(CheckpointError, match="became shorter"):
        merge(checkpoints, tmp_path / "out")


# not getrusage: after vfork a process's ru_maxrss counts pytest's own peak, which it has never had
PEAK = """
import re, sys
from ds_plugin.cli.main import main
from ds_plugin.weight_averaging.merge import merge
def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
imported = kilobytes("VmRSS")
code = main(sys.argv[1:])
print(code, (kilobytes("VmHWM") - imported) * 1024, "deepspeed" in sys.modules)
"""


def test_memory_stays_below_two_shards_and_300_mb(tmp_path):
    """Above what the imports take (more with a CUDA build of torch); six checkpoints, two workers, bf16 (which is
    widened). DeepSpeed is never imported."""
    megabytes = 24
    names = [write(tmp_path / f"step{seed}", weights_of(seed)) for seed in (1, 2)]
    for seed, folder in enumerate(names):
        torch.manual_seed(seed)
        for shard in (0, 1):
            grown = torch.randn(megabytes * 10**6 // 2).bfloat16()
            altered(folder, shard, lambda t, shard=shard, grown=grown: t.update({f"big{shard}": grown}))
        (folder / INDEX).unlink()
    arguments = ["merge", *map(str, names * 3), "--out", str(tmp_path / "out"), "--workers", "2"]
    result = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    code, peak, deepspeed = result.stdout.splitlines()[-1].split()
    assert code == "0" and deepspeed == "False"
    assert int(peak) < 2 * megabytes * 10**6 + 300 * 10**6
    # and far below it: nothing grows with the shards
    assert int(peak) < 60 * 10**6
