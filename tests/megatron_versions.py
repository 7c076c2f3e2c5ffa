"""The slow tests in Megatron-LM's own script, for one checkout after another, and those in Megatron-Bridge:

    python -m tests.megatron_versions CHECKOUT... [--bridge] [--python PROGRAM] [--select EXPRESSION]

Each adds a line to docs/results/versions.md. A checkout of core 0.17 or later wants Python 3.12, and so does Bridge:
``--python`` names one with this project's packages. ``--select`` is pytest's ``-k``. The exit code is 1 when a test has
failed.
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
TITLE, BRIDGE = "## Megatron-LM's own script", "## Megatron-Bridge"
_SELECTED = "on that day; `-k`: the tests that were selected, all if empty."
HEADS = {
    TITLE: f"""{TITLE}

Each line: `python -m tests.megatron_versions CHECKOUT` {_SELECTED}

| date | core of the checkout | commit | Python | torch | -k | result |
|---|---|---|---|---|---|---|
""",
    BRIDGE: f"""{BRIDGE}

Each line: `python -m tests.megatron_versions --bridge` {_SELECTED}

| date | megatron-bridge | megatron-core | transformers | Python | torch | -k | result |
|---|---|---|---|---|---|---|---|
""",
}
_TELLS = "import platform, torch; print(platform.python_version(), torch.__version__)"
_PACKAGES = ("megatron-bridge", "megatron-core", "transformers")
_BRIDGES = f"from importlib.metadata import version; print(*map(version, {_PACKAGES}))"


def main(arguments: list[str] | None = None) -> int:
    """Run the tests for each checkout, print and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="CHECKOUT")
    parser.add_argument("--bridge", action="store_true", help="of Megatron-Bridge, as it is installed there")
    parser.add_argument("--python", default=sys.executable, metavar="PROGRAM")
    parser.add_argument("--select", default="", metavar="EXPRESSION")
    args = parser.parse_args(arguments)
    failed = 0
    for checkout in [*args.checkouts, *([None] if args.bridge else [])]:
        row, code = tried(checkout, args.python, args.select)
        failed += code != 0
        write_text(PAGE, added(PAGE.read_text(), BRIDGE if checkout is None else TITLE, row))
        print(" ".join(row), flush=True)
    return 1 if failed else 0


def tried(checkout: Path | None, python: str, select: str) -> tuple[list[str], int]:
    """The cells of a checkout's line, None: of Bridge's, and pytest's exit code."""
    tests = "test_bridge.py" if checkout is None else "test_megatron_checkout.py"
    command = [python, "-m", "pytest", "-q", "-m", "slow", f"tests/distributed/{tests}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if checkout is not None:
        environment["MEGATRON_LM_PATH"] = str(checkout.resolve())
    command += ["-k", select] if select else []
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    said = done.stdout.strip().splitlines()
    print(done.stdout if done.returncode else said[-1], flush=True)
    versions = _said(python, "-c", _TELLS)
    if checkout is None:
        of = _said(python, "-c", _BRIDGES)
    else:
        of = [branch(checkout), " ".join(_said("git", "-C", str(checkout), "rev-parse", "--short", "HEAD"))]
    result = said[-1].strip("= ") if said else f"pytest ended with {done.returncode}"
    return [str(datetime.date.today()), *of, *versions, select, result], done.returncode


def _said(*command: str) -> list[str]:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.split()


def added(page: str, title: str, row: Sequence[str]) -> str:
    """The page with one more line at the end of the table under this title."""
    page = page.rstrip("\n") + "\n"
    if title not in page:
        page += "\n" + HEADS[title]
    begins = page.index(title)
    ends = page.find("\n## ", begins)
    ends = len(page) if ends < 0 else ends
    return page[:ends] + f"| {' | '.join(row)} |\n" + page[ends:]


if __name__ == "__main__":
    sys.exit(main())
