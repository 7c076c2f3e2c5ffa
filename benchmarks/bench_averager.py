"""How fast the averager is: against copies of the same bytes, a step's arithmetic, and what others do instead.

    python benchmarks/bench_averager.py [--out FILE.json] [--check]

Everything takes turns in rounds on one thread, in CPU time unless a part says otherwise; `common.over` says what a
figure is. Which physical pages a process gets moves its memory's speed: ``memory`` is the median of several processes.
A *memcpy* is torch's copy of all masters into memory of the averager's kind, of which nothing is in a cache. The parts:

``memory``  A snapshot, the mean of a window of 5, and what others do, on tensors of 4 MiB: torch's AveragedModel, and
            the mean of stacked snapshots. The floor of the mean: it reads five arrays and writes one, a memcpy reads
            one and writes one, and a write first reads the line it changes ("add in place"): 6 / 2 = 3 memcpys.
            Measured, it is a memcpy and four times "read", a read-only sum. The bound is on the lower of the two.
``threads`` The averages and what torch offers, on one thread and on two, in wall time, over a plain copy on one; and
            again while as many other processes as there are cores want them.
``ranks``   The shards of one rank of 1, 2 and 4 under ZeRO, in this process: ranks times the cost over the cost on one
            rank, 1 when it falls as 1 / ranks.
``gather``  Two gloo ranks: gathering the whole fp32 weights on each and averaging them there, over a snapshot of the
            rank's own half. CPU time is the process's, with its gloo threads.
``step``    DeepSpeed training a small GPT in fp32 without ZeRO, where a snapshot looks for what is not finite: what the
            wrapped methods add to the steps of an interval of 100, the snapshot included. A step of N parameters and T
            tokens is at least 6 N T operations at the rate of a large matmul, a snapshot 4 N bytes: N cancels, and
            "tokens" says from how many tokens a step, all ranks together, a snapshot every 100 steps is less than
            0.1 % of it. On a GPU these are upper limits: snapshots hide behind training there.
``seal``    What a save waits for when its files are sealed: the hashing itself is a thread's, while training goes on.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import common
import numpy as np
import torch
import torch.distributed as dist
from common import interleaved, over
from torch.optim import swa_utils

from ds_plugin.weight_averaging import window
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig

K = 5  # snapshots of a window
INTERVAL = 100
FLOOR = (K + 1) / (1 + 1)
RANKS = (1, 2, 4)
_OURS = ("snapshot", "mean", "weighted mean", "ema", "block")
_TENSOR = 1024 * 1024  # elements of a tensor, as models have them

#: what of ours, over what of others', at most
_AGAINST = (
    ("mean", "stacked mean", 1.0),
    ("weighted mean", "mean", 1.5),
    ("ema", "foreach ema", 2.0),
    ("block", "foreach mean", 2.0),
)

Found = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print every figure, write the JSON; ``--check``: 1 when a bound is broken."""
    bounds = "fail when a bound is broken; `limits` has them"
    parser = common.parser(__doc__, bounds, width=256, depth=4, length=128, batch=4, rounds=21)
    parser.add_argument("--millions", type=float, default=52, help="parameters, in shards of uneven size")
    parser.add_argument("--processes", type=int, default=3, help="for the part memory; 1: this one")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure; default: all")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {part: PARTS[part](args) for part in args.parts.split(",")}
    for part, figures in found.items():
        for name, figure in figures.items():
            print(f"{part}: {name}: {_said(figure)}")
    return common.ended(args, limits(found), found=found)


