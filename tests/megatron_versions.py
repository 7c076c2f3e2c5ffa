"""The slow tests in Megatron-LM's own script, for one checkout after another:

    python -m tests.megatron_versions CHECKOUT... [--python PROGRAM] [--select EXPRESSION]

Each adds a line to docs/results/versions.md. A checkout of core 0.17 or later wants Python 3.12: ``--python`` names one
with this project's packages. ``--select`` is pytest's ``-k``. The exit code is 1 when a test has failed.
"""

import argparse
import datetime
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_plugin.core.files import write_text
from tests.harness import ROOT
from tests.layouts import branch

PAGE = ROOT / "docs" / "results" / "versions.md"
TITLE = "## Megatron-LM's own script"
HEAD = f"""{TITLE}

Each line: `python -m tests.megatron_versions CHECKOUT` on that day; `-k`: the tests that were selected, all if empty.

| date | core of the checkout | commit | Python | torch | -k | result |
|---|---|---|---|---|---|---|
"""
_TELLS = "import platform, torch; print(platform.python_version(), torch.__version__)"


def main(arguments: list[str] | None = None) -> int:
    """Run the tests for each checkout, print and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT")
    parser.add_argument("--python", default=sys.executable, metavar="PROGRAM")
    parser.add_argument("--select", default="", metavar="EXPRESSION")
    args = parser.parse_args(arguments)
    failed = 0
    for checkout in args.checkouts:
        row, code = tried(checkout, args.python, args.select)
        failed += code != 0
        write_text(PAGE, added(PAGE.read_text(), row))
        print(" ".join(row), flush=True)
    return 1 if failed else 0


def tried(checkout: Path, python: str, select: str) -> tuple[list[str], int]:
    """The cells of a checkout's line, and pytest's exit code."""
    command = [python, "-m", "pytest", "-q", "-m", "slow", "tests/distributed/test_megatron_checkout.py"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "MEGATRON_LM_PATH": str(checkout.resolve())}
    command += ["-k", select] if select else []
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    said = done.stdout.strip().splitlines()
    print(done.stdout if done.returncode else said[-1], flush=True)
    versions = subprocess.run([python, "-c", _TELLS], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.split()
    named = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(named, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()
    result = said[-1].strip("= ") if said else f"pytest ended with {done.returncode}"
    return [str(datetime.date.today()), branch(checkout), commit, *versions, select, result], done.returncode


def added(page: str, row: Sequence[str]) -> str:
    """The page with one more line at the end of its table, which is the last."""
    page = page.rstrip("\n") + "\n"
    if TITLE not in page:
        page += "\n" + HEAD
    return page + f"| {' | '.join(row)} |\n"


if __name__ == "__main__":
    sys.exit(main())
