"""How fast ``ds-plugin merge`` is: against plain copies of the same bytes in the same run.

    python benchmarks/bench_merge.py [--out FILE.json] [--check]

A plain copy reads every input file whole (in blocks of 1 MiB, as `cp` does) and writes as many bytes as the output has,
one after another, each output file flushed to disk. It and the merge take turns. The figure is the median over the
rounds of the copy's time over the merge's (1 is as fast as copying), with the smallest and the largest beside it; the
bound is on it. With several workers a copy by as many threads takes its turns, too, and has a figure of its own: where
every core has a worker already, that one says what the arithmetic costs, as processor time does, which other programs
on the machine disturb less. (A worker of a merge has a second thread where the machine has more cores than workers.)
The inputs are in the page cache, which is when arithmetic shows most, or, with ``--cold``, dropped from it before every
turn, as checkpoints that are larger than memory are. Peak memory is that of a process of its own.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from ds_plugin.core.files import atomic_write
from ds_plugin.weight_averaging.merge.merge import merge

BLOCK = 1 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PEAK = """
import sys
from ds_plugin.weight_averaging.merge.merge import merge
merge(sys.argv[3:], sys.argv[1], workers=int(sys.argv[2]))
print(open("/proc/self/status").read())
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line per dtype and number of workers, write the JSON; ``--check``: 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--shard-mb", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--cold", action="store_true", help="read the inputs from the disk, not from the page cache")
    parser.add_argument("--folder", type=Path, help="where the files go meanwhile; default: the folder for temporaries")
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="fail below 0.6 of copying or above 2 shards + 300 MB")
    args = parser.parse_args(arguments)
    found: dict[str, dict[str, float]] = {}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=args.folder) as folder:
            inputs = make(Path(folder), dtype, args)
            for workers in map(int, args.workers.split(",")):
                found[f"{dtype}, {workers} workers"] = row = measure(Path(folder), inputs, workers, args)
                print(
                    f"{dtype}, {workers} workers: {row['ratio']:.2f} of copying ({row['low']:.2f}-{row['high']:.2f}), "
                    f"{row['threads_ratio']:.2f} with as many threads, {row['cpu_ratio']:.2f} in processor time, "
                    f"{row['read_gb_s']:.2f} GB/s read, peak {row['peak_mb']:.0f} MB with shards of {args.shard_mb} MB"
                )
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "check", "folder")}
        described = {"settings": settings, "torch": torch.__version__, "found": found}
        atomic_write(args.out, lambda path: path.write_text(json.dumps(described, indent=1) + "\n") and None)
    bad = [n for n, row in found.items() if row["ratio"] < 0.6 or row["peak_mb"] > 2 * args.shard_mb + 300]
    return 1 if args.check and bad else 0


def make(folder: Path, dtype: str, args: argparse.Namespace) -> list[Path]:
    """Checkpoints of random weights: matrices of 4 MB and, as in a model, a small tensor beside each."""
    inputs = []
    size = DTYPES[dtype].itemsize
    for number in range(args.checkpoints):
        (folder / f"step{number}").mkdir()
        inputs.append(folder / f"step{number}")
        for shard in range(args.shards):
            tensors = {}
            for layer in range(max(1, args.shard_mb // 4)):
                tensors[f"{shard}.{layer}.weight"] = torch.randn(4_000_000 // size).to(DTYPES[dtype])
                tensors[f"{shard}.{layer}.bias"] = torch.randn(1000).to(DTYPES[dtype])
            save_file(tensors, inputs[-1] / f"model-{shard}.safetensors")
    return inputs


def measure(folder: Path, inputs: list[Path], workers: int, args: argparse.Namespace) -> dict[str, float]:
    """SnapshotStager and merge in turns (the first round warms up), then the peak memory of one more merge."""
    out = folder / "out"
    turns: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(inputs, out, 1),
        "threads": lambda: copy(inputs, out, workers),
        "merge": lambda: merge(inputs, out, workers=workers),
    }
    if workers == 1:
        del turns["threads"]
    seconds, busy = ({name: list[float]() for name in turns} for _ in range(2))
    for number in range(args.rounds + 1):
        for name in random.Random(number).sample(list(turns), len(turns)):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # or what one leaves to be written would be on the other's bill
            if args.cold:
                drop(inputs)
            started, processor = time.perf_counter(), time.process_time()
            turns[name]()
            seconds[name].append(time.perf_counter() - started)
            busy[name].append(time.process_time() - processor)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", _PEAK, str(out), str(workers), *map(str, inputs)]
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    shutil.rmtree(out, ignore_errors=True)
    total = sum(file.stat().st_size for path in inputs for file in path.iterdir())
    merging = statistics.median(seconds["merge"][1:])
    ratios = over(seconds["copy"], seconds["merge"])
    return {
        "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
        "threads_ratio": statistics.median(over(seconds.get("threads", seconds["copy"]), seconds["merge"])),
        "cpu_ratio": statistics.median(over(busy["copy"], busy["merge"])),
        "read_gb_s": total / merging / 1e9, "peak_mb": int(peak[1]) * 1024 / 1e6,
    }  # fmt: skip


def over(these: list[float], those: list[float]) -> list[float]:
    """Ratios, round by round, without the first."""
    return [a / b for a, b in zip(these[1:], those[1:], strict=True)]


def drop(inputs: list[Path]) -> None:
    """Out of the page cache."""
    for file in (file for path in inputs for file in path.iterdir()):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(inputs: list[Path], out: Path, workers: int) -> None:
    """Read all inputs, write the last of them, a shard to a thread."""
    out.mkdir()

    def one(name: str) -> None:
        block = memoryview(bytearray(BLOCK))
        with open(out / name, "wb", buffering=0) as target:
            for path in inputs:
                with open(path / name, "rb", buffering=0) as source:
                    while count := source.readinto(block):
                        if path is inputs[-1]:
                            target.write(block[:count])
            os.fsync(target.fileno())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, sorted(file.name for file in inputs[0].iterdir())))


if __name__ == "__main__":
    sys.exit(main())
