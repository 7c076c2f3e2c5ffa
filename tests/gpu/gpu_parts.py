"""The parts of `gpu_check`: what each measures on a GPU, and the bounds.

A part yields (name of a figure, its value, its bound if it has one), so that figures found before an error are kept.
"""

import gc
import json
import math
import statistics
import tempfile
import time
import unittest
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench_completep
import bench_warmup
import common
import torch
from deepspeed.accelerator import get_accelerator
from megatron.core.models.gpt import gpt_layer_specs
from torch.utils import cpp_extension

import ds_plugin
from ds_plugin.deepspeed_engine import readings
from ds_plugin.sweeps import builders
from launch_scripts.gpt.optimizer import choose_optimizer

Figures = Iterator[tuple[Any, ...]]
Bound = tuple[float, float]
Span = tuple[float, float]  # begin and end

_ADAMW = {"lr": 1e-3, "weight_decay": 0.1}
NONE, ONE = (0, 0), (1, 1)  # bounds


class Shape(NamedTuple):
    """Of a GPT and its batch."""

    width: int
    depth: int
    length: int
    batch: int

    @property
    def head(self) -> int:
        return min(64, self.width // 2)


class Rig:
    """What the parts run on: this GPU, or in miniature a CPU."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run
        self.small = Shape(32, 1, 16, 2) if dry_run else Shape(256, 2, 128, 4)
        # activations and the optimizer's state both count in its memory; on a CPU random streams do, too: 35 kB
        self.large = Shape(64, 2, 64, 8) if dry_run else Shape(1024, 8, 256, 2)
        # its kernels take longer than it takes the CPU to start them
        self.fast = Shape(32, 1, 16, 2) if dry_run else Shape(2048, 2, 512, 16)
        self.lengths = [8, 16] if dry_run else [128, 256, 512]
        self.rounds, self.round = (3, 2) if dry_run else (20, 20)

    def on_a_gpu(self, low: float, high: float) -> Bound | None:
        """The bound of what a CPU does not have, or has other times of."""
        return None if self.dry_run else (low, high)

    def synchronize(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def profiled(self, work: Callable[[], object]) -> tuple[list[Span], list[Span]]:
        """When copies from the device and when its kernels ran during some work, in seconds."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(f"{folder}/trace.json")
            return spans(json.loads(Path(folder, "trace.json").read_text()))


def start(dry_run: bool) -> Rig:
    """Make this process a world of one rank."""
    if dry_run:
        get_accelerator().is_fp16_supported = lambda: True  # it asks for fast kernels, and slow ones do here
    else:
        torch.cuda.set_device(0)
    common.start(threads=int(dry_run))
    return Rig(dry_run)


def spans(trace: dict[str, Any]) -> tuple[list[Span], list[Span]]:
    """Copies from the device, and kernels, of a profile in Chrome's format; seconds."""

    def of(category: str, name: str) -> list[Span]:
        events = [e for e in trace["traceEvents"] if e.get("cat") == category and name in e["name"]]
        return [(e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events]

    return of("gpu_memcpy", "DtoH"), of("kernel", "")


def under(copied: list[Span], kernels: list[Span]) -> float:
    """The share of the copies' time in which some kernel runs. Copies do not overlap; kernels may."""
    shared, last = 0.0, -math.inf
    for begin, end in sorted(kernels):
        begin, last = max(begin, last), max(end, last)
        shared += sum(max(0.0, min(end, e) - max(begin, b)) for b, e in copied)
    return shared / sum(e - b for b, e in copied)


def methods(shape: Shape, *names: str, **averaging: Any) -> dict[str, Any]:
    """The JSON sections of some methods, of all three without names; ``averaging``: settings of its own."""
    warmup = {"enabled": True, "start_length": 8, "end_length": shape.length, "duration": {"steps": 4}}
    every: dict[str, Any] = {
        "sequence_length_warmup": warmup,
        "completep": {"enabled": True, "base_width": shape.width // 2, "base_depth": 1, "base_head_dim": shape.head},
        "weight_averaging": {"enabled": True, "window": 4, "interval": 1, **averaging},
    }
    return {name: every[name] for name in names or every}


@contextmanager
def engine_of(
    shape: Shape, sections: dict[str, Any], stage: int, precision: str = "bf16", te: bool = False, **changes: Any
) -> Iterator[Any]:
    """A DeepSpeed engine on a GPT that starts alike for every layout; gone afterwards, its memory too."""
    section = ds_plugin.split_config(sections)[1].completep
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    spec = None if te else gpt_layer_specs.get_gpt_layer_local_spec()
    model, *_ = common.small_gpt(
        shape.width, shape.depth, shape.length, head=shape.head, section=section, dtype=dtype, spec=spec
    )
    given: dict[str, Any] = {
        **common.deepspeed_json(shape.batch),
        # a scale that does not overflow by itself, and is halved by the first overflow
        precision: {"enabled": True, **({"initial_scale_power": 8, "hysteresis": 1} if precision == "fp16" else {})},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6},
        "optimizer": {"type": "AdamW", "params": {**_ADAMW, "torch_adam": True}},
        **changes,
    }
    engine = ds_plugin.initialize(model=model, config={**given, **sections})[0]
    del model
    engine.train()
    try:
        yield engine
    finally:
        if any(section["enabled"] for section in sections.values()):
            ds_plugin.detach(engine)
        engine.destroy()


def train(engine: Any, shape: Shape, steps: int, factor: float = 1.0) -> list[float]:
    """Steps on the batches that belong to their numbers, the loss times a factor; the losses."""
    batches, losses = [], []
    for step in range(engine.global_steps, engine.global_steps + steps):  # sending them waits for the device
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, common.VOCAB, (shape.batch, shape.length + 1), generator=generator)
        batches.append(tokens.to(engine.device))
    for tokens in batches:
        loss = builders.loss_of(engine, (tokens[:, :-1], tokens[:, 1:]))
        engine.backward(loss * factor)
        engine.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


plugin_of: Callable[[Any], Any] = ds_plugin.get_plugin


def not_finite(losses: list[float]) -> int:
    return sum(not math.isfinite(loss) for loss in losses)


def optimizer(rig: Rig) -> Figures:
    """The AdamW that a JSON without ``torch_adam`` comes to, and a few steps of it with all methods."""
    plain: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": _ADAMW}}
    if rig.dry_run:  # DeepSpeed would compile its own for CPUs
        plain, _ = choose_optimizer(plain)
    elif cpp_extension.CUDA_HOME is None:
        raise unittest.SkipTest("DeepSpeed compiles FusedAdam, and there is no CUDA toolkit (nvcc; CUDA_HOME)")
    with engine_of(rig.small, methods(rig.small), stage=1, **plain) as engine:
        kind = type(engine.basic_optimizer)
        yield "chosen", f"{kind.__module__}.{kind.__qualname__}"
        yield "is fused", int(kind.__name__ == "FusedAdam"), rig.on_a_gpu(*ONE)
        yield "losses not finite", not_finite(train(engine, rig.small, 4)), NONE


def precision(rig: Rig) -> Figures:
    """All methods in bf16; and in fp16, where the gradients of one step overflow: it is skipped, and in no average."""
    shape = rig.small
    with engine_of(shape, methods(shape), stage=0) as engine:
        yield "bf16, stage 0: losses not finite", not_finite(train(engine, shape, 4)), NONE
    for stage in (0, 1, 3):
        with engine_of(shape, methods(shape), stage=stage, precision="fp16") as engine:
            plugin, what = plugin_of(engine), f"fp16, stage {stage}: "
            yield what + "losses not finite", not_finite(train(engine, shape, 2)), NONE
            masters = [master.clone() for master in plugin.averager.masters()]
            steps, trained, scale = plugin.averager.steps[:], plugin.ledger.trained, engine.optimizer.loss_scale
            skipped = engine.skipped_steps
            train(engine, shape, 1, factor=1e30)
            yield what + "steps skipped by an overflow", engine.skipped_steps - skipped, ONE
            yield what + "loss scale after over before", float(engine.optimizer.loss_scale / scale), (0.5, 0.5)
            moved = zip(masters, plugin.averager.masters(), strict=True)
            yield what + "masters changed by it", sum(not torch.equal(a, b) for a, b in moved), NONE
            yield what + "snapshots of it", len(set(plugin.averager.steps) ^ set(steps)), NONE
            yield what + "tokens trained by it", plugin.ledger.trained - trained, NONE
            train(engine, shape, 1)
            yield what + "snapshots of the step after it", plugin.averager.steps.count(engine.global_steps), ONE


def zero(rig: Rig) -> Figures:
    """All methods under ZeRO 1, 2 and 3; a run from a checkpoint against the one that wrote it, its average too."""
    shape = rig.small
    for stage in (1, 2, 3):
        sections, what = methods(shape), f"stage {stage}: "
        with tempfile.TemporaryDirectory() as folder:
            with engine_of(shape, sections, stage) as engine:
                losses = train(engine, shape, 3)
                engine.save_checkpoint(folder)
                straight = _ending(engine, shape)
            yield what + "losses not finite", not_finite(losses + straight), NONE
            with engine_of(shape, sections, stage) as engine:
                engine.load_checkpoint(folder)
                resumed = _ending(engine, shape)
            apart = max(abs(a - b) for a, b in zip(straight, resumed, strict=True))
            yield what + "resumed, largest difference", apart, NONE


def _ending(engine: Any, shape: Shape) -> list[float]:
    """The losses of three further steps, and the sums of the average, in which a snapshot from before them is left."""
    losses = train(engine, shape, 3)
    return losses + [tensor.double().sum().item() for tensor in plugin_of(engine).averager.read()]


def memory(rig: Rig) -> Figures:
    """The peak of a first step with its full-length pass, over that of DeepSpeed's first two at full length: in the
    second, Adam's state is there while gradients are made."""

    def peak(stage: int, *names: str) -> int:
        with engine_of(rig.large, methods(rig.large, *names) if names else {}, stage) as engine:
            gc.collect()  # not in the step, whose peak would be another one's
            held = 6 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())  # bf16 and masters
            return held + bench_completep.peak_memory(partial(train, engine, rig.large, 1 if names else 2))

    peak(0)  # workspaces and masks that stay
    for stage in (0, 1, 2, 3):
        real, tried = peak(stage), peak(stage, "sequence_length_warmup")
        yield f"stage {stage}: step, bytes", real
        yield f"stage {stage}: full-length pass over step", tried / real, (0.98, 1.02)


