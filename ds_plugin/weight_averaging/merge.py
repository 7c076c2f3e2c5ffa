"""``python -m ds_plugin merge``: the weighted mean of checkpoints on disk, written as safetensors.

Streams pieces of `CHUNK` elements through every checkpoint into one output shard per worker, so that memory does not
grow with the size of a shard. The workers are threads: reading, writing and torch's arithmetic leave Python's lock, and
processes would each hold a copy of torch (more than 200 MB). Each output shard appears whole and flushed to disk, and
only then is noted in ``merge.json``, which is how an interrupted merge knows what to keep.
"""

import argparse
import errno
import json
import math
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_plugin.atomic import atomic_write
from ds_plugin.errors import CheckpointError, ConfigError, PluginError
from ds_plugin.weight_averaging.config import KINDS
from ds_plugin.weight_averaging.merge_inputs import DTYPE_NAMES, Source, Stored, compare, read_safetensors
from ds_plugin.weight_averaging.merge_output import RECORD, Progress, Record, Shard, check_space, write_all
from ds_plugin.weight_averaging.merge_zero import read_deepspeed
from ds_plugin.weight_averaging.window import read_weights

SHARD_BYTES = 5 * 10**9  # of an output that has no sharding to follow; Hugging Face's own default
OUTPUT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COPIED_BYTES = 100 * 10**6
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf")
_OURS = "weight_averaging_rank_"  # the plugin's window files, which lie beside DeepSpeed's
_LOG_SECONDS = 5.0


def parse_weights(text: str, count: int) -> list[float]:
    """Weights of ``count`` checkpoints, oldest first; they need not add up to 1.

    ``uniform``, ``linear`` and ``1-sqrt`` are those of `window.read_weights`; else a list, one number each.

    Raises:
        ConfigError: an unknown word, another count, or a weight that is negative or not finite.
    """
    if text in KINDS:
        return read_weights(text, count)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights is {text!r}; write {', '.join(KINDS)} or one number per checkpoint, e.g. 0.2,0.3,0.5"
        ) from None
    if len(weights) != count:
        raise ConfigError(f"--weights has {len(weights)} numbers for {count} checkpoints; give one for each")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not 0 < sum(weights) < math.inf:
        raise ConfigError(f"--weights is {text!r}; write finite numbers that are not negative, one of them positive")
    return weights


