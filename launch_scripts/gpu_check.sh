#!/usr/bin/env bash
# Check on one GPU, without a network and within 6 minutes, what is promised for GPUs; results go to docs/results/gpu/.
# Nothing is set up: it takes DS_PLUGIN_PYTHON, an environment that is activated, .venv, or python3. Arguments:
#
#   --out FILE.json    where the results go
#   --dry-run          all of it in miniature on a CPU
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
for PY in "${DS_PLUGIN_PYTHON:-}" "${active:+$active/bin/python}" "$ROOT/.venv/bin/python" "$(command -v python3 || true)"; do
    if [ -n "$PY" ] && [ -x "$PY" ]; then
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        # a call that hangs in the driver ends with the rest; what was found by then is written
        exec timeout -k 5 355 "$PY" "$ROOT/tests/gpu/gpu_check.py" "$@"
    fi
done
echo "error: no Python found; activate an environment, or name one: DS_PLUGIN_PYTHON=/a/python" >&2
exit 2
