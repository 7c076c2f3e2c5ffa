"""Torch_dist checkpoints, as megatron-core's dist_checkpointing writes them: read without running code, and written.

``.metadata``, a pickle, says which rectangle of which tensor lies where in the ``*.distcp`` files, each as one
`torch.save`. It is read by an unpickler that admits nothing but inert stand-ins. The output keeps the chunks of the
newest input, so that inputs of the same parallelism are read in long runs and only others row by row; a reader with
any parallelism takes what it needs from them.

What is averaged are the fp32 masters where the optimizer's state holds them under the parameters' names, as
``optimizer.state.param.NAME`` (DistributedOptimizer, distrib_optim_sharding_type "fully_reshardable") or
``optimizer.state.fp32_param.NAME`` (the optimizer that is not distributed), written as ``NAME``; else the model's
weights. Nothing else of the optimizer is read or written. Entries that are no tensors (``_extra_state``), ``common.pt``
and ``metadata.json`` are the newest checkpoint's, copied unread.
"""

import io
import json
import math
import pickle
import re
import shutil
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch

from ds_plugin.core.errors import CheckpointError, PluginError
from ds_plugin.core.files import atomic_write
from ds_plugin.weight_averaging.merge.deepspeed import stored_in, unpickled
from ds_plugin.weight_averaging.merge.inputs import DTYPE_NAMES, RESTORE, Piece, Source, Stored
from ds_plugin.weight_averaging.merge.output import Part, Plan, Shard
from ds_plugin.weight_averaging.merge.rectangles import Chunk, covers_once, window

_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\..*")
_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?param\.(.+)")
_COPIED = ("common.pt", "metadata.json")  # in this order: megatron-core looks for the second first
_COMMON = "common_state/shard_0_1"  # what newer versions of it have in place of common.pt, an object like others

_CHECKPOINT = "torch.distributed.checkpoint"
_ADMITTED = {
    f"{_CHECKPOINT}.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_CHECKPOINT}.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),  # megatron-core keeps them
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "torch.serialization": ("_get_layout",),
}  # fmt: skip


_Key = tuple[str, tuple[int, ...] | None]  # a name and a chunk's offset, None where it is no tensor


@dataclass
class TorchDist(Source):
    """A torch_dist checkpoint. ``objects``: the bytes of the entries that are no tensors."""

    chunks: dict[str, tuple[Chunk, ...]] = field(default_factory=dict)
    objects: dict[str, Piece] = field(default_factory=dict)


def read_torch_dist(path: Path) -> TorchDist:
    """The model's weights (or their fp32 masters) of a torch_dist folder.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, of another format, or holds foreign classes.
    """
    _check_format(path)
    try:
        entries, places = _entries(path / ".metadata")
        if _COMMON not in entries and not (path / "common.pt").is_file():
            raise CheckpointError(f"{path / 'common.pt'} is missing; {RESTORE}")
        return _source(path, entries, places)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / '.metadata'} is damaged ({error!r}); {RESTORE}") from None


def _check_format(path: Path) -> None:
    config = path / "metadata.json"
    if not config.is_file():
        raise CheckpointError(
            f"{config} is missing, so this is not megatron-core's; merge reads no other program's .metadata"
        )
    try:
        found = json.loads(config.read_text("utf-8"))
        backend, version = found["sharded_backend"], found.get("sharded_backend_version", 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config} is damaged ({error!r}); {RESTORE}") from None
    if (backend, version) != ("torch_dist", 1):
        raise CheckpointError(f"{config}: the format is {backend} {version}, merge reads torch_dist 1; convert it")


class _Inert:
    """Stands in for the classes that ``.metadata`` may name: keeps their fields and runs none of their code."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Unpickler(pickle.Unpickler):
    """Admits plain values, torch.Size, dtypes and `_Inert` stand-ins; another name is refused before any import."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ADMITTED.get(module, ()):
            return _Inert
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        raise _Foreign(f"{module}.{name}")


class _Foreign(Exception):
    """A class that is not admitted."""


