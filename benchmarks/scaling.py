"""What weight averaging takes on 64 to 4096 GPUs, worked out, and that arithmetic checked here: docs/scaling.md.

    python benchmarks/scaling.py                                              # the table for models of 7 to 405 billion
    python benchmarks/scaling.py --measure --out docs/results/scaling         # 1 to 8 processes here; measured.json

The arithmetic is `ds_plugin.plan.costs`, which ``ds-plugin plan`` uses. ``--measure`` finds in one process
the bytes per second of a snapshot (of 104 MB) and the operations per second of a training step: `costs.RATES["cpu"]`,
to two digits. Then DeepSpeed (fp32, ZeRO 1) trains a small GPT with averaging in 1, 2, 4 and 8 gloo processes.

Seconds are CPU time of the thread that is measured; one rank at a time works. Figures are medians over rounds, "low"
and "high" hold the middle half of them.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_plugin.core.files import atomic_write
from ds_plugin.plan import costs
from ds_plugin.plan.costs import RATES, Layout
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots.memory import size
from megatron_patches.models.gpt import GPTConfig, padded_vocab_size

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
_VOCAB, _LENGTH, _LARGE = 256, 64, 26_000_000  # of the GPT that is trained; elements of the large snapshot

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or measure; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="check the arithmetic on this machine")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write measured.json here")
    args = parser.parse_args(arguments)
    if not args.measure:
        print(table(work_out()))
        return 0
    found = measure(args.rounds)
    for name, rate in found["rates"].items():
        print(f"{name}: {rate['value']:.3g} ({rate['low']:.3g} to {rate['high']:.3g})")
    print(compared(found["compared"]))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1) + "\n"
        atomic_write(args.out / "measured.json", lambda path: path.write_text(text))
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
    lines = [f"| {heads} | gathering instead: received |", "|---" * 8 + "|"]
    for row in rows:
        cells = (
            row["model"], str(row["ranks"]), _time(row["step"]),
            f"{size(row['memory'])}, {size(row['pinned'])} ({size(8 * row['pinned'])})", size(row["snapshot"]),
            _time(row["seconds"]), f"{row['seconds'] / INTERVAL / row['step']:.1e}",
            size(row["received"]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- measured ----------------------------------------------------------------------------------------------------------


def measure(rounds: int) -> dict[str, Any]:
    """Spawn the processes of each size; the rates come from the run of one."""
    rates: dict[str, Any] = {}
    rows: list[Row] = []
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            given = (processes, rounds, folder, rates.get("link", {}).get("value"))
            torch.multiprocessing.spawn(_process, given, nprocs=processes)
            written = json.loads((Path(folder) / "found.json").read_text())
        rates = rates or written["rates"]
        rows += written["rows"]
    packages = {name: version(name) for name in ("torch", "deepspeed", "megatron-core")}
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **packages},
        "device": f"{os.cpu_count()} CPU cores, one thread a process",
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "rates": rates,
        "compared": rows,
    }


class _Large:
    """Masters of one large tensor, of no engine."""

    layout = "sharded"

    def __init__(self) -> None:
        self._masters = [torch.randn(_LARGE)]

    def tensors(self) -> list[torch.Tensor]:
        return self._masters

    def refresh(self) -> None: ...

    def fragments(self) -> list[Any]:
        return []


def _process(rank: int, processes: int, rounds: int, folder: str, link: float | None) -> None:
    import ds_plugin
    from ds_plugin.deepspeed_engine import startup
    from megatron_patches import megatron_on_cpu
    from megatron_patches.models import gpt

    startup.quiet()
    startup.skip_inference_kernel()
    megatron_on_cpu.enable()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(processes)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    shape = {"num_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "seq_length": _LENGTH}
    config = GPTConfig.model_validate(shape)
    gpt.initialize_parallel(config, 1234)
    model = gpt.build_gpt(config, _VOCAB, gpt.transformer_config(config, torch.float32), gpt.layer_spec(config))
    engine = ds_plugin.initialize(model=model, mpu=gpt.DeepSpeedMPU(), config={
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "weight_averaging": AVERAGING,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    })[0]  # fmt: skip
    tokens = torch.randint(_VOCAB, (1, _LENGTH))
    positions = torch.arange(_LENGTH)[None]

    def train() -> None:
        engine.backward(engine(tokens, positions, None, labels=tokens).mean())
        engine.step()

    rates = {}
    if processes == 1:
        large = WeightAverager(WeightAveragingConfig.model_validate({**AVERAGING, "interval": 1}), _Large())
        operations = 6 * _LENGTH * sum(p.numel() for p in model.parameters())
        rates["link"] = _rate(_snapshots(large, rounds), 4 * _LARGE)
        rates["flops"] = _rate(_timed(train, rounds), operations)
        link = rates["link"]["value"]
    averager = ds_plugin.get_plugin(engine).averager
    assert link is not None and averager is not None
    held = costs.parameters(config, padded_vocab_size(_VOCAB, 1), Layout(processes))
    masters = -(-held // processes)
    taken = costs.averaging(averager.config, masters, pinned=False)[0]
    copied = 4 * sum(t.numel() for t in averager.shards.tensors())
    for turn in range(processes):  # so that they do not take the memory's bandwidth from one another
        dist.barrier()
        seconds = _snapshots(averager, rounds) if turn == rank else []
        if turn == rank == 0:
            low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
            rows = [
                _row(processes, "bytes of CPU memory", taken, averager.memory.rank),
                _row(processes, "bytes of a snapshot", 4 * masters, copied),
                _row(processes, "seconds of a snapshot", 4 * masters / link, middle) | {"low": low, "high": high},
            ]
            (Path(folder) / "found.json").write_text(json.dumps({"rates": rates, "rows": rows}))
    dist.barrier()
    startup.leave()


def _snapshots(averager: WeightAverager, rounds: int) -> list[float]:
    for step in range(WINDOW):  # all buffers have been touched
        averager.snapshot(step, finite=True)
    return _timed(lambda: averager.snapshot(WINDOW, finite=True), rounds)


def _timed(work: Callable[[], object], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds + 1):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return found[1:]  # the first warms up


def _rate(seconds: list[float], amount: float) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"value": amount / middle, "low": amount / high, "high": amount / low}


def _row(processes: int, what: str, predicted: float, measured: float) -> Row:
    return {"processes": processes, "what": what, "predicted": predicted, "measured": measured}


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def compared(rows: list[Row]) -> str:
    """In Markdown, predicted beside measured."""
    lines = ["| processes | what | predicted | measured (middle half) | ratio |", "|---" * 5 + "|"]
    for row in rows:
        show = size if row["what"].startswith("bytes") else _time
        half = f" ({show(row['low'])} to {show(row['high'])})" if "low" in row else ""
        cells = (str(row["processes"]), row["what"], show(row["predicted"]), show(row["measured"]) + half)
        lines.append(f"| {' | '.join(cells)} | {row['measured'] / row['predicted']:.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
