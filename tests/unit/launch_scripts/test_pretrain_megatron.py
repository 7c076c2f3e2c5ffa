"""What is wrong around Megatron-LM's script is one error, before anything is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "launch_scripts" / "pretrain_megatron.sh"


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"PROCESSES": "x"}, 2, "PROCESSES is 'x'"),
        ({"PROCESSES": "0"}, 2, "PROCESSES is '0'"),
        ({"NODES": "-1"}, 2, "NODES is '-1'"),
        ({"NODES": "00"}, 2, "NODES is '00'"),
        ({"MASTER_PORT": "1e9"}, 2, "MASTER_PORT is '1e9'"),
        ({"RECIPE": "/no/such.json"}, 2, "RECIPE is '/no/such.json'"),
        ({"PROCESSES": "08", "NODE_RANK": "0", "MEGATRON": "/no/such"}, 1, "MEGATRON is '/no/such'"),
    ],
)
def test_one_error(given, code, said):
    environment = {**os.environ, "DS_PLUGIN_PYTHON": sys.executable, **given}
    ended = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == code and len(lines) == 1 and said in lines[0], ended.stderr
    assert ended.stdout == ""
