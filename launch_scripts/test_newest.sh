#!/usr/bin/env bash
# The default suite with the newest torch, DeepSpeed, megatron-core and transformers that pyproject.toml allows and this
# machine can install, in .venv-newest; adds a line to docs/results/versions.md. Arguments go to pytest.
#
#   PYTHON=python3.12   the interpreter to make .venv-newest with
#   VENV=/a/folder      an environment to use as it is; nothing is installed
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY="${VENV:-.venv-newest}/bin/python"
if [ -z "${VENV:-}" ]; then
    [ -x "$PY" ] || "${PYTHON:-python3.12}" -m venv .venv-newest
    "$PY" -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[test,monitor]"
fi
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
failed=0
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PY" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" | tee "$log" || failed=$?
"$PY" - "$log" <<'PYTHON'
import datetime, pathlib, platform, sys
from importlib.metadata import version

names = ("torch", "deepspeed", "megatron-core", "transformers")
summary = pathlib.Path(sys.argv[1]).read_text().strip().splitlines()[-1].strip("= ")
row = [str(datetime.date.today()), platform.python_version(), *map(version, names), summary]
page = pathlib.Path("docs/results/versions.md")
if not page.is_file():
    head = ["date", "Python", *names, "default suite"]
    lines = ["# Versions", "", "Each line: `bash launch_scripts/test_newest.sh` on that day.", ""]
    page.write_text("\n".join([*lines, f"| {' | '.join(head)} |", "|---" * len(head) + "|", ""]))
text, line = page.read_text(), f"| {' | '.join(row)} |\n"
at = text.find("\n## ")  # tables of other commands follow
page.write_text(text + line if at < 0 else text[:at] + line + text[at:])
print(row)
PYTHON
exit "$failed"
