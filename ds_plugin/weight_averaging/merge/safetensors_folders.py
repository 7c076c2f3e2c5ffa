"""Safetensors folders, read and written: Hugging Face's layout, a header in each file and an index beside them."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_plugin.core.errors import CheckpointError
from ds_plugin.core.files import atomic_write
from ds_plugin.weight_averaging.merge.inputs import (
    DEQUANTIZE,
    DTYPE_NAMES,
    DTYPES,
    RESTORE,
    Piece,
    Source,
    Stored,
    without_wrappers,
)
from ds_plugin.weight_averaging.merge.output import RECORD, Part, Plan, Shard

_COPIED_BYTES = 100 * 10**6
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf")
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_STATE = (RECORD, "latest", "latest_universal", "trainer_state.json", "zero_to_fp32.py", "ds_plugin.json")


@dataclass
class Safetensors(Source):
    """A safetensors folder. ``headers``: of each file, its header as it stands. ``renamed``: it has wrappers' names."""

    headers: dict[str, bytes] = field(default_factory=dict)
    index: Path | None = None
    renamed: bool = False


def read_safetensors(path: Path, files: list[Path], index: Path | None) -> Safetensors:
    """The tensors of ``files`` in ``path``, or of those that ``index`` names.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or does not hold what the index says.
    """
    beside = path if path.is_dir() else None
    source = Safetensors(path, "a safetensors checkpoint", {}, files, beside=beside, index=index)
    wanted: Mapping[str, str] = {}
    if index is not None:
        try:
            wanted = without_wrappers(json.loads(index.read_text("utf-8"))["weight_map"], index)
            source.files = [path / name for name in sorted(set(wanted.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); {RESTORE}") from None
    for file in source.files:
        source.headers[file.name], raw = _read_header(file)
        found = without_wrappers(raw, file)
        source.renamed |= found.keys() != raw.keys()
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
                raise CheckpointError(f"{path}: tensor {name} is {entry['dtype']}, which has no mean; {DEQUANTIZE}")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, stop = (8 + count + offset for offset in entry["data_offsets"])
            numel = math.prod(shape)
            if start != end or stop - start != numel * dtype.itemsize:
                raise ValueError(f"tensor {name} lies at bytes {start} to {stop}")
            tensors[name] = Stored(dtype, shape, (Piece(path, start, numel),), not dtype.is_floating_point, numel == 1)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {RESTORE}") from None
    if size != end:
        what = "truncated" if size < end else "damaged"
        raise CheckpointError(f"{path} is {what}: {size} bytes where its header asks for {end}; {RESTORE}")
    return length + header, tensors


def plan_same(sources: list[Safetensors], dtype: torch.dtype | None) -> Plan:
    """The files of the first source under their names, with its small files and its index."""
    first = sources[0]
    by_file: dict[str, list[str]] = {file.name: [] for file in first.files}
    for name, stored in first.tensors.items():
        by_file[stored.pieces[0].path.name].append(name)
    shards = []
    for file, names in by_file.items():
        parts = [Part(n, _written(first.tensors[n], dtype, None), first.tensors[n].numel) for n in names]
        header = first.headers[file]
        if dtype is None and not first.renamed:
            shards.append(Shard(file, (header, *parts)))
        else:
            shards.append(_shard(file, parts, first, json.loads(header[8:]).get("__metadata__")))

    def finish(out: Path) -> None:
        _copy_others(first.beside, out, dtype)
        if first.index is not None:
            index = first.index.read_bytes()
            same = dtype is None and not first.renamed
            _write(out / first.index.name, index if same else _index(shards, "", json.loads(index)))

    return Plan(shards, list(sources), finish)


def plan_new(sources: list[Source], dtype: torch.dtype | None, shard_bytes: int) -> Plan:
    """New files of ``shard_bytes`` (one tensor) at most for sources that are not safetensors, in fp32 by default.

    Each of the source's folders becomes one, whose files say in their metadata which tensor-parallel rank's they are.
    """
    first = sources[0]
    by_folder: dict[str, list[Shard]] = {}
    for rank, (folder, names) in enumerate(first.folders.items()):
        groups: list[list[Part]] = [[]]
        for name in names:
            stored = first.tensors[folder + name]
            part = Part(folder + name, _written(stored, dtype, torch.float32), stored.numel)
            if groups[-1] and sum(p.nbytes for p in groups[-1]) + part.nbytes > shard_bytes:
                groups.append([])
            groups[-1].append(part)
        files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        if len(groups) == 1:
            files = ["model.safetensors"]
        metadata = {"format": "pt"}
        if folder:
            metadata |= {"tensor_parallel_rank": str(rank), "tensor_parallel_size": str(len(first.folders))}
        by_folder[folder] = [
            _shard(folder + file, parts, first, metadata, folder) for file, parts in zip(files, groups, strict=True)
        ]

    def finish(out: Path) -> None:
        _copy_others(first.beside, out, dtype or torch.float32)
        for folder, shards in by_folder.items():
            if len(shards) > 1:
                _write(out / folder / _INDEX, _index(shards, folder, {}))

    return Plan([shard for shards in by_folder.values() for shard in shards], sources, finish)


def _written(stored: Stored, dtype: torch.dtype | None, default: torch.dtype | None) -> torch.dtype:
    return (dtype or default or stored.dtype) if stored.dtype.is_floating_point else stored.dtype


def _shard(name: str, parts: list[Part], source: Source, metadata: Any, folder: str = "") -> Shard:
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)  # so that each tensor begins at a multiple of its size
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for part in parts:
        place = [offset, offset + part.nbytes]
        entry = {"dtype": DTYPE_NAMES[part.dtype], "shape": source.tensors[part.tensor].shape, "data_offsets": place}
        header[part.tensor.removeprefix(folder)] = entry
        offset = place[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Shard(name, (len(text).to_bytes(8, "little") + text, *parts))


def is_model_folder(path: Path) -> bool:
    """Whether a model of transformers' lies here: its configuration says which."""
    return "model_type" in _config(path)


def refuse_quantized(folder: Path | None) -> None:
    """Raise CheckpointError where the configuration says that the weights are packed: scales alone have no meaning."""
    config = _config(folder) if folder is not None else {}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if found := part.get("quantization_config"):
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise CheckpointError(
                f"{folder}/{_CONFIG} has a quantization_config ({method}): packed weights have no mean; {DEQUANTIZE}"
            )


def _config(folder: Path) -> dict[str, Any]:
    """``config.json``; empty where there is none."""
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {RESTORE}") from None
    return found if isinstance(found, dict) else {}


def _copy_others(source: Path | None, out: Path, dtype: torch.dtype | None) -> None:
    """Configuration and tokenizer, which a safetensors folder needs to be loaded; never weights or training state.

    ``dtype``: that of the weights, for the configuration to say; None: its own.
    """
    for path in sorted(source.iterdir()) if source is not None else []:
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.name in _STATE or path.name.startswith(".") or weights or not path.is_file():
            continue
        if path.name == _CONFIG and dtype is not None:
            config = _with_dtype(_config(path.parent), str(dtype).removeprefix("torch."))
            _write(out / _CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        elif path.stat().st_size <= _COPIED_BYTES:
            atomic_write(out / path.name, partial(shutil.copyfile, path))


def _with_dtype(config: Any, dtype: str) -> Any:
    """``dtype`` wherever the configuration, or one within it, names one; where none does, readers ask the weights."""
    if not isinstance(config, dict):
        return config
    named = {key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
    return {key: dtype if key in named else _with_dtype(value, dtype) for key, value in config.items()}


def _index(shards: list[Shard], folder: str, before: dict[str, Any]) -> bytes:
    parts = [(shard, part) for shard in shards for part in shard.tensors]
    metadata = {**before.get("metadata", {}), "total_size": sum(part.nbytes for _, part in parts)}
    places = {part.tensor.removeprefix(folder): shard.name.removeprefix(folder) for shard, part in parts}
    return (
        json.dumps({**before, "metadata": metadata, "weight_map": places}, indent=2, sort_keys=True) + "\n"
    ).encode()


def _write(path: Path, content: bytes) -> None:
    atomic_write(path, lambda temporary: temporary.write_bytes(content))
