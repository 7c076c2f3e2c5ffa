"""What CompleteP costs a training step: both residual modes against megatron-core's own layers of the same size.

    python benchmarks/bench_completep.py [--out FILE.json]

Each round trains one step (forward, backward, AdamW) of every variant, in an order of its own; the figure is the median
over rounds of the time over the unpatched step's of the same round, with the middle half of the rounds beside it. The
unpatched variant is in every round twice: the second against the first says what the measurement is good for. Time is
CPU time of one thread without a GPU, and wall time to the end of the step with one. Peak memory is the most that
tensors which a step made held at once, as its operations return them (CPU) or as torch's allocator counts it (GPU).
"""

import argparse
import sys
import weakref
from collections.abc import Callable
from typing import Any

import common
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.sweeps import builders
from megatron_patches.completep import build_param_groups, ratios_of

VARIANTS = ("unpatched", "unpatched again", "forward", "folded")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line per variant and write the JSON; exit code 1 when a bound of ``--check`` is broken."""
    bound = "fail above 1 %% of time, or any more memory"
    parser = common.parser(__doc__, bound, width=256, depth=8, length=128, batch=4, rounds=60)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--llama", action="store_true", help="SwiGLU, RMSNorm and no biases instead of GPT-3's")
    parser.add_argument("--fused", action="store_true", help="compile the residual adds, Megatron's and ours")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    builders.start_megatron()
    steps = {name: build(name, args) for name in VARIANTS}
    time, ours = common.times(steps, args.rounds), VARIANTS[2:]
    memory = {name: peak_memory(step) for name, step in steps.items()}
    print("peak memory, bytes:", ", ".join(f"{name} {peak}" for name, peak in memory.items()))
    limits = common.compared("step time, ", time, ours)
    limits += [(f"{name}, bytes at the peak", memory[name], memory["unpatched"]) for name in ours]
    return common.ended(args, limits, time=time, memory=memory)


def build(variant: str, args: argparse.Namespace) -> Callable[[], None]:
    """One training step of a variant, as a function."""
    section = None
    if variant in ("forward", "folded"):
        section = CompletePConfig.model_validate(
            {"enabled": True, "base_width": 32, "base_depth": 2, "base_head_dim": 32, "residual": variant}
        )
    llama = {"activation": "swiglu", "normalization": "RMSNorm", "bias": False} if args.llama else {}
    model, config, roles = common.small_gpt(
        args.width, args.depth, args.length, section=section, fused=args.fused, dropout=args.dropout, **llama
    )
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if section is not None:
        ratios = ratios_of(config, section)
        groups = build_param_groups(model, roles, ratios, section, lr=1e-3, weight_decay=0.1, eps=1e-8)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    tokens = torch.randint(0, common.VOCAB, (args.batch, args.length + 1), device=next(model.parameters()).device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        loss = builders.loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def peak_memory(step: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during a step, beyond those alive at its start."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Held() as held:
        step()
    return held.peak


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live. What was there before is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known | before:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _freed(self, which: int, size: int) -> None:
        self._known.remove(which)
        self.alive -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


if __name__ == "__main__":
    sys.exit(main())