def transformer_engine(rig: Rig) -> Figures:
    """All methods on its layers."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # whatever a build for another machine may raise
        raise unittest.SkipTest(f"transformer_engine does not import: {type(error).__name__}: {error}") from error
    with engine_of(rig.small, methods(rig.small), stage=1, te=True) as engine:
        kinds = [kind.__module__ for module in engine.module.modules() for kind in type(module).__mro__]
        yield "its modules in the model", sum(kind.startswith("transformer_engine") for kind in kinds), (1, math.inf)
        yield "losses not finite", not_finite(train(engine, rig.small, 6)), NONE


def snapshot(rig: Rig) -> Figures:
    """What a snapshot of a training engine takes: device memory, the link, and time that shows.

    Overheads: by how much two steps, with a snapshot after the first, take longer than DeepSpeed's, over an interval of
    its steps.
    """
    shape = rig.fast
    sections = methods(shape, "weight_averaging", window=2, interval=2)
    with engine_of(shape, {}, 1) as plain, engine_of(shape, sections, 1) as engine:
        averager = plugin_of(engine).averager
        train(engine, shape, 5)  # the next step is due

        def settled() -> None:
            assert averager.steps  # waits for the snapshot before
            rig.synchronize()

        def two(which: Any) -> None:
            train(which, shape, 2)
            rig.synchronize()

        def whole() -> None:
            averager.snapshot(engine.global_steps, finite=known)
            settled()

        known = readings.step_was_finite(engine, averager.masters())
        averager.before_step()
        yield "device memory, bytes", bench_completep.peak_memory(whole), NONE

        variants = {"plain": partial(two, plain), "averaged": partial(two, engine)}
        seconds = common.interleaved(variants, rig.rounds, time.perf_counter, before=settled)
        added = statistics.median(a - b for a, b in zip(seconds["averaged"], seconds["plain"], strict=True))
        yield "step, seconds", (step := statistics.median(seconds["plain"]) / 2)
        for interval, most in ((20, 0.005), (100, 0.001)):
            yield f"overhead at interval {interval}", added / (interval * step), rig.on_a_gpu(-math.inf, most)

        flat = torch.cat([master.flatten() for master in averager.masters()])
        pinned = torch.empty(flat.shape, pin_memory=not rig.dry_run)

        def link() -> None:
            pinned.copy_(flat, non_blocking=True)
            rig.synchronize()

        fastest = min(common.interleaved({"link": link}, rig.rounds, time.perf_counter, before=settled)["link"])
        yield "link, GB/s", flat.nbytes / fastest / 1e9
        if rig.dry_run:
            return  # there is no stream beside the kernels' one

        def watched() -> None:
            two(engine)
            settled()

        rig.profiled(watched)  # a profiler takes its time when it first starts
        copied, kernels = rig.profiled(watched)
        if not copied or not kernels:
            raise RuntimeError(f"the profile shows {len(copied)} copies from the device and {len(kernels)} kernels")
        yield "copies under kernels", under(copied, kernels), (0.8, 1.0)
        yield "rate over the link's", fastest / sum(e - b for b, e in copied), (0.8, math.inf)


def completep(rig: Rig) -> Figures:
    """A step in both residual modes over megatron-core's own, taking turns (`bench_completep`)."""
    shape = rig.fast
    args = Namespace(**shape._asdict(), dropout=0.0, llama=False, fused=False)
    steps = {name: bench_completep.build(name, args) for name in bench_completep.VARIANTS}
    found = common.times(steps, rig.rounds)
    yield "unpatched again", found["unpatched again"]["ratio"]
    for mode in ("forward", "folded"):
        yield f"{mode}: time over unpatched", found[mode]["ratio"], rig.on_a_gpu(0, 1.01)


