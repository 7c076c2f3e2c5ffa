"""Safetensors folders, read and written: Hugging Face's layout, and what lies beside the weights."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import safe_open

from ds_plugin.core.json_files import parse_json, read_json
from ds_plugin.weight_averaging.merge import inputs
from ds_plugin.weight_averaging.merge.inputs import RESTORE, Mean, Piece, Stored, refuse, without_wrappers
from ds_plugin.weight_averaging.publish.layout import DTYPES, Entry, File, index_of, plan_file, plan_files
from ds_plugin.weight_averaging.state.reshard import damage

_COPIED_BYTES = 100 * 10**6
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf")
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
#: of an index; each file lies beside it
_INDEXED = {"weight_map": dict[str, Annotated[str, Field(pattern=r"^[^/\x00]+$")]]}
_STATE = ("latest", "latest_universal", "trainer_state.json", "zero_to_fp32.py", "ds_plugin.json")


@dataclass
class Source(inputs.Source):
    """A checkpoint whose mean is written as safetensors."""

    #: the tensors of each folder, by the prefix that tells them apart in ``tensors``: "" alone, or "tp0-of-2/" and so
    #: on; then the files' metadata say which tensor-parallel rank's they are
    folders: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, dict[str, str] | None] = field(default_factory=dict)  # metadata; empty: new files are made
    index: str = ""  # the file that is to say which holds what

    def write(self, out: Path, mean: Mean, dtype: torch.dtype | None, shard_bytes: int, workers: int) -> None:
        """The source's own files, else new ones of ``shard_bytes`` (one tensor) at most."""
        for rank, (folder, names) in enumerate(self.folders.items()):
            held: dict[str, list[Entry]] = {file: [] for file in self.files}
            for name in names:
                stored = self.tensors[folder + name]
                own = stored.pieces[0].path.name if self.files else ""
                held.setdefault(own, []).append(Entry(name, stored.written(dtype), stored.shape))
            if self.files:
                files = [plan_file(file, held[file], metadata) for file, metadata in self.files.items()]
            else:
                told = {"tensor_parallel_rank": str(rank), "tensor_parallel_size": str(len(self.folders))}
                files = plan_files(held.get("", []), shard_bytes, told if folder else {})
            (out / folder).mkdir(exist_ok=True)
            entries = {entry.name: entry for part in held.values() for entry in part}
            for file in files:
                _write_file(out, folder, file, entries, mean, workers)
            if self.index or (len(files) > 1 and not self.files):
                (out / folder / (self.index or _INDEX)).write_text(index_of(files), "utf-8")
        if self.beside is not None:
            _copy_others(self.beside, out, dtype)


def _write_file(out: Path, folder: str, file: File, entries: dict[str, Entry], mean: Mean, workers: int) -> None:
    """In threads: reading, writing and torch's arithmetic leave Python's lock; processes would each hold torch."""
    step = inputs.CHUNK
    parts = [(name, start) for name in file.offsets for start in range(0, entries[name].numel, step)]
    with (
        open(out / folder / file.name, "wb", buffering=0) as opened,
        ThreadPoolExecutor(workers, "merge", torch.set_num_threads, (1,)) as pool,
    ):
        opened.write(file.header)

        def write(part: tuple[str, int]) -> None:
            name, start = part
            values = mean.of(folder + name, start, min(step, entries[name].numel - start)).to(entries[name].dtype)
            view, begin = values.view(torch.uint8).numpy().data, file.offsets[name] + start * values.itemsize
            while view:
                written = os.pwrite(opened.fileno(), view, begin)
                view, begin = view[written:], begin + written

        for _ in pool.map(write, parts):  # the first failure ends all
            pass
    mean.note(f"{folder}{file.name} is written, {file.size / 1e6:,.1f} MB")


def read_safetensors(path: Path, files: list[Path], index: Path | None) -> Source:
    """The tensors of ``files`` in ``path``, or of those that ``index`` names."""
    source = Source(path, "a safetensors checkpoint", beside=path if path.is_dir() else None)
    wanted: dict[str, str] = {}
    if index is not None:
        source.index = index.name
        wanted = without_wrappers(read_json(index, _INDEXED, remedy=RESTORE)["weight_map"], index)
        files = [path / name for name in sorted(set(wanted.values()))]
    for file in files:
        source.files[file.name], found = _read_header(file)
        for name, stored in without_wrappers(found, file).items():
            what = f"{file} holds tensor {name}, which"
            refuse(name in source.tensors, f"{what} another file beside it holds too", "remove one")
            refuse(index and wanted.get(name) != file.name, f"{what} {source.index} does not place there")
            source.tensors[name] = stored
    for name in wanted:
        refuse(name not in source.tensors, f"{path / wanted[name]} lacks tensor {name}, which {index} places there")
    source.folders = {"": list(source.tensors)}
    return source


def _read_header(path: Path) -> tuple[dict[str, str] | None, dict[str, Stored]]:
    """The metadata, and the tensors. safetensors itself refuses all that is wrong but names that stand twice."""
    tensors = {}
    with damage(path, RESTORE), open(path, "rb") as file, safe_open(path, "pt"):
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length), path, remedy=RESTORE)
        metadata = header.pop("__metadata__", None)
        for name, entry in header.items():
            what = f"{path}: tensor {name} is {entry['dtype']}, which has no mean"
            refuse(entry["dtype"] not in DTYPES, what, inputs.DEQUANTIZE)
            shape = torch.Size(entry["shape"])
            piece = Piece(path, 8 + length + entry["data_offsets"][0], shape.numel())
            tensors[name] = Stored(DTYPES[entry["dtype"]], shape, [piece])
        return metadata, tensors


def refuse_quantized(folder: Path) -> None:
    """Raise CheckpointError where the configuration says that the weights are packed: scales alone have no meaning."""
    config = config_of(folder)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config")
        method = found.get("quant_method") if isinstance(found, dict) else found
        what = f"{folder}/{_CONFIG} has a quantization_config ({method}): packed weights have no mean"
        refuse(found, what, inputs.DEQUANTIZE)


def config_of(folder: Path) -> dict[str, Any]:
    """``config.json``; empty where there is none."""
    path = folder / _CONFIG
    return read_json(path, remedy=RESTORE) if path.is_file() else {}


def _copy_others(folder: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Configuration and tokenizer, never weights or training state. ``dtype``: for the configuration to say."""
    for path in sorted(folder.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.name in _STATE or path.name.startswith(".") or weights or not path.is_file():
            continue
        if path.name == _CONFIG and dtype is not None:
            config = _with_dtype(config_of(folder), str(dtype).removeprefix("torch."))
            (out / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        elif path.stat().st_size <= _COPIED_BYTES:
            shutil.copyfile(path, out / path.name)


def _with_dtype(config: Any, dtype: str) -> Any:
    """``dtype`` wherever the configuration, or one within it, names one; where none does, readers ask the weights."""
    if not isinstance(config, dict):
        return config
    named = {key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
    return {key: dtype if key in named else _with_dtype(value, dtype) for key, value in config.items()}