def limits(found: dict[str, Found]) -> Iterator[common.Limit]:
    """The bounds, on the parts that were measured."""
    if memory := found.get("memory"):
        ratio = {name: row["ratio"] for name, row in memory.items() if name != "floor"}
        yield "a snapshot, in memcpys", ratio["snapshot"], 1.10
        floor = min(memory["floor"]["lines"], memory["floor"]["measured"])
        yield f"the mean of {K}, in times its floor", ratio["mean"] / floor, 1.5
        for ours, peer in (("snapshot", "AveragedModel"), ("mean", "stacked mean")):
            yield f"{ours} over {peer}", ratio[ours] / ratio[peer], 1.0
    if sealed := found.get("seal"):
        yield "a save that is sealed, over one that is not", sealed["a save"]["ratio"], 1.05
    if rows := found.get("threads"):
        for ours, peer, limit in _AGAINST:
            for on in (1, 2):
                ratio_on = rows[f"{ours} on {on}"]["ratio"] / rows[f"{peer} on {on}"]["ratio"]
                yield f"{ours} over {peer}, on {on}", ratio_on, limit
        for name in (name for name in rows if f"{name}, loaded" in rows and name.rpartition(" on ")[0] in _OURS):
            yield f"{name} under load, in times its own", rows[f"{name}, loaded"]["ratio"] / rows[name]["ratio"], 3.0
    for name, row in found.get("ranks", {}).items():
        # A cost that does not fall with the ranks would be 2 and 4. Below it, caches decide: they hold the shards of
        # one rank in four and not the whole, and on a shared machine the same run gives 0.7 to 1.5.
        yield f"{name}, in times the ideal", row["ratio"], 1.75
    if gather := found.get("gather"):
        yield "a snapshot over a gathered average, CPU time", 1 / gather["gathered, CPU"]["ratio"], 1.0
    if step := found.get("step"):
        yield f"overhead at interval {INTERVAL}, in %", 100 * step["overhead"]["ratio"], 0.1
        yield "tokens a step at which it is 0.1 %", step["tokens"]["at 0.1 %"], step["tokens"]["trained"]


def sizes(args: argparse.Namespace, ranks: int = 1) -> list[int]:
    """Elements of one rank's shards: uneven, odd, small and empty ones."""
    total = int(args.millions * 1e6)
    whole = [total * 4 // 10 + 3, total * 3 // 10, total * 2 // 10 + 1, total // 10, 0, 4097, 13]
    return [-(-size // ranks) for size in whole]


def averager_of(shards: common.Shards, mode: str = "sliding") -> WeightAverager:
    """An averager whose window of `K` is full, so that all of its memory has been touched."""
    of = {"horizons": [K]} if mode == "ema" else {"window": K}
    config = WeightAveragingConfig.model_validate({"enabled": True, "interval": 1, "mode": mode, **of})
    averager = WeightAverager(config, shards)
    for step in range(K):
        averager.before_step()  # an accelerator's snapshot is followed by the fence of the next step
        averager.snapshot(step, finite=True)
    return averager


def memory(args: argparse.Namespace) -> Found:
    """All in memcpys of the same bytes: the median over ``args.processes`` fresh processes."""
    if args.processes == 1:
        return one_memory(args)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return middle_of(list(pool.map(one_memory, [args] * args.processes)))


def middle_of(each: list[Found]) -> Found:
    """The median of every figure; of "low" and "best" the lowest, of "high" the highest."""
    take = {"low": min, "high": max, "best": min}
    return {
        name: {key: take.get(key, statistics.median)([found[name][key] for found in each]) for key in row}
        for name, row in each[0].items()
    }


def one_memory(args: argparse.Namespace) -> Found:
    """`memory` in this process."""
    torch.set_num_threads(1)
    shards = common.Shards(sizes(args))
    masters = shards.tensors()
    averager = averager_of(shards)
    flat, out = torch.cat(masters), [torch.zeros_like(m) for m in masters]
    spares = itertools.cycle(averager_of(shards).snapshots())  # of the averager's kind, and as cold as its own

    def memcpy() -> None:
        for target, master in zip(next(spares), masters, strict=True):
            target.copy_(master)

    def add_in_place() -> None:
        for target, master in zip(next(spares), masters, strict=True):
            target.add_(master)

    model = torch.nn.ParameterList(flat.split(_TENSOR))
    averaged = swa_utils.AveragedModel(model)
    variants: dict[str, Callable[[], object]] = {
        "memcpy": memcpy,
        "read": lambda: flat.sum(),
        "add in place": add_in_place,
        "snapshot": lambda: averager.snapshot(K, finite=True),
        "snapshot, looked at": lambda: averager.snapshot(K, finite=None),
        "mean": lambda: window.weighted_mean_(out, averager.snapshots(), [1.0] * K),
        "stacked mean": partial(stacked_mean, averager.snapshots()),
        "AveragedModel": partial(averaged.update_parameters, model),
    }
    seconds = interleaved(variants, args.rounds)
    rows: Found = {name: over(found, seconds["memcpy"]) for name, found in seconds.items()}
    rows["floor"] = {"lines": FLOOR, "measured": 1 + (K - 1) * rows["read"]["ratio"], "all traffic": (K + 2) / 3}
    return rows


def stacked_mean(snapshots: list[list[torch.Tensor]]) -> None:
    """What is written without thinking of memory, tensor by tensor of a model."""
    for shards in zip(*snapshots, strict=True):
        for tensors in zip(*(shard.split(_TENSOR) for shard in shards), strict=True):
            torch.stack(tensors).mean(0)


def threads(args: argparse.Namespace) -> Found:
    """In copies on one thread: everything quiet, and in the presence of as many busy processes as there are cores."""
    found = one_threads(args)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        loaded = one_threads(args)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {**found, **{f"{name}, loaded": row for name, row in loaded.items()}}


def one_threads(args: argparse.Namespace) -> Found:
    """Wall time in this process, with torch's own number of threads at 1 and at 2."""
    shards = common.Shards(sizes(args))
    sliding, ema, block = (averager_of(shards, mode) for mode in ("sliding", "ema", "block"))
    flat, out = torch.cat(shards.tensors()), [torch.zeros_like(m) for m in shards.tensors()]
    spare, model = torch.zeros_like(flat), torch.nn.ParameterList(flat.split(_TENSOR))
    kept, weights = sliding.snapshots(), window.read_weights("wma", K)
    peers = {
        "foreach ema": swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn()),
        "foreach mean": swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()),
    }
    variants: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(spare.numpy(), flat.numpy()),
        "snapshot": lambda: sliding.snapshot(K, finite=True),
        "mean": lambda: window.weighted_mean_(out, kept, [1.0] * K),
        "weighted mean": lambda: window.weighted_mean_(out, kept, weights),
        "stacked mean": partial(stacked_mean, kept),
        "ema": lambda: ema.snapshot(K, finite=True),
        "block": lambda: block.snapshot(K, finite=True),
        **{name: partial(peer.update_parameters, model) for name, peer in peers.items()},
    }
    before, rows = torch.get_num_threads(), Found()
    for number in (1, 2):
        torch.set_num_threads(number)
        seconds = interleaved(variants, args.rounds, time.perf_counter)
        rows |= {f"{name} on {number}": over(found, seconds["copy"]) for name, found in seconds.items()}
    torch.set_num_threads(before)
    return rows


