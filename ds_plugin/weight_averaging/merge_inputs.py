"""What `merge` reads: where in which file each tensor of a checkpoint lies. No tensor is loaded here.

Safetensors and DeepSpeed's files (`merge_zero`) become the same thing, a `Source`: names, each with a dtype, a shape
and the byte ranges that hold its elements in order.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_plugin.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

RESTORE = "restore the file, or leave this checkpoint out"


@dataclass(frozen=True)
class Piece:
    """``count`` consecutive elements of a file, from byte ``offset`` on."""

    path: Path
    offset: int
    count: int


@dataclass(frozen=True)
class Stored:
    """One tensor. ``latest``: a buffer or a frozen weight, of which the newest is taken and no mean is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    latest: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Source:
    """One checkpoint. ``headers``: of each safetensors file, its header as it stands (none for DeepSpeed's files)."""

    path: Path
    layout: str
    tensors: dict[str, Stored]
    files: list[Path]
    headers: dict[str, bytes] = field(default_factory=dict)
    index: Path | None = None


def compare(first: Source, other: Source) -> None:
    """Refuse to average two checkpoints of different models or layouts, naming the first difference.

    Raises:
        CheckpointError: with both values.
    """
    if first.layout != other.layout:
        raise CheckpointError(
            f"{other.path} is {other.layout}, {first.path} is {first.layout}; give checkpoints of one layout"
        )
    for name in [*first.tensors, *other.tensors]:
        mine, theirs = (_described(source.tensors.get(name)) for source in (first, other))
        if mine != theirs:
            raise CheckpointError(
                f"tensor {name} is {theirs} in {other.path} and {mine} in {first.path}; give checkpoints of one model"
            )


def _described(stored: Stored | None) -> str:
    return "absent" if stored is None else f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"


def read_safetensors(path: Path, files: list[Path], index: Path | None) -> Source:
    source = Source(path, "a safetensors checkpoint", {}, files, index=index)
    wanted: Mapping[str, str] = {}
    if index is not None:
        try:
            wanted = json.loads(index.read_text("utf-8"))["weight_map"]
            source.files = [path / name for name in sorted(set(wanted.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); {RESTORE}") from None
    for file in source.files:
        source.headers[file.name], found = _read_header(file)
        for name, stored in found.items():
            if name in source.tensors:
                raise CheckpointError(f"{file} holds tensor {name}, which another file beside it holds too; remove one")
            if index is None or wanted.get(name) == file.name:
                source.tensors[name] = stored
            else:
                raise CheckpointError(f"{file} holds tensor {name}, which {index.name} does not place there; {RESTORE}")
    for name in wanted:
        if name not in source.tensors:
            raise CheckpointError(f"{path / wanted[name]} lacks tensor {name}, which {index} places there; {RESTORE}")
    return source


def _read_header(path: Path) -> tuple[bytes, dict[str, Stored]]:
    """The header with its length in front, and the tensors in the order of their bytes."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {RESTORE}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = file.read(8)
        count = int.from_bytes(length, "little")
        header = file.read(count) if count <= size - 8 else b""
    if size < 8 or len(header) != count:
        raise CheckpointError(f"{path} is truncated: {size} bytes do not hold its header; {RESTORE}")
    tensors, end = {}, 8 + count
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{path}: tensor {name} is {entry['dtype']}, which merge cannot average")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, stop = (8 + count + offset for offset in entry["data_offsets"])
            if start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} lies at bytes {start} to {stop}")
            tensors[name] = Stored(dtype, shape, (Piece(path, start, math.prod(shape)),), not dtype.is_floating_point)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {RESTORE}") from None
    if size != end:
        what = "truncated" if size < end else "damaged"
        raise CheckpointError(f"{path} is {what}: {size} bytes where its header asks for {end}; {RESTORE}")
    return length + header, tensors
