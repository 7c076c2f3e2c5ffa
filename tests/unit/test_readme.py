"""README's Python, run from top to bottom in a process of its own, as a user without a GPU would paste it."""

import json
import os
import re
import subprocess
import sys

from tests.harness import RANK_ENV, ROOT

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}},
    "steps_per_print": 10**9,
    "sequence_length_warmup": {"enabled": True, "start_length": 8, "end_length": 16, "duration": {"steps": 4}},
    "completep": {"enabled": True, "base_width": 16, "base_depth": 1},
    "weight_averaging": {"enabled": True, "interval": 1},
}

#: what a script has before the model is built; deepspeed.initialize is ours before it is used for the first time
BEFORE = """
import deepspeed, torch
import ds_plugin
from megatron.core.models.gpt import GPTModel
from megatron_patches import completep
from megatron_patches.models import gpt

deepspeed.initialize = ds_plugin.initialize
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
cfg = gpt.GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=2, seq_length=16)
gpt.initialize_parallel(cfg, 1)
config, spec = gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg)
vocab_size, max_sequence_length = 32, 16
"""

TRAINING = """
def loss_of(engine):
    tokens = torch.randint(0, vocab_size, (2, 17))
    positions = torch.arange(16).expand(2, -1)
    return engine(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).mean()

engine.train()
for _ in range(2):
    engine.backward(loss_of(engine))
    engine.step()

def evaluate(engine):
    engine.eval()
    print("evaluated", torch.isfinite(loss_of(engine)).item(), ds_plugin.get_plugin(engine).averager.steps)

"""

AFTER = """
from megatron_patches import active
print("active", "deepspeed.comm.torch.build_shm_op" in [name for name, _ in active()])
"""


def blocks():
    """The Python of README.md; of a diff, what it looks like afterwards."""
    found, fence = [], re.compile(r"^```(python|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for kind, text in fence.findall((ROOT / "README.md").read_text()):
        if kind == "diff":
            text = "".join(line[1:] for line in text.splitlines(keepends=True) if not line.startswith("-"))
        found.append(text)
    return found


def run_blocks(folder, package):
    """The lines that the blocks print, run in ``folder`` with the package found in ``package``."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    before, script, averaged = blocks()
    (folder / "pasted.py").write_text(before + BEFORE + script + TRAINING + averaged + AFTER)
    env = {**os.environ, **RANK_ENV, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(package)}
    env["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    command = [sys.executable, "-W", "ignore", "pasted.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_blocks_run_one_after_another_on_a_cpu(tmp_path):
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"  # of a compile that was killed: torch waits for it
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert run_blocks(tmp_path, ROOT)[-2:] == ["evaluated True [1, 2]", "active True"]
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]  # nothing was compiled
