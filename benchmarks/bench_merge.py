"""How fast ``ds-plugin merge`` is, in turns with others that do the same, and how much memory it takes.

    python benchmarks/bench_merge.py [--out FILE.json] [--check]

- loop: what one writes by hand: `load_file`, sums in a dict of fp32, `save_file`; torch has the merge's threads.
- mergekit: its ``linear`` (mergekit-pytorch), where it can be imported; it is no dependency.
- copy: every input read once in blocks, the bytes of one written: the least that any of them can do on one thread.

All flush what they write. Figures are wall time over the merge's, median and quartiles over the rounds; the inputs are
in the page cache, which is when arithmetic shows most. Peak memory is that of a process of its own.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from safetensors.torch import load_file, save_file

from ds_plugin.weight_averaging.merge.merge import merge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {"loop": 1.5, "mergekit": 1.8}
BLOCK = 1 << 20
_PEAK = """
import sys
from ds_plugin.weight_averaging.merge.merge import merge
merge(sys.argv[3:], sys.argv[1], workers=int(sys.argv[2]))
print(open("/proc/self/status").read())
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line per dtype and rival, write the JSON; ``--check``: 1 when a bound is broken."""
    bounds = f"fail where the merge is not {BOUNDS} times as fast, or above 2 shards + 300 MB"
    parser = common.parser(__doc__, bounds, checkpoints=5, shards=1, rounds=9, workers=2)
    parser.add_argument("--shard-mb", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="where the files go meanwhile; default: the folder for temporaries")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.workers)
    found: dict[str, common.Row] = {}
    bad = False
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=args.folder) as folder:
            inputs, out = make(Path(folder), DTYPES[dtype], args), Path(folder, "out")
            for name, row in measure(inputs, out, args).items():
                found[f"{dtype}, {name}"] = row
                bad |= row["ratio"] < BOUNDS.get(name, 0)
                spread = f"{row['low']:.2f} to {row['high']:.2f}"
                print(f"{dtype}: {name} takes {row['ratio']:.2f} ({spread}) times the merge's time")
            peak = peak_mb(inputs, out, args.workers)
            found[f"{dtype}, peak"] = {"MB": peak}
            bad |= peak > 2 * args.shard_mb + 300
            print(f"{dtype}: peak memory {peak:.0f} MB with shards of {args.shard_mb} MB")
    common.record(args, args.out, found=found)
    return 1 if args.check and bad else 0


def make(folder: Path, dtype: torch.dtype, args: argparse.Namespace) -> list[Path]:
    """Checkpoints of random weights: matrices of 4 MB and, as in a model, a small tensor beside each."""
    inputs = []
    for number in range(args.checkpoints):
        inputs.append(folder / f"step{number}")
        inputs[-1].mkdir()
        for shard in range(args.shards):
            tensors = {}
            for layer in range(max(1, args.shard_mb // 4)):
                tensors[f"{shard}.{layer}.weight"] = torch.randn(4_000_000 // dtype.itemsize).to(dtype)
                tensors[f"{shard}.{layer}.bias"] = torch.randn(1000).to(dtype)
            save_file(tensors, inputs[-1] / f"model-{shard}.safetensors")
    return inputs


def measure(inputs: list[Path], out: Path, args: argparse.Namespace) -> dict[str, common.Row]:
    """Each rival's wall time over the merge's."""

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # or what one leaves to be written would be on the other's bill

    variants = {
        "merge": lambda: merge(inputs, out, workers=args.workers),
        "loop": lambda: loop(inputs, out),
        "copy": lambda: copy(inputs, out),
    }
    if importlib.util.find_spec("mergekit") is not None:
        variants["mergekit"] = lambda: mergekit(inputs, out)
    seconds = common.interleaved(variants, args.rounds, time.perf_counter, before)
    before()
    return {name: common.over(spent, seconds["merge"]) for name, spent in seconds.items() if name != "merge"}


def loop(inputs: list[Path], out: Path) -> None:
    """File by file."""
    out.mkdir()
    for file in sorted(inputs[0].iterdir()):
        total: dict[str, torch.Tensor] = {}
        for folder in inputs:
            for name, tensor in load_file(folder / file.name).items():
                dtype = tensor.dtype
                if name in total:
                    total[name] += tensor.float()
                else:
                    total[name] = tensor.to(torch.float32, copy=True)
        save_file({name: (tensor / len(inputs)).to(dtype) for name, tensor in total.items()}, out / file.name)
    flush(out)


def mergekit(inputs: list[Path], out: Path) -> None:
    """As ``mergekit-pytorch`` does it, which takes single files: one after another, summed in fp32 as here."""
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts import merge_raw_pytorch as raw

    for file in sorted(inputs[0].iterdir()):
        dtype = str(next(iter(load_file(file).values())).dtype).removeprefix("torch.")
        models = [{"model": str(folder / file.name), "parameters": {"weight": 1.0}} for folder in inputs]
        described = {"merge_method": "linear", "models": models, "dtype": "float32", "out_dtype": dtype}
        config = raw.RawPyTorchMergeConfig.model_validate(described)
        tasks = raw.plan_flat_merge(config, str(out / file.stem), False, False, MergeOptions())
        Executor(tasks, math_device="cpu", storage_device="cpu").execute()
    flush(out)


def copy(inputs: list[Path], out: Path) -> None:
    """Read all inputs, write the last of them."""
    out.mkdir()
    block = memoryview(bytearray(BLOCK))
    for file in (file for folder in inputs for file in sorted(folder.iterdir())):
        with open(out / file.name, "wb", buffering=0) as target, open(file, "rb", buffering=0) as source:
            while count := source.readinto(block):
                if file.parent == inputs[-1]:
                    target.write(block[:count])
    flush(out)


def flush(folder: Path) -> None:
    """To the disk, as the merge does."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def peak_mb(inputs: list[Path], out: Path, workers: int) -> float:
    """Of one more merge, torch's import included."""
    command = [sys.executable, "-c", _PEAK, str(out), str(workers), *map(str, inputs)]
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    shutil.rmtree(out)
    return int(peak[1]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
