"""``ds-plugin merge``: what is averaged, checks before anything is written, and the folder that is written.

It appears when all of it is flushed to disk. A merge that is interrupted or killed leaves nothing and starts over.
"""

import argparse
import errno
import fcntl
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ds_plugin.core.errors import ConfigError, PluginError
from ds_plugin.core.files import sync_folder
from ds_plugin.core.json_files import read_tag
from ds_plugin.weight_averaging.config import KINDS, OTHER_KINDS
from ds_plugin.weight_averaging.merge.deepspeed import read_deepspeed
from ds_plugin.weight_averaging.merge.inputs import RESTORE, Mean, Source, compare, opened, refuse
from ds_plugin.weight_averaging.merge.safetensors_folders import is_model_folder, read_safetensors, refuse_quantized
from ds_plugin.weight_averaging.window import read_weights

SHARD_BYTES = 5 * 10**9  # of an output that has no sharding to follow; Hugging Face's own default
OUTPUT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OURS = "weight_averaging_rank_"  # the plugin's window files, which lie beside DeepSpeed's
_MEGATRONS_LATEST = "latest_checkpointed_iteration.txt"
_RETAG = f"{RESTORE}, or give the tag's folder"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # what transformers calls its files
_LOCK = ".lock"


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
    workers: int = 2,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the weighted mean of ``checkpoints`` (oldest first) into the new folder ``out``.

    - Safetensors folders become the same files, with their names, dtypes and metadata. The first one's configuration
      and tokenizer are copied, with the dtype that is written; nothing of a trainer's state is.
    - DeepSpeed checkpoints: their fp32 masters under the module's names, as safetensors in shards of ``shard_bytes``,
      with configuration and tokenizer that Hugging Face's Trainer wrote beside them. Of a folder with a file ``latest``
      the checkpoint it names is read, whatever 16-bit weights lie there too. Pipeline stages lie together. Of tensor
      parallelism each rank has a folder of its own, ``tp0-of-2`` and so on, to be loaded on that rank before DeepSpeed
      wraps the model, not strictly: megatron-core's layers would miss their ``_extra_state``, which is empty.
    - Torch_dist checkpoints of megatron-core become one with the model's weights alone, in fp32 where the checkpoints
      hold fp32 masters, which `dist_checkpointing.load` reads at any parallelism; see `torch_dist`.

    Sums are made in fp32 (fp64 for fp64), oldest to newest, as `window.weighted_mean_` makes them, bit for bit. Single
    integers, and the buffers and frozen weights of a DeepSpeed checkpoint, are the last checkpoint's; other integers
    must be equal in all. ``dtype`` is that of the floating-point tensors written. ``workers``: threads. ``note`` is
    told what a user should know.

    Raises:
        ConfigError: an argument is wrong, ``out`` holds anything, or another process writes it.
        CheckpointError: a checkpoint is missing, damaged, unsafe to read, quantized, or of another model or layout.
        PluginError: the output cannot be written, such as on a full disk.
    """
    if not checkpoints:
        raise ConfigError("merge needs at least one checkpoint")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; write {', '.join(OUTPUT_DTYPES)}")
    if workers < 1 or shard_bytes < 1:
        raise ConfigError(f"--workers is {workers} and the shard size {shard_bytes}; write positive numbers")
    numbers = parse_weights(weights, len(checkpoints))
    sources = [open_source(Path(path)) for path in checkpoints]
    first, newest, threads = sources[0], sources[-1], torch.get_num_threads()
    for source in sources:
        if source.beside is not None:
            refuse_quantized(source.beside)
        compare(first, source)
    if newest.remark:
        note(newest.remark)
    written = OUTPUT_DTYPES[dtype] if dtype else first.dtype
    needed = sum(stored.numel * stored.written(written).itemsize for stored in first.tensors.values())
    try:
        with staged(Path(out), needed) as folder:
            first.write(folder, Mean(sources, numbers, note), written, shard_bytes, workers)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PluginError(f"the disk of {out} is full; make room and give the same command again") from None
        raise PluginError(f"{error.filename or out} cannot be read or written: {error.strerror}") from None
    finally:
        opened.cache_clear()
        torch.set_num_threads(threads)


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """Yield a hidden folder beside ``out``, which becomes ``out`` when the block succeeds, and else goes.

    What a killed process left there goes first; one that is alive holds the lock.

    Raises:
        ConfigError: ``out`` holds something, or another process is at work on it.
        PluginError: its disk has not the ``needed`` bytes.
    """
    if held := sorted(out.iterdir()) if out.exists() else []:
        raise ConfigError(f"--out {out} holds {held[0].name}; give a new folder")
    if os.path.ismount(out):
        raise ConfigError(f"--out {out} is a mount point, which no folder can take the place of; give one within it")
    out = out.resolve()
    staging = out.with_name(f".{out.name}.merging")
    staging.mkdir(parents=True, exist_ok=True)
    with open(staging / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another merge writes --out {out}; wait for it, or give another folder") from None
        if not os.fstat(lock.fileno()).st_nlink:
            raise ConfigError(f"another merge of --out {out} has just ended; look at what it wrote")
        try:
            for path in staging.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()
            if (free := shutil.disk_usage(staging).free) < needed:
                what = f"--out {out} needs {needed / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB"
                raise PluginError(f"{what}; make room")
            yield staging
            for path in [*staging.rglob("*"), staging]:
                sync_folder(path)  # files as well
            os.rename(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        (out / _LOCK).unlink()  # not earlier: whoever opens it must find it held
    sync_folder(out.parent)


def open_source(path: Path) -> Source:
    """Find out what lies at ``path`` and where its tensors are.

    Raises:
        CheckpointError: nothing that can be averaged, or a file is missing, truncated, or holds foreign classes.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return read_safetensors(path, [path], None)
    refuse(not path.is_dir(), f"there is no checkpoint at {path}", "give a folder that exists")
    remedy = "give the tag folder that it was converted from, or resume from it (checkpoint.load_universal) and save"
    refuse(any(path.glob("zero/*/fp32.pt")), f"{path} is a universal checkpoint, which merge cannot read", remedy)
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
            found.remark = f"{path}: the mean is of the adapters in {files[0].name}, in that file's precision"
        return found
    if (path / ".metadata").is_file():
        # here, because torch.distributed.checkpoint takes 50 MB that merging other formats has no use for
        from ds_plugin.weight_averaging.merge.torch_dist import read_torch_dist

        return read_torch_dist(path)
    if (path / _MEGATRONS_LATEST).is_file():
        tag = read_tag(path / _MEGATRONS_LATEST, remedy=_RETAG)
        return open_source(path / (f"iter_{int(tag):07d}" if tag.isdecimal() else tag))
    what = f"{path} holds neither *.safetensors, nor DeepSpeed's *_optim_states.pt, nor torch_dist's .metadata, nor a"
    what += f" file 'latest' or '{_MEGATRONS_LATEST}'"
    refuse(not (path / "latest_universal").is_file(), what, "give the folder that does")
    return open_source(path / read_tag(path / "latest_universal", remedy=_RETAG))


