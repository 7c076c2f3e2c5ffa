"""Which files a model is published as, where in them each rank's elements belong, and who writes what. All of it pure.

Names, shapes and dtypes make the header of a safetensors file: ranks that agree on it write into one file side by side.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from ds_plugin.core.errors import StateError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the model as it is published, whole; and by what the ranks' models have it sharded."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    #: other names of the same, tied, tensor: in the metadata, as ``safetensors.torch.save_model`` has it
    aliases: tuple[str, ...] = ()
    tp_sharded: bool = False
    zero3_sharded: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class File(NamedTuple):
    """One output file: its header, the byte at which each tensor begins, and its size in bytes."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


def plan_files(
    entries: Sequence[Entry], max_bytes: int, metadata: Mapping[str, str] | None = None, stem: str = "model"
) -> list[File]:
    """The files, in the order of ``entries``, with Hugging Face's names, which begin with ``stem``: each of
    ``max_bytes`` of tensors at most (one may be larger). ``metadata``: what their headers say besides the format."""
    metadata = {"format": "pt", **(metadata or {})}
    parts: list[list[Entry]] = [[]]
    for entry in entries:
        if parts[-1] and sum(each.nbytes for each in parts[-1]) + entry.nbytes > max_bytes:
            parts.append([])
        parts[-1].append(entry)
    if len(parts) == 1:
        return [plan_file(f"{stem}.safetensors", parts[0], metadata)]
    names = (f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1))
    return [plan_file(name, part, metadata) for name, part in zip(names, parts, strict=True)]


def plan_file(name: str, entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> File:
    """One file, whose header has this ``metadata`` and the aliases; neither if it is None."""
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = {**metadata, **{a: e.name for e in entries for a in e.aliases}}
    offsets, end = {}, 0
    for entry in sorted(entries, key=lambda e: -e.dtype.itemsize):  # each then begins at a multiple of its item's size
        offsets[entry.name], end = end, end + entry.nbytes
        place = [offsets[entry.name], end]
        header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return File(name, text, {name: len(text) + offset for name, offset in offsets.items()}, len(text) + end)


def index_of(files: Sequence[File]) -> str:
    """``model.safetensors.index.json``: which file holds which tensor."""
    total = sum(file.size - len(file.header) for file in files)
    weight_map = {name: file.name for file in files for name in file.offsets}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


class Cut(NamedTuple):
    """Where a tensor-parallel rank's slice lies in the whole tensor, both flat: the slice is a sequence of blocks of
    ``block`` elements; the whole tensor takes one from every rank in turn."""

    block: int
    rank: int = 0
    ranks: int = 1

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """``(first element in the whole tensor, elements)`` for ``count`` elements of the slice from ``start`` on."""
        while count > 0:
            block, within = divmod(start, self.block)
            length = min(count, self.block - within)
            yield (block * self.ranks + self.rank) * self.block + within, length
            start, count = start + length, count - length


def cut_along(shape: tuple[int, ...], dim: int, stride: int, rank: int, ranks: int) -> tuple[tuple[int, ...], Cut]:
    """The whole tensor's shape, and the `Cut`, of a slice of ``shape`` that is cut along ``dim``. ``stride``: of how
    many tensors, laid end to end along ``dim`` and each cut by itself, it consists (2 for a gated unit). Raises
    StateError: they are not equal, or there is no such dimension."""
    if not 0 <= dim < len(shape) or shape[dim] % stride:
        raise StateError(f"publish: a slice of {list(shape)} cannot be cut along dimension {dim}, stride {stride}")
    whole = (*shape[:dim], shape[dim] * ranks, *shape[dim + 1 :])
    return whole, Cut(shape[dim] // stride * math.prod(shape[dim + 1 :]), rank, ranks)


class Report(NamedTuple):
    """What a rank tells the others."""

    place: tuple[int, int]  # pipeline stage and tensor-parallel rank
    rows: tuple[Entry, ...] | None  # of the first rank of this place: all others have the same
    averaged: tuple[int, ...]  # how many elements of each row are in this rank's share of the average


def agree(reports: Sequence[Report], rank: int, layout: str, tied: str) -> tuple[list[Entry], list[tuple[int, bool]]]:
    """All tensors of the model, and what ``rank`` writes: ``(row, whether of the average)``. A name that several stages
    have is a tied tensor, of the lowest of them, and begins with ``tied``. What is not sharded the first ranks write.
    Raises StateError: places differ about a tensor, or it is not held exactly once."""
    rows = {report.place: report.rows for report in reports if report.rows is not None}
    owners: dict[str, tuple[int, Entry]] = {}
    for place in sorted(rows):
        for row, other in zip_longest(rows[place], rows[place[0], 0]):
            if not (row and other) or (row.name, row.tp_sharded) != (other.name, other.tp_sharded):
                what = f"{(row or other).name} is not the same on all tensor-parallel ranks"
                raise StateError(f"publish: {what}; build one model on all")
            owner, known = owners.setdefault(row.name, (place[0], row))
            if owner != place[0] and not row.name.startswith(tied):
                what = f"pipeline stages {owner} and {place[0]} both have a {row.name}, which is not tied"
                raise StateError(f"publish: {what}; leave parameters to the layers (a loss_fn has none)")
            if (known.dtype, known.shape) != (row.dtype, row.shape):
                one, other_one = (f"{each.dtype} {list(each.shape)}" for each in (known, row))
                remedy = "build one model on all, and give what is cut tensor_model_parallel and partition_dim"
                raise StateError(f"publish: {row.name} is {one} on one rank and {other_one} on another; {remedy}")
    here, mine = reports[rank].place, []
    peers = [report for report in reports if report.place == here]
    ranks = 1 + max(tensor_rank for _, tensor_rank in rows)
    for i, row in enumerate(rows[here]):
        if owners[row.name][0] != here[0] or (here[1] and not row.tp_sharded):
            continue
        found = [report.averaged[i] for report in peers]
        averaged = any(found)
        held, needed = sum(found) if layout == "sharded" else found[0], row.numel // (ranks if row.tp_sharded else 1)
        if averaged and held != needed:
            what = f"the data-parallel ranks' averages hold {held} elements of {row.name} where {needed} are needed"
            raise StateError(f"publish: {what}; this way to shard the optimizer (MiCS, experts) is not known")
        if peers[0] is reports[rank] or (layout == "sharded" if averaged else row.zero3_sharded):
            mine.append((i, averaged))
    return [entry for _, entry in owners.values()], mine
