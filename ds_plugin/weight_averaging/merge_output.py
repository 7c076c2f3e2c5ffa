"""How `merge` writes: the arithmetic, the workers, and the record of what is finished."""

import json
import math
import os
import shutil
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_plugin.atomic import atomic_path, atomic_write
from ds_plugin.errors import CheckpointError, ConfigError, PluginError
from ds_plugin.weight_averaging.merge_inputs import Source, Stored

RECORD = "merge.json"
CHUNK = 256 * 1024  # elements read at a time: buffers of 1 MiB of fp32 stay in the cache
_OPEN_FILES = 64  # per worker

Progress = Callable[[int, int, str | None], None]  # bytes done, bytes in all, the shard that is now finished


@dataclass(frozen=True)
class Shard:
    """One output file: its header, and the tensors (name, dtype, elements) in the order of their bytes."""

    name: str
    header: bytes
    tensors: list[tuple[str, torch.dtype, int]]
    size: int


class Record:
    """``merge.json`` in the output folder: what the merge is of, and the checksums of the finished shards."""

    def __init__(self, out: Path, described: dict[str, Any]):
        self.path, self._lock = out / RECORD, threading.Lock()
        self.finished: dict[str, int] = {}
        self.described = json.loads(json.dumps(described))
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out} is a file; give a new folder")
        out.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            if found := next((p for p in sorted(out.iterdir()) if not _stale(p)), None):
                raise ConfigError(f"--out {out} holds {found.name} and no {RECORD}; give a new folder")
        else:
            try:
                before = json.loads(self.path.read_text("utf-8"))
                self.finished = {str(name): int(crc) for name, crc in before.pop("finished").items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{self.path} is damaged ({error}); remove {out} or give a new folder") from None
            for key, value in self.described.items():
                if before.get(key) != value:
                    raise ConfigError(
                        f"--out {out} holds another merge: its {key} are {_short(before.get(key))}, this command's "
                        f"{_short(value)}; give a new folder"
                    )
        for leftover in filter(_stale, list(out.iterdir())):
            leftover.unlink()
        self._write()

    def verified(self, shard: Shard, note: Callable[[str], None]) -> bool:
        """Whether a finished shard is there, whole and unaltered."""
        path = self.path.parent / shard.name
        if shard.name not in self.finished:
            return False
        if path.is_file() and path.stat().st_size == shard.size and _checksum(path, shard) == self.finished[shard.name]:
            return True
        note(f"{path} was finished before and has been altered since: it is made again")
        del self.finished[shard.name]
        return False

    def finish(self, shard: Shard, checksum: int) -> None:
        with self._lock:
            self.finished[shard.name] = checksum
            self._write()

    def _write(self) -> None:
        text = json.dumps({**self.described, "finished": self.finished}, indent=1) + "\n"
        atomic_write(self.path, lambda path: path.write_text(text, encoding="utf-8"))


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:300] + "..."


