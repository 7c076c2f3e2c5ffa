"""What CompleteP costs a training step: both residual modes against megatron-core's own layers of the same size.

    python benchmarks/bench_completep.py [--out FILE.json]

Each round trains one step (forward, backward, AdamW) of every variant, in an order that rotates; the figure is the
median over rounds of the time over the unpatched step's of the same round, with the middle half of the rounds beside
it. The unpatched variant is in every round twice: the second against the first says what the measurement is good for.
Time is CPU time of one thread without a GPU, and from CUDA events with one. Peak memory is the most that tensors which
a step made held at once, as its operations return them (CPU) or as torch's allocator counts it (GPU).
"""

import argparse
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_plugin.completep.config import CompletePConfig
from ds_plugin.core.files import atomic_write
from ds_plugin.sweeps import trial
from megatron_patches.completep import build_param_groups, finish, prepare, ratios_of
from megatron_patches.models import gpt

VARIANTS = ("unpatched", "unpatched again", "forward", "folded")
_VOCAB = 256


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line per variant and write the JSON; exit code 1 when a bound of ``--check`` is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--llama", action="store_true", help="SwiGLU, RMSNorm and no biases instead of GPT-3's")
    parser.add_argument("--fused", action="store_true", help="compile the residual adds, the host's and ours")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="fail above 1 %% of time, or any more memory")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    trial.start_host()
    steps = {name: build(name, args) for name in VARIANTS}
    found: dict[str, dict[str, Any]] = {
        "time": times(steps, args.rounds),
        "memory": {name: peak_memory(step) for name, step in steps.items()},
    }
    for name in VARIANTS[1:]:
        ratio, low, high = found["time"][name]
        memory = found["memory"][name] / found["memory"]["unpatched"]
        spread = f"middle half {low:.4f} to {high:.4f}"
        print(f"{name}: step time {ratio:.4f} of unpatched ({spread}), peak memory {memory:.4f}")
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "check")}
        described = {"settings": settings, "torch": torch.__version__, "device": _device().type, **found}
        atomic_write(args.out, lambda temporary: temporary.write_text(json.dumps(described, indent=1) + "\n"))
    dear = [
        name
        for name in ("forward", "folded")
        if found["time"][name][0] > 1.01 or found["memory"][name] > found["memory"]["unpatched"]
    ]
    return 1 if args.check and dear else 0


def build(variant: str, args: argparse.Namespace) -> Callable[[], None]:
    """One training step of a variant, as a function."""
    cfg = gpt.GPTConfig.model_validate(
        {
            "num_layers": args.depth,
            "hidden_size": args.width,
            "num_attention_heads": args.width // 32,
            "seq_length": args.length,
            "dropout": args.dropout,
            **({"activation": "swiglu", "normalization": "RMSNorm", "bias": False} if args.llama else {}),
        }
    )
    gpt.initialize_parallel(cfg, 1234)
    config, spec = gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg)
    config.bias_dropout_fusion = args.fused
    section = None
    if variant in ("forward", "folded"):
        section = CompletePConfig.model_validate(
            {"enabled": True, "base_width": 32, "base_depth": 2, "base_head_dim": 32, "residual": variant}
        )
    config, spec = prepare(config, spec, section)
    model = gpt.build_gpt(cfg, _VOCAB, config, spec)
    roles = finish(model, section)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if section is not None:
        ratios = ratios_of(config, section)
        groups = build_param_groups(model, roles, ratios, section, lr=1e-3, weight_decay=0.1, eps=1e-8)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    tokens = torch.randint(0, _VOCAB, (args.batch, args.length + 1), device=_device())
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        loss = trial.loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def times(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """By variant: median and quartiles over the rounds of its step's time over the unpatched one's."""
    names = list(steps)
    for step in steps.values():
        step()
        step()
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        measured = {name: _seconds(steps[name]) for name in names[turn:] + names[:turn]}
        for name in names:
            ratios[name].append(measured[name] / measured["unpatched"])
    quartiles = {name: statistics.quantiles(found, n=4) for name, found in ratios.items()}
    return {name: (middle, low, high) for name, (low, middle, high) in quartiles.items()}


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


def _seconds(step: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.thread_time()
    step()
    return time.thread_time() - started


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
