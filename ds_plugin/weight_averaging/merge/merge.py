"""``ds-plugin merge``: the weighted mean of checkpoints on disk, as safetensors or torch_dist.

Streams pieces of `CHUNK` elements through every checkpoint into one output shard per worker, so that memory does not
grow with the size of a shard. The workers are threads: reading, writing and torch's arithmetic leave Python's lock, and
processes would each hold a copy of torch (more than 200 MB). Where there are more cores than busy workers, each has a
second thread, which takes pieces of the same shard. Each output shard appears whole and flushed to disk, and only then
is noted in ``merge.json``, which is how an interrupted merge knows what to keep.
"""

import argparse
import errno
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ds_plugin.core.errors import CheckpointError, ConfigError, PluginError
from ds_plugin.weight_averaging.config import KINDS, OTHER_KINDS
from ds_plugin.weight_averaging.merge.deepspeed import read_deepspeed
from ds_plugin.weight_averaging.merge.inputs import RESTORE, Source, compare
from ds_plugin.weight_averaging.merge.output import (
    Plan,
    Progress,
    Record,
    Shard,
    check_space,
    refuse_different_integers,
    write_all,
)
from ds_plugin.weight_averaging.merge.safetensors_folders import (
    Safetensors,
    is_model_folder,
    plan_new,
    plan_same,
    read_safetensors,
    refuse_quantized,
)
from ds_plugin.weight_averaging.merge.torch_dist import TorchDist, plan_torch_dist, read_torch_dist
from ds_plugin.weight_averaging.window import read_weights

SHARD_BYTES = 5 * 10**9  # of an output that has no sharding to follow; Hugging Face's own default
OUTPUT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OURS = "weight_averaging_rank_"  # the plugin's window files, which lie beside DeepSpeed's
_MEGATRONS_LATEST = "latest_checkpointed_iteration.txt"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # what transformers calls its files
_LOG_SECONDS = 5.0


def parse_weights(text: str, count: int) -> list[float]:
    """Relative weights of ``count`` checkpoints, oldest first, as `window.factors` takes them.

    A word of `KINDS` as in `window.read_weights`; else a list, one number each.

    Raises:
        ConfigError: an unknown word, another count, or a weight that is negative or not finite.
    """
    if text in KINDS:
        return read_weights(text, count)
    if text in OTHER_KINDS:
        raise ConfigError(f"--weights is {text!r}; {OTHER_KINDS[text]}")
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights is {text!r}; write {', '.join(KINDS)} or one number per checkpoint, e.g. 0.2,0.3,0.5"
        ) from None
    if len(weights) != count:
        raise ConfigError(f"--weights has {len(weights)} numbers for {count} checkpoints; give one for each")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ConfigError(f"--weights is {text!r}; write finite numbers that are not negative, one of them positive")
    return weights


