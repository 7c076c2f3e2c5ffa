"""A Megatron indexed dataset (PREFIX.bin, PREFIX.idx) and what is written about it: whether they fit each other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from pydantic import Field

from ds_plugin.core.errors import DataError
from ds_plugin.core.json_files import read_json
from launch_scripts.gpt.tokens import LARGEST_VOCABULARY

#: tokens that `count_tokens` reads: of a larger file so many, in blocks of so many
COUNT_AT_MOST, COUNT_BLOCK = 1 << 26, 1 << 20


class Description(pydantic.BaseModel):
    """What a PREFIX.json of ours says; see `corpus.Corpus` for the fields."""

    model_config = pydantic.ConfigDict(strict=True)

    vocab_size: int = Field(ge=1, le=LARGEST_VOCABULARY)
    eod: int = Field(ge=0)
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    unigram_entropy: float = Field(ge=0, allow_inf_nan=False)
    text_bytes: int = Field(0, ge=0)
    left_out: dict[str, int] = {}


def read_description(path: Path) -> Description:
    """Raises DataError: it cannot be read, or is not a description that this program wrote."""
    found: Description = read_json(path, Description, error=DataError, remedy="delete it and start again")
    return found


def is_description(path: Path) -> bool:
    """Whether a .json beside somebody's dataset is meant as a description: any file may have that name."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return path.is_file()  # whatever it was, it is damaged
    return isinstance(content, dict) and set(Description.model_fields) <= set(content)


def check_description(path: Path, found: Description, dataset: Any) -> None:
    """Raises DataError: the description is not of this dataset."""
    tokens, documents = int(dataset.sequence_lengths.sum(dtype=np.int64)), len(dataset.document_indices) - 1
    if (found.tokens, found.documents) != (tokens, documents) or found.eod >= found.vocab_size:
        raise DataError(
            f"data: '{path}' says {found.tokens} tokens in {found.documents} documents, with {found.eod} at the end of "
            f"each and {found.vocab_size} in all; the index beside it has {tokens} in {documents}; delete the .json, "
            "or put the files together that were made together"
        )


def open_dataset(prefix: Path, remedy: str = "copy or make the pair again") -> Any:
    """The IndexedDataset at `prefix`, after a check that both files are what they should be.

    Raises DataError: the index is damaged, points outside the .bin file, or holds no tokens.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    size = prefix.with_name(prefix.name + ".bin").stat().st_size
    if size == 0:
        raise DataError(f"data: '{prefix}.bin' is empty; {remedy}")
    try:
        dataset = IndexedDataset(str(prefix))
    except Exception as error:  # assertions, struct errors and mmap errors, depending on where the damage is
        raise DataError(f"data: '{prefix}.idx' is not a Megatron index ({error!r}); {remedy}") from error
    lengths, pointers, ends = dataset.sequence_lengths, dataset.index.sequence_pointers, dataset.document_indices
    negative = min(int(values.min(initial=0)) for values in (lengths, pointers, ends))
    if negative < 0 or (np.diff(ends) < 0).any():
        what = f"a length or position of {negative}" if negative < 0 else "documents that are not in order"
        raise DataError(f"data: '{prefix}.idx' holds {what}; {remedy}")
    itemsize = int(dataset.index.dtype_size)
    needs = int((pointers + lengths * np.int64(itemsize)).max(initial=0))
    if needs > size or pointers.max(initial=0) > size:  # a position near 2**63 would overflow the sum
        needs = max(needs, int(pointers.max(initial=0)))
        raise DataError(f"data: '{prefix}.bin' has {size} bytes, its index needs at least {needs}; {remedy}")
    if needs == 0 or not lengths.any() or len(ends) < 2:
        raise DataError(f"data: '{prefix}.idx' holds no tokens; {remedy}")
    return dataset


def count_tokens(prefix: Path, dtype: type[np.number], tokens: int) -> tuple[np.ndarray, int]:
    """Count tokens of the .bin file: all, or evenly strided blocks of a large one. Returns (counts, how many).

    Raises DataError: they are no token numbers.
    """
    stored = np.memmap(prefix.with_name(prefix.name + ".bin"), dtype=dtype, mode="r")[:tokens]
    if tokens <= COUNT_AT_MOST:
        starts = np.arange(0, tokens, COUNT_BLOCK)
    else:
        starts = np.linspace(0, tokens - COUNT_BLOCK, COUNT_AT_MOST // COUNT_BLOCK).astype(np.int64)
    counts = np.zeros(0, dtype=np.int64)
    for start in starts:
        block = stored[start : start + COUNT_BLOCK]
        low, high = block.min(), block.max()
        if not np.issubdtype(dtype, np.integer) or low < 0 or high >= LARGEST_VOCABULARY:
            raise DataError(
                f"data: '{prefix}.bin' does not hold token numbers but {np.dtype(dtype).name} from {low} to {high}; "
                "make it again"
            )
        more = np.bincount(block, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return counts, int(counts.sum())
