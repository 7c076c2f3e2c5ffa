"""Text for the sweeps: bytes as they lie on disk, or the tokens of a Megatron dataset."""

import importlib
import inspect
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import PositiveInt

from ds_plugin.core.errors import DataError
from ds_plugin.core.json_files import read_json

STDLIB = "stdlib"
_RECORDS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")
#: of the standard library; long enough for a handful of steps
_MODULES = ("argparse", "ast", "inspect", "subprocess", "tarfile", "typing", "zipfile")


@dataclass(frozen=True)
class Text:
    """Files of tokens one after the other, all of one integer type. ``source``: how the user named them."""

    source: str
    files: tuple[Path, ...]
    dtype: str
    vocab: int
    tokens: int

    def read(self) -> torch.Tensor:
        """All tokens, [tokens], an integer type; a single file is read from disk as its tokens are used."""
        if len(self.files) == 1:
            return torch.from_numpy(np.memmap(self.files[0], dtype=self.dtype, mode="c"))
        return torch.from_numpy(np.concatenate([np.fromfile(path, self.dtype) for path in self.files]))


def modules() -> Text:
    """Text that every Python has and that needs no preparation."""
    files = tuple(Path(inspect.getfile(importlib.import_module(name))) for name in _MODULES)
    return Text("modules", files, "uint8", 256, sum(path.stat().st_size for path in files))


def find(source: str, least: int) -> Text:
    """``source``: "stdlib" (the modules of the Python standard library), a text file, a folder of them, or the prefix
    of a Megatron dataset, with its vocabulary's size in PREFIX.json, as ``launch_scripts/pretrain_gpt.py`` leaves it.

    Raises:
        DataError: it does not hold ``least`` tokens, or holds records, whose syntax is no text; or the dataset does not
            say its vocabulary's size.
    """
    if not source.strip():
        raise DataError(f"--data: {source!r} names nothing; give a text file or folder, or {STDLIB!r}")
    dtype, vocab, root = np.dtype("uint8"), 256, Path(source)
    if Path(f"{source}.idx").is_file() and Path(f"{source}.bin").is_file():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        wanted, remedy = {"vocab_size": PositiveInt}, 'write {"vocab_size": N} there'
        vocab = read_json(Path(f"{source}.json"), wanted, error=DataError, remedy=remedy)["vocab_size"]
        files, dtype = [Path(f"{source}.bin")], np.dtype(IndexedDataset(source).index.dtype)
    elif source == STDLIB:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    else:
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
    files = [path for path in files if path.is_file() and path.stat().st_size]
    tokens = sum(path.stat().st_size for path in files) // dtype.itemsize
    if tokens < least:
        raise DataError(
            f"--data: {source!r} holds {tokens} tokens of text where {least} are needed; give a text file, a folder of "
            f"text files, the prefix of a Megatron dataset (PREFIX.bin with PREFIX.idx), or {STDLIB!r}"
        )
    if records := [path for path in files if path.name.lower().endswith(_RECORDS)]:
        raise DataError(
            f"--data: {str(records[0])!r} holds records, not plain text; give the prefix of the Megatron dataset that "
            "launch_scripts/pretrain_gpt.py makes of them in its --cache folder"
        )
    return Text(source, tuple(files), dtype.name, vocab, tokens)
