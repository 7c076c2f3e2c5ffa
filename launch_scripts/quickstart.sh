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

options=()
if [ -z "$decided" ] && [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
    if [ ! -e "$folder/summary.json" ] && [ -e "$folder/checkpoints/latest" ]; then
        echo "runs/$name was interrupted; going on from its last checkpoint."
        options=(--resume)
    else
        # Finished, or interrupted before its first checkpoint. Nothing is deleted.
        moved="$("$PY" -I - "$folder" <<'PYTHON'
import pathlib, sys, time

folder = pathlib.Path(sys.argv[1])
summary = folder / "summary.json"
when = (summary if summary.exists() else folder).stat().st_mtime
stem = f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(when))}"
target = folder.with_name(stem)
count = 1
while target.exists():
    count += 1
    target = folder.with_name(f"{stem}-{count}")
folder.rename(target)
print(target.name)
PYTHON
)"
        echo "The earlier run was moved to runs/$moved."
    fi
fi

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

# The module, not .venv/bin/deepspeed: that script's first line breaks where the path has spaces.
"$PY" -m deepspeed.launcher.runner --quiet ${processes[@]+"${processes[@]}"} --master_port "$port" \
    "$script" --deepspeed_config "$ROOT/configs/quickstart.json" --name "$name" --runs "$runs" --cache "$ROOT/data" \
    ${options[@]+"${options[@]}"} "$@"

for result in report.png summary.json; do
    if [ -e "$folder/$result" ]; then echo "$folder/$result"; fi
done
