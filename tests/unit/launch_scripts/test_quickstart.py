"""quickstart.sh: what it does with an earlier run, and how a signal ends it. No training: see test_two_runs.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.gpt.test_hold import hold_elsewhere

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; print('waiting', flush=True); time.sleep(60)"])
print("child", child.pid, flush=True)
child.wait()
"""
#: an interpreter without torch, whose launcher leaves a word, or waits for a child
STUB = f"""#!/usr/bin/env bash
case "$*" in
    *torch*) echo 0 ;;
    "-m deepspeed.launcher.runner"*)
        echo "launched: $*"
        [ -z "${{STUB_WAITS:-}}" ] || exec "{sys.executable}" -c "$STUB_WAITS" ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A project folder with this one's code and no runs."""
    for name in ("launch_scripts", "ds_plugin", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


#: a shell cannot hear a signal that was ignored when it started, as SIGHUP is when the tests run under nohup
HEARD = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"


def start(place: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = ["bash", str(place / "launch_scripts" / "quickstart.sh"), *arguments]
    env = {**os.environ, "DS_PLUGIN_PYTHON": str(place / "python"), **environment}
    command = [sys.executable, "-c", HEARD, *command]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(place: Path, *arguments: str) -> tuple[int, str]:
    process = start(place, *arguments)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def earlier(place: Path, *names: str) -> Path:
    folder = place / "runs" / "quickstart"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_what_becomes_of_an_earlier_run(place: Path):
    code, said = run(place)
    assert code == 0 and "launched: " in said and "--resume" not in said and "moved" not in said
    folder = earlier(place, ".lock")  # of a start that was refused
    assert "moved" not in run(place)[1] and folder.exists()
    earlier(place, "checkpoints/latest", "metrics.csv")
    code, said = run(place)
    assert code == 0 and "going on from its last checkpoint" in said and "--resume" in said
    earlier(place, "summary.json")
    code, said = run(place)
    assert code == 0 and "--resume" not in said and "The earlier run was moved to runs/quickstart-" in said
    assert not folder.exists()
    (moved,) = (place / "runs").iterdir()
    assert (moved / "summary.json").exists() and (moved / "metrics.csv").exists()


@pytest.mark.parametrize("names", [("metrics.csv",), ("checkpoints/latest",), ("summary.json",)])
def test_a_run_that_is_under_way_is_neither_moved_nor_resumed(place: Path, names: tuple[str, ...]):
    folder = earlier(place, *names)
    with hold_elsewhere(folder) as other:
        code, said = run(place)
        other.kill()
    assert code == 2 and said.count("error: ") == 1 and f"is in use by process {other.pid} on " in said, said
    assert "launched" not in said and (folder / names[0]).exists()


def test_what_the_launcher_ends_with_is_what_the_script_ends_with(place: Path):
    stub = place / "python"
    stub.write_text(STUB.replace('echo "launched: $*"', "exit 2"))
    assert run(place)[0] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_launcher_and_its_children(place: Path, number: int):
    process = start(place, STUB_WAITS=LAUNCHER)
    assert process.stdout is not None
    child = 0
    for line in process.stdout:
        if line.startswith("child "):
            child = int(line.split()[1])
        if line == "waiting\n":
            break
    begun = time.monotonic()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - begun < 10, rest
    assert "launcher.runner" not in rest  # a job that ended is no news
    for _ in range(50):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the launcher's child outlived the script")
