"""Safetensors folders, read and written: Hugging Face's layout, and what lies beside the weights."""

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import safe_open

from ds_plugin.core.json_files import parse_json, read_json
from ds_plugin.weight_averaging.merge import inputs
from ds_plugin.weight_averaging.merge.inputs import (
    DTYPES,
    RESTORE,
    Mean,
    Piece,
    Stored,
    damaged,
    refuse,
    without_wrappers,
)
from ds_plugin.weight_averaging.publish.layout import Entry, File, index_of, plan_file, plan_files

_COPIED_BYTES = 100 * 10**6
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf")
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
#: of an index; each file lies beside it
_INDEXED = {"weight_map": dict[str, Annotated[str, Field(pattern=r"^[^/\x00]+$")]]}
_STATE = ("latest", "latest_universal", "trainer_state.json", "zero_to_fp32.py", "ds_plugin.json")


@dataclass
class Source(inputs.Source):
    """A checkpoint whose mean is written as safetensors.

    ``folders``: the tensors of each folder, by the prefix that tells them apart in ``tensors``: "" alone, or
    "tp0-of-2/" and so on. Then the files say in their metadata which tensor-parallel rank's they are. ``files``: the
    metadata of each file of "", where these shall be its files. ``index``: what is to say which holds what.
    """

    folders: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, dict[str, str] | None] = field(default_factory=dict)
    index: str = ""

    def write(self, out: Path, mean: Mean, dtype: torch.dtype | None, shard_bytes: int, workers: int) -> None:
        """The source's own files, else new ones of ``shard_bytes`` (one tensor) at most."""
        for rank, (folder, names) in enumerate(self.folders.items()):
            stored = [(name, self.tensors[folder + name]) for name in names]
            entries = {name: Entry(name, one.written(dtype), one.shape) for name, one in stored}
            if self.files:
                held: dict[str, list[Entry]] = {file: [] for file in self.files}
                for name, one in stored:
                    held[one.pieces[0].path.name].append(entries[name])
                files = [plan_file(file, held[file], metadata) for file, metadata in self.files.items()]
            else:
                told = {"tensor_parallel_rank": str(rank), "tensor_parallel_size": str(len(self.folders))}
                files = plan_files(list(entries.values()), shard_bytes, told if folder else {})
            (out / folder).mkdir(exist_ok=True)
            _write_files(out, folder, files, entries, mean, workers)
            if self.index or (len(files) > 1 and not self.files):
                (out / folder / (self.index or _INDEX)).write_text(index_of(files), "utf-8")
        if self.beside is not None:
            _copy_others(self.beside, out, dtype)


def _write_files(
    out: Path, folder: str, files: Sequence[File], entries: dict[str, Entry], mean: Mean, workers: int
) -> None:
    """In threads: reading, writing and torch's arithmetic leave Python's lock; processes would each hold torch."""
    for file in files:
        with (
            open(out / folder / file.name, "wb", buffering=0) as opened,
            ThreadPoolExecutor(workers, "merge", torch.set_num_threads, (1,)) as pool,
        ):
            opened.write(file.header)

            def piece(part: tuple[str, int, int], target: int = opened.fileno(), file: File = file) -> None:
                name, start, count = part
                values = mean.of(folder + name, start, count).to(entries[name].dtype)
                view, begin = values.view(torch.uint8).numpy().data, file.offsets[name] + start * values.itemsize
                while view:
                    written = os.pwrite(target, view, begin)
                    view, begin = view[written:], begin + written

            sizes = {name: entries[name].numel for name in file.offsets}
            step = inputs.CHUNK
            parts = [(n, start, min(step, size - start)) for n, size in sizes.items() for start in range(0, size, step)]
            for _ in pool.map(piece, parts):  # the first failure ends all
                pass
        mean.note(f"{folder}{file.name} is written, {file.size / 1e6:,.1f} MB")


def read_safetensors(path: Path, files: list[Path], index: Path | None) -> Source:
    """The tensors of ``files`` in ``path``, or of those that ``index`` names.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or does not hold what the index says.
    """
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
    """The metadata, and the tensors.

    safetensors itself refuses gaps, overlaps, shapes that do not fit and files of another size. Of names that stand
    twice it takes the last.
    """
    tensors = {}
    with damaged(path), open(path, "rb") as file, safe_open(path, "pt"):
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


def is_model_folder(path: Path) -> bool:
    """Whether a model of transformers' lies here: its configuration says which."""
    return "model_type" in _config(path)


def refuse_quantized(folder: Path) -> None:
    """Raise CheckpointError where the configuration says that the weights are packed: scales alone have no meaning."""
    config = _config(folder)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config")
        method = found.get("quant_method") if isinstance(found, dict) else found
        what = f"{folder}/{_CONFIG} has a quantization_config ({method}): packed weights have no mean"
        refuse(found, what, inputs.DEQUANTIZE)


def _config(folder: Path) -> dict[str, Any]:
    """``config.json``; empty where there is none."""
    path = folder / _CONFIG
    return read_json(path, remedy=RESTORE) if path.is_file() else {}


def _copy_others(folder: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Configuration and tokenizer, which a safetensors folder needs to be loaded; never weights or training state.

    ``dtype``: that of the weights, for the configuration to say; None: its own.
    """
    for path in sorted(folder.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.name in _STATE or path.name.startswith(".") or weights or not path.is_file():
            continue
        if path.name == _CONFIG and dtype is not None:
            config = _with_dtype(_config(folder), str(dtype).removeprefix("torch."))
            (out / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        elif path.stat().st_size <= _COPIED_BYTES:
            shutil.copyfile(path, out / path.name)


def _with_dtype(config: Any, dtype: str) -> Any:
    """``dtype`` wherever the configuration, or one within it, names one; where none does, readers ask the weights."""
    if not isinstance(config, dict):
        return config
    named = {key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
    return {key: dtype if key in named else _with_dtype(value, dtype) for key, value in config.items()}