def warmup(rig: Rig) -> Figures:
    """A step of three lengths over DeepSpeed's on samples of that length, taking turns (`bench_warmup`)."""
    args = Namespace(width=rig.fast.width, depth=rig.fast.depth, batch=rig.fast.batch // 2, rounds=3)
    _, again, *modes = bench_warmup.VARIANTS
    bench_warmup.ROUND = rig.round
    steps = {name: bench_warmup.build(name, args, rig.lengths) for name in bench_warmup.VARIANTS}
    for length in rig.lengths:
        found = bench_warmup.times(steps, args.rounds, length)
        yield f"length {length}, DeepSpeed again", found[again]["ratio"]
        for mode in modes:
            yield f"length {length}, {mode}: time over DeepSpeed's", found[mode]["ratio"], rig.on_a_gpu(0, 1.01)


#: name -> the part, and the seconds it may take
PARTS: dict[str, tuple[Callable[[Rig], Figures], float]] = {
    "precision": (precision, 45),
    "zero": (zero, 45),
    "memory": (memory, 45),
    "transformer_engine": (transformer_engine, 30),
    "snapshot": (snapshot, 45),
    "completep": (completep, 30),
    "warmup": (warmup, 60),
    "optimizer": (optimizer, 90),  # the last: it may compile for a minute
}