def _stale(path: Path) -> bool:
    """Whether `atomic_path` made this file in a process that is gone."""
    parts = path.name.split(".")
    if not path.name.startswith(".") or len(parts) < 4 or parts[-2] != "tmp" or not parts[-3].isdigit():
        return False
    try:
        os.kill(int(parts[-3]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(parts[-3]) == os.getpid()


def _digest(piece: bytes | memoryview, before: int) -> int:
    """Take one more piece into a checksum: the sum of its words, ten times as fast as a CRC of its bytes."""
    words = len(piece) // 8
    total = int(np.frombuffer(piece, np.int64, words).sum())
    return zlib.crc32(total.to_bytes(8, "little", signed=True) + bytes(piece[words * 8 :]), before)


def _checksum(path: Path, shard: Shard) -> int:
    """Of a file, the pieces being those in which it was written."""
    found = 0
    with open(path, "rb", buffering=0) as file:
        found = _digest(file.read(len(shard.header)), found)
        for _, dtype, count in shard.tensors:
            for start in range(0, count, CHUNK):
                found = _digest(file.read(min(CHUNK, count - start) * dtype.itemsize), found)
    return found


def check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise PluginError(f"--out {out} needs {needed / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB; make room")


def write_all(
    shards: list[Shard],
    sources: list[Source],
    weights: list[float],
    out: Path,
    record: Record,
    workers: int,
    advance: Callable[[int, str | None], None],
) -> None:
    """Write every shard, ``workers`` at a time; the first failure stops all."""
    stop = threading.Event()

    def one(shard: Shard) -> None:
        torch.set_num_threads(1)  # of this thread: the workers are the parallelism
        writer = _Writer(sources, weights, stop)
        with atomic_path(out / shard.name) as path, open(path, "wb", buffering=0) as file:
            writer.write(shard, file, advance)
        record.finish(shard, writer.checksum)
        advance(0, shard.name)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(workers, max(1, len(shards))), "merge")
    try:
        jobs: list[Future[None]] = [pool.submit(one, shard) for shard in shards]
        for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
            job.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class _Stopped(Exception):
    """Another worker failed."""


class _Writer:
    """Writes one shard: buffers of a chunk each, and a few open files."""

    def __init__(self, sources: list[Source], weights: list[float], stop: threading.Event):
        self.last, self.stop = sources[-1], stop
        self.terms = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight]
        self.divisor = math.fsum(weights)
        self.checksum = 0
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def write(self, shard: Shard, file: Any, advance: Callable[[int, str | None], None]) -> None:
        """Stream the shard into ``file``; `checksum` is then the file's."""
        try:
            self._put(file, memoryview(shard.header))
            advance(len(shard.header), None)
            for name, dtype, numel in shard.tensors:
                for start in range(0, numel, CHUNK):
                    if self.stop.is_set():
                        raise _Stopped
                    chunk = self._mean(name, start).to(dtype)
                    self._put(file, _bytes(chunk))
                    advance(chunk.nbytes, None)
        finally:
            for opened in self._files.values():
                opened.close()

    def _mean(self, name: str, start: int) -> torch.Tensor:
        stored = self.last.tensors[name]
        count = min(CHUNK, stored.numel - start)
        if stored.latest:
            return self._read(stored, start, self._buffer("read", stored.dtype, count))
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        total = self._buffer("total", wide, count)
        for index, (source, weight) in enumerate(self.terms):
            # the first goes into the sum itself
            place = total if index == 0 and stored.dtype == wide else self._buffer("read", stored.dtype, count)
            values = self._read(source.tensors[name], start, place)
            if values.dtype != wide:  # first, since torch adds tensors of two dtypes one element at a time
                values = (total if index == 0 else self._buffer("wide", wide, count)).copy_(values)
            if weight != 1:
                values.mul_(weight)
            if index:
                total.add_(values)
        return total if self.divisor == 1 else total.div_(self.divisor)

    def _buffer(self, use: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        key = (use, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(CHUNK, dtype=dtype)
        return self._buffers[key][:count]

    def _read(self, stored: Stored, start: int, target: torch.Tensor) -> torch.Tensor:
        """Fill ``target`` with the tensor's elements from ``start`` on."""
        view, size, filled, count = _bytes(target), stored.dtype.itemsize, 0, target.numel()
        for piece in stored.pieces:
            begin, end = max(start, 0), min(start + count, piece.count)
            start -= piece.count
            while begin < end:
                window = view[filled * size : (filled + end - begin) * size]
                self._fill(piece.path, window, piece.offset + begin * size)
                filled, begin = filled + end - begin, end
        return target

    def _fill(self, path: Path, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._open(path), [view], offset)
            if count == 0:
                raise CheckpointError(f"{path} became shorter while it was read; keep the checkpoints as they are")
            view, offset = view[count:], offset + count

    def _open(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[path] = open(path, "rb", buffering=0)
        self._files.move_to_end(path)
        return self._files[path].fileno()

    def _put(self, file: Any, view: memoryview) -> None:
        self.checksum = _digest(view, self.checksum)
        while view:
            view = view[file.write(view) :]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
