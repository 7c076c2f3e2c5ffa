"""Whether what is promised holds on a GPU: one command, on one GPU, without a network, within 6 minutes.

    bash launch_scripts/gpu_check.sh [--out FILE.json] [--dry-run]

The parts and their bounds are in `gpu_parts`. The JSON, written anew after every part, has each figure and its bound.
A part that raises, or takes longer than its share of the time, has failed, and the rest goes on. Exit code 0; 1 when a
part failed or found no time; 2, and why, when nothing could be run. With ``--dry-run`` all but the profile of copies
runs in miniature on a CPU: device memory is what torch's operations make, and times have no bound.
"""

import argparse
import contextlib
import importlib
import math
import os
import signal
import sys
import time
import unittest
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "results" / "gpu" / "check.json"
LIMIT = 340.0  # seconds for all of it
_BEGAN = time.monotonic()

NOT_RUN, NO_TIME = "not run", "no time was left"

Record = dict[str, Any]


def main(arguments: list[str] | None = None, limit: float | None = None) -> int:
    """Run all parts; the exit code. ``limit``: seconds from now on, in place of `LIMIT` from the start of this file."""
    began = _BEGAN if limit is None else time.monotonic()
    ends = began + (LIMIT if limit is None else limit)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu_check.sh", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="in miniature, on a CPU")
    parser.add_argument("--out", type=Path, help=f"the JSON; default: {OUT.relative_to(ROOT)}, none in a dry run")
    args = parser.parse_args(arguments)
    out = args.out or (None if args.dry_run else OUT)
    try:
        environment(args.dry_run)
        import torch

        if not args.dry_run:
            torch.cuda.init()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
        from ds_plugin.cli import env
        from ds_plugin.deepspeed_engine import startup

        startup.quiet()
        sys.path.append(str(ROOT / "benchmarks"))  # whose ratios and rounds the parts use
        parts = importlib.import_module("gpu_parts")
        rig = parts.start(args.dry_run)
    except ImportError as error:
        wheels = f"{sys.executable} -m pip install --no-index --find-links DIR {error.name}"
        print(f"error: {error}; install it, without a network from a folder of wheels: {wheels}", file=sys.stderr)
        return 2
    except (AssertionError, OSError, RuntimeError) as error:  # the first: torch is built without CUDA
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        print(f"error: {error} (CUDA_VISIBLE_DEVICES {visible!r}); --dry-run needs no GPU", file=sys.stderr)
        return 2
    command = "bash launch_scripts/gpu_check.sh" + " --dry-run" * args.dry_run
    records: dict[str, Record] = {name: {"status": NOT_RUN, "reason": NO_TIME} for name in parts.PARTS}
    for name, (function, budget) in parts.PARTS.items():
        left = ends - time.monotonic()
        if left > 1:
            records[name] = ran(partial(function, rig), min(budget, left))
        print(said(name, records[name]), flush=True)
        seconds = round(time.monotonic() - began, 1)
        parts.common.record(args, out, command=command, device=env.accelerator(), parts=records, seconds=seconds)
    startup.leave()
    return int(any(r["status"] == "failed" or r.get("reason") == NO_TIME for r in records.values()))


def ran(part: Callable[[], Iterator[tuple[Any, ...]]], seconds: float) -> Record:
    """What became of a part: its figures, each beside its bound if it has one, as far as it came."""
    record: Record = {"status": "passed", "figures": {}}
    began = time.monotonic()
    try:
        with within(seconds):
            for name, value, *bound in part():
                record["figures"][name] = judged(value, *bound)
        broken = [name for name, figure in record["figures"].items() if figure.get("passed") is False]
        if broken:
            record |= {"status": "failed", "error": "out of bounds: " + "; ".join(broken)}
    except unittest.SkipTest as reason:
        return {"status": NOT_RUN, "reason": str(reason)}
    except (Exception, OverTime) as error:
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return {**record, "seconds": round(time.monotonic() - began, 1)}


def judged(value: Any, bound: tuple[float, float] | None = None) -> Record:
    """A figure's record. ``bound``: the lowest and the highest value that pass; None where nothing is promised."""
    if bound is None:
        return {"value": value, "bound": None}
    written = [limit if math.isfinite(limit) else None for limit in bound]  # JSON has no infinity
    return {"value": value, "bound": written, "passed": bool(bound[0] <= value <= bound[1])}


def said(name: str, record: Record) -> str:
    """A part's line."""
    figures = record.get("figures", {}).items()
    why = record.get("error") or record.get("reason")
    values = ", ".join(f"{key} {_short(figure['value'])}" for key, figure in figures)
    return f"{name}: {record['status']}, {record.get('seconds', 0)} s" + f": {why}" * bool(why) + f" [{values}]"


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `OverTime` in the block when it takes longer. In the main thread only; a call into C is let end."""

    def ring(*_: object) -> None:
        raise OverTime(f"took longer than its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class OverTime(BaseException):
    """No `Exception`, which the frameworks may catch."""


def environment(dry_run: bool) -> None:
    """What torch and the frameworks read when they are imported: one rank, no network, nothing compiled."""
    os.environ.update({"LOCAL_RANK": "0", "TORCHDYNAMO_DISABLE": "1", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"})
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    os.environ["DS_ACCELERATOR"] = "cpu" if dry_run else "cuda"
    if dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
