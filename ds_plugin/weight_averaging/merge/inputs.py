"""What `merge` reads: a `Source` says where in which file each tensor of a checkpoint lies; none is loaded early."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ds_plugin.core.errors import CheckpointError
from ds_plugin.weight_averaging.publish.layout import DTYPE_NAMES
from ds_plugin.weight_averaging.state.fragments import WRAPPERS, plain_name
from ds_plugin.weight_averaging.state.reshard import damage
from ds_plugin.weight_averaging.window import factors

CHUNK = 128 * 1024  # elements made at a time: they stay in the cache, and calls cost little beside the work
#: classes in files of `torch.save` besides tensors and plain values; none is needed, so `Inert` takes their place
HARMLESS = """
    _io.BytesIO deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler deepspeed.runtime.fp16.loss_scaler.LossScaler
    deepspeed.runtime.zero.config.ZeroStageEnum deepspeed.utils.tensor_fragment.fragment_address
""".split()  # the first is megatron-core's extra state
RESTORE = "restore the file, or leave this checkpoint out"
DEQUANTIZE = "give the checkpoints not quantized, or dequantized (transformers: model.dequantize(), save_pretrained)"
#: a file to read from; what the cache lets go is closed as soon as nobody holds it
opened = lru_cache(64)(partial(open, mode="rb", buffering=0))


class Piece(NamedTuple):
    """``length`` consecutive elements of a file, from byte ``begin`` on."""

    path: Path
    begin: int
    length: int


def cut(pieces: Iterable[Piece], start: int, count: int, itemsize: int = 4) -> list[Piece]:
    """``count`` elements from ``start`` on, of pieces laid end to end."""
    found = []
    for path, begin, length in pieces:
        low, high = max(start, 0), min(start + count, length)
        if low < high:
            found.append(Piece(path, begin + itemsize * low, high - low))
        start -= length
    return found


class Stored(NamedTuple):
    """One tensor, whose elements in row-major order are those of ``pieces`` laid end to end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Any]  # `Piece`, or what else its source reads
    latest: bool = False  # a buffer or a frozen weight: no mean is made, and the newest taken, as of integers
    varies: bool = False  # a buffer, which may differ between checkpoints even where it has no mean

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def written(self, dtype: torch.dtype | None) -> torch.dtype:
        """Its dtype in an output whose floating-point tensors are to have ``dtype`` (None: each its own)."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype


@dataclass
class Source:
    """One checkpoint."""

    path: Path
    layout: str
    tensors: dict[str, Stored] = field(default_factory=dict)
    beside: Path | None = None  # the folder with the model's configuration and tokenizer
    remark: str = ""  # what a user should know about how it was read
    dtype: torch.dtype | None = None  # of a mean, if the user names none; None: each tensor's own

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Elements of a tensor, flat, in memory of their own."""
        stored = self.tensors[name]
        values = torch.empty(count, dtype=stored.dtype)
        view = values.view(torch.uint8).numpy().data
        for path, begin, length in cut(stored.pieces, start, count, stored.dtype.itemsize):
            left, view = view[: length * stored.dtype.itemsize], view[length * stored.dtype.itemsize :]
            file = opened(path)  # held as long as it is read: another thread may have put its own in the cache
            while left:
                found = os.preadv(file.fileno(), [left], begin)
                refuse(not found, f"{path} became shorter while it was read", "keep the checkpoints as they are")
                left, begin = left[found:], begin + found
        return values

    def write(self, out: Path, mean: "Mean", dtype: torch.dtype | None, shard_bytes: int, workers: int) -> None:
        """Write the ``mean`` of checkpoints, of which this is the first, into the new folder ``out``."""
        raise NotImplementedError