def ranks(args: argparse.Namespace) -> Found:
    """Ranks x the cost on one of so many ranks, over the cost on one rank."""
    averagers = {n: averager_of(common.Shards(sizes(args, n))) for n in RANKS}
    outs = {n: [torch.zeros_like(m) for m in averagers[n].shards.tensors()] for n in RANKS}
    variants: dict[str, Callable[[], object]] = {}
    for n, averager in averagers.items():
        variants[f"snapshot, {n} ranks"] = partial(averager.snapshot, K, finite=True)
        variants[f"mean, {n} ranks"] = partial(window.weighted_mean_, outs[n], averager.snapshots(), [1.0] * K)
    seconds = interleaved(variants, args.rounds)
    return {
        f"{what}, {n} ranks": over(seconds[f"{what}, {n} ranks"], seconds[f"{what}, 1 ranks"], factor=n)
        for what in ("snapshot", "mean")
        for n in RANKS[1:]
    }


def gather(args: argparse.Namespace) -> Found:
    """Two processes of this script; see `gathered`."""
    found: Found = common.on_ranks(2, gathered, args)
    return found


def gathered(args: argparse.Namespace) -> Found:
    """Every rank gathers all shards and averages the whole, over a snapshot of its own. All ranks call it."""
    averager = averager_of(common.Shards(sizes(args, dist.get_world_size())))
    shard = torch.cat(averager.shards.tensors())
    full, average = (torch.zeros(shard.numel() * dist.get_world_size()) for _ in range(2))
    update = swa_utils.get_swa_multi_avg_fn()

    def gather_and_average() -> None:
        dist.all_gather_into_tensor(full, shard)
        update([average], [full], K - 1)

    variants = {"snapshot": lambda: averager.snapshot(K, finite=True), "gathered": gather_and_average}
    rows = {}
    for name, clock in (("CPU", time.process_time), ("wall", time.perf_counter)):
        seconds = interleaved(variants, args.rounds, clock, before=dist.barrier)
        rows[f"gathered, {name}"] = over(seconds["gathered"], seconds["snapshot"])
    return rows