def merge(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    weights: str = "uniform",
    workers: int = 1,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the weighted mean of ``checkpoints`` (oldest first) into the folder ``out``, as safetensors.

    Safetensors folders keep their sharding, names, dtypes, metadata and index, and the first one's other small files
    are copied; DeepSpeed checkpoints give their fp32 masters under the module's names, in shards of ``shard_bytes``.
    Sums are made in fp32 (fp64 for fp64), oldest to newest, and divided once by the sum of the weights: with
    ``uniform`` the bits are those of `window.mean_`. Integers, and the buffers and frozen weights of a DeepSpeed
    checkpoint, are the last checkpoint's. ``dtype`` is that of the floating-point tensors written. A folder that an
    interrupted merge of the same arguments left is completed: its finished shards are verified and kept.

    ``progress`` is called from the workers with the bytes done, the bytes in all, and the shard now finished if one is.

    Raises:
        ConfigError: an argument is wrong, or ``out`` holds anything else.
        CheckpointError: a checkpoint is missing, damaged, unsafe to read, or of another model or layout.
        PluginError: the output cannot be written, such as on a full disk.
    """
    if not checkpoints:
        raise ConfigError("merge needs at least one checkpoint")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; write {', '.join(OUTPUT_DTYPES)}")
    if workers < 1 or shard_bytes < 1:
        raise ConfigError(f"--workers is {workers} and the shard size {shard_bytes}; write positive numbers")
    out = Path(out)
    numbers = parse_weights(weights, len(checkpoints))
    sources = [open_source(Path(path)) for path in checkpoints]
    for other in sources[1:]:
        compare(sources[0], other)
    shards = plan_shards(sources[0], OUTPUT_DTYPES.get(dtype or ""), shard_bytes)
    described = _describe(sources, numbers, shards)
    try:
        record = Record(out, described)
        finished = [shard for shard in shards if record.verified(shard, note)]
        if finished:
            note(f"{out}: {len(finished)} of {len(shards)} shards were finished and are kept")
        left = [shard for shard in shards if shard not in finished]
        check_space(out, sum(shard.size for shard in left))
        write_all(left, sources, numbers, out, record, workers, _counted(progress, finished, shards))
        _copy_others(sources[0], out)
        _write_index(sources[0], shards, out, same=dtype is None)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PluginError(
                f"the disk of {out} is full; what is finished is kept: make room and give the same command again"
            ) from None
        raise PluginError(f"{error.filename or out} cannot be read or written: {error.strerror}") from None


def open_source(path: Path) -> Source:
    """Find out what lies at ``path`` and where its tensors are.

    Raises:
        CheckpointError: nothing that can be averaged, or a file is missing, truncated, or holds foreign classes.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return read_safetensors(path, [path], None)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}; give a folder that exists")
    if any(path.glob("*_states.pt")):
        return read_deepspeed(path)
    files = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith((_OURS, ".")))
    indices = sorted(path.glob("*.safetensors.index.json"))
    if files or indices:
        return read_safetensors(path, files, indices[0] if indices else None)
    if (path / "latest").is_file():
        return open_source(path / (path / "latest").read_text("utf-8").strip())
    if (path / ".metadata").is_file():
        raise CheckpointError(f"{path} is a torch_dist checkpoint, which merge cannot read; convert it to safetensors")
    raise CheckpointError(
        f"{path} holds neither *.safetensors nor DeepSpeed's *_optim_states.pt nor a file 'latest'; give the folder "
        "that does"
    )


def _counted(
    progress: Progress | None, finished: list[Shard], shards: list[Shard]
) -> Callable[[int, str | None], None]:
    done, total, lock = sum(shard.size for shard in finished), sum(shard.size for shard in shards), threading.Lock()

    def advance(count: int, name: str | None) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total, name)

    advance(0, None)
    return advance


def plan_shards(source: Source, dtype: torch.dtype | None, shard_bytes: int) -> list[Shard]:
    """The output files: those of ``source`` under their names, or new ones of ``shard_bytes`` (one tensor) at most."""

    def written(stored: Stored) -> torch.dtype:
        default = torch.float32 if not source.headers else stored.dtype
        return (dtype or default) if stored.dtype.is_floating_point else stored.dtype

    if source.headers:
        by_file: dict[str, list[str]] = {file.name: [] for file in source.files}
        for name, stored in source.tensors.items():
            by_file[stored.pieces[0].path.name].append(name)
        shards = []
        for file, names in by_file.items():
            header = source.headers[file]
            if dtype is not None:
                metadata = json.loads(header[8:]).get("__metadata__")
                shards.append(_new_shard(file, [(n, written(source.tensors[n])) for n in names], source, metadata))
                continue
            shards.append(_shard(file, header, [(n, source.tensors[n].dtype) for n in names], source))
        return shards
    parts: list[list[tuple[str, torch.dtype]]] = [[]]
    held = 0
    for name, stored in source.tensors.items():
        size = stored.numel * written(stored).itemsize
        if parts[-1] and held + size > shard_bytes:
            parts.append([])
            held = 0
        parts[-1].append((name, written(stored)))
        held += size
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = ["model.safetensors"]
    return [_new_shard(name, part, source, {"format": "pt"}) for name, part in zip(names, parts, strict=True)]


