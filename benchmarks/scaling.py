"""What weight averaging takes on 64 to 4096 GPUs, worked out, and that arithmetic checked here: docs/scaling.md.

    python benchmarks/scaling.py                                              # the table for models of 7 to 405 billion
    python benchmarks/scaling.py --measure --out docs/results/scaling         # 1 to 8 processes here; measured.json

The arithmetic is `ds_plugin.plan.costs`, which ``ds-plugin plan`` uses. ``--measure`` finds in one process
the bytes per second of a snapshot (of 104 MB) and the operations per second of a training step: `costs.RATES["cpu"]`,
to two digits. Then DeepSpeed (fp32, ZeRO 1) trains a small GPT with averaging in 1, 2, 4 and 8 gloo processes.

Seconds are CPU time of the thread that is measured; one rank at a time works. Figures are medians over rounds, "low"
and "high" hold the middle half of them.
"""

import sys
from pathlib import Path
from typing import Any

import bench_averager
import common
import torch.distributed as dist

from ds_plugin.plan import costs
from ds_plugin.plan.costs import RATES, Layout
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots.memory import size
from megatron_patches.models.gpt import DeepSpeedMPU, GPTConfig, padded_vocab_size

PROCESSES, RANKS = (1, 2, 4, 8), (64, 1024, 4096)
WINDOW, INTERVAL, STEP_TOKENS = 5, 100, 4096 * 4096
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
AVERAGING = {"enabled": True, "interval": INTERVAL, "window": WINDOW}
_LENGTH, _LARGE = 64, 26_000_000  # of the GPT that is trained; elements of the large snapshot

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or measure; the exit code."""
    parser = common.parser(__doc__, rounds=21)
    parser.add_argument("--measure", action="store_true", help="check the arithmetic on this machine")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write measured.json here")
    args = parser.parse_args(arguments)
    if not args.measure:
        print(table(work_out()))
        return 0
    found: dict[str, Any] = {}
    for processes in PROCESSES:  # the rates come from the run of one
        link = found["rates"]["link"]["value"] if found else None
        one = common.on_ranks(processes, measured, args.rounds, link)
        found = {"rates": one["rates"] or found["rates"], "compared": found.get("compared", []) + one["rows"]}
    for name, rate in found["rates"].items():
        print(f"{name}: {rate['value']:.3g} ({rate['low']:.3g} to {rate['high']:.3g})")
    print(compared(found["compared"]))
    common.record(args, args.out and args.out / "measured.json", **found)
    return 0


def work_out() -> list[Row]:
    """A row for each model and number of ranks: bytes and seconds of one rank, 16 bits, ZeRO 1."""
    config, rates, rows = WeightAveragingConfig.model_validate(AVERAGING), RATES["gpu"], []
    for name, (shape, words) in MODELS.items():
        model = GPTConfig.model_validate({**_LLAMA, **shape})
        vocab = padded_vocab_size(words, model.tensor_parallel)
        for ranks in RANKS:
            layout = Layout(ranks, tensor=model.tensor_parallel)
            held = costs.parameters(model, vocab, layout)
            masters = -(-held // layout.data)
            rows.append(
                {
                    "model": name,
                    "parameters": costs.parameters(model, vocab, Layout(1)),
                    "ranks": ranks,
                    "step": costs.step_seconds(rates, model, vocab, STEP_TOKENS, ranks),
                    "memory": costs.averaging(config, masters, pinned=False)[0],
                    "pinned": costs.averaging(config, masters, pinned=True)[0],
                    "snapshot": 4 * masters,
                    "seconds": 4 * masters / rates.link,
                    "received": 4 * (held - masters),
                }
            )
    return rows


def table(rows: list[Row]) -> str:
    """In Markdown."""
    heads = "model | ranks | a step | CPU memory per rank, pinned at most (node) | copied per snapshot | in | of a step"
    cells = [
        (
            row["model"], str(row["ranks"]), _time(row["step"]),
            f"{size(row['memory'])}, {size(row['pinned'])} ({size(8 * row['pinned'])})", size(row["snapshot"]),
            _time(row["seconds"]), f"{row['seconds'] / INTERVAL / row['step']:.1e}",
            size(row["received"]),
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join(common.markdown([*heads.split(" | "), "gathering instead: received"], cells))


def measured(rounds: int, link: float | None) -> dict[str, Any]:
    """Rows of so many processes, and of one the rates; all ranks call it. ``link``: bytes per second, known by then."""
    import ds_plugin

    rank, processes = dist.get_rank(), dist.get_world_size()
    model, *_ = common.small_gpt(512, 4, _LENGTH, head=64)
    plain = {**common.deepspeed_json(1), "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}}
    config = {**plain, "weight_averaging": AVERAGING}
    engine = ds_plugin.initialize(model=model, mpu=DeepSpeedMPU(), config=config)[0]
    train = common.step_of(engine, 1, _LENGTH)
    rates = {}
    if processes == 1:
        large = bench_averager.averager_of(common.Shards([_LARGE]))
        operations = 6 * _LENGTH * sum(p.numel() for p in model.parameters())
        seconds = common.interleaved({"train": train}, rounds)["train"]
        rates = {"link": _rate(_snapshots(large, rounds), 4 * _LARGE), "flops": _rate(seconds, operations)}
        link = rates["link"]["value"]
    averager = ds_plugin.get_plugin(engine).averager
    assert link is not None and averager is not None
    described = {"num_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "seq_length": _LENGTH}
    shape = GPTConfig.model_validate(described)
    held = costs.parameters(shape, padded_vocab_size(common.VOCAB, 1), Layout(processes))
    masters = -(-held // processes)
    taken = costs.averaging(averager.config, masters, pinned=False)[0]
    copied = 4 * sum(t.numel() for t in averager.shards.tensors())
    rows = []
    for turn in range(processes):  # so that they do not take the memory's bandwidth from one another
        dist.barrier()
        if turn == rank:
            row = common.quartiles(_snapshots(averager, rounds))
            rows = [
                _row(processes, "bytes of CPU memory", taken, averager.memory.rank),
                _row(processes, "bytes of a snapshot", 4 * masters, copied),
                _row(processes, "seconds of a snapshot", 4 * masters / link, row.pop("ratio")) | row,
            ]
    return {"rates": rates, "rows": rows}


def _snapshots(averager: WeightAverager, rounds: int) -> list[float]:
    for step in range(WINDOW):  # all buffers have been touched
        averager.snapshot(step, finite=True)
    return common.interleaved({"": lambda: averager.snapshot(WINDOW, finite=True)}, rounds)[""]


def _rate(seconds: list[float], amount: float) -> common.Row:
    row = common.quartiles(seconds)
    return {"value": amount / row["ratio"], "low": amount / row["high"], "high": amount / row["low"]}


def _row(processes: int, what: str, predicted: float, measured: float) -> Row:
    return {"processes": processes, "what": what, "predicted": predicted, "measured": measured}


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def compared(rows: list[Row]) -> str:
    """In Markdown, predicted beside measured."""
    lines = []
    for row in rows:
        show = size if row["what"].startswith("bytes") else _time
        half = f" ({show(row['low'])} to {show(row['high'])})" if "low" in row else ""
        shown = show(row["predicted"]), show(row["measured"]) + half, f"{row['measured'] / row['predicted']:.3g}"
        lines.append((str(row["processes"]), row["what"], *shown))
    return "\n".join(common.markdown(["processes", "what", "predicted", "measured (middle half)", "ratio"], lines))


if __name__ == "__main__":
    sys.exit(main())
