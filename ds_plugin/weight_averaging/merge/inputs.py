"""What `merge` reads: where in which file each tensor of a checkpoint lies. No tensor is loaded here.

Every format becomes the same thing, a `Source`: names, each with a dtype, a shape and the byte ranges that hold its
elements in order. The formats are in `merge_safetensors`, `merge_zero` (DeepSpeed) and `merge_torch_dist`
(megatron-core).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.state.fragments import WRAPPERS, plain_name

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

RESTORE = "restore the file, or leave this checkpoint out"
DEQUANTIZE = (
    "give the checkpoints as they were before they were quantized, or dequantized (transformers: model.dequantize(), "
    "or load them by a quantization config with dequantize=True; then save_pretrained)"
)


T = TypeVar("T")


def without_wrappers(named: Mapping[str, T], where: object) -> dict[str, T]:
    """``named`` with `plain_name`.

    Raises:
        CheckpointError: two of them have the same, or a name is that of a wrapper alone.
    """
    found: dict[str, T] = {}
    for name, value in named.items():
        plain = plain_name(name)
        if plain in found or not plain:
            raise CheckpointError(
                f"{where} holds {name}, which without the prefixes of wrappers ({', '.join(WRAPPERS)}) is the name of "
                "another tensor; save the model under one set of names"
            )
        found[plain] = value
    return found


class Piece(NamedTuple):
    """``length`` consecutive elements of a file, from byte ``offset`` on. A tuple: they are made as the merge runs."""

    path: Path
    offset: int
    length: int


def cut(pieces: Iterable[Piece], start: int, count: int, itemsize: int) -> Iterator[Piece]:
    """``count`` elements of ``itemsize`` bytes from ``start`` on, of pieces laid end to end."""
    for piece in pieces:
        begin, end = max(start, 0), min(start + count, piece.length)
        if begin < end:
            yield Piece(piece.path, piece.offset + itemsize * begin, end - begin)
        start -= piece.length
        if start + count <= 0:
            return


@dataclass(frozen=True)
class Stored:
    """One tensor.

    ``latest``: a buffer, a frozen weight or integers, of which the newest is taken and no mean is made. ``varies``: a
    single number, or known to be a buffer, so that it may differ between checkpoints where it has no mean.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    latest: bool = False
    varies: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def span(self, start: int, count: int) -> Iterator[Piece]:
        """Where ``count`` elements from ``start`` on lie, in row-major order."""
        return cut(self.pieces, start, count, self.dtype.itemsize)


@dataclass
class Source:
    """One checkpoint.

    ``folders``: the names of each folder to be written, by the prefix that tells them apart in ``tensors`` ("" alone,
    or "tp0-of-2/" and so on). ``beside``: the folder with the model's configuration and tokenizer. ``remark``: what a
    user should know about how it was read.
    """

    path: Path
    layout: str
    tensors: dict[str, Stored]
    files: list[Path]
    folders: dict[str, list[str]] = field(default_factory=dict)
    beside: Path | None = None
    remark: str = ""


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
