"""The arithmetic of docs/scaling.md checked on this machine: what it predicts for 1 to 8 processes, and what they take.

    python benchmarks/scaling_measure.py [--out docs/results/scaling]

First, in one process, what a byte or a step costs: a snapshot of large masters, a report's pass over Adam's second
moment, a multiplication, the bookkeeping of a step, a report with nothing to read, and its work for each rank of the
job. These figures, rounded, are `ds_plugin.run.plan_costs.CPU`. Then DeepSpeed (fp32, ZeRO 1) with averaging and warmup
on a small GPT in 1, 2, 4 and 8 gloo processes, one after the other.

Seconds are CPU time of the thread that is measured. What is timed takes turns within each round, and one rank at a time
works where no collective forbids it. Figures are medians over rounds; "low" and "high" hold the middle half of them.
``--out`` writes measured.json.
"""

import argparse
import datetime
import functools
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ds_plugin.atomic import atomic_write
from ds_plugin.run import plan_costs as costs
from ds_plugin.run.plan_costs import Layout, Rates
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.cost import size
from ds_plugin.weight_averaging.swap import Exchange
from megatron_patches.gpt import GPTConfig, padded_vocab_size

PROCESSES = (1, 2, 4, 8)
WINDOW, INTERVAL, REPORT = 5, 100, 20
_MANY = 1024  # ranks of a job that a report is made up for
_VOCAB = 256
_PACKAGES = ("torch", "deepspeed", "megatron-core")

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the JSON; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write measured.json here")
    parser.add_argument("--width", type=int, default=512, help="of the GPT that is trained")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of its samples")
    parser.add_argument("--millions", type=float, default=26, help="elements of the large buffers")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--processes", default=",".join(map(str, PROCESSES)))
    args = parser.parse_args(arguments)
    found = measure(args)
    for name, rate in found["rates"].items():
        print(f"{name}: {rate['value']:.3g} ({rate['low']:.3g} to {rate['high']:.3g})")
    print(compared(found["compared"]))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1) + "\n"
        atomic_write(args.out / "measured.json", lambda path: path.write_text(text))
    return 0


@dataclass
class Timed:
    """Seconds of each round."""

    seconds: list[float]

    def row(self) -> dict[str, float]:
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return {"seconds": middle, "low": low, "high": high}


