"""Text for the sweeps: bytes as they lie on disk, or the tokens of a Megatron dataset."""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ds_plugin.core.errors import DataError

STDLIB = "stdlib"


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


def find(source: str) -> Text:
    """``source``: "stdlib" (the modules of the Python standard library), a text file, a folder of them, or the prefix
    of a Megatron dataset, with its vocabulary's size in PREFIX.json, as ``launch_scripts/pretrain_gpt.py`` leaves it.

    Raises:
        DataError: there is nothing of that name, it is empty, or the dataset does not say its vocabulary's size.
    """
    if Path(f"{source}.idx").is_file() and Path(f"{source}.bin").is_file():
        return _dataset(Path(source))
    root = Path(sysconfig.get_path("stdlib")) if source == STDLIB else Path(source)
    if root.is_dir():
        pattern = "*.py" if source == STDLIB else "*"
        files = [p for p in sorted(root.glob(pattern) if source == STDLIB else root.rglob(pattern)) if p.is_file()]
    else:
        files = [root] if root.is_file() else []
    files = [path for path in files if path.stat().st_size]
    if not files:
        raise DataError(
            f"--data: {source!r} holds no text; give a text file, a folder of text files, the prefix of a Megatron "
            f"dataset (PREFIX.bin with PREFIX.idx), or {STDLIB!r}"
        )
    return Text(source, tuple(files), "uint8", 256, sum(path.stat().st_size for path in files))


def _dataset(prefix: Path) -> Text:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        vocab = int(json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'--data: {prefix}.json does not say the size of the vocabulary ({error}); write {{"vocab_size": N}} there'
        ) from None
    dtype = np.dtype(IndexedDataset(str(prefix)).index.dtype)
    path = Path(f"{prefix}.bin")
    return Text(str(prefix), (path,), dtype.name, vocab, path.stat().st_size // dtype.itemsize)
