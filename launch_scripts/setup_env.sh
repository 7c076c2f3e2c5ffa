# Sourced by quickstart.sh, test.sh and docs.sh: makes the project's own environment in .venv, or brings it up to date.
# Leaves two variables: ROOT, the project folder, and PY, the interpreter to use.
#
#   PYTHON=python3.12            make .venv with this interpreter
#   DS_PLUGIN_PYTHON=/a/python   use this interpreter as it is; nothing is made or installed
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_VENV="$ROOT/.venv"
_STAMP="$_VENV/.complete" # only a finished installation has it; it holds what was installed
_LOCK="$ROOT/.venv.lock"  # held while installing; where it exists, .venv is ours to empty

_fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

# Prints the version of interpreter $1 as 3.11; nothing when it does not run.
_version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# Sets _BASE, the interpreter to make .venv with, and _BASE_VERSION.
_find_python() {
    local candidates=(python3 python3.13 python3.12 python3.11) found=""
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for _BASE in "${candidates[@]}"; do
        _BASE_VERSION="$(_version_of "$_BASE")"
        case "$_BASE_VERSION" in 3.11 | 3.12 | 3.13) return ;; esac
        [ -n "$found" ] || found="$_BASE ${_BASE_VERSION:+is Python }${_BASE_VERSION:-does not run}"
    done
    _fail "Python 3.11, 3.12 or 3.13 is needed, but $found." \
        "Name another one: PYTHON=python3.12 bash launch_scripts/$(basename "$0")"
}

# Prints a hash of all that decides what is installed, and of what is missing though it was.
_wanted() {
    "$PY" -I - "$ROOT" <<'PYTHON'
import hashlib, importlib.util, pathlib, sys

root = pathlib.Path(sys.argv[1])
files = b"".join((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
missing = [name for name in ("torch", "deepspeed", "megatron", "pytest", "xdist", "material") if importlib.util.find_spec(name) is None]
print(hashlib.sha256(files + repr((str(root), sys.version, missing)).encode()).hexdigest())
PYTHON
}

_up_to_date() {
    [ -e "$_STAMP" ] && [ "$(_version_of "$PY")" = "$_BASE_VERSION" ] && [ "$(cat "$_STAMP")" = "$(_wanted)" ]
}

# _step NUMBER TEXT COMMAND...: says that it starts and how long it took; the command's own output goes to $_LOG.
_step() {
    local number="$1" text="$2" start="$SECONDS" ticker status=0
    shift 2
    printf '[%s/3] %s ...\n' "$number" "$text"
    # A sign of life, every second on a terminal and every 20 elsewhere. It looks for this script because Ctrl-C does
    # not reach what a script runs in the background.
    while sleep 1 && kill -0 "$$" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r      %d s' "$((SECONDS - start))"
        elif [ "$(((SECONDS - start) % 20))" -eq 0 ]; then
            printf '      %d s\n' "$((SECONDS - start))"
        fi
    done &
    ticker=$!
    "$@" >"$_LOG" 2>&1 || status=$?
    { kill "$ticker" && wait "$ticker"; } 2>/dev/null || true
    [ ! -t 1 ] || printf '\r'
    if [ "$status" -ne 0 ]; then
        tail -n 25 "$_LOG" >&2
        _fail "step $number of 3 failed after $((SECONDS - start)) s. Above is the end of its output, all of it is in" \
            "$_LOG" "Start again to repeat the installation."
    fi
    printf '      done, %d s\n' "$((SECONDS - start))"
}

_make_venv() {
    "$_BASE" -m venv --clear "$_VENV" && return
    echo "On Debian and Ubuntu this module is a package of its own: apt install python$_BASE_VERSION-venv"
    return 1
}

_pip_install() {
    "$PY" -m pip --disable-pip-version-check --no-input install -c "$ROOT/constraints.txt" "$@"
}

_install() {
    local ours="" torch
    [ ! -e "$_LOCK" ] || ours=1
    exec 9>>"$_LOCK"
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "Another start is setting up the environment; waiting for it ..."
        flock 9
        if _up_to_date; then
            exec 9>&-
            return
        fi
    fi

    _LOG="$(mktemp "${TMPDIR:-/tmp}/ds-plugin-setup.XXXXXX")"
    # Packages that an interrupted pip left half written look complete to the next one. Without the stamp, only an empty
    # environment is safe; with it, the old packages are whole and pip can change them in place.
    if [ "$(_version_of "$PY")" = "$_BASE_VERSION" ] && { [ -e "$_STAMP" ] || [ -z "$ours" ]; }; then
        echo "Bringing .venv up to date."
        echo "[1/3] .venv is there"
    elif [ -e "$_VENV" ] && [ -z "$ours" ] && [ ! -e "$_STAMP" ]; then
        rm -f "$_LOCK"
        _fail "$_VENV was not made by this script and does not run Python $_BASE_VERSION; move it away."
    else
        echo "Setting up .venv. This takes a few minutes, once."
        _step 1 "Making .venv with Python $_BASE_VERSION" _make_venv
    fi
    rm -f "$_STAMP"
    torch="$(sed -n "s/^torch==/torch /p" "$ROOT/constraints.txt")"
    # torch first and alone: the build that pip chooses for this machine then stays.
    _step 2 "Installing $torch" _pip_install torch
    _step 3 "Installing DeepSpeed, Megatron-core, the plugin and its tests" _pip_install -e "$ROOT[test,monitor,data,docs]"
    _wanted >"$_STAMP"
    rm -f "$_LOG"
    exec 9>&-
}

if [ -n "${DS_PLUGIN_PYTHON:-}" ]; then
    PY="$DS_PLUGIN_PYTHON"
    [ -n "$(_version_of "$PY")" ] || _fail "DS_PLUGIN_PYTHON=$PY does not run; give the path of a Python interpreter."
    case "$PY" in */*) PY="$(cd "$(dirname "$PY")" && pwd)/$(basename "$PY")" ;; esac
else
    PY="$_VENV/bin/python"
    _find_python
    _up_to_date || _install
fi