def _entries(path: Path) -> tuple[dict[str, Any], dict[_Key, Any]]:
    """Of each name what is stored, and where."""
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except _Foreign as error:
        raise CheckpointError(
            f"{path} holds {error}, which is not loaded: a pickle can run any code; save the checkpoint without it"
        ) from None
    except (pickle.UnpicklingError, EOFError, ImportError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error!r}); {RESTORE}") from None
    places = {}
    for index, place in found.storage_data.items():
        offset = getattr(index, "offset", None)
        places[index.fqn, None if offset is None else tuple(offset)] = place
    return found.state_dict_metadata, places


def _copied(path: Path) -> list[Path]:
    return [path / name for name in _COPIED if (path / name).is_file()]


def _source(path: Path, entries: dict[str, Any], places: dict[_Key, Any]) -> TorchDist:
    masters = {match[1]: key for key in entries if (match := _MASTER.fullmatch(key))}
    source = TorchDist(path, "a torch_dist checkpoint", {}, [path / ".metadata", *_copied(path)])
    low: list[str] = []
    high: list[str] = []
    for name, entry in entries.items():
        if _OPTIMIZER.fullmatch(name):
            continue
        if not hasattr(entry, "chunks"):
            file, offset, length = _place(path, name, places[name, None])
            source.objects[name] = Piece(file, offset, length)
            continue
        key, shape = masters.get(name, name), tuple(entry.size)
        # megatron-core before 0.14 wrote them flattened, the parallelism in their shape; some masters have 16 bits
        if entries[key].properties.state[0] != torch.float32 or tuple(entries[key].size) != shape:
            key = name
        dtype = entries[key].properties.state[0]
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path}: tensor {key} is {dtype}, which has no mean; save the weights in bf16")
        (high if key != name else low).append(name)
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entries[key].chunks]
        if not covers_once(shape, chunks):
            raise CheckpointError(
                f"{path}: the {len(chunks)} chunks of {key} {list(shape)} do not cover it once; {RESTORE}"
            )
        source.chunks[name] = tuple(_chunk(path, key, *chunk, dtype, places[key, chunk[0]]) for chunk in chunks)
        source.tensors[name] = Stored(dtype, shape, (), not dtype.is_floating_point, math.prod(shape) == 1)
    if not source.tensors:
        raise CheckpointError(f"{path} holds no weights of a model; give a checkpoint that does")
    used = {chunk.piece.path for chunks in source.chunks.values() for chunk in chunks}
    source.files += sorted(used | {piece.path for piece in source.objects.values()})
    source.layout += " with fp32 masters" if high else ""
    source.remark = _remark(source, low, high)
    return source


def _remark(source: TorchDist, low: list[str], high: list[str]) -> str:
    """Whether the mean is of masters; nothing where there are none because the model itself is in fp32."""
    rounded = [name for name in low if source.tensors[name].dtype in (torch.bfloat16, torch.float16)]
    if not rounded:
        return f"{source.path}: the mean is of the fp32 masters of {len(high)} tensors" if high else ""
    dtype = str(source.tensors[rounded[0]].dtype).removeprefix("torch.")
    return (
        f"{source.path}: no fp32 masters under the parameters' names (distrib_optim_sharding_type fully_reshardable "
        f"has them) for {len(rounded)} of {len(source.tensors)} tensors, such as {rounded[0]}: the mean is of the "
        f"model's {dtype} weights"
    )


def _place(path: Path, name: str, info: Any) -> tuple[Path, int, int]:
    file = path / info.relative_path
    if file.name != info.relative_path or file.suffix != ".distcp":
        raise CheckpointError(f"{path / '.metadata'}: {name} lies in {info.relative_path}, not in a *.distcp beside it")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"{file}: {name} is stored as {info.transform_descriptors}, which merge cannot read")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; {RESTORE}")
    if info.offset < 0 or info.length < 0 or info.offset + info.length > file.stat().st_size:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} is truncated: {size} bytes, and {name} ends at {info.offset + info.length}; {RESTORE}"
        )
    return file, info.offset, info.length


