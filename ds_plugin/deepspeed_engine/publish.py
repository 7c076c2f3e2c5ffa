"""The average as a folder of safetensors, which every rank writes its own share of: nothing is gathered anywhere.

All ranks agree on the files first: names, shapes and dtypes make the headers, and the headers every byte's place. The
first rank creates them at full size; each rank then writes what it holds where it belongs, out of the averager's spare
buffer, a piece at a time. The average is never in the model. What travels between ranks are names and numbers."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_plugin.core.errors import ConfigError, PluginError, StateError, gathered, raise_on_all_ranks, this_rank
from ds_plugin.core.files import replace_folder, sync_folder, write_text
from ds_plugin.core.json_files import MANIFEST
from ds_plugin.deepspeed_engine import compat
from ds_plugin.deepspeed_engine.masters import zero3_part
from ds_plugin.weight_averaging.averager import MasterShards, WeightAverager
from ds_plugin.weight_averaging.publish import layout
from ds_plugin.weight_averaging.publish.config import write_config
from ds_plugin.weight_averaging.state.fragments import check, plain_name, unwrapped

PIECE = 1024 * 1024  # elements converted and written at a time: 4 MiB of fp32
AVERAGED = "averaged"  # the folder of the average that is published with a checkpoint, within the checkpoint's
#: what that leaves there, now and when it is killed; other folders may begin alike
_OF_AVERAGES = re.compile(rf"{AVERAGED}(_horizon_\d+)?(\.previous)?|\.{AVERAGED}(_horizon_\d+)?\.[0-9a-f]+\.tmp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Part = tuple[int, torch.Tensor]  # first element of this rank's tensor, flat values
_GATED = "linear_fc1"  # megatron-core's name for the two halves of a gated unit's first layer, laid end to end


@dataclass(frozen=True)
class Form:
    """How a published folder differs from the model's own names and files."""

    #: a tensor's name in the file, of its plain name in the model; None: it is left out
    name: Callable[[str], str | None] = str
    stem: str = "model"  # of the files' names
    #: writes what else belongs into the folder, on the first rank, before the folder appears
    beside: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Held:
    """One tensor of this rank's model: how the others see it, its place in the whole one, and the values here."""

    entry: layout.Entry
    cut: layout.Cut
    average: list[Part]
    tensor: Any

    def own(self) -> list[Part]:
        """The model's own values, of what is not averaged; under ZeRO 3 this rank's part of them."""
        if not self.entry.zero3_sharded:
            return [(0, self.tensor.detach().reshape(-1))]
        name, part = self.entry.name, getattr(self.tensor, compat.ZERO3_PART)
        start, count = zero3_part(self.tensor)
        if hasattr(part, compat.ZERO3_QUANTIZED):
            raise ConfigError(f"publish: {name} is kept quantized; write zero_quantized_nontrainable_weights: false")
        if part.numel() < count:
            raise ConfigError(f"publish: {name} is not in memory; write 'cpu' for offload_param.device, not nvme")
        return [(start, part.detach().reshape(-1)[:count])]


