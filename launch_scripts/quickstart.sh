#!/usr/bin/env bash
# Train a small GPT with all three methods, on all GPUs or on two CPU processes. Arguments go to pretrain_gpt.py and
# override configs/quickstart.json: bash launch_scripts/quickstart.sh --steps 50 --name short
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
script="$ROOT/launch_scripts/pretrain_gpt.py"

# The run's folder, and whether the arguments decide about it.
name="quickstart" runs="$ROOT/runs" decided="" previous=""
for argument in "$@"; do
    case "$argument" in
        -h | --help) exec "$PY" "$script" --help ;;
        --name=*) name="${argument#*=}" decided=1 ;;
        --runs=*) runs="${argument#*=}" decided=1 ;;
        --name | --runs | --resume | --tag | --tag=*) decided=1 ;;
    esac
    case "$previous" in
        --name) name="$argument" ;;
        --runs) runs="$argument" ;;
    esac
    previous="$argument"
done
folder="$runs/$name"

# What becomes of an earlier run there: a word for what was done with it. Nothing is deleted, and nothing is touched
# while a process trains in the folder.
options=() earlier=""
if [ -z "$decided" ] && [ -d "$folder" ]; then
    earlier="$("$PY" -P - "$folder" <<'PYTHON'
import pathlib, sys, time

from ds_plugin.core.errors import PluginError
from launch_scripts.gpt.hold import LOCK, hold_folder

folder = pathlib.Path(sys.argv[1])
summary = folder / "summary.json"
try:
    hold_folder(folder)
except (PluginError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
if all(path.name == LOCK for path in folder.iterdir()):
    sys.exit()
if not summary.exists() and (folder / "checkpoints" / "latest").exists():
    print("interrupted")
    sys.exit()
when = (summary if summary.exists() else folder).stat().st_mtime  # finished, or interrupted before any checkpoint
stem = f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(when))}"
target = folder.with_name(stem)
count = 1
while target.exists():
    count += 1
    target = folder.with_name(f"{stem}-{count}")
try:
    folder.rename(target)
except OSError as error:
    print(f"error: {folder} cannot be moved to {target.name} ({error}); use another --name", file=sys.stderr)
    sys.exit(2)
print(target.name)
PYTHON
)"
fi
case "$earlier" in
    "") ;;
    interrupted)
        echo "runs/$name was interrupted; going on from its last checkpoint."
        options=(--resume)
        ;;
    *) echo "The earlier run was moved to runs/$earlier." ;;
esac

gpus="$("$PY" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 0 ]; then
    echo "Training on the GPUs ($gpus)."
    processes=() # the launcher takes all; a number would make it ignore CUDA_VISIBLE_DEVICES
else
    echo "No GPU found: training on 2 CPU processes."
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    processes=(--num_accelerators 2)
fi
port="$("$PY" -I -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

# The launcher and its ranks are a process group of their own (set -m), so that a signal to this script, which bash
# would keep for itself, ends all of them.
set -m
# The module, not .venv/bin/deepspeed: that script's first line breaks where the path has spaces.
"$PY" -m deepspeed.launcher.runner --quiet ${processes[@]+"${processes[@]}"} --master_port "$port" \
    "$script" --deepspeed_config "$ROOT/configs/quickstart.json" --name "$name" --runs "$runs" --cache "$ROOT/data" \
    ${options[@]+"${options[@]}"} "$@" &
launcher=$!
exec 2>/dev/null # from here on only bash itself would speak there, of a job that was ended
for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # the names as they are now
    trap "kill -s $signal -- -$launcher || true" "$signal"
done
while true; do # a signal interrupts the waiting
    status=0
    wait "$launcher" || status=$?
    kill -0 "$launcher" || break
done
[ "$status" -eq 0 ] || exit "$status"

for result in report.png summary.json; do
    if [ -e "$folder/$result" ]; then echo "$folder/$result"; fi
done
