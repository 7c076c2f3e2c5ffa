"""Turns text into a Megatron indexed dataset (PREFIX.bin, PREFIX.idx), once, and describes it in PREFIX.json."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ds_plugin.core.errors import DataError, raise_on_all_ranks
from ds_plugin.core.files import atomic_path, atomic_write, read_json
from launch_scripts.gpt.text import STDLIB, TextFile, cut, document_limit, find_text_files, read_text
from launch_scripts.gpt.tokens import Encoder, load_encoder

Progress = Callable[[int, int], None]

_FORMAT = 1  # part of every fingerprint: raise it when the same text would give another dataset
_BATCH_BYTES = 1 << 22
_COUNT_AT_MOST = 1 << 26
_COUNT_BLOCK = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """A dataset that is ready to train on.

    `prefix` is absolute, without a suffix. `unigram_entropy` is in nats per token, end-of-document tokens included: the
    loss of a model that knows how frequent each token is and nothing else. `text_bytes` is the text's size in UTF-8 and
    `skipped` the number of files left out (empty, not UTF-8, or with a NUL); both are 0 for a dataset found as
    .bin/.idx.
    """

    prefix: Path
    vocab_size: int
    eod: int
    tokens: int
    documents: int
    unigram_entropy: float
    source: str
    text_bytes: int = 0
    skipped: int = 0


def prepare(source: str, *, tokenizer: Path | None, cache_dir: Path, progress: Progress | None = None) -> Corpus:
    """Return the dataset for `source`, made in `cache_dir` unless it is there already.

    `source` is "stdlib" (the Python standard library's own text), a text file, a folder of text files, or the prefix of
    an existing Megatron dataset (with or without .bin or .idx), which is used as it is. `tokenizer` is a Hugging Face
    tokenizers file, or None for bytes. `progress(done, total)` is called with bytes of text.

    The file names in `cache_dir` carry a fingerprint of the files' names, sizes and times and of the tokenizer, so a
    second start re-uses them and changed text makes a new set. An interrupted preparation leaves nothing behind.

    With torch.distributed initialised every rank must call this: rank 0 does the work, in a folder every rank can read.

    Raises DataError (nothing at the path, no text in it, half a dataset, a damaged one) or ConfigError (tokenizer), on
    every rank.
    """
    corpus: Corpus | None = None
    distributed = dist.is_available() and dist.is_initialized()
    with raise_on_all_ranks():
        if not distributed or dist.get_rank() == 0:
            corpus = _prepare(source, tokenizer, Path(cache_dir).absolute(), progress or (lambda done, total: None))
    if distributed:
        box: list[Any] = [corpus]
        dist.broadcast_object_list(box, src=0)
        corpus = box[0]
    assert corpus is not None
    return corpus


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution given by non-negative `counts`, shape [vocabulary]."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _prepare(source: str, tokenizer: Path | None, cache_dir: Path, progress: Progress) -> Corpus:
    prefix = _existing_prefix(source)
    cache_dir.mkdir(parents=True, exist_ok=True)
    if prefix is not None:
        return _adopt(prefix, source, tokenizer, cache_dir)
    files = find_text_files(source)
    encoder = load_encoder(tokenizer)
    listing = [[file.name, file.size, file.modified_ns] for file in files]
    label = STDLIB if source == STDLIB else Path(source).absolute().stem
    target = cache_dir / f"{_slug(label)}-{_slug(encoder.name)}-{_digest([listing, encoder.fingerprint])}"
    sidecar = target.with_name(target.name + ".json")
    if _whole(target) and sidecar.is_file():
        return _read_sidecar(sidecar, target, source)
    return _build(target, source, files, encoder, progress)


def _build(target: Path, source: str, files: list[TextFile], encoder: Encoder, progress: Progress) -> Corpus:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    total = sum(file.size for file in files)
    limit = document_limit(files)
    counts = np.zeros(encoder.vocab_size, dtype=np.int64)
    text_bytes = skipped = documents = 0
    # Put in place in the order bin, json, idx: the dataset counts as there once its .idx is.
    with (
        atomic_path(target.with_name(target.name + ".idx")) as index_path,
        atomic_path(target.with_name(target.name + ".json")) as sidecar_path,
        atomic_path(target.with_name(target.name + ".bin")) as bin_path,
    ):
        builder = IndexedDatasetBuilder(str(bin_path), dtype=encoder.dtype)
        with contextlib.closing(builder.data_file):
            done = 0
            progress(0, total)
            batch: list[bytes] = []
            for position, file in enumerate(files):
                content = _read(file.path)
                done += file.size
                if content is None:
                    skipped += 1
                else:
                    batch += cut(content, limit)
                    text_bytes += len(content)
                if sum(map(len, batch)) >= _BATCH_BYTES or position == len(files) - 1:
                    for tokens in encoder.encode(batch):
                        document = np.append(tokens, encoder.dtype(encoder.eod))
                        builder.add_document(document, [len(document)])
                        counts += np.bincount(document, minlength=len(counts))
                    documents += len(batch)
                    batch = []
                    progress(done, total)
            if documents == 0:
                raise DataError(
                    f"data: {source!r} holds no text: {skipped} files are empty, not UTF-8, or hold a NUL byte; give "
                    f"plain text files"
                )
            builder.finalize(str(index_path))
        corpus = Corpus(
            prefix=target,
            vocab_size=encoder.vocab_size,
            eod=encoder.eod,
            tokens=int(counts.sum()),
            documents=documents,
            unigram_entropy=entropy(counts),
            source=source,
            text_bytes=text_bytes,
            skipped=skipped,
        )
        _write_sidecar(sidecar_path, corpus, tokenizer=encoder.name, tokens_counted=corpus.tokens)
    return corpus


def _read(path: Path) -> bytes | None:
    try:
        return read_text(path)
    except OSError as error:
        raise DataError(f"data: {str(path)!r} cannot be read ({error}); make it readable, or move it away") from error


def _existing_prefix(source: str) -> Path | None:
    """The absolute prefix when `source` names a Megatron dataset, None when it names text."""
    path = Path(source).absolute()
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    elif source == STDLIB or path.exists():
        return None
    present = [path.with_name(path.name + suffix).is_file() for suffix in (".bin", ".idx")]
    if not any(present):
        return None
    if not all(present):
        lacks = ".idx" if present[0] else ".bin"
        raise DataError(
            f"data: {source!r} has no {path.name}{lacks}; a Megatron dataset is a pair of .bin and .idx: copy the "
            f"missing file too, or give the text it was made from"
        )
    return path


def _adopt(prefix: Path, source: str, tokenizer: Path | None, cache_dir: Path) -> Corpus:
    """Describe a dataset made elsewhere. What is found is kept in the cache folder, not beside the user's files."""
    encoder = load_encoder(tokenizer) if tokenizer is not None else None
    stats = [prefix.with_name(prefix.name + suffix).stat() for suffix in (".bin", ".idx")]
    marks = [prefix.name, encoder.fingerprint if encoder else None, [[s.st_size, s.st_mtime_ns] for s in stats]]
    own = prefix.with_name(prefix.name + ".json")
    kept = cache_dir / f"{_slug(prefix.name)}-{_digest(marks)}.json"
    if encoder is None and own.is_file():
        with contextlib.suppress(DataError):  # a .json beside the dataset may be anything
            return _read_sidecar(own, prefix, source)
    if kept.is_file():
        return _read_sidecar(kept, prefix, source)

    dataset = _open(prefix)
    dtype = dataset.index.dtype
    tokens = int(dataset.sequence_lengths.sum(dtype=np.int64))
    counts, counted = _count(prefix, dtype, tokens)
    if encoder is not None:
        vocab_size, eod = encoder.vocab_size, encoder.eod
        if len(counts) > vocab_size:
            raise DataError(
                f"data: {source!r} holds token {len(counts) - 1}, but the tokenizer {str(tokenizer)!r} has only "
                f"{vocab_size}; give the tokenizer that the dataset was made with"
            )
    elif counted == tokens:
        # Without a tokenizer the tokens themselves are the best evidence; most sequences end with end-of-document.
        lengths = dataset.sequence_lengths[:1000]
        last = [dataset.get(i, offset=int(length) - 1, length=1)[0] for i, length in enumerate(lengths) if length]
        vocab_size, eod = 256 if dtype is np.uint8 else len(counts), int(np.bincount(last).argmax())
    else:
        raise DataError(
            f"data: {source!r} does not say how large its vocabulary is and is too large ({tokens} tokens) to look "
            f"through; give the tokenizer file it was made with"
        )
    documents = len(dataset.document_indices) - 1
    corpus = Corpus(prefix, vocab_size, eod, tokens, documents, entropy(counts), source)
    name = encoder.name if encoder else None
    atomic_write(kept, lambda path: _write_sidecar(path, corpus, tokenizer=name, tokens_counted=counted))
    return corpus


def _open(prefix: Path) -> Any:
    """The IndexedDataset at `prefix`, after a check that both files are what they should be."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    remedy = "copy or make the pair again"
    try:
        dataset = IndexedDataset(str(prefix))
    except Exception as error:  # assertions, struct errors and mmap errors, depending on where the damage is
        raise DataError(f"data: '{prefix}.idx' is not a Megatron index ({error}); {remedy}") from error
    ends = dataset.index.sequence_pointers + dataset.sequence_lengths * np.int64(dataset.index.dtype_size)
    size = prefix.with_name(prefix.name + ".bin").stat().st_size
    if len(ends) == 0 or ends.max() > size:
        needs = int(ends.max()) if len(ends) else 1
        raise DataError(f"data: '{prefix}.bin' has {size} bytes, its index needs at least {needs}; {remedy}")
    return dataset


def _count(prefix: Path, dtype: type[np.number], tokens: int) -> tuple[np.ndarray, int]:
    """Count tokens of the .bin file: all, or evenly strided blocks of a large one. Returns (counts, how many)."""
    stored = np.memmap(prefix.with_name(prefix.name + ".bin"), dtype=dtype, mode="r")[:tokens]
    if tokens <= _COUNT_AT_MOST:
        starts = np.arange(0, tokens, _COUNT_BLOCK)
    else:
        starts = np.linspace(0, tokens - _COUNT_BLOCK, _COUNT_AT_MOST // _COUNT_BLOCK).astype(np.int64)
    counts = np.zeros(0, dtype=np.int64)
    for start in starts:
        block = stored[start : start + _COUNT_BLOCK]
        try:
            more = np.bincount(block, minlength=len(counts))
        except (ValueError, TypeError) as error:
            raise DataError(f"data: '{prefix}.bin' does not hold token numbers ({error}); make it again") from error
        more[: len(counts)] += counts
        counts = more
    return counts, int(counts.sum())


def _write_sidecar(path: Path, corpus: Corpus, **more: Any) -> None:
    names = ("megatron-core", "numpy", "tokenizers", "torch")
    record = asdict(corpus) | {"prefix": corpus.prefix.name} | more | {"versions": {n: _version(n) for n in names}}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_sidecar(path: Path, prefix: Path, source: str) -> Corpus:
    found: Corpus = read_json(path, Corpus, error=DataError, remedy="delete it and start again")
    return replace(found, prefix=prefix, source=source)


def _whole(prefix: Path) -> bool:
    return all(prefix.with_name(prefix.name + suffix).is_file() for suffix in (".bin", ".idx"))


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", label)[:40] or "text"


def _digest(marks: Any) -> str:
    return hashlib.blake2b(json.dumps([_FORMAT, marks]).encode(), digest_size=6).hexdigest()