def _held(
    engine: Any, shards: MasterShards, average: list[torch.Tensor], dtype: torch.dtype | None, form: Form
) -> list[Held]:
    """Every parameter and persistent buffer of this rank's model that has a name in the file."""
    module, ranks = unwrapped(engine.module), compat.tensor_parallel_size(engine)
    fragments, tensor_rank = shards.fragments(), compat.model_coordinate(engine)[0]
    check(fragments, average)
    parts: dict[str, list[Part]] = {}
    for f in fragments:
        values = average[f.shard].view(-1)[f.offset : f.offset + f.count]
        parts.setdefault(plain_name(f.name), []).append((f.start, values))
    gated = tuple(
        plain_name(f"{name}.{_GATED}.").removeprefix(".")
        for name, owner in module.named_modules()
        if hasattr(owner, _GATED) and getattr(getattr(owner, "config", None), "gated_linear_unit", False)
    )
    found = []
    for name, tensor, aliases in _tensors(module):
        mine = parts.pop(name, [])
        if (named := form.name(name)) is None:
            if mine:
                raise ConfigError(f"publish: {name} is averaged and has no name in what is written; do not train it")
            continue
        _refuse_tensor(name, tensor, ranks)
        whole = tuple(compat.global_shape(tensor))
        cut = layout.Cut(max(1, math.prod(whole)))
        if sliced := ranks > 1 and getattr(tensor, "tensor_model_parallel", False):
            # each rank's two halves lie together whatever the attribute says: the forward pass cuts them in the middle
            stride = 2 if name.startswith(gated) else getattr(tensor, "partition_stride", 1)
            whole, cut = layout.cut_along(whole, tensor.partition_dim, stride, tensor_rank, ranks)
        written = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        entry = layout.Entry(named, written, whole, aliases, bool(sliced), hasattr(tensor, compat.ZERO3_PART))
        found.append(Held(entry, cut, mine, tensor))
    if parts:
        raise StateError(f"publish: the model has no parameter {next(iter(parts))} any more; do not rename parameters")
    return found


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """The parameters and persistent buffers, each once: its first name, itself, and its other names, all of them plain.
    Raises ConfigError: two have one name then."""
    wanted = {id(value) for value in (*module.parameters(), *module.state_dict(keep_vars=True).values())}
    names: dict[int, list[str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for named in (module.named_parameters, module.named_buffers):
        for wrapped, tensor in named(remove_duplicate=False):
            name = plain_name(wrapped)
            if tensors.setdefault(name, tensor) is not tensor:
                raise ConfigError(f"publish: {wrapped} is {name} without its wrapper, as another tensor is; rename it")
            if id(tensor) in wanted and name not in names.setdefault(id(tensor), []):
                names[id(tensor)].append(name)
    for name, *others in names.values():
        yield name, tensors[name], tuple(others)


def _refuse_tensor(name: str, tensor: torch.Tensor, ranks: int) -> None:
    if tensor.dtype not in layout.DTYPE_NAMES:
        raise ConfigError(f"publish: {name} is {tensor.dtype}, which cannot be written; convert it")
    cut = getattr(tensor, "tensor_model_parallel", False)
    if ranks > 1 and (not hasattr(tensor, "partition_dim") if cut else getattr(tensor, "model_parallel", False)):
        remedy = "set tensor_model_parallel (true) and partition_dim on it, as megatron-core does"
        raise ConfigError(f"publish: {name} is cut by tensor parallelism and nothing says how; {remedy}")


def publish(
    engine: Any,
    averager: WeightAverager,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    horizon: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    replace: bool = False,
    form: Form | None = None,
) -> list[Path]:
    """Write the average into the new folder ``folder``; see `engine.Plugin.publish`."""
    form = form or Form()
    with raise_on_all_ranks():
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"publish: dtype={dtype}; give one of {', '.join(map(str, DTYPES))}, or leave it out")
        if max_shard_bytes < 1:
            raise ConfigError(f"publish: max_shard_bytes={max_shard_bytes}; give a positive number of bytes")
        refuse(engine)
    average = averager.read(horizon)
    with raise_on_all_ranks():
        held = _held(engine, averager.shards, average, dtype, form)
    tensor_rank, stage = compat.model_coordinate(engine)[:2]
    place = stage, tensor_rank
    first = gathered(place).index(place) == this_rank()
    averaged = tuple(sum(len(values) for _, values in h.average) for h in held)
    reports = gathered(layout.Report(place, tuple(h.entry for h in held) if first else None, averaged))
    with raise_on_all_ranks():
        entries, mine = layout.agree(reports, this_rank(), averager.shards.layout, compat.PIPELINE_TIED)
        files = layout.plan_files(entries, max_shard_bytes, stem=form.stem)
        shares = [(held[i], held[i].average if of_average else held[i].own()) for i, of_average in mine]
    with _new_folder(Path(folder), replace) as (final, staging):
        with _disk(final, sum(file.size for file in files)):
            if this_rank() == 0:
                write_config(unwrapped(engine.module), staging, dtype)
                if form.beside is not None:
                    form.beside(staging)
                _create(staging, files, form.stem)
        with _disk(final):
            _write(staging, files, shares)
    return [final / file.name for file in files]


def publish_with_checkpoint(engine: Any, averager: WeightAverager, checkpoint: Path) -> None:
    """The average, or that of each horizon, into the folder of a complete checkpoint. Where a tag is saved again, what
    is of its earlier average goes when the new one is whole, or there is none yet."""
    horizons: Sequence[int | None] = (averager.config.horizons or [None]) if averager.steps else []
    names = {AVERAGED if horizon is None else f"{AVERAGED}_horizon_{horizon}": horizon for horizon in horizons}
    for name, horizon in names.items():
        publish(engine, averager, checkpoint / name, horizon=horizon, replace=True)
    with _disk(checkpoint):
        if this_rank() == 0:
            for left in list(checkpoint.iterdir()):
                if left.name not in names and _OF_AVERAGES.fullmatch(left.name):
                    shutil.rmtree(left)


def refuse(engine: Any) -> None:
    """Raise ConfigError for an engine whose parts of the model cannot be put together."""
    from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size

    _refuse_experts(engine, "publish")
    if not compat.is_pipeline(engine) and bwc_pipeline_parallel_world_size(engine.mpu) > 1:
        what = "mpu has pipeline stages that DeepSpeed does not know, whose parameters may have equal names"
        raise ConfigError(f"publish: {what}; use DeepSpeed's PipelineModule, or the other framework's export")
    if engine.autotp_size() > 1:
        what = f"tensor_parallel.autotp_size is {engine.autotp_size()}, whose slices are not known"
        raise ConfigError(f"publish: {what}; save with DeepSpeed's save_16bit_model() inside averaged_weights()")


def _refuse_experts(engine: Any, what: str) -> None:
    from deepspeed.moe.utils import is_moe_param  # by DeepSpeed's and megatron-core's mark

    for expert in (name for name, p in engine.module.named_parameters() if is_moe_param(p)):
        remedy = 'leave "save_average" out, and export the model by its own framework inside averaged_weights()'
        raise ConfigError(f"{what}: {expert} is an expert's, which differs between data-parallel ranks; {remedy}")


@contextlib.contextmanager
def _new_folder(folder: Path, replace: bool) -> Iterator[tuple[Path, Path]]:
    """Yield ``(folder, staging)``: a hidden folder beside it, seen by all ranks, which becomes ``folder`` at the end,
    by one rename; whatever fails before, on any rank, leaves nothing. Both are the first rank's, whatever the others'
    working directories are; whoever sees the new name looks at its disk."""
    final, name = gathered((folder.resolve(), f".{folder.name}.{uuid.uuid4().hex}.tmp"))[0]
    staging = final.with_name(name)
    try:
        with _disk(final):
            if this_rank() == 0:
                if not replace and _in_use(final):
                    raise ConfigError(f"publish: {final} exists already; give a new or an empty folder")
                staging.mkdir(parents=True)
        with _disk(final):
            if not staging.is_dir():
                what = f"rank {this_rank()} does not see the folder that rank 0 made in {final.parent}"
                raise ConfigError(f"publish: {what}; give a folder on a file system that all nodes share")
        yield final, staging
        with _disk(final):
            if this_rank() == 0:
                sync_folder(staging)
                replace_folder(staging, final)
    except BaseException:
        if this_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _in_use(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _create(folder: Path, files: Sequence[layout.File], stem: str) -> None:
    """Each file with its header, and room for all of its tensors: a full disk shows now, not after an hour. And the
    index, where there are several."""
    if len(files) > 1:
        write_text(folder / f"{stem}.safetensors.index.json", layout.index_of(files))
    for file in files:
        with open(folder / file.name, "xb") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, file.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                opened.truncate(file.size)  # a file system that cannot reserve
            opened.write(file.header)
            opened.flush()
            os.fsync(opened.fileno())


def _write(folder: Path, files: Sequence[layout.File], shares: Sequence[tuple[Held, list[Part]]]) -> None:
    """This rank's shares into their places, file by file, which are opened for writing only: a network file system's
    client then has no page of them that it could send back with other ranks' bytes as they were before."""
    for file in files:
        here = [(held, *part) for held, parts in shares if held.entry.name in file.offsets for part in parts]
        if here:
            with open(os.open(folder / file.name, os.O_WRONLY), "wb", buffering=0) as opened:
                for held, start, values in here:
                    _write_part(opened.fileno(), file.offsets[held.entry.name], held, start, values)
                os.fsync(opened.fileno())


def _write_part(descriptor: int, begin: int, held: Held, start: int, values: torch.Tensor) -> None:
    """``values``: of the rank's tensor from element ``start`` on; ``begin``: the byte at which the whole one begins."""
    dtype = held.entry.dtype
    for done in range(0, len(values), PIECE):
        piece = values[done : done + PIECE]
        view = piece.to("cpu", dtype).view(torch.uint8).numpy().data
        for at, count in held.cut.runs(start + done, len(piece)):
            offset, size = begin + at * dtype.itemsize, count * dtype.itemsize
            run, view = view[:size], view[size:]
            while run:
                written = os.pwrite(descriptor, run, offset)
                run, offset = run[written:], offset + written


@contextlib.contextmanager
def _disk(folder: Path, size: int = 0) -> Iterator[None]:
    """`raise_on_all_ranks` for a block that reads or writes files. ``size``: bytes to be written in all."""
    with raise_on_all_ranks():
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                much = f", where the model takes {size / 1e6:,.1f} MB" if size else ""
                raise PluginError(f"publish: the disk of {folder} is full{much}; make room") from error
            what = error.filename or folder
            raise PluginError(f"publish: {what} cannot be written ({error.strerror}); give another folder") from error


def refuse_checkpoint(engine: Any) -> None:
    """Raise ConfigError for what ``zero_to_fp32`` cannot read, or is not on disk when `save_checkpoint` returns."""
    _refuse_experts(engine, "save_averaged_checkpoint")
    stage, cut = engine.zero_optimization_stage(), compat.is_pipeline(engine) or compat.tensor_parallel_size(engine) > 1
    for applies, reason in (
        (stage == 0, f"zero_optimization.stage is {stage}"),
        (compat.wrapper_of(engine) == "bf16", "DeepSpeed's BF16_Optimizer is in use (bf16 with fp32 gradients)"),
        (cut, "the model is cut over tensor-parallel ranks or pipeline stages"),
        (engine.checkpoint_engine.is_decoupled(), "DeepSpeed writes checkpoints in the background"),
    ):
        if applies:
            what = f"save_averaged_checkpoint: {reason}, and zero_to_fp32 could not read the result"
            raise ConfigError(f"{what}; use publish(), which writes safetensors")


def mark_checkpoint(engine: Any, averager: WeightAverager, folder: Path, horizon: int | None) -> None:
    """Make a tag folder and say in it, before anything else is there, that it holds an average and is no resume point:
    in the manifest's place. Every rank calls it. Raises ConfigError: the folder holds something already."""
    said = {"format": "averaged", "averaged": True, "global_steps": engine.global_steps, "steps": averager.steps}
    said |= {"mode": averager.config.mode, "horizon": horizon}
    with raise_on_all_ranks():
        if compat.is_first_at(engine):
            if _in_use(folder):
                raise ConfigError(f"save_averaged_checkpoint: {folder} exists already; give another tag")
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / MANIFEST, json.dumps(said, indent=1))
