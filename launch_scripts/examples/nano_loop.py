"""A small GPT in plain torch and a loop of one's own, with sequence length warmup and weight averaging.

torchrun --nproc-per-node 1 launch_scripts/examples/nano_loop.py [--steps 40] [--out runs/nano]
"""

import argparse
import inspect
import json
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F

import ds_plugin

LENGTH, MICRO, WIDTH = 128, 8, 64


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(256, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(4)))
        self.head = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 256, bias=False))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        at = torch.arange(idx.shape[1], device=idx.device)
        logits = self.head(self.blocks(self.tokens(idx) + self.positions(at)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    given = parser.parse_args()
    deepspeed.init_distributed()
    config = json.loads(Path(__file__).with_name("methods.json").read_text())
    config["optimizer"]["params"] = {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sizes = {"train_batch_size": MICRO * world, "train_micro_batch_size_per_gpu": MICRO}
    del config["completep"], config["gradient_accumulation_steps"]  # it has no names by which roles are known
    engine, *_ = ds_plugin.initialize(model=GPT(), config={**config, **sizes})
    plugin = ds_plugin.get_plugin(engine)
    text = torch.tensor(list(inspect.getsource(torch.nn.functional).encode()), device=engine.device)
    if given.out.is_dir():
        engine.load_checkpoint(str(given.out))
    for step in range(engine.global_steps, given.steps):
        drawn = torch.Generator().manual_seed(step * world + rank)
        starts = torch.randint(len(text) - LENGTH - 1, (MICRO,), generator=drawn)
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        loss = engine(rows[:, :-1], rows[:, 1:])  # cut to the step's length on the way in
        engine.backward(loss)
        engine.step()
        if (step + 1) % 10 == 0:  # the same on every rank
            print(f"step {step + 1}, length {plugin.trained_length}, loss {loss.item():.3f}")
            engine.save_checkpoint(str(given.out))
    plugin.publish(given.out / "averaged", replace=True)


if __name__ == "__main__":
    main()
