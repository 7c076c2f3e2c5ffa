#!/usr/bin/env bash
# Train with Megatron-LM's own pretrain_gpt.py, unmodified, and the methods of a recipe. Further arguments go to
# pretrain_gpt.py and win over the recipe's:
#
#   MEGATRON=~/Megatron-LM bash launch_scripts/pretrain_megatron.sh --save checkpoints --save-interval 50
#   MEGATRON=~/Megatron-LM RECIPE=mine.json PROCESSES=8 bash launch_scripts/pretrain_megatron.sh --save checkpoints
#   NODES=8 NODE_RANK=0 MASTER_ADDR=node0 MEGATRON=... RECIPE=...    # on each node, with its own NODE_RANK
#
# MEGATRON    a checkout of Megatron-LM: core_r0.16.0 for Python 3.11, main for 3.12 and newer
# RECIPE      a JSON file with the methods' sections and the script's options under "megatron"; a small one if not given
# PROCESSES   of this node; all GPUs if not given, 2 without any
# NODES       1 if not given; with more, NODE_RANK, MASTER_ADDR (the first node) and MASTER_PORT (29500) are read
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

for name in PROCESSES NODES NODE_RANK MASTER_PORT; do
    value="${!name-}"
    if [ -n "$value" ] && [[ ! "$value" =~ ^[0-9]{1,6}$ || "$name $((10#$value))" =~ ^(PROCESSES|NODES)\ 0$ ]]; then
        (_fail "$name is '$value'; give a whole number") || exit 2
    fi
done
recipe="${RECIPE:-$ROOT/configs/gpt-tiny_all_megatron-2xcpu.json}"
[ -f "$recipe" ] || (_fail "RECIPE is '$recipe', which is no file; give a JSON with the methods' sections") || exit 2
script="${MEGATRON:-}/pretrain_gpt.py"
if [ ! -f "$script" ]; then
    _fail "MEGATRON is '${MEGATRON:-}', which holds no pretrain_gpt.py; give the folder of a Megatron-LM checkout:" \
        "git clone --branch core_r0.16.0 https://github.com/NVIDIA/Megatron-LM"
fi
if ! "$PY" -c "import regex, six, yaml" 2>/dev/null; then
    _fail "Megatron-LM's script needs packages that are missing: $PY -m pip install six regex pyyaml"
fi

gpus="$("$PY" -c 'import torch; print(torch.cuda.device_count())')"
processes="${PROCESSES:-$((gpus > 0 ? gpus : 2))}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$gpus" -eq 0 ]; then
    echo "No GPU found: training on $processes CPU processes."
    export DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1
fi

nodes="${NODES:-1}"
meeting=(--standalone)
if [ "$nodes" != 1 ]; then
    if [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; then
        _fail "NODES is $nodes, NODE_RANK '${NODE_RANK:-}' and MASTER_ADDR '${MASTER_ADDR:-}'; give each node its number," \
            "from 0, and the name of the first: NODES=$nodes NODE_RANK=0 MASTER_ADDR=node0"
    fi
    meeting=(--nnodes "$nodes" --node_rank "$NODE_RANK")
    meeting+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi

options="$("$PY" -m ds_plugin plan --config "$recipe" --world-size "$((processes * nodes))" --arguments)"
read -ra options <<<"$options"
exec "$PY" -m torch.distributed.run "${meeting[@]}" --nproc_per_node "$processes" \
    -m megatron_patches "$script" --ds-plugin-config "$recipe" "${options[@]}" "$@"
