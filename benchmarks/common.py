"""What the benchmarks share: command line, record, rounds in turns, ratios, processes, and a small GPT."""

import argparse
import datetime
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_plugin.cli import env
from ds_plugin.core.files import atomic_write
from ds_plugin.deepspeed_engine import compat, startup
from ds_plugin.weight_averaging.state.fragments import Fragment

sys.path.append(str(Path(__file__).parents[1]))  # launch_scripts is not installed
VOCAB = 256
Row = dict[str, float]
Limit = tuple[str, float, float]  # what, its figure, at most
_NUMBERS = {
    "width": "of the model", "depth": "of the model", "length": "tokens of a sample", "batch": "samples a step",
    "rounds": "in which the variants take turns", "checkpoints": "that are merged", "shards": "of a checkpoint",
    "workers": "threads or processes",
}  # fmt: skip


def parser(doc: str | None, check: str | None = None, **numbers: int) -> argparse.ArgumentParser:
    """With ``--out`` and ``--check`` where it says what ``check`` fails on; ``numbers``: options that several have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if check is not None:
        made.add_argument("--out", type=Path, help="write the figures here")
        made.add_argument("--check", action="store_true", help=check)
    for name, default in numbers.items():
        made.add_argument(f"--{name}", type=int, default=default, help=f"{_NUMBERS[name]}; default: {default}")
    return made


def compared(name: str, rows: Mapping[str, Row], ours: Sequence[str]) -> list[Limit]:
    """Print a line for each variant but the first; the limits of ours: 1 % of time more than the first takes."""
    for variant, row in list(rows.items())[1:]:
        print(f"{name}{variant}: over {next(iter(rows))} {said(row)}")
    return [(f"{name}{variant}", rows[variant]["ratio"], 1.01) for variant in ours]


def ended(args: argparse.Namespace, limits: Iterable[Limit], **found: Any) -> int:
    """Write what was found to ``args.out``, print the limits that are broken; the exit code of ``args.check``."""
    lines = broken(limits)
    record(args, args.out, **found, broken=lines)
    for line in lines:
        print(f"bound broken: {line}")
    return int(args.check and bool(lines))


def broken(limits: Iterable[Limit]) -> list[str]:
    """Those that are not kept, a line each."""
    return [f"{name}: {value:.4g}, at most {most:.4g}" for name, value, most in limits if not value <= most]


def record(args: argparse.Namespace, out: Path | None, **found: Any) -> None:
    """Write what was found to ``out``, if given, with the date, versions, device and settings it was found by."""
    if out is None:
        return
    gpu = torch.cuda.is_available()
    described = {
        "date": datetime.date.today().isoformat(),
        "versions": env.versions(),
        "device": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores, one thread a process",
        "load_average": os.getloadavg()[0],
        "settings": {k: v for k, v in vars(args).items() if k != "check" and not isinstance(v, Path)},
        **found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lambda path: path.write_text(json.dumps(described, indent=1) + "\n"))


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def clock() -> float:
    """Seconds: this thread's CPU time; with a GPU, those at which it has done all that it was given."""
    if not torch.cuda.is_available():
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.thread_time,
    before: Callable[[], object] = lambda: None,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after ``warmup`` rounds more.

    The order is another one each time: what runs before leaves the caches full, and its writes to be finished.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + warmup):
        for name in random.Random(number).sample(list(variants), len(variants)):
            before()
            started = clock()
            variants[name]()
            seconds[name].append(clock() - started)
    return {name: found[warmup:] for name, found in seconds.items()}


