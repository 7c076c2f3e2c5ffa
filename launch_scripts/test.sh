#!/usr/bin/env bash
# Everything that must pass: lint, types, tests. Arguments go to pytest: bash launch_scripts/test.sh -k pacing
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "== ruff"
"$PY" -m ruff check .
echo "== mypy"
"$PY" -m mypy
echo "== pytest"
# Two processes: most tests have work for one core. A file's tests stay in one of them, with what they have trained; in
# the order of the folders, as those with ranks take longest. In one process: bash launch_scripts/test.sh -n 0
"$PY" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