def _new_shard(name: str, tensors: list[tuple[str, torch.dtype]], source: Source, metadata: Any) -> Shard:
    tensors = sorted(tensors, key=lambda t: -t[1].itemsize)  # so that every tensor begins at a multiple of its own size
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for tensor, dtype in tensors:
        stored = source.tensors[tensor]
        end = offset + stored.numel * dtype.itemsize
        header[tensor] = {"dtype": DTYPE_NAMES[dtype], "shape": stored.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _shard(name, len(text).to_bytes(8, "little") + text, tensors, source)


def _shard(name: str, header: bytes, tensors: list[tuple[str, torch.dtype]], source: Source) -> Shard:
    counted = [(tensor, dtype, source.tensors[tensor].numel) for tensor, dtype in tensors]
    return Shard(name, header, counted, len(header) + sum(count * dtype.itemsize for _, dtype, count in counted))


def _describe(sources: list[Source], weights: list[float], shards: list[Shard]) -> dict[str, Any]:
    """What this merge is of: two merges with the same description write the same bytes."""
    checkpoints = []
    for source in sources:
        stats = {file.name: file.stat() for file in source.files}
        files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        checkpoints.append({"path": str(source.path.resolve()), "files": files})
    headers = {shard.name: [shard.size, zlib.crc32(shard.header)] for shard in shards}
    return {"format": 1, "checkpoints": checkpoints, "weights": weights, "shards": headers}


def _copy_others(source: Source, out: Path) -> None:
    """Configuration and tokenizer, which a safetensors folder needs to be loaded; never weights of another format."""
    if not source.headers or not source.path.is_dir():
        return
    for path in sorted(source.path.iterdir()):
        skipped = path.name.startswith(".") or path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not skipped and path.name != RECORD and path.stat().st_size <= _COPIED_BYTES:
            atomic_write(out / path.name, partial(shutil.copyfile, path))


def _write_index(source: Source, shards: list[Shard], out: Path, *, same: bool) -> None:
    """The index is what a reader looks for first, so it is written last."""
    if source.index is not None and same:
        content = source.index.read_text("utf-8")
    elif source.index is None and (source.headers or len(shards) == 1):
        return
    else:
        total = sum(shard.size - len(shard.header) for shard in shards)
        index = json.loads(source.index.read_text("utf-8")) if source.index is not None else {}
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        index["weight_map"] = {name: shard.name for shard in shards for name, *_ in shard.tensors}
        content = json.dumps(index, indent=2, sort_keys=True) + "\n"
    name = source.index.name if source.index is not None else "model.safetensors.index.json"
    atomic_write(out / name, lambda path: path.write_text(content, encoding="utf-8"))


def command(args: argparse.Namespace) -> int:
    """Run the merge with a bar on a terminal and plain lines in a log; the exit code."""
    try:
        with _Shown() as shown:
            merge(
                args.checkpoints,
                args.out,
                weights=args.weights,
                workers=args.workers,
                dtype=args.dtype,
                shard_bytes=int(args.shard_gb * 1e9) if math.isfinite(args.shard_gb) else 0,
                progress=shown.progress,
                note=shown.line,
            )
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the shards that are finished", file=sys.stderr)
        return 130
    print(f"{args.out}: the mean of {len(args.checkpoints)} checkpoints")
    return 0


class _Shown:
    """The merge's bar on a terminal; in a log a line per shard, and at most one in 5 seconds between them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        self._console, self._last, self._started = Console(highlight=False), 0.0, time.monotonic()
        columns = (
            TextColumn("merging"),
            BarColumn(None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console, expand=True) if self._console.is_terminal else None
        self._task = self._bar.add_task("", total=None) if self._bar is not None else None

    def __enter__(self) -> "_Shown":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, done: int, total: int, finished: str | None) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif finished or time.monotonic() - self._last >= _LOG_SECONDS:
            seconds = time.monotonic() - self._started
            state = f"{finished} is written, " if finished else ""
            self.line(f"merging: {state}{done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {seconds:.0f} s")

    def line(self, text: str) -> None:
        self._last = time.monotonic()
        if self._bar is not None:
            self._console.print(text, markup=False)
        else:
            print(text, flush=True)