def rounds(
    variants: Mapping[str, Callable[[], object]], count: int, clock: Callable[[], float] = time.thread_time
) -> dict[str, Timed]:
    """Each variant once in a round, in an order that rotates; the first round warms up and is left out."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(count + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = clock()
            variants[name]()
            found[name].append(clock() - started)
    return {name: Timed(seconds[1:]) for name, seconds in found.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Spawn the processes of each size; the rates come from the run of one."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "device": f"{os.cpu_count()} CPU cores, one thread a process",
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "what")},
        "load_average": {},
    }
    rows: list[Row] = []
    rates: Rates | None = None
    for processes in map(int, args.processes.split(",")):
        with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            given = vars(args) | {"rates": rates}
            torch.multiprocessing.spawn(_process, (processes, given, folder), nprocs=processes)
            written = json.loads((Path(folder) / "found.json").read_text())
        if "rates" in written:
            found["rates"] = written["rates"]
            rates = as_rates(written["rates"])
        rows += written["rows"]
        found["load_average"][str(processes)] = os.getloadavg()[0]
        if processes == 1:
            assert rates is not None
            rows.append(_of_multiplier(args, rates))
    found["compared"] = rows
    return found


def as_rates(measured: Mapping[str, Mapping[str, float]]) -> Rates:
    """The medians, as the arithmetic takes them."""
    return Rates(**{name: figure["value"] for name, figure in measured.items()}, measured="just now")


def _process(rank: int, processes: int, given: dict[str, Any], folder: str) -> None:
    from ds_plugin.run import startup

    startup.quiet()
    startup.skip_inference_kernel()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(processes)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    args = argparse.Namespace(**given)
    run = Run(args, processes)
    written: dict[str, Any] = {"rows": held(run)}  # first, while nothing that was freed lies about
    if args.rates is None:
        written["rates"] = measure_rates(run)
        args.rates = as_rates(written["rates"])
    written["rows"] += timed(run, args.rates)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(written))
    startup.leave()


class Run:
    """A DeepSpeed engine that has made one step, and can be given the methods and the methods be taken away."""

    def __init__(self, args: argparse.Namespace, processes: int):
        import deepspeed

        from megatron_patches import cpu_host, gpt

        cpu_host.enable()
        deepspeed.init_distributed(dist_backend="gloo")
        self.args, self.processes = args, processes
        self.model = GPTConfig.model_validate(
            {
                "num_layers": args.depth, "hidden_size": args.width, "num_attention_heads": args.width // 64,
                "seq_length": args.length,
            }
        )  # fmt: skip
        gpt.initialize_parallel(self.model, 1234)
        spec = gpt.layer_spec(self.model)
        built = gpt.build_gpt(self.model, _VOCAB, gpt.transformer_config(self.model, torch.float32), spec)
        matrices = [p for p in built.parameters() if p.dim() > 1]
        vectors = [p for p in built.parameters() if p.dim() <= 1]
        host = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        }
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.engine = deepspeed.initialize(model=built, config=host, model_parameters=groups)[0]
        tokens = torch.randint(0, _VOCAB, (1, args.length + 1))
        self.given = (tokens[:, :-1].contiguous(), torch.arange(args.length).unsqueeze(0), None)
        self.labels = tokens[:, 1:].contiguous()
        self.engine.train()
        self.train()  # from the first step on, the host says that one was applied
        self.masters = self.engine.optimizer.single_partition_of_fp32_groups
        self.loss = torch.tensor(1.0)

    def train(self) -> None:
        """One real step."""
        self.engine.backward(self.engine(*self.given, labels=self.labels).mean())
        self.engine.step()

    def bare(self) -> None:
        """What is left of a step when the host does nothing."""
        self._forward()
        self._backward(None)
        self._step()

    def attach(self, *methods: str, report_interval: int = REPORT) -> Any:
        """The methods around a host that does nothing, so that only what they add takes time."""
        import ds_plugin

        sections = {
            "weight_averaging": {"enabled": True, "interval": INTERVAL, "window": WINDOW},
            "sequence_length_warmup": {
                "enabled": True, "start_length": 8, "end_length": self.args.length, "duration": {"steps": 10**9},
                "preflight": False, "report_interval": report_interval, "variance": True,
            },
        }  # fmt: skip
        self.engine.forward, self.engine.backward, self.engine.step = self._forward, self._backward, self._step
        ds_plugin.attach(self.engine, {name: sections[name] for name in methods})
        return ds_plugin.attached(self.engine)

    def detach(self) -> None:
        """Plain DeepSpeed again."""
        import ds_plugin

        ds_plugin.detach(self.engine)
        for name in ("forward", "backward", "step"):
            vars(self.engine).pop(name, None)
        gc.collect()

    def steps(self, count: int) -> None:
        """So many steps of the engine that does nothing, with the methods that are attached."""
        self.engine.global_steps = 0
        for _ in range(count):
            self.engine.backward(self.engine(*self.given, labels=self.labels))
            self.engine.step()

    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.loss

    def _backward(self, loss: object) -> object:
        return loss

    def _step(self) -> None:
        self.engine.global_steps += 1


def measure_rates(run: Run) -> dict[str, dict[str, float]]:
    """What `Rates` holds, with the middle half of the rounds."""
    rates = _rates_of_bytes(run)
    for name, method in (("averaging_step", "weight_averaging"), ("warmup_step", "sequence_length_warmup")):
        rates[name] = _quiet_step(run, method)
    rates["report_base"], rates["report_rank"] = _report_alone(run), _report_of_many(run)
    return rates


class Large:
    """Masters of one large tensor, of no engine."""

    layout = "sharded"

    def __init__(self, count: int):
        self._masters = [torch.randn(count)]

    def tensors(self) -> list[torch.Tensor]:
        return self._masters

    def refresh(self) -> None: ...

    def fragments(self) -> list[Any]:
        return []


def _rates_of_bytes(run: Run) -> dict[str, dict[str, float]]:
    from ds_plugin import stability

    args, count = run.args, int(run.args.millions * 1e6)
    config = WeightAveragingConfig.model_validate({"enabled": True, "interval": 1, "window": WINDOW})
    averager = WeightAverager(config, Large(count))
    for step in range(WINDOW):
        averager.snapshot(step, finite=True)
    activation, product = torch.randn(count), torch.empty(count)
    operations = 6 * args.length * sum(p.numel() for p in run.engine.module.parameters())
    found = rounds(
        {
            "snapshot": lambda: averager.snapshot(WINDOW, finite=True),
            "looked_at": lambda: averager.snapshot(WINDOW),
            "report": lambda: stability.adam_variance(run.engine),
            "multiply": lambda: torch.mul(activation, 0.5, out=product),
            "train": run.train,
        },
        args.rounds,
    )
    moments = 4 * sum(m.numel() for m in run.masters)
    per = {"snapshot": 4 * count, "looked_at": 4 * count, "report": moments, "multiply": 4 * count}
    rates = {name: _rate(found[name], 1 / bytes_) for name, bytes_ in per.items()}
    train = _rate(found["train"], 1 / operations)
    return {**rates, "flops": {"value": 1 / train["value"], "low": 1 / train["high"], "high": 1 / train["low"]}}


def _quiet_step(run: Run, method: str) -> dict[str, float]:
    """What a method adds to a step without a snapshot and without a report."""
    count = INTERVAL - 1
    run.attach(method, report_interval=10**5)

    def bare() -> None:
        for _ in range(count):
            run.bare()

    seconds = rounds({"with": lambda: run.steps(count), "bare": bare}, run.args.rounds)
    run.detach()
    added = [a - b for a, b in zip(seconds["with"].seconds, seconds["bare"].seconds, strict=True)]
    return _rate(Timed(added), 1 / count)


def _report_alone(run: Run) -> dict[str, float]:
    """Seconds of a report of one rank that does not read Adam's state."""
    monitor = run.attach("sequence_length_warmup").warmup.monitor
    monitor.variance = False
    count = REPORT - 1  # the next would report by itself

    def steps(*, reported: bool) -> None:
        for _ in range(count):
            monitor.record(run.loss)
            monitor.close_step()
            if reported:
                monitor.report()

    def close() -> None:
        steps(reported=False)

    timed = rounds(
        {"reported": lambda: steps(reported=True), "closed": close, "after": monitor.report}, run.args.rounds
    )
    run.detach()
    added = [a - b for a, b in zip(timed["reported"].seconds, timed["closed"].seconds, strict=True)]
    return _rate(Timed(added), 1 / count)


