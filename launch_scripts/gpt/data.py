"""Reads a corpus through megatron-core's GPT dataset, and gives batches that a resume continues exactly."""

import dataclasses
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ds_plugin.core.errors import ConfigError, DataError, raise_on_all_ranks
from launch_scripts.gpt.corpus import Corpus

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_SPLITS = ("training", "validation", "test")


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The part of a tokenizer that GPTDatasetConfig asks for; the text is tokenized already."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"class": "launch_scripts.gpt.data", "vocab_size": self.vocab_size, "eod": self.eod}


def build_datasets(
    corpus: Corpus,
    *,
    sequence_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    split: str = "98,2,0",
    cache_dir: Path,
) -> tuple[Dataset, Dataset | None]:
    """Return the (training, validation) GPTDatasets of a corpus; validation is None when its share of `split` is 0.

    Megatron-core decides everything: whole documents go to training, validation and test in the proportions of `split`,
    in the order they are stored; documents and samples are then shuffled with `seed`. Each dataset has at least the
    samples asked for (it goes through the text again as often as it takes) and each sample `sequence_length` tokens.

    The order depends on the number of epochs that `train_samples` needs, so a resumed run must ask for as many as the
    first one did. Indices are kept in `cache_dir`, which every rank must be able to read. With torch.distributed
    initialised every rank must call this; rank 0 builds the indices.

    Raises ConfigError (a malformed split, a number below 1) or DataError (a part shorter than one sample), on every
    rank.
    """
    for name, value in (("sequence_length", sequence_length), ("train_samples", train_samples)):
        if value < 1:
            raise ConfigError(f"{name}: {value} is not a positive number; write 1 or more")
    if valid_samples < 0:
        raise ConfigError(f"valid_samples: {valid_samples} is negative; write 0 or more")
    _check_split(split, valid_samples)

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(corpus.prefix)], None),
        split=split,
        tokenizer=_Tokens(corpus.vocab_size, corpus.eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # the model is causal: a mask of length x length would cost more than the batch
    )
    sizes = [train_samples, valid_samples, 0]
    with raise_on_all_ranks():
        bounds = _check_lengths(corpus, config)
        config.path_to_cache = str(_index_folder(corpus, config, sizes, Path(cache_dir).absolute()))
        if not dist.is_initialized() or dist.get_rank() == 0:
            _build_indices(corpus, config, bounds, sizes)
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return train, valid


