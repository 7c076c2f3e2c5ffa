"""What the three methods take on 64 to 4096 GPUs, worked out: the tables of docs/scaling.md.

    python benchmarks/scaling.py [--out docs/results/scaling]

Models of 7, 70 and 405 billion parameters; bytes and seconds of one rank. The arithmetic is
`ds_plugin.run.plan_costs`, which ``python -m ds_plugin plan`` uses as well; `scaling_measure.py` checks it against
processes on one machine. ``--out`` writes the figures as tables.csv, unrounded.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_plugin.atomic import atomic_write
from ds_plugin.run import plan_costs as costs
from ds_plugin.run.plan_costs import Layout
from ds_plugin.sequence_length_warmup.config import INTERLEAVE
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.cost import size
from megatron_patches.gpt import GPTConfig, padded_vocab_size

RANKS = (64, 256, 1024, 4096)
WINDOW, INTERVAL, REPORT = 5, 100, 20
STEP_TOKENS = 4096 * 4096
H100 = costs.gpu(link=25e9, bandwidth=3.35e12, flops=400e12)

_LLAMA: dict[str, Any] = {
    "seq_length": 4096, "position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu", "bias": False,
}  # fmt: skip
#: name -> (shape, vocabulary): Llama 2's 7 and 70 billion and Llama 3.1's 405 billion (arXiv 2307.09288, 2407.21783)
MODELS = {
    "7B": (
        dict(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, tensor_parallel=1), 32000,
    ),
    "70B": (
        dict(num_layers=80, hidden_size=8192, num_attention_heads=64, num_query_groups=8, ffn_hidden_size=28672,
             tensor_parallel=8), 32000,
    ),
    "405B": (
        dict(num_layers=126, hidden_size=16384, num_attention_heads=128, num_query_groups=8, ffn_hidden_size=53248,
             tensor_parallel=8), 128256,
    ),
}  # fmt: skip

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, write the CSV; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write tables.csv here")
    args = parser.parse_args(arguments)
    rows = work_out()
    print(tables(rows))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        atomic_write(args.out / "tables.csv", lambda path: _write_csv(path, rows))
    return 0


def shape(name: str) -> tuple[GPTConfig, int]:
    """A model of `MODELS`, and its padded vocabulary."""
    sizes, vocab = MODELS[name]
    model = GPTConfig.model_validate({**_LLAMA, **sizes})
    return model, padded_vocab_size(vocab, model.tensor_parallel)


def work_out() -> list[Row]:
    """A row for each model and number of ranks: bytes and seconds of one rank. CompleteP is on, 16 bits, ZeRO 1."""
    config = WeightAveragingConfig.model_validate({"enabled": True, "interval": INTERVAL, "window": WINDOW})
    rows = []
    for name in MODELS:
        model, vocab = shape(name)
        found = costs.parts(model, vocab)
        count = sum(costs.parameters(found, model.num_layers).values())
        for ranks in RANKS:
            layout = Layout(ranks, tensor=model.tensor_parallel)
            local = costs.local_parameters(found, model.num_layers, layout, tied=False)
            masters = costs.shares(local, layout.data, by_role=True)
            taken = costs.averaging(config, masters, pinned=True)
            refreshed = 2 * (sum(local.values()) - sum(masters.values()))  # 16-bit parameters of the other ranks
            step = costs.step_seconds(H100, costs.multiplying(found, model), STEP_TOKENS, ranks)
            tokens = STEP_TOKENS // layout.data
            multiplied = costs.multiplied_bytes(model, tokens, layout, 2)
            seconds = {
                "averaging_seconds": costs.averaging_seconds(H100, taken.snapshot, INTERVAL),
                "warmup_seconds": costs.warmup_seconds(H100, taken.snapshot, REPORT, ranks),
                "completep_seconds": multiplied * H100.multiply,
            }
            rows.append(
                {
                    "model": name,
                    "parameters": count,
                    "ranks": ranks,
                    "tensor": layout.tensor,
                    "step_seconds": step,
                    "snapshot_bytes": taken.snapshot,
                    "host_bytes": taken.exact,
                    "host_bytes_pinned": taken.held,
                    "node_bytes_pinned": taken.held * layout.on_node,
                    "snapshot_seconds": taken.snapshot * H100.snapshot,
                    "swap_bytes": 2 * taken.snapshot,
                    "swap_received_bytes": 2 * refreshed,
                    "gather_instead_bytes": 2 * refreshed,  # fp32, once, of what the swap refreshes twice in 16 bits
                    "report_bytes": taken.snapshot,
                    "report_received_bytes": costs.REPORT_BYTES * ranks,
                    "carried_bytes": INTERLEAVE * tokens * 3 * 8,  # tokens, positions and labels, 64 bits each
                    "multiplied_bytes": multiplied,
                    "gradient_bytes": 2 * model.seq_length * model.hidden_size,  # of a sample's residual stream
                    **seconds,
                    "share": sum(seconds.values()) / step,
                }
            )
    return rows


def tables(rows: list[Row]) -> str:
    """In Markdown: averaging, warmup, CompleteP."""

    def first(r: Row) -> tuple[str, ...]:
        return r["model"], f"{r['parameters'] / 1e9:.2f}e9", str(r["ranks"]), _time(r["step_seconds"])

    parts: list[tuple[tuple[str, ...], Callable[[Row], tuple[str, ...]]]] = [
        (
            ("host memory per rank, as pinned (node)", "copied per snapshot", "in", "per step", "of a step",
             "swap: to the host and back", "received for it", "gathering instead: received per snapshot"),
            lambda r: (
                f"{size(r['host_bytes'])}, {size(r['host_bytes_pinned'])} ({size(r['node_bytes_pinned'])})",
                size(r["snapshot_bytes"]), _time(r["snapshot_seconds"]), _time(r["averaging_seconds"]),
                _share(r["averaging_seconds"] / r["step_seconds"]), size(r["swap_bytes"]),
                size(r["swap_received_bytes"]), size(r["gather_instead_bytes"]),
            ),
        ),
        (
            ("host memory: `truncate`, `carry`", "read per report", "received per report", "per step", "of a step"),
            lambda r: (
                f"0, {size(r['carried_bytes'])}", size(r["report_bytes"]), size(r["report_received_bytes"]),
                _time(r["warmup_seconds"]), _share(r["warmup_seconds"] / r["step_seconds"]),
            ),
        ),
        (
            ("memory, forward mode, per sample", "multiplied per step", "in", "of a step", "folded mode"),
            lambda r: (
                size(r["gradient_bytes"]), size(r["multiplied_bytes"]), _time(r["completep_seconds"]),
                _share(r["completep_seconds"] / r["step_seconds"]), "0",
            ),
        ),
    ]  # fmt: skip
    written = []
    for heads, cells in parts:
        all_heads = ("model", "parameters", "ranks", "a step", *heads)
        lines = [f"| {' | '.join(all_heads)} |", "|---" * len(all_heads) + "|"]
        written.append("\n".join([*lines, *(f"| {' | '.join((*first(row), *cells(row)))} |" for row in rows)]))
    return "\n\n".join(written)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value >= 1e-5 else "< 0.001 %"


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
