"""The check of a GPU where there is none: what it says is missing, how it judges, and what becomes of a part."""

import os
import signal
import subprocess
import sys
import time
import unittest

import pytest

from tests import harness


@pytest.fixture
def check():
    return harness.benchmark("gpu_check")


def script(*arguments, **env):
    command = ["bash", str(harness.ROOT / "launch_scripts" / "gpu_check.sh"), *map(str, arguments)]
    env = {**os.environ, **harness.RANK_ENV, "DS_PLUGIN_PYTHON": sys.executable, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_without_a_gpu_it_says_so():
    done = script()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith("(CUDA_VISIBLE_DEVICES ''); --dry-run needs no GPU\n")


def test_an_interpreter_that_is_activated_is_found(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    done = script("--nope", DS_PLUGIN_PYTHON="", VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 2 and "unrecognized arguments: --nope" in done.stderr


def test_a_package_that_is_missing_is_named(check, capsys, monkeypatch):
    monkeypatch.setattr(check, "environment", lambda dry_run: None)  # this process's stays
    monkeypatch.setitem(sys.modules, "torch", None)
    assert check.main(["--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: import of torch ") and error.endswith("--no-index --find-links DIR torch\n")


# -- what becomes of a part ------------------------------------------------------------------------------------------


def figures(*found, then=None):
    def part():
        yield from found
        if then is not None:
            then()

    return part


def skip():
    raise unittest.SkipTest("there is none")


@pytest.mark.parametrize(
    ("part", "status", "why", "kept"),
    [
        (figures(("a", 1, (0, 1)), ("b", "text")), "passed", None, ["a", "b"]),
        (figures(("a", 1), ("b", 2, (0, 1))), "failed", "out of bounds: b", ["a", "b"]),
        (figures(("a", 1), then=lambda: 1 / 0), "failed", "ZeroDivisionError: division by zero", ["a"]),
        (figures(("a", 1), then=lambda: time.sleep(5)), "failed", "OverTime: took longer than its 0 s", ["a"]),
        (figures(("a", 1), then=skip), "not run", "there is none", []),
    ],
)
def test_figures_until_an_error_are_kept(check, part, status, why, kept):
    handler = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    record = check.ran(part, 0.2)
    assert record["status"] == status and record.get("error", record.get("reason")) == why
    assert list(record.get("figures", {})) == kept and time.monotonic() - began < 2
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0
