"""Torch_dist checkpoints, as megatron-core's dist_checkpointing writes them: read without running code, and written.

The output has the chunks of the newest input. What is averaged are the fp32 masters where the optimizer's state holds
them under the parameters' names, as ``optimizer.state.param.NAME`` (DistributedOptimizer, distrib_optim_sharding_type
"fully_reshardable") or ``optimizer.state.fp32_param.NAME`` (the one that is not distributed); else the model's weights.
Nothing else of the optimizer is read. What is no tensor (``_extra_state``) is the newest checkpoint's, copied unread.
"""

import io
import math
import pickle
import re
import shutil
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, filesystem, metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ds_plugin.core.json_files import read_json
from ds_plugin.weight_averaging.merge.inputs import RESTORE, Inert, Mean, Source, Stored, refuse
from ds_plugin.weight_averaging.publish.layout import DTYPE_NAMES
from ds_plugin.weight_averaging.state.reshard import damage

_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\..*")
_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?param\.(.+)")
_COPIED = ("common.pt", "metadata.json")
_COMMON = "common_state/shard_0_1"  # what newer versions of it have in place of common.pt, an object like others
#: what ``.metadata`` is made of
_RECORDS = {f"{metadata.__name__}.{name}": vars(metadata)[name] for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")}
_RECORDS |= {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_RECORDS |= {"collections.OrderedDict": OrderedDict, "torch.Size": torch.Size}
_RECORDS[f"{filesystem.__name__}._StorageInfo"] = filesystem._StorageInfo
#: what else it may name: plans, paths, layouts
_UNUSED = re.compile(r"(torch\.distributed\.checkpoint|megatron\.core\.dist_checkpointing|pathlib)\..+|.*\._get_layout")


@dataclass
class TorchDist(Source):
    """A torch_dist checkpoint, whose tensors consist of (chunk, file)."""

    found: Any = None  # what ``.metadata`` holds
    keys: dict[str, str] = field(default_factory=dict)  # under which name each that is to be written is stored
    objects: dict[str, Any] = field(default_factory=dict)  # those that are no tensors: where their bytes are

    def read(self, name: str, *where: Any) -> torch.Tensor:
        """A chunk (``metadata.ChunkStorageMetadata``) of a tensor, in memory of its own."""
        key, [chunk] = self.keys[name], where
        entry = self.found.state_dict_metadata[key]
        values = torch.empty(chunk.sizes, dtype=entry.properties.dtype)

        def part(item: ReadItem) -> torch.Tensor:
            pairs = zip(item.dest_offsets, item.lengths, strict=True)
            return values[tuple(slice(start, start + length) for start, length in pairs)]

        planner = SimpleNamespace(resolve_tensor=part, commit_tensor=lambda item, tensor: None)
        reader = FileSystemReader(self.path)
        reader.set_up_storage_reader(self.found, is_coordinator=True)
        with damage(f"{self.path}: {key}", RESTORE):
            items = create_read_items_for_chunk_list(key, entry, [chunk])
            _refuse_gaps(self.path, key, entry, [item.lengths for item in items], values.numel())
            reader.read_data(LoadPlan(items), cast(Any, planner))
        return values

    def write(self, out: Path, mean: Mean, dtype: torch.dtype | None, shard_bytes: int, workers: int) -> None:
        """The newest checkpoint's chunks, in as many files."""
        newest = mean.sources[-1]
        entries: dict[str, Any] = {}
        files: defaultdict[str, list[WriteItem]] = defaultdict(list)
        for name, place in newest.objects.items():
            entries[name] = metadata.BytesStorageMetadata()
            files[place.relative_path].append(WriteItem(metadata.MetadataIndex(name), WriteItemType.BYTE_IO))
        for name, stored in newest.tensors.items():
            properties, size = metadata.TensorProperties(stored.written(dtype)), torch.Size(stored.shape)
            entries[name] = metadata.TensorStorageMetadata(properties, size, [chunk for chunk, _ in stored.pieces])
            for chunk, file in stored.pieces:
                index, data = metadata.MetadataIndex(name, chunk.offsets), TensorWriteData(chunk, properties, size)
                files[file].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        made = torch.empty(0)

        def resolve(item: WriteItem) -> torch.Tensor | io.BytesIO:
            nonlocal made
            name = item.index.fqn
            if item.tensor_data is None:
                place = newest.objects[name]
                with open(newest.path / place.relative_path, "rb") as file:
                    file.seek(place.offset)
                    return io.BytesIO(file.read(place.length))
            made.untyped_storage().resize_(0)  # the writer keeps what it has written until the file is whole
            made = mean.of(name, item.tensor_data.chunk).to(item.tensor_data.properties.dtype)
            return made

        # nothing ahead: each mean is made when it is written
        writer, results = FileSystemWriter(out, per_thread_copy_ahead=0, sync_files=False), []
        for plan in writer.prepare_global_plan([SavePlan(files[file]) for file in sorted(files)]):
            results.append(writer.write_data(plan, cast(Any, SimpleNamespace(resolve_data=resolve))).value())
            mean.note(f"{results[-1][0].storage_data.relative_path} is written")
        writer.finish(metadata.Metadata(entries), results)
        for name in _COPIED:
            if (newest.path / name).is_file():
                shutil.copyfile(newest.path / name, out / name)


def read_torch_dist(path: Path) -> TorchDist:
    """The model's weights (or their fp32 masters) of a torch_dist folder."""
    config = read_json(path / "metadata.json", {"sharded_backend": str}, remedy=RESTORE)
    backend, version = config["sharded_backend"], config.get("sharded_backend_version", 1)
    what = f"{path / 'metadata.json'}: the format is {backend} {version}, merge reads torch_dist 1"
    refuse((backend, version) != ("torch_dist", 1), what, "convert it")

    class Unpickler(pickle.Unpickler):
        """torch's would run any code: here another name than `_RECORDS` and `_UNUSED` is refused before any import."""

        def find_class(self, module: str, name: str) -> Any:
            known = f"{module}.{name}"
            what = f"{path / '.metadata'} holds {known}, which is not loaded: a pickle can run any code"
            refuse(known not in _RECORDS and not _UNUSED.fullmatch(known), what, "save the checkpoint without it")
            return _RECORDS.get(known, Inert)

    with damage(path / ".metadata", RESTORE), open(path / ".metadata", "rb") as file:
        found = Unpickler(file).load()
        without = _COMMON not in found.state_dict_metadata and not (path / "common.pt").is_file()
        refuse(without, f"{path / 'common.pt'} is missing")
        return _source(path, found)


def _source(path: Path, found: Any) -> TorchDist:
    entries, high = found.state_dict_metadata, 0
    masters = {match[1]: key for key in entries if (match := _MASTER.fullmatch(key))}
    source = TorchDist(path, "a torch_dist checkpoint", found=found)

    def place(name: str, *offsets: Any) -> Any:
        place = found.storage_data[metadata.MetadataIndex(name, *offsets)]
        file, end = path / place.relative_path, place.offset + place.length
        what = f"{path / '.metadata'}: {name} lies in {place.relative_path}, not in a *.distcp beside it"
        refuse(file.name != place.relative_path or file.suffix != ".distcp", what)
        ways = place.transform_descriptors
        refuse(ways, f"{file}: {name} is stored as {ways}, which merge cannot read")
        size = file.stat().st_size
        refuse(place.offset < 0 or end > size, f"{file} is truncated: {size} bytes, and {name} ends at {end}")
        return place

    for name, entry in entries.items():
        if _OPTIMIZER.fullmatch(name):
            continue
        if not isinstance(entry, metadata.TensorStorageMetadata):
            source.objects[name] = place(name)
            continue
        # megatron-core before 0.14 wrote them flattened, the parallelism in their shape; some masters have 16 bits
        key, master = name, entries[masters.get(name, name)]
        if master.properties.dtype == torch.float32 and master.size == entry.size and name in masters:
            key, entry, high = masters[name], master, high + 1
        dtype = entry.properties.dtype
        none = dtype not in DTYPE_NAMES
        refuse(none, f"{path}: tensor {key} is {dtype}, which has no mean", "save the weights in bf16")
        _refuse_gaps(path, key, entry, [chunk.sizes for chunk in entry.chunks], math.prod(entry.size))
        pieces = [(chunk, place(key, chunk.offsets).relative_path) for chunk in entry.chunks]
        source.keys[name], source.tensors[name] = key, Stored(dtype, tuple(entry.size), pieces)
    refuse(not source.tensors, f"{path} holds no weights of a model", "give a checkpoint that does")
    if high:
        source.layout += " with fp32 masters"
        source.remark = f"{path}: the mean is of the fp32 masters of {high} tensors"
    rounded = [n for n, stored in source.tensors.items() if stored.dtype in (torch.bfloat16, torch.float16)]
    if rounded:  # else the model itself is in fp32, or all have masters
        dtype = str(source.tensors[rounded[0]].dtype).removeprefix("torch.")
        some = f"{len(rounded)} of {len(source.tensors)} tensors, such as {rounded[0]}"
        source.remark = (
            f"{path}: no fp32 masters under the parameters' names (distrib_optim_sharding_type fully_reshardable has "
            f"them) for {some}: the mean is of the model's {dtype} weights"
        )
    return source


def _refuse_gaps(path: Path, key: str, entry: Any, parts: list[torch.Size], numel: int) -> None:
    what = f"{path}: the {len(entry.chunks)} chunks of {key} {list(entry.size)} do not cover it once"
    refuse(sum(map(math.prod, parts)) != numel, what)
