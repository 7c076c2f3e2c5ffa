"""What averaging costs a run, on paper: memory, traffic and time per rank. ``python -m ds_plugin averaging-cost``.

N parameters whose fp32 masters are divided over R ranks - ZeRO 1 to 3, BF16_Optimizer, megatron-core's
DistributedOptimizer: tensor x pipeline x data parallel ranks together - leave N / R on each. Without ZeRO, R is the
number of tensor x pipeline parallel ranks.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class Cost:
    """Of one rank. Bytes, and seconds where the name says so."""

    memory: int  # host memory: the snapshots and one buffer for their average, without what pinning rounds up
    node_memory: int  # of all ranks of a node
    snapshot: int  # accelerator to host, once per interval
    snapshot_seconds: float
    share: float  # of a training step's time, with nothing of it hidden behind the computation
    swap: int  # host to accelerator and back, for putting the average in place
    swap_seconds: float
    gathered: int  # what a rank receives per snapshot where weights are gathered whole instead (fp32)
    replica: int  # accelerator memory of a whole fp32 replica beside the model instead, per tensor x pipeline rank


def cost(
    parameters: float,
    ranks: int,
    *,
    window: int = 5,
    interval: int = 100,
    deltas: str = "fp32",
    model_parallel: int = 1,
    ranks_per_node: int = 8,
    link: float = 25e9,
    tokens: float = 4e6,
    flops: float = 400e12,
) -> Cost:
    """``link``: bytes per second between a rank's accelerator and host memory; 25e9 is about PCIe 4.0 x16.

    ``tokens`` per optimizer step and ``flops`` per second and rank as achieved (400e12: 40 % of an H100's 989e12 in
    bf16) say how long a step takes: 6 x parameters x tokens / (ranks x flops) (Kaplan et al., arXiv 2001.08361).
    """
    mine = parameters / ranks
    snapshots = window * FP32 if deltas == "fp32" else FP32 + (window - 1) * BF16
    memory = mine * (snapshots + FP32)
    snapshot = mine * FP32
    return Cost(
        memory=round(memory),
        node_memory=round(memory * min(ranks, ranks_per_node)),
        snapshot=round(snapshot),
        snapshot_seconds=snapshot / link,
        share=snapshot / link / interval / (6 * parameters * tokens / (ranks * flops)),
        swap=round(2 * snapshot),
        swap_seconds=2 * snapshot / link,
        gathered=round(parameters / model_parallel * FP32 - snapshot),
        replica=round(parameters / model_parallel * FP32),
    )


def table(sizes: Sequence[float], ranks: Sequence[int], **settings: float) -> str:
    """A row in Markdown for each size and number of ranks."""
    heads = ["parameters", "ranks", "host memory per rank (node)", "copied per snapshot", "in", "of a step", "swap in"]
    heads.append("gathering instead: received per rank")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for parameters in sizes:
        for count in ranks:
            c = cost(parameters, count, **settings)  # type: ignore[arg-type]
            memory = f"{size(c.memory)} ({size(c.node_memory)})"
            times = f"{c.snapshot_seconds * 1e3:.3g} ms", f"{c.share:.2g}", f"{c.swap_seconds * 1e3:.3g} ms"
            row = [f"{parameters / 1e9:.3g}e9", str(count), memory, size(c.snapshot), *times, size(c.gathered)]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m ds_plugin averaging-cost``."""
    add = parser.add_argument
    add("--parameters", type=float, nargs="+", default=[7e9, 70e9], help="of the whole model (default 7e9 70e9)")
    add("--ranks", type=int, nargs="+", default=[64, 256, 1024], help="that share the masters (default 64 256 1024)")
    add("--window", type=int, default=5)
    add("--interval", type=int, default=100, help="optimizer steps between two snapshots")
    add("--deltas", choices=("fp32", "bf16"), default="fp32", help="how the older snapshots are kept")
    add("--model-parallel", type=int, default=1, help="tensor x pipeline size, for the comparison with gathering")
    add("--ranks-per-node", type=int, default=8)
    add("--link", type=float, default=25e9, help="bytes per second between accelerator and host (default 25e9)")
    add("--tokens", type=float, default=4e6, help="per optimizer step (default 4e6)")
    add("--flops", type=float, default=400e12, help="per second and rank, as achieved (default 400e12)")


def command(args: argparse.Namespace) -> int:
    """Print the table; the exit code."""
    names = ("window", "interval", "deltas", "model_parallel", "ranks_per_node", "link", "tokens", "flops")
    print(table(args.parameters, args.ranks, **{name: getattr(args, name) for name in names}))
    return 0