def _named_by_latest(path: Path) -> Source:
    """DeepSpeed's newest checkpoint in a folder, which may be a Trainer's and hold the 16-bit weights as well."""
    tag = read_tag(path / "latest", remedy=_RETAG)
    remedy = f"{RESTORE}, or remove 'latest' to merge the safetensors beside it"
    refuse(not (path / tag).is_dir(), f"{path / 'latest'} names {tag}, which is missing", remedy)
    source = open_source(path / tag)
    low = next((p.name for pattern in _WEIGHTS for p in sorted(path.glob(pattern))), None)
    if low is not None:
        source.remark = f"{path}: the mean is of the fp32 masters in {tag}, which 'latest' names, not of {low}"
    return source


def command(args: argparse.Namespace) -> int:
    """Run the merge and say which files are written; the exit code."""
    try:
        merge(
            args.checkpoints,
            args.out,
            weights=args.weights,
            workers=args.workers,
            dtype=args.dtype,
            shard_bytes=int(args.shard_gb * 1e9) if math.isfinite(args.shard_gb) else 0,
            note=lambda text: print(text, flush=True),
        )
    except KeyboardInterrupt:
        print("interrupted; nothing was written: the same command starts over", file=sys.stderr)
        return 130
    print(f"{args.out}: the mean of {len(args.checkpoints)} checkpoints")
    return 0