def batches(
    dataset: Dataset,
    *,
    start_sample: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    loop: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's micro-batches from sample `start_sample` on.

    Item i of micro-batch m (counted from this call) on rank r is sample
    start_sample + m * dp_size * micro_batch + r * micro_batch + i, so a run that goes on from its count of consumed
    samples (all ranks together) sees what it would have seen. The stream ends before the first micro-batch that is not
    whole on every rank; with `loop` it starts over from sample 0 instead, without a gap.

    Each batch holds tokens, labels (the tokens one later) and position_ids, int64, and loss_mask, fp32, all of shape
    [micro_batch, sequence_length]. Draws nothing from torch's global random stream.

    Raises DataError when there is not one whole micro-batch to give.
    """
    length = len(dataset)  # type: ignore[arg-type]
    needed = dp_size * micro_batch + (0 if loop else start_sample)
    if length < needed:
        raise DataError(
            f"data: {dp_size} ranks x micro-batch {micro_batch} from sample {start_sample} on need {needed} samples, "
            f"the dataset has {length}; ask build_datasets for more samples, or use a smaller micro-batch"
        )
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=_Samples(length, start_sample, micro_batch, dp_rank, dp_size, loop),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator every new iterator draws a seed from the global stream: an evaluation would then
        # change the dropout of the steps after it.
        generator=torch.Generator().manual_seed(0),
    )
    return iter(loader)


class _Samples(Sampler[list[int]]):
    """The sample numbers of one rank's micro-batches: see `batches`."""

    def __init__(self, length: int, start: int, micro_batch: int, dp_rank: int, dp_size: int, loop: bool) -> None:
        self.length, self.start, self.micro_batch = length, start, micro_batch
        self.dp_rank, self.dp_size, self.loop = dp_rank, dp_size, loop

    def __iter__(self) -> Iterator[list[int]]:
        first, stride = self.start, self.dp_size * self.micro_batch
        while self.loop or first + stride <= self.length:
            mine = first + self.dp_rank * self.micro_batch
            yield [sample % self.length for sample in range(mine, mine + self.micro_batch)]
            first += stride


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return default_collate([{key: sample[key] for key in KEYS} for sample in samples])


def _check_split(split: str, valid_samples: int) -> None:
    parts = split.split(",")
    if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", part) for part in parts):
        raise ConfigError(f"split: {split!r} is not training,validation,test shares; write two or three, like '98,2,0'")
    if float(parts[0]) == 0:
        raise ConfigError(f"split: {split!r} leaves nothing for training; make the first share positive, like '98,2,0'")
    if valid_samples and float(parts[1]) == 0:
        raise ConfigError(
            f"split: {split!r} leaves nothing for the {valid_samples} validation samples; make the second share "
            f"positive, like '98,2,0', or ask for 0"
        )


def _check_lengths(corpus: Corpus, config: Any) -> list[tuple[int, int] | None]:
    """First and last document of each split. A split shorter than a sample would keep megatron-core counting epochs."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if not IndexedDataset.exists(str(corpus.prefix)):
        raise DataError(
            f"data: '{corpus.prefix}.bin' and '.idx' are not both there; prepare the data in a folder that every node "
            f"can read"
        )
    # Keep the dataset by name: its arrays are views into a memory map that goes with it, and reading them then crashes.
    dataset = IndexedDataset(str(corpus.prefix))
    lengths = dataset.sequence_lengths
    bounds: list[tuple[int, int] | None] = []
    for name, share in zip(_SPLITS, config.split_matrix, strict=True):
        if share is None:
            bounds.append(None)
            continue
        first, last = (int(round(edge * float(len(lengths)))) for edge in share)  # the builder's rounding
        tokens = int(lengths[first:last].sum(dtype=np.int64))
        if tokens < config.sequence_length + 1:
            raise DataError(
                f"data: the {name} part has {tokens} tokens in {last - first} of {len(lengths)} documents (split "
                f"{config.split!r} of {corpus.source!r}), one sample needs {config.sequence_length + 1} (sequence "
                f"length {config.sequence_length} and one to predict); use a shorter sequence length, give that part a "
                f"larger share of the split (or 0), or use more text"
            )
        bounds.append((first, last))
    return bounds


def _index_folder(corpus: Corpus, config: Any, sizes: list[int], cache_dir: Path) -> Path:
    """A folder for exactly these indices. They follow from the .idx content, which megatron-core's own name leaves out:
    a dataset replaced under the same name would get the old one's samples."""
    digest = hashlib.blake2b(digest_size=8)
    with open(f"{corpus.prefix}.idx", "rb") as index:
        while block := index.read(1 << 24):
            digest.update(block)
    marks = (str(corpus.prefix), config.random_seed, config.sequence_length, config.split, sizes, config.tokenizer)
    digest.update(repr(marks).encode())
    return cache_dir / f"samples-{digest.hexdigest()}"


def _build_indices(corpus: Corpus, config: Any, bounds: list[tuple[int, int] | None], sizes: list[int]) -> None:
    """Fill the index folder, all at once.

    The builder below would build them too, but it writes in place, so that an interrupted start leaves files the next
    one trips over, and a full disk on rank 0 would leave the other ranks in its barrier.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    folder = Path(config.path_to_cache)
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        beside = dataclasses.replace(config, path_to_cache=str(temporary))
        low_level = GPTDataset.build_low_level_dataset(str(corpus.prefix), beside)
        for part, edges, size in zip(Split, bounds, sizes, strict=True):
            if edges is not None:
                GPTDataset(low_level, str(corpus.prefix), np.arange(*edges, dtype=np.int32), size, part, beside)
        os.replace(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was first
            raise DataError(
                f"data: cannot write the sample indices to '{folder}' ({error}); free some space or give a cache "
                f"folder that can be written"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