def merge(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    weights: str = "mean",
    workers: int = 1,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the weighted mean of ``checkpoints`` (oldest first) into the folder ``out``.

    What is read, and what is written:

    - Safetensors folders: the same files, keeping names, sharding, dtypes, metadata and index. The first one's
      configuration and tokenizer are copied, with the dtype that is written; nothing of a trainer's state is.
    - DeepSpeed checkpoints: their fp32 masters under the module's names, as safetensors in shards of ``shard_bytes``,
      and the configuration and tokenizer that Hugging Face's Trainer wrote beside them. Of a folder with a file
      ``latest`` the checkpoint it names is read, whatever 16-bit weights lie there too.
      Pipeline stages lie together in one folder, where each finds its layers by name. Of tensor parallelism each rank
      has a folder of its own, ``tp0-of-2`` and so on, to be loaded into the model on that rank, before the host wraps
      it (not strictly: megatron-core's layers would miss their ``_extra_state``, which is empty)::

          model.load_state_dict(load_file(out / f"tp{rank}-of-{size}" / "model.safetensors"), strict=False)

    - Torch_dist checkpoints of megatron-core: a torch_dist folder with the model's weights alone, in fp32 where the
      checkpoints hold fp32 masters, which `dist_checkpointing.load` reads at any parallelism; see `merge_torch_dist`.

    Sums are made in fp32 (fp64 for fp64), oldest to newest, as `window.weighted_mean_` makes them, bit for bit. Single
    integers, and the buffers and frozen weights of a DeepSpeed checkpoint, are the last checkpoint's; other integers
    must be equal in all. ``dtype`` is that of the floating-point tensors written. A folder that an interrupted merge of
    the same arguments left is completed: its finished shards are verified and kept.

    ``progress`` is called from the workers with the bytes done, the bytes in all, and the shard now finished if one is.

    Raises:
        ConfigError: an argument is wrong, or ``out`` holds anything else.
        CheckpointError: a checkpoint is missing, damaged, unsafe to read, quantized, or of another model or layout.
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
    for source in sources:
        refuse_quantized(source.beside)
    for other in sources[1:]:
        compare(sources[0], other)
    if sources[-1].remark:
        note(sources[-1].remark)
    plan = make_plan(sources, OUTPUT_DTYPES.get(dtype or ""), shard_bytes)
    shards = plan.shards
    described = _describe(sources, numbers, shards)
    try:
        refuse_different_integers(plan.sources)
        record = Record(out, described)
        finished = [shard for shard in shards if record.verified(shard, note)]
        if finished:
            note(f"{out}: {len(finished)} of {len(shards)} shards were finished and are kept")
        left = [shard for shard in shards if shard not in finished]
        check_space(out, sum(shard.size for shard in left))
        write_all(left, plan.sources, numbers, out, record, workers, _counted(progress, finished, shards))
        plan.finish(out)
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
    if any(path.glob("zero/*/fp32.pt")):
        raise CheckpointError(
            f"{path} is a universal checkpoint, which merge cannot read; give the tag folder that it was converted "
            "from, or resume from it (checkpoint.load_universal) and save again"
        )
    if any(path.glob("*_states.pt")):
        source = read_deepspeed(path)
        source.beside = path.parent if is_model_folder(path.parent) else None
        return source
    adapters = (path / "adapter_config.json").is_file()  # PEFT's, which only its own file is loaded from
    if (path / "latest").is_file() and not adapters:
        return _named_by_latest(path)
    files = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith((_OURS, ".")))
    indices = sorted(path.glob("*.safetensors.index.json"))
    if files or indices:
        found = read_safetensors(path, files, indices[0] if indices else None)
        if adapters:
            found.remark = f"{path}: the mean is of the adapters in {found.files[0].name}, in that file's precision"
        return found
    if (path / ".metadata").is_file():
        return read_torch_dist(path)
    if (path / _MEGATRONS_LATEST).is_file():
        tag = _tag(path / _MEGATRONS_LATEST)
        return open_source(path / (f"iter_{int(tag):07d}" if tag.isdecimal() else tag))
    if (path / "latest_universal").is_file():
        return open_source(path / _tag(path / "latest_universal"))
    raise CheckpointError(
        f"{path} holds neither *.safetensors, nor DeepSpeed's *_optim_states.pt, nor torch_dist's .metadata, nor a "
        f"file 'latest' or '{_MEGATRONS_LATEST}'; give the folder that does"
    )


def _tag(file: Path) -> str:
    """The name of the checkpoint that a file says is the newest one."""
    tag = file.read_text("utf-8").strip()
    if not tag:
        raise CheckpointError(f"{file} is empty and names no checkpoint; {RESTORE}, or give the tag's folder")
    return tag


def _named_by_latest(path: Path) -> Source:
    """DeepSpeed's newest checkpoint in a folder, which may be a Trainer's and hold the 16-bit weights as well."""
    tag = _tag(path / "latest")
    if not (path / tag).is_dir():
        raise CheckpointError(
            f"{path / 'latest'} names {tag}, which is missing; {RESTORE}, or remove 'latest' to merge the safetensors "
            "beside it"
        )
    source = open_source(path / tag)
    low = next((p.name for pattern in _WEIGHTS for p in sorted(path.glob(pattern))), None)
    if low is not None:
        source.remark = f"{path}: the mean is of the fp32 masters in {tag}, which 'latest' names, not of {low}"
    return source


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


def make_plan(sources: list[Source], dtype: torch.dtype | None, shard_bytes: int) -> Plan:
    """What to write: in the sources' own format, or as safetensors where they are DeepSpeed's."""
    if isinstance(sources[0], Safetensors):
        return plan_same(cast(list[Safetensors], sources), dtype)
    if isinstance(sources[0], TorchDist):
        return plan_torch_dist(cast(list[TorchDist], sources), dtype)
    return plan_new(sources, dtype, shard_bytes)


def _describe(sources: list[Source], weights: list[float], shards: list[Shard]) -> dict[str, Any]:
    """What this merge is of: two merges with the same description write the same bytes."""
    checkpoints = []
    for source in sources:
        stats = {file.name: file.stat() for file in source.files}
        files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        checkpoints.append({"path": str(source.path.resolve()), "files": files})
    headers = {shard.name: [shard.size, shard.checksum] for shard in shards}
    return {"format": 2, "checkpoints": checkpoints, "weights": weights, "shards": headers}


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
