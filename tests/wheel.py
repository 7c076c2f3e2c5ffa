"""The distributions as pip makes them from what is committed or would be, and a folder with the wheel installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT


def build(folder: Path, kind: str) -> Path:
    """The "wheel" or "sdist", built in ``folder`` in a process of its own, as pip and build do it."""
    source = folder / f"source of {kind}"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).exists():  # not one that is deleted and not committed yet
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=source, capture_output=True, text=True, check=True
    )
    return folder / done.stdout.splitlines()[-1]


def install(wheel: Path, folder: Path) -> Path:
    """The folder that pip installs the wheel into; what it requires is this environment's."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--quiet"]
    env = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([*pip, "--target", str(folder), str(wheel)], cwd=wheel.parent, env=env, check=True)
    return folder