class Mean:
    """The weighted mean of ``sources``, oldest first. ``note`` is told what is written."""

    def __init__(self, sources: Sequence[Any], weights: Sequence[float], note: Callable[[str], None]):
        self.sources, self.note = sources, note
        shares, self._divisor = factors(weights)
        self._terms = [(source, share) for source, share in zip(sources, shares, strict=True) if share]

    def of(self, name: str, *where: Any) -> torch.Tensor:
        """The mean of a part of a tensor, read from every source once: in memory of its own, in fp32 (fp64 of fp64).
        Raises CheckpointError: integers differ, which have no mean: packed weights of one input with the averaged
        scales of all would be a wrong model. Single numbers (step counters) and buffers may: the newest is taken."""
        *others, last = self.sources
        newest = last.tensors[name]
        floating = newest.dtype.is_floating_point
        if newest.latest or not floating:
            values = last.read(name, *where)
            for other in () if floating or newest.varies or newest.numel == 1 else others:
                refuse(
                    not torch.equal(other.read(name, *where), values),
                    f"tensor {name} is {newest.dtype} and differs between {other.path} and {last.path}, and integers "
                    "have no mean: leave one of the two out",
                    f"if it holds packed weights, {DEQUANTIZE}",
                )
            return values
        total = None
        for source, share in self._terms:
            values = source.read(name, *where)
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if share != 1:
                values.mul_(share)  # and not in one call with the sum, which may round once or twice
            total = values if total is None else total.add_(values)
        assert total is not None  # some weight is positive
        return total if self._divisor == 1 else total.div_(self._divisor)


def compare(first: Source, other: Source) -> None:
    """Refuse to average two checkpoints of different models or layouts, naming the first difference, both values."""
    what = f"{other.path} is {other.layout}, {first.path} is {first.layout}"
    refuse(first.layout != other.layout, what, "give checkpoints of one layout")

    def described(source: Source) -> str:
        stored = source.tensors.get(name)
        return "absent" if stored is None else f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"

    for name in [*first.tensors, *other.tensors]:
        what = f"tensor {name} is {described(other)} in {other.path} and {described(first)} in {first.path}"
        refuse(described(first) != described(other), what, "give checkpoints of one model")


def refuse(wrong: object, what: str, remedy: str = RESTORE) -> None:
    """Raise CheckpointError if something is wrong."""
    if wrong:
        raise CheckpointError(f"{what}; {remedy}")


def without_wrappers(named: Mapping[str, Any], where: object) -> dict[str, Any]:
    """``named`` with `plain_name`; two with the same, or a name that is a wrapper's alone, are refused."""
    found: dict[str, Any] = {}
    for name, value in named.items():
        plain = plain_name(name)
        what = f"{where} holds {name}, which without the prefixes of wrappers ({', '.join(WRAPPERS)}) is the name of"
        refuse(plain in found or not plain, f"{what} another tensor", "save the model under one set of names")
        found[plain] = value
    return found


class Inert:
    """Stands in for a class: takes any arguments and runs none of its code."""

    def __init__(self, *arguments: object) -> None: ...
    def __setstate__(self, state: Any) -> None: ...


def load(path: Path) -> Any:
    """What `torch.save` wrote, without running any code of it; tensors on the meta device. Raises CheckpointError: it
    is missing or damaged, or names a class not `HARMLESS`, which is then never imported."""
    with damage(path, RESTORE):
        foreign = ", ".join(sorted(set(get_unsafe_globals_in_checkpoint(path)) - set(HARMLESS)))
        what = f"{path} holds {foreign}, which is not loaded: a pickle can run any code"
        refuse(foreign, what, "save the checkpoint without it (client_state takes plain values)")
        with safe_globals([(Inert, harmless) for harmless in HARMLESS]):
            return torch.load(path, map_location="meta", weights_only=True)


def place(path: Path, name: str, tensor: torch.Tensor) -> Piece:
    """Where a tensor of `load` lies in its file."""
    strange = tensor.dtype not in DTYPE_NAMES or not tensor.is_contiguous()
    refuse(strange, f"{path}: {name} is {tensor.dtype} with strides {tensor.stride()}: not readable", DEQUANTIZE)
    begin: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore  # set by torch.load
    return Piece(path, begin + int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.numel())