def step(args: argparse.Namespace) -> Found:
    """What averaging adds to DeepSpeed's step."""
    import ds_plugin

    _, train, count = _engine(args)  # which trains, and nothing is wrapped there
    engine, once, _ = _engine(args)
    once()  # from the first step on, DeepSpeed says that one was applied

    def bare_backward(loss: object) -> object:
        return loss

    def bare_step() -> None:
        engine.global_steps += 1

    engine.backward, engine.step = bare_backward, bare_step  # what is wrapped next, so that only the wrapping is timed
    ds_plugin.attach(engine, {"weight_averaging": {"enabled": True, "interval": INTERVAL, "window": K}})
    averager = ds_plugin.get_plugin(engine).averager
    assert averager is not None

    def steps(number: int, backward: Callable[[object], object], step: Callable[[], object]) -> None:
        engine.global_steps = 0
        for _ in range(number):
            backward(None)
            step()
        assert averager.steps  # waits for a snapshot that is under way, as reading does

    for _ in range(K):
        steps(INTERVAL, engine.backward, engine.step)
    assert averager.steps == [INTERVAL] * K
    large = averager_of(common.Shards(sizes(args), engine.device))

    def large_snapshot() -> None:
        large.before_step()
        large.snapshot(K, finite=True)
        assert large.steps

    square = torch.randn(1024, 1024)
    if engine.device.type == "cuda":
        square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    variants: dict[str, Callable[[], object]] = {
        "step": train,
        "bare": lambda: steps(INTERVAL - 1, bare_backward, bare_step),
        "wrapped": lambda: steps(INTERVAL - 1, engine.backward, engine.step),
        "bare interval": lambda: steps(INTERVAL, bare_backward, bare_step),
        "wrapped interval": lambda: steps(INTERVAL, engine.backward, engine.step),
        "large snapshot": large_snapshot,
        "matmul": lambda: square @ square,
    }
    seconds = interleaved(variants, args.rounds, common.clock)
    added, added_interval = (
        [found - statistics.median(seconds[f"bare{what}"]) for found in seconds[f"wrapped{what}"]]
        for what in ("", " interval")
    )
    copied = over(seconds["large snapshot"], seconds["matmul"])
    operations = copied["ratio"] * 2 * len(square) ** 3 / sum(sizes(args))  # in the time that a parameter's copy takes
    return {
        "overhead": over(added_interval, seconds["step"], factor=1 / INTERVAL),
        "of it bookkeeping": over(added, seconds["step"], factor=1 / (INTERVAL - 1)),
        "bookkeeping, microseconds": 1e6 * statistics.median(added) / (INTERVAL - 1),
        "large snapshot over a matmul": copied,
        "tokens": {
            "trained": args.batch * args.length,
            "parameters": count,
            "at 0.1 %": operations / (6 * INTERVAL * 0.001),
        },
    }


def seal(args: argparse.Namespace) -> Found:
    """DeepSpeed's save_checkpoint, which begins to seal what it has written, over one that does not."""
    import ds_plugin

    engine, once, _ = _engine(args)
    once()
    ds_plugin.attach(engine, {"weight_averaging": {"enabled": True, "interval": INTERVAL, "window": K}})
    sealer = ds_plugin.get_plugin(engine).sealer
    close = sealer.close
    with tempfile.TemporaryDirectory() as folder:

        def save(sealed: bool) -> None:
            vars(sealer)["close"] = close if sealed else lambda *args: None
            engine.save_checkpoint(folder, tag="tag")

        variants = {"sealed": partial(save, True), "not sealed": partial(save, False)}
        seconds = interleaved(variants, args.rounds, time.perf_counter, before=sealer.wait)
        sealer.wait()
    return {"a save": over(seconds["sealed"], seconds["not sealed"])}


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    part.__name__: part for part in (memory, threads, ranks, gather, step, seal)
}


def _engine(args: argparse.Namespace) -> tuple[Any, Callable[[], None], int]:
    """DeepSpeed in fp32 without ZeRO, one training step of it, and its number of parameters."""
    import deepspeed

    common.start()
    model, *_ = common.small_gpt(args.width, args.depth, args.length)
    engine = deepspeed.initialize(model=model, config=common.deepspeed_json(args.batch))[0]
    return engine, common.step_of(engine, args.batch, args.length), sum(p.numel() for p in model.parameters())


def _said(figure: Any) -> str:
    if not isinstance(figure, dict):
        return f"{figure:.4g}"
    return common.said(figure) if "low" in figure else ", ".join(f"{n} {_said(value)}" for n, value in figure.items())


if __name__ == "__main__":
    sys.exit(main())