def _report_of_many(run: Run) -> dict[str, float]:
    """Seconds that a report takes for each rank of the job: every rank reads what all have sent."""
    monitor = run.attach("sequence_length_warmup").warmup.monitor
    monitor.variance = False  # its pass over Adam's state would drown what is looked for

    def gathered(table: torch.Tensor, vector: torch.Tensor) -> None:
        table.view(-1, len(vector)).copy_(vector)

    def report(ranks: int) -> None:
        with (
            mock.patch.object(dist, "get_world_size", lambda group=None: ranks),
            mock.patch.object(dist, "all_gather_into_tensor", gathered),
        ):
            for _ in range(REPORT):
                monitor.record(run.loss)
                monitor.close_step()

    timed = rounds({"many": lambda: report(_MANY), "one": lambda: report(1)}, run.args.rounds)
    run.detach()
    added = [a - b for a, b in zip(timed["many"].seconds, timed["one"].seconds, strict=True)]
    return _rate(Timed(added), 1 / (_MANY - 1))


def _rate(timed: Timed, factor: float) -> dict[str, float]:
    row = timed.row()
    return {"value": factor * row["seconds"], "low": factor * row["low"], "high": factor * row["high"]}


# -- predicted beside measured -----------------------------------------------------------------------------------------


@dataclass
class Predicted:
    """What the arithmetic says of this run's ranks."""

    taken: costs.Averaging
    layout: Layout
    received: int  # bytes that a swap's two refreshes bring from other ranks, fp32

    @classmethod
    def of(cls, run: Run) -> "Predicted":
        layout, found = Layout(run.processes), costs.parts(run.model, padded_vocab_size(_VOCAB, 1))
        local = costs.local_parameters(found, run.model.num_layers, layout, tied=False)
        masters = costs.shares(local, layout.data, by_role=False)
        config = WeightAveragingConfig.model_validate({"enabled": True, "interval": INTERVAL, "window": WINDOW})
        taken = costs.averaging(config, masters, pinned=False)
        return cls(taken, layout, 2 * (4 * sum(local.values()) - taken.snapshot))


def held(run: Run) -> list[Row]:
    """Bytes. Every rank calls it, rank 0's are kept."""
    expected = Predicted.of(run)
    before = _private_bytes()
    plugin = run.attach("weight_averaging", "sequence_length_warmup")
    averager = plugin.averager
    for step in range(WINDOW):
        averager.snapshot(step, finite=True)
    averager.read()  # so that the spare buffer is touched as well
    resident = _private_bytes() - before
    with Received() as received, plugin.averaged_weights():
        pass
    snapshot = sum(4 * t.numel() for t in averager.shards.tensors())
    allocated = averager.memory.rank
    run.detach()
    return [
        _row(run.processes, "bytes of host memory, allocated", expected.taken.held, allocated),
        _row(run.processes, "bytes of host memory, resident", expected.taken.held, resident),
        _row(run.processes, "bytes of a snapshot", expected.taken.snapshot, snapshot),
        _row(run.processes, "bytes received for a swap", expected.received, received.bytes),
    ]


