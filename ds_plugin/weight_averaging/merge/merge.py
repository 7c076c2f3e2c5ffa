"""``ds-plugin merge``: what is averaged, checks before anything is written, and the folder that is written.

It appears when all of it is flushed to disk. A merge that is interrupted or killed leaves nothing and starts over.
"""

import errno
import fcntl
import math
import os
import shutil
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
from ds_plugin.weight_averaging.merge.safetensors_folders import config_of, read_safetensors, refuse_quantized
from ds_plugin.weight_averaging.window import read_weights

SHARD_BYTES = 5 * 10**9  # of an output that has no sharding to follow; Hugging Face's own default
OUTPUT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OURS = "weight_averaging_rank_"  # the plugin's window files, which lie beside DeepSpeed's
_MEGATRONS_LATEST = "latest_checkpointed_iteration.txt"
_RETAG = f"{RESTORE}, or give the tag's folder"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # what transformers calls its files


def parse_weights(text: str, count: int) -> list[float]:
    """Relative weights of ``count`` checkpoints, oldest first, of a word of `KINDS`, or of a list of numbers. Raises
    ConfigError: an unknown word, another count, or a weight that is negative or not finite."""
    if text in KINDS:
        return read_weights(text, count)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        known = f"write {', '.join(KINDS)} or one number per checkpoint, e.g. 0.2,0.3,0.5"
        raise ConfigError(f"--weights is {text!r}; {OTHER_KINDS.get(text, known)}") from None
    if len(weights) != count:
        raise ConfigError(f"--weights has {len(weights)} numbers for {count} checkpoints; give one for each")
    if not any(weights) or not all(0 <= weight < math.inf for weight in weights):
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

    Safetensors folders become the same files, with the first one's configuration and tokenizer; DeepSpeed checkpoints
    their fp32 masters as safetensors in shards of ``shard_bytes``, in a folder for each tensor-parallel rank, to be
    loaded not strictly (megatron-core's empty ``_extra_state`` is left out); torch_dist checkpoints one with the
    weights alone. Sums are made in fp32 (fp64 for fp64), oldest to newest, bit for bit as `window.weighted_mean_` makes
    them. ``dtype``: of the floating-point tensors. ``workers``: threads. ``note`` is told what a user should know.

    Raises ConfigError: an argument is wrong, or ``out`` is in use; CheckpointError: a checkpoint is missing, damaged,
    unsafe to read, quantized, or of another model or layout; PluginError: the output cannot be written.
    """
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; write {', '.join(OUTPUT_DTYPES)}")
    if min(len(checkpoints), workers, shard_bytes) < 1:
        raise ConfigError(f"{len(checkpoints)} checkpoints, {workers} --workers, shards of {shard_bytes}: give some")
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
    """Yield a hidden folder beside ``out``, which becomes ``out`` when the block succeeds, and else goes. What a killed
    process left there goes first; one that is alive holds the lock. ``needed``: bytes."""
    if held := sorted(out.iterdir()) if out.exists() else []:
        raise ConfigError(f"--out {out} holds {held[0].name}; give a new folder")
    if os.path.ismount(out):
        raise ConfigError(f"--out {out} is a mount point, which no folder can take the place of; give one within it")
    out = out.resolve()
    staging, locked = out.with_name(f".{out.name}.merging"), out.with_name(f".{out.name}.lock")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(locked, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another merge writes --out {out}; wait for it, or give another folder") from None
        if not os.fstat(lock.fileno()).st_nlink:
            raise ConfigError(f"another merge of --out {out} has just ended; look at what it wrote")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            if (free := shutil.disk_usage(staging).free) < needed:
                found = f"needs {needed / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB"
                raise PluginError(f"--out {out} {found}; make room")
            yield staging
            for path in [*staging.rglob("*"), staging]:
                sync_folder(path)  # files as well
            os.rename(staging, out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            locked.unlink()  # not earlier: whoever opens it must find it held


def open_source(path: Path) -> Source:
    """Find out what lies at ``path`` and where its tensors are. Raises CheckpointError: nothing that can be averaged,
    or a file is missing, truncated, or holds foreign classes."""
    if path.is_file() and path.suffix == ".safetensors":
        return read_safetensors(path, [path], None)
    refuse(not path.is_dir(), f"there is no checkpoint at {path}", "give a folder that exists")
    remedy = "give the tag folder that it was converted from, or resume from it (checkpoint.load_universal) and save"
    refuse(any(path.glob("zero/*/fp32.pt")), f"{path} is a universal checkpoint, which merge cannot read", remedy)
    if any(path.glob("*_states.pt")):
        source = read_deepspeed(path)
        source.beside = path.parent if "model_type" in config_of(path.parent) else None  # transformers' folder
        return source
    adapters = (path / "adapter_config.json").is_file()  # PEFT's, which only its own file is loaded from
    if (path / "latest").is_file() and not adapters:  # DeepSpeed's newest, perhaps with a Trainer's 16-bit weights
        tag = read_tag(path / "latest", remedy=_RETAG)
        remedy = f"{RESTORE}, or remove 'latest' to merge the safetensors beside it"
        refuse(not (path / tag).is_dir(), f"{path / 'latest'} names {tag}, which is missing", remedy)
        named = open_source(path / tag)
        for low in sorted(p.name for pattern in _WEIGHTS for p in path.glob(pattern))[:1]:
            named.remark = f"{path}: the mean is of the fp32 masters in {tag}, which 'latest' names, not of {low}"
        return named
    files = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith((_OURS, ".")))
    indices = sorted(path.glob("*.safetensors.index.json"))
    if files or indices:
        found = read_safetensors(path, files, indices[0] if indices else None)
        if adapters:
            found.remark = f"{path}: the mean is of the adapters in {files[0].name}, in that file's precision"
        return found
    if (path / ".metadata").is_file():
        # here: torch.distributed.checkpoint takes 50 MB that merging other formats has no use for
        from ds_plugin.weight_averaging.merge.torch_dist import read_torch_dist

        return read_torch_dist(path)
    if (path / _MEGATRONS_LATEST).is_file():
        tag = read_tag(path / _MEGATRONS_LATEST, remedy=_RETAG)
        return open_source(path / (f"iter_{int(tag):07d}" if tag.isdecimal() else tag))
    known = f"*.safetensors, DeepSpeed's *_optim_states.pt, torch_dist's .metadata, 'latest' or '{_MEGATRONS_LATEST}'"
    refuse(not (path / "latest_universal").is_file(), f"{path} holds none of {known}", "give the folder that does")
    return open_source(path / read_tag(path / "latest_universal", remedy=_RETAG))
