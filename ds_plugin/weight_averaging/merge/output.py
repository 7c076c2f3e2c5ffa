"""How `merge` writes: the arithmetic, the workers, and the record of what is finished."""

import json
import os
import re
import shutil
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ds_plugin.core.errors import CheckpointError, ConfigError, PluginError
from ds_plugin.core.files import atomic_path, atomic_write
from ds_plugin.weight_averaging.merge.inputs import DEQUANTIZE, Source, Stored
from ds_plugin.weight_averaging.window import factors

RECORD = "merge.json"
CHUNK = 256 * 1024  # elements read at a time: the buffers stay in the cache, and calls cost little beside the work
_OPEN_FILES = 64  # per worker
_WRITE_BACK = 8 * 1024 * 1024  # bytes

Progress = Callable[[int, int, str | None], None]  # bytes done, bytes in all, the shard that is now finished


@dataclass(frozen=True)
class Part:
    """A tensor of an output file: the mean of ``count`` elements of the sources' tensor of that name."""

    tensor: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One output file: tensors, and the bytes before, between and after them."""

    name: str
    parts: tuple[bytes | Part, ...]

    @cached_property
    def size(self) -> int:
        return sum(part.nbytes if isinstance(part, Part) else len(part) for part in self.parts)

    @property
    def tensors(self) -> list[Part]:
        return [part for part in self.parts if isinstance(part, Part)]

    @property
    def checksum(self) -> int:
        """Of the bytes that are known beforehand."""
        return zlib.crc32(b"".join(part for part in self.parts if isinstance(part, bytes)))


@dataclass(frozen=True)
class Plan:
    """The output: its large files, the sources they are made from, and what writes the small ones when they are done.

    The sources are those that were read, or the same with their tensors cut as the output's are.
    """

    shards: list[Shard]
    sources: list[Source]
    finish: Callable[[Path], None]


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
        for leftover in filter(_stale, list(out.rglob(".*"))):
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
    match = re.fullmatch(r"\..+\.(\d+)\.tmp(\..+)?", path.name)
    if match is None:
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(match[1]) == os.getpid()


def _digest(piece: bytes | memoryview) -> bytes:
    """What a checksum takes of one piece: the sum of its words, ten times as fast as a CRC of its bytes."""
    words = len(piece) // 8
    total = int(np.frombuffer(piece, np.int64, words).sum())
    return total.to_bytes(8, "little", signed=True) + bytes(piece[words * 8 :])


def _checksum(path: Path, shard: Shard) -> int:
    """Of a file."""
    found = 0
    with open(path, "rb", buffering=0) as file:
        for piece in _pieces(shard):
            found = zlib.crc32(_digest(file.read(piece.size)), found)
    return found


def refuse_different_integers(sources: list[Source]) -> None:
    """Integers have no mean: packed weights of one input with the averaged scales of all would be a wrong model.

    Single numbers (step counters, BatchNorm's num_batches_tracked) and what is known to be a buffer may differ: the
    newest is taken. Stops at the first difference; what is equal is read once from every source.

    Raises:
        CheckpointError: naming the tensor, both files and the remedy.
    """
    *others, last = sources
    if not others:
        return
    hand = _Hand(sources, [1.0] * len(sources))
    try:
        for name, stored in last.tensors.items():
            if stored.dtype.is_floating_point or stored.varies:
                continue
            for start in range(0, stored.numel, CHUNK):
                count = min(CHUNK, stored.numel - start)
                newest, _ = hand.read(stored, start, *hand.buffer("latest", stored.dtype, count))
                for other in (source.tensors[name] for source in others):
                    values, _ = hand.read(other, start, *hand.buffer("read", stored.dtype, count))
                    if not torch.equal(values, newest):
                        files = [next(one.span(start, 1)).path for one in (other, stored)]
                        raise CheckpointError(
                            f"tensor {name} is {stored.dtype} and differs between {files[0]} and {files[1]}, and "
                            f"integers have no mean: leave one of the two out; if it holds packed weights, {DEQUANTIZE}"
                        )
    finally:
        hand.close()


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
    at_a_time = min(workers, max(1, len(shards)))
    hands = 2 if at_a_time < len(os.sched_getaffinity(0)) else 1

    def one(shard: Shard) -> None:
        (out / shard.name).parent.mkdir(exist_ok=True)
        with atomic_path(out / shard.name) as path, open(path, "wb", buffering=0) as file:
            checksum = _Writing(shard, file, stop, advance).by([_Hand(sources, weights) for _ in range(hands)])
        record.finish(shard, checksum)
        advance(0, shard.name)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(at_a_time, "merge")
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


class _Piece(NamedTuple):
    """Consecutive bytes of a shard: given ones, or the mean of ``elements`` of a tensor, from ``start`` on."""

    offset: int
    size: int
    part: bytes | Part
    start: int = 0
    elements: int = 0


def _pieces(shard: Shard) -> Iterator[_Piece]:
    offset = 0
    for part in shard.parts:
        if isinstance(part, bytes):
            yield _Piece(offset, len(part), part)
            offset += len(part)
            continue
        for start in range(0, part.count, CHUNK):
            count = min(CHUNK, part.count - start)
            yield _Piece(offset, count * part.dtype.itemsize, part, start, count)
            offset += count * part.dtype.itemsize


class _Writing:
    """One shard on its way into its ``file``: its pieces, which threads take as they have time, and what is written."""

    def __init__(self, shard: Shard, file: Any, stop: threading.Event, advance: Callable[[int, str | None], None]):
        self.file, self.stop, self.advance = file, stop, advance
        self._pieces, self._lock = enumerate(_pieces(shard)), threading.Lock()
        self._digests: dict[int, bytes] = {}
        self._failed = threading.Event()
        self._written = self._sent = 0  # bytes

    def by(self, hands: "list[_Hand]") -> int:
        """Write all of it, a thread to each hand, the first being this one; returns the file's checksum."""
        with ThreadPoolExecutor(len(hands), "merge-hand") as pool:
            others = [pool.submit(self._take, hand) for hand in hands[1:]]
            self._take(hands[0])
            for other in others:
                other.result()
        if self.stop.is_set():
            raise _Stopped
        return zlib.crc32(b"".join(digest for _, digest in sorted(self._digests.items())))

    def _take(self, hand: "_Hand") -> None:
        torch.set_num_threads(1)  # of this thread: the hands are the parallelism
        try:
            while not (self.stop.is_set() or self._failed.is_set()):
                with self._lock:
                    number, piece = next(self._pieces, (0, None))
                if piece is None:
                    return
                view = hand.bytes_of(piece)
                hand.put(self.file, view, piece.offset)
                self._digests[number] = _digest(view)
                self._count(piece.size)
        except BaseException:
            self._failed.set()
            raise
        finally:
            hand.close()

    def _count(self, size: int) -> None:
        with self._lock:
            self._written += size
            if self._written - self._sent >= _WRITE_BACK:  # to the disk while the merge goes on, not all at the end
                os.posix_fadvise(self.file.fileno(), self._sent, self._written - self._sent, os.POSIX_FADV_DONTNEED)
                self._sent = self._written
        self.advance(size, None)


class _Hand:
    """What one thread makes pieces with: buffers of a chunk each, and a few open files."""

    def __init__(self, sources: list[Source], weights: list[float]):
        self.last = sources[-1]
        numbers, self.divisor = factors(weights)
        self.terms = [(source, number) for source, number in zip(sources, numbers, strict=True) if number]
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._memory: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._buffers: dict[tuple[str, torch.dtype, int], tuple[torch.Tensor, memoryview]] = {}

    def close(self) -> None:
        for opened in self._files.values():
            opened.close()

    def bytes_of(self, piece: _Piece) -> memoryview:
        """A piece of the output, until the next is asked for."""
        if isinstance(piece.part, bytes):
            return memoryview(piece.part)
        values, view = self._mean(piece.part.tensor, piece.start, piece.elements)
        if values.dtype == piece.part.dtype:
            return view
        written, view = self.buffer("written", piece.part.dtype, piece.elements)
        written.copy_(values)
        return view

    def put(self, file: Any, view: memoryview, offset: int) -> None:
        """Write at a place of the file."""
        while view:
            count = os.pwrite(file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def _mean(self, name: str, start: int, count: int) -> tuple[torch.Tensor, memoryview]:
        stored = self.last.tensors[name]
        if stored.latest:
            return self.read(stored, start, *self.buffer("latest", stored.dtype, count))
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        total, view = self.buffer("total", wide, count)
        for index, (source, weight) in enumerate(self.terms):
            # the first goes into the sum itself
            place = (total, view) if index == 0 and stored.dtype == wide else self.buffer("read", stored.dtype, count)
            values, _ = self.read(source.tensors[name], start, *place)
            if stored.dtype != wide:  # first, since torch adds tensors of two dtypes one element at a time
                values = (total if index == 0 else self.buffer("wide", wide, count)[0]).copy_(values)
            if weight != 1:
                values.mul_(weight)
            if index:
                total.add_(values)
        if self.divisor != 1:
            total.div_(self.divisor)
        return total, view

    def buffer(self, use: str, dtype: torch.dtype, count: int) -> tuple[torch.Tensor, memoryview]:
        """Memory that is used again and again, as a tensor and as its bytes.

        Fresh memory costs the kernel more than the arithmetic in it, and even a new view costs several microseconds.
        """
        found = self._buffers.get((use, dtype, count))
        if found is None:
            whole = self._memory.setdefault((use, dtype), torch.empty(CHUNK, dtype=dtype))
            found = self._buffers[use, dtype, count] = whole[:count], whole[:count].view(torch.uint8).numpy().data
        return found

    def read(
        self, stored: Stored, start: int, target: torch.Tensor, view: memoryview
    ) -> tuple[torch.Tensor, memoryview]:
        """Fill ``target``, whose bytes ``view`` are, with the tensor's elements from ``start`` on."""
        filled, size = 0, stored.dtype.itemsize
        for path, offset, count in stored.span(start, target.numel()):
            end = filled + count * size
            self._fill(path, view[filled:end], offset)
            filled = end
        return target, view

    def _fill(self, path: Path, view: memoryview, offset: int) -> None:
        descriptor = self._open(path)
        while view:
            count = os.preadv(descriptor, [view], offset)
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