def timed(run: Run, rates: Rates) -> list[Row]:
    """Seconds. Every rank calls it, rank 0's are kept."""
    expected, args = Predicted.of(run), run.args
    plugin = run.attach("weight_averaging", "sequence_length_warmup")
    averager = plugin.averager
    for step in range(WINDOW):
        averager.snapshot(step, finite=True)
    snapshot = _in_turn(lambda: rounds({"": lambda: averager.snapshot(WINDOW, finite=True)}, args.rounds))

    def bare() -> None:
        for _ in range(INTERVAL):
            run.bare()

    steps = rounds({"with": lambda: run.steps(INTERVAL), "bare": bare}, args.rounds)
    added = [(a - b) / INTERVAL for a, b in zip(steps["with"].seconds, steps["bare"].seconds, strict=True)]
    per_step = costs.averaging_seconds(rates, expected.taken.snapshot, INTERVAL)
    per_step += costs.warmup_seconds(rates, expected.taken.snapshot, REPORT, run.processes)
    masters, average = averager.shards.tensors(), averager.read()
    exchange = _in_turn(lambda: rounds({"": lambda: _exchange(masters, average)}, args.rounds))
    copies = 6 * expected.taken.snapshot * rates.snapshot  # three copies of the shard each way
    run.detach()
    rows = [
        _row(run.processes, "seconds of a snapshot", expected.taken.snapshot * rates.snapshot, snapshot[""].row()),
        _row(run.processes, "seconds of a swap's exchanges", copies, exchange[""].row()),
        _row(run.processes, "seconds per step in the plugin", per_step, Timed(added).row()),
    ]
    return rows


def _row(processes: int, what: str, predicted: float, measured: Mapping[str, float] | float) -> Row:
    figures = dict(measured) if isinstance(measured, Mapping) else {"seconds": measured}
    value = figures.pop("seconds")
    ratio = value / predicted if predicted else None
    return {
        "processes": processes,
        "what": what,
        "predicted": predicted,
        "measured": value,
        "ratio": ratio,
        **figures,
    }


def _in_turn(measured: Callable[[], Any]) -> Any:
    """One rank after the other, so that they do not take the memory's bandwidth from one another."""
    found = None
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            found = measured()
    dist.barrier()
    return found


def _exchange(masters: list[torch.Tensor], average: list[torch.Tensor]) -> None:
    """A swap to and fro, without the arithmetic of the average and without the host's refresh."""
    for _ in range(2):
        Exchange(masters, average).forth()


def _private_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)


class Received(TorchDispatchMode):
    """Bytes of weights that all-gathers bring to this rank from others, counted where they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and "allgather" in func._schema.name:
            parts = [t for t in _tensors(args[0]) if t.is_floating_point()]  # not the ranks' few bytes on how it went
            total = sum(t.numel() * t.element_size() for t in parts)
            self.bytes += total * (dist.get_world_size() - 1) // dist.get_world_size()
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _of_multiplier(args: argparse.Namespace, rates: Rates) -> Row:
    """Measured in a process that keeps the memory it has freed, as training does on a GPU.

    glibc gives a gradient of 16 MB back to the system when it is freed; to get it again, page by page, takes longer
    than to multiply it, and would be counted, since only with the multiplier there is such a gradient.
    """
    keeping = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    with mock.patch.dict(os.environ, keeping):  # read when a process starts
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_multiplier, 2 * args.rounds, rates).result()


def _multiplier(count: int, rates: Rates) -> Row:
    """A residual addition's forward and backward pass with the multiplier, over the host's own without."""
    from megatron_patches import cpu_host
    from megatron_patches.completep.residual import scaled_bias_dropout_add

    torch.set_num_threads(1)
    cpu_host.enable()
    add = {name: scaled_bias_dropout_add(m)(True, False) for name, m in (("with", 0.5), ("without", 1.0))}
    x, residual = (torch.randn(4096, 1, 1024, requires_grad=True) for _ in range(2))
    gradient = torch.randn_like(x)

    def one(name: str) -> None:  # not backward(): it would copy a gradient that two leaves share, but only without
        torch.autograd.grad(add[name]((x, None), residual, 0.0), (x, residual), gradient)

    found = rounds({name: functools.partial(one, name) for name in add}, count)
    added = [a - b for a, b in zip(found["with"].seconds, found["without"].seconds, strict=True)]
    predicted = 4 * x.numel() * rates.multiply
    return _row(1, "seconds of a branch's multiplier, CompleteP", predicted, Timed(added).row())


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def compared(rows: list[Row]) -> str:
    """In Markdown, predicted beside measured."""
    lines = [
        "| processes | what | predicted | measured (middle half) | measured / predicted |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        show = size if row["what"].startswith("bytes") else _time
        half = f" ({show(row['low'])} to {show(row['high'])})" if "low" in row else ""
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
        lines.append(
            f"| {row['processes']} | {row['what']} | {show(row['predicted'])} | {show(row['measured'])}{half} "
            f"| {ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
