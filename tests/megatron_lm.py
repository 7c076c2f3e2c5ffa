"""Megatron-LM's own training script, from a checkout, on CPU processes; and what it logs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import harness

FLAGS = """
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 8 --train-iters 60 --lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 5
    --attention-dropout 0 --hidden-dropout 0 --mock-data --split 90,5,5 --tokenizer-type NullTokenizer --vocab-size 255
    --log-interval 1 --eval-interval 25 --eval-iters 2 --save-interval 30 --num-workers 0
    --distributed-backend gloo --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-bias-swiglu-fusion
""".split()


def real(
    checkout: str | Path,
    folder: Path,
    name: str,
    sections: dict[str, Any],
    *flags: str | Path,
    program: str = "megatron_patches",
    ranks: int = 8,
    without: Sequence[str] = (),
) -> harness.Launched:
    """Start pretrain_gpt.py with `FLAGS` but for those ``without``, then ``flags``; ``program`` runs it, a module."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(sections))
    given: list[str | Path] = [] if program != "megatron_patches" else ["--ds-plugin-config", file]
    script: list[str | Path] = [
        "--module",
        "--no_local_rank",
        program,
        Path(checkout, "pretrain_gpt.py"),
        *(flag for flag in FLAGS if flag not in without),
        *flags,
        *given,
    ]
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": f"{folder}:{harness.ROOT}"}
    return harness.Launched(script, ranks=ranks, env=environment)


def logged(output: str) -> tuple[dict[int, dict[str, str]], list[str]]:
    """{iteration: its line's figures but for times and memory}, and the lines of evaluations in order."""
    found = {}
    for line in output.splitlines():
        if match := re.search(r" iteration +(\d+)/ +\d+ \| (consumed samples.*)", line):
            # behind the last bar another rank's words may follow
            parts = [re.sub(r"\s+", " ", part).strip() for part in match[2].split("|")[:-1]]
            figures = (part for part in parts if ": " in part and not re.search("time|allocated|reserved", part))
            found[int(match[1])] = dict(part.split(": ") for part in figures)
    return found, re.findall(r"validation loss at (.*?value: \S+)", output)
