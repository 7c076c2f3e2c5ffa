#!/usr/bin/env bash
# Build the site into site/: the reference is written from the library, then mkdocs builds strict, where a broken link
# is an error. Arguments go to mkdocs: bash launch_scripts/docs.sh --site-dir /tmp/site; "serve" shows it while you write:
#
#   bash launch_scripts/docs.sh serve
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
if ! "$PY" -c "import material, mkdocstrings" 2>/dev/null; then
    _fail "the site's packages are missing: $PY -m pip install -c constraints.txt -e '.[docs]'"
fi
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" NO_MKDOCS_2_WARNING=1 # nothing is computed; a word about another program
"$PY" docs/hooks/reference.py
if [ "${1:-}" = serve ]; then
    exec "$PY" -m mkdocs serve "${@:2}"
fi
"$PY" -m mkdocs build --strict --clean "$@"