def quartiles(values: Sequence[float]) -> Row:
    """The median as "ratio", and the middle half from "low" to "high"."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"ratio": middle, "low": low, "high": high}


def over(seconds: Sequence[float], reference: Sequence[float], factor: float = 1.0) -> Row:
    """`quartiles` of ``factor`` times one variant's times over another's, round by round; "best": of the smallest."""
    row = quartiles([factor * a / b for a, b in zip(seconds, reference, strict=True)])
    return {**row, "best": factor * min(seconds) / min(reference)}


def times(steps: Mapping[str, Callable[[], object]], rounds: int, each: int = 1) -> dict[str, Row]:
    """By variant: `over` of its time over the first one's. ``each``: steps of a round."""
    seconds = interleaved(steps, rounds * each, clock, warmup=each)
    spent = {name: [sum(s[i : i + each]) for i in range(0, len(s), each)] for name, s in seconds.items()}
    return {name: over(found, next(iter(spent.values()))) for name, found in spent.items()}


def said(row: Row) -> str:
    """A ratio with its spread."""
    best = f", best {row['best']:.4g}" if "best" in row else ""
    return f"{row['ratio']:.4g} (middle half {row['low']:.4g} to {row['high']:.4g}{best})"


class Shards:
    """Master weights that belong to no engine, as an averager reads them."""

    layout = "sharded"

    def __init__(self, sizes: Sequence[int], device: torch.device | str = "cpu"):
        self._masters = [torch.randn(size, device=device) for size in sizes]

    def tensors(self) -> list[torch.Tensor]:
        return self._masters

    def refresh(self) -> None: ...

    def fragments(self) -> list[Fragment]:
        return []


def start(threads: int = 1) -> None:
    """Make this process a world of one rank, on the GPU if there is one. ``threads``: torch's; 0 leaves them."""
    import deepspeed

    from ds_plugin.sweeps import builders

    startup.quiet()
    if threads:
        torch.set_num_threads(threads)
    compat.skip_inference_kernel()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, though there is no launcher
    builders.start_megatron()
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def on_ranks(count: int, work: Callable[..., Any], *args: Any) -> Any:
    """What ``work(*args)`` returns on rank 0 of ``count`` gloo processes of one thread, which all call it; by JSON."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        torch.multiprocessing.spawn(_rank, (count, folder, work, args), nprocs=count)
        return json.loads(Path(folder, "found.json").read_text())


def _rank(rank: int, count: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from megatron_patches import megatron_on_cpu

    startup.quiet()
    compat.skip_inference_kernel()
    megatron_on_cpu.enable()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    found = work(*args)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    startup.leave()


def small_gpt(
    width: int, depth: int, length: int, *, head: int = 32, section: Any = None, vocab: int = VOCAB, seed: int = 1234,
    dtype: torch.dtype = torch.float32, spec: Any = None, fused: bool | None = None, **settings: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """A megatron-core GPT, its TransformerConfig, and the roles of its parameters under CompleteP's ``section``.

    ``spec``: of its layers. ``fused``: whether residual adds are compiled. ``settings``: of `GPTConfig`.
    """
    from megatron_patches.completep import finish, prepare
    from megatron_patches.models import gpt

    described = {"num_layers": depth, "hidden_size": width, "num_attention_heads": width // head, "seq_length": length}
    cfg = gpt.GPTConfig.model_validate({**described, **settings})
    gpt.initialize_parallel(cfg, seed)
    config = gpt.transformer_config(cfg, dtype)
    if fused is not None:
        config.bias_dropout_fusion = fused
    config, spec = prepare(config, gpt.layer_spec(cfg) if spec is None else spec, section)
    model = gpt.build_gpt(cfg, vocab, config, spec)
    return model, config, finish(model, section)


def step_of(engine: Any, batch: int, length: int) -> Callable[[], None]:
    """One training step of a DeepSpeed engine, on samples that stay the same."""
    from ds_plugin.sweeps import builders

    tokens = torch.randint(0, VOCAB, (batch, length + 1))
    pair = tokens[:, :-1].contiguous().to(engine.device), tokens[:, 1:].contiguous().to(engine.device)
    engine.train()

    def step() -> None:
        engine.backward(builders.loss_of(engine, pair))
        engine.step()

    return step


def deepspeed_json(batch: int) -> dict[str, Any]:
    """DeepSpeed's JSON of a plain AdamW, ``batch`` samples a step."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