def _chunk(
    path: Path, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, info: Any
) -> Chunk:
    file, offset, length = _place(path, name, info)
    with _Slice(file, offset, length) as part:
        tensor = unpickled(cast(IO[bytes], part), f"{file}: {name}")
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != sizes or tensor.dtype != dtype:
        what = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CheckpointError(f"{file}: {name} is {what} and should be {dtype} {list(sizes)}; {RESTORE}")
    stored = stored_in(file, name, tensor, base=offset)
    return Chunk(offsets, sizes, stored.pieces[0])


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, length: int):
        self._file, self._offset, self._length = open(path, "rb"), offset, length
        self._file.seek(offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._offset + start + offset) - self._offset

    def tell(self) -> int:
        return self._file.tell() - self._offset

    def readinto(self, buffer: Any) -> int:
        left = max(0, self._length - self.tell())
        return self._file.readinto(memoryview(buffer)[:left])

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass
class _File:
    """An output file as it grows."""

    parts: list[bytes | Part] = field(default_factory=list)
    size: int = 0

    def add(self, *parts: bytes | Part) -> tuple[int, int]:
        """Where they begin, and their bytes."""
        begin = self.size
        self.parts += parts
        self.size += sum(part.nbytes if isinstance(part, Part) else len(part) for part in parts)
        return begin, self.size - begin


def plan_torch_dist(sources: list[TorchDist], dtype: torch.dtype | None) -> Plan:
    """The newest source's chunks, in files named as those that hold them there."""
    newest = sources[-1]
    cut = [Source(source.path, source.layout, {}, source.files) for source in sources]
    dtypes = {
        name: dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        for name, stored in newest.tensors.items()
    }
    files: dict[str, _File] = {}
    places: dict[_Key, tuple[str, int, int]] = {}
    for name, chunks in newest.chunks.items():
        for chunk in chunks:
            key, file = f"{name} {list(chunk.offsets)}", chunk.piece.path.name
            for source, one in zip(sources, cut, strict=True):
                one.tensors[key] = window(source.tensors[name], source.chunks[name], chunk)
            before, after = _saved(chunk.sizes, dtypes[name])
            values = Part(key, dtypes[name], math.prod(chunk.sizes))
            places[name, chunk.offsets] = file, *files.setdefault(file, _File()).add(before, values, after)
    for name, piece in newest.objects.items():
        cut[-1].tensors[name] = Stored(torch.uint8, (piece.length,), (piece,), latest=True, varies=True)
        file = piece.path.name
        places[name, None] = file, *files.setdefault(file, _File()).add(Part(name, torch.uint8, piece.length))

    def finish(out: Path) -> None:
        metadata = _metadata(newest, dtypes, places)
        atomic_write(out / ".metadata", lambda path: path.write_bytes(metadata))
        for file in _copied(newest.path):
            atomic_write(out / file.name, partial(shutil.copyfile, file))

    return Plan([Shard(name, tuple(files[name].parts)) for name in sorted(files)], cut, finish)


def _saved(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the elements of a tensor.

    The checksum of the elements, which comes after them, stays 0: torch.load does not look at it.
    """
    template = _Template()
    with torch.serialization.skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), cast(IO[bytes], template))
    before, *after = template.parts
    if template.skipped != math.prod(sizes) * dtype.itemsize or len(after) > 1:
        raise PluginError(
            f"torch {torch.__version__}: torch.save skips {template.skipped} bytes for {dtype} {list(sizes)} under "
            "skip_data; merge torch_dist checkpoints with a torch version from this package's tested range"
        )
    return bytes(before), bytes(after[0]) if after else b""


class _Template(io.RawIOBase):
    """Takes what is written, in parts between which the writer moved on."""

    def __init__(self) -> None:
        self.parts, self.skipped = [bytearray()], 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.parts[-1] += content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_CUR:
            raise io.UnsupportedOperation("only forward")
        self.parts.append(bytearray())
        self.skipped += offset
        return self.skipped + sum(map(len, self.parts))


def _metadata(
    source: TorchDist,
    dtypes: dict[str, torch.dtype],
    places: dict[_Key, tuple[str, int, int]],
) -> bytes:
    # here, because it takes 50 MB that merging other formats has no use for
    from torch.distributed.checkpoint import filesystem, metadata

    entries: dict[str, Any] = {name: metadata.BytesStorageMetadata() for name in source.objects}
    for name, chunks in source.chunks.items():
        entries[name] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtypes[name]),
            torch.Size(source.tensors[name].shape),
            [metadata.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks],
        )
    stored = {metadata.MetadataIndex(*key): filesystem._StorageInfo(*place) for key, place in places.items()}
    version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    return pickle.dumps(metadata.Metadata(entries, storage_data=stored, version=version))
