"""What was tried to break runs, and what came of it: ``python tests/reliability.py`` runs the long forms of the tests
below, thirty kills among them, and writes docs/results/reliability.md. About half an hour. With words, only
the rows that begin with one of them are made anew: ``python tests/reliability.py recipes kills``.

A test tells with ``record_property("tried", ...)`` what it has tried; any other counts as one try for each set of
parameters. A try is clear when it ended in one error that names the thing (or, where that is the point, in a run that
went on bit for bit), allowed when a list in the test says that it may be accepted, silent when it was accepted for no
reason in such a list, hung when a time limit ended it, lost when something saved was lost.
"""

import datetime
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "reliability.md"
COLUMNS = ("tried", "clear", "allowed", "silent", "hung", "lost")
#: what a reader calls it -> files of tests
KINDS = {
    "recipes and sections with something wrong in them": ["tests/unit/test_fuzz.py"],
    "small files: manifests, sidecars, indices, trackers": ["tests/unit/core/test_json_files.py"],
    "files of a checkpoint, each damaged in six ways; resumes": ["tests/distributed/test_seals.py"],
    "texts, records, datasets, tokenizers": ["tests/unit/gpt/test_records.py", "tests/unit/gpt/test_corpus.py"],
    "run folders: metrics, run.json of another": ["tests/unit/gpt/test_folder.py", "tests/unit/gpt/test_saved.py"],
    "command lines": ["tests/unit/cli", "tests/distributed/test_bad_input.py"],
    "full disks": ["tests/distributed/test_full_disk.py"],
    "two runs in one folder": ["tests/distributed/test_two_runs.py"],
    "kills at any moment, resumed": ["tests/distributed/test_interruption.py"],
}


def main() -> int:
    """Run everything, write the page; 0 when nothing was silent, hung or lost."""
    rows = written()
    for kind, files in KINDS.items():
        if len(sys.argv) == 1 or kind.startswith(tuple(sys.argv[1:])):
            rows[kind] = tally(files, "lost" if kind.startswith("kills") else "silent")
    rows = {kind: rows[kind] for kind in KINDS if kind in rows}
    bad = any(row[column] for row in rows.values() for column in ("silent", "hung", "lost"))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "megatron-core"))
    lines = [
        "# Reliability",
        "",
        "What was tried to break runs, and what came of it. `python tests/reliability.py` runs it and writes this;",
        "the words are explained there.",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, {versions}.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(f"| {kind} | {' | '.join(str(row[column]) for column in COLUMNS)} |" for kind, row in rows.items()),
        "",
    ]
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return int(bad)


def written() -> dict[str, Counter[str]]:
    """The rows of the page as it is."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {kind: Counter(dict(zip(COLUMNS, map(int, row), strict=True))) for kind, *row in cells[1:]}


def tally(files: list[str], failed: str) -> Counter[str]:
    """What the tests in these files have tried; ``failed``: the column of a test that fails in time."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", *files]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        cases = ET.parse(report).getroot().iter("testcase")
        return sum((_case(case, failed) for case in cases), Counter())


def _case(case: ET.Element, failed: str) -> Counter[str]:
    told = {p.get("name", ""): int(p.get("value", 0)) for p in case.iter("property")}
    failure = next((found for kind in ("failure", "error") for found in case.iter(kind)), None)
    if case.find("skipped") is not None:
        return Counter()
    if failure is not None:
        text = f"{failure.get('message')} {failure.text}"
        return Counter(tried=1, **{"hung" if "Timeout" in text else failed: 1})
    allowed, tried = told.get("allowed", 0), told.get("tried", 1)
    return Counter(tried=tried, clear=tried - allowed, allowed=allowed)


if __name__ == "__main__":
    sys.exit(main())
