#!/usr/bin/env bash
# Train with Megatron-LM's own pretrain_gpt.py, unmodified, and the methods of a recipe. Further arguments go to
# pretrain_gpt.py and win over the recipe's:
#
#   MEGATRON=~/Megatron-LM bash launch_scripts/pretrain_megatron.sh --save checkpoints --save-interval 50
#   MEGATRON=~/Megatron-LM RECIPE=mine.json PROCESSES=8 bash launch_scripts/pretrain_megatron.sh --save checkpoints
#
# MEGATRON    a checkout of Megatron-LM: core_r0.16.0 for Python 3.11, main for 3.12 and newer
# RECIPE      a JSON file with the methods' sections and the script's options under "megatron"; a small one if not given
# PROCESSES   of this node; all GPUs if not given, 2 without any
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

script="${MEGATRON:-}/pretrain_gpt.py"
if [ ! -f "$script" ]; then
    _fail "MEGATRON is '${MEGATRON:-}', which holds no pretrain_gpt.py; give the folder of a Megatron-LM checkout:" \
        "git clone --branch core_r0.16.0 https://github.com/NVIDIA/Megatron-LM"
fi
if ! "$PY" -c "import regex, six, yaml" 2>/dev/null; then
    _fail "Megatron-LM's script needs packages that are missing: $PY -m pip install six regex pyyaml"
fi
recipe="${RECIPE:-$ROOT/configs/gpt-tiny_all_megatron-2xcpu.json}"

gpus="$("$PY" -c 'import torch; print(torch.cuda.device_count())')"
processes="${PROCESSES:-$((gpus > 0 ? gpus : 2))}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$gpus" -eq 0 ]; then
    echo "No GPU found: training on $processes CPU processes."
    export DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1
fi

options="$("$PY" -m ds_plugin plan --config "$recipe" --world-size "$processes" --arguments)"
read -ra options <<<"$options"
exec "$PY" -m torch.distributed.run --standalone --nproc_per_node "$processes" \
    -m megatron_patches "$script" --ds-plugin-config "$recipe" "${options[@]}" "$@"
