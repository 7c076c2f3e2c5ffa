"""Turns text into a Megatron indexed dataset (PREFIX.bin, PREFIX.idx), once, and describes it in PREFIX.json."""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ds_plugin.core.errors import DataError, raise_on_all_ranks
from ds_plugin.core.files import atomic_path, atomic_write
from launch_scripts.gpt.hold import sweep_temporaries
from launch_scripts.gpt.indexed import check_description, count_tokens, is_description, open_dataset, read_description
from launch_scripts.gpt.text import (
    LARGEST_DOCUMENT,
    STDLIB,
    Source,
    contents,
    cut,
    document_limit,
    find_text_files,
    unfit,
)  # fmt: skip
from launch_scripts.gpt.tokens import Encoder, load_encoder

Progress = Callable[[int, int], None]

_FORMAT = 2  # part of every fingerprint: raise it when the same text would give another dataset
_BATCH_BYTES = 1 << 22
_IDLE_SECONDS = 3600.0


@dataclass(frozen=True)
class Corpus:
    """A dataset that is ready to train on.

    `prefix` is absolute, without a suffix. `unigram_entropy` is in nats per token, end-of-document tokens included: the
    loss of a model that knows how frequent each token is and nothing else. `text_bytes` is the text's size in UTF-8;
    `left_out` says how many files and records were left out, by the reason; both are empty for a dataset found as
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
    left_out: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """How much there is, and what was left out, in one line."""
        left_out = "; ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"data: {self.tokens:,} tokens in {self.documents:,} documents" + (
            f"; left out: {left_out}" if left_out else ""
        )


def prepare(
    source: str,
    *,
    tokenizer: Path | None,
    cache_dir: Path,
    text_key: str = "text",
    eod: str | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Return the dataset for `source`, made in `cache_dir` unless it is there already.

    `source` is "stdlib" (the Python standard library's own text), a text file, a .jsonl, .jsonl.gz or .parquet file, a
    folder of such files or one of ``Dataset.save_to_disk``, or the prefix of an existing Megatron dataset (with or
    without .bin or .idx), which is used as it is. `text_key` names what of a record is its text. `tokenizer` is a
    Hugging Face tokenizers file or the folder of one, or None for bytes; `eod` names its end-of-document token (see
    `FileEncoder`). `progress(done, total)` is called with bytes of the files.

    The file names in `cache_dir` carry a fingerprint of the files' names, sizes and times and of the tokenizer, so a
    second start re-uses them and changed text makes a new set. An interrupted preparation leaves nothing behind.

    With torch.distributed initialised every rank must call this: rank 0 does the work, in a folder every rank can read.

    Raises DataError (nothing at the path, no text in it, half a dataset, a damaged one, a cache folder that cannot be
    written) or ConfigError (tokenizer), on every rank.
    """
    corpus: Corpus | None = None
    distributed = dist.is_available() and dist.is_initialized()
    with raise_on_all_ranks():
        if not distributed or dist.get_rank() == 0:
            try:
                encoder = load_encoder(tokenizer, eod) if tokenizer is not None or eod is not None else None
                corpus = _prepare(
                    source, encoder, text_key, Path(cache_dir).absolute(), progress or (lambda done, total: None)
                )
            except OSError as error:
                raise DataError(
                    f"data: {source!r} cannot be prepared in '{cache_dir}' ({error}); make room there, or give --cache "
                    "a folder that can be written"
                ) from error
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


def _prepare(source: str, encoder: Encoder | None, text_key: str, cache_dir: Path, progress: Progress) -> Corpus:
    if not source.strip() or "\0" in source:
        raise DataError(f"data: {source!r} names nothing; give a text file or folder, or {STDLIB!r}")
    prefix = _existing_prefix(source)
    cache_dir.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(cache_dir, idle_seconds=_IDLE_SECONDS)  # other runs may be preparing theirs
    if prefix is not None:
        return _adopt(prefix, source, encoder, cache_dir)
    found, encoder = find_text_files(source, text_key), encoder or load_encoder(None)
    listing = [[file.name, file.size, file.modified_ns, file.kind] for file in found.files]
    label = STDLIB if source == STDLIB else Path(source).absolute().stem
    marks = [listing, encoder.fingerprint, text_key if any(file.kind for file in found.files) else None]
    target = cache_dir / f"{_slug(label)}-{_slug(encoder.name)}-{_digest(marks)}"
    sidecar = target.with_name(target.name + ".json")
    if _whole(target) and sidecar.is_file():
        dataset = open_dataset(target, f"delete '{target.name}.idx', and it is made again from the text")
        return _described(sidecar, target, source, dataset)
    return _build(target, source, found, text_key, encoder, progress)


def _documents(found: Source, text_key: str, left_out: Counter[str]) -> Iterator[tuple[bytes, int]]:
    """Every document, and how far the reading is in bytes of the files; counts in `left_out` what is none."""
    limit, before = document_limit(found.files), 0
    if found.beside:
        left_out["files beside the records"] = found.beside
    for file in found.files:
        read = 0
        for content in contents(file, text_key):
            reason = unfit(content)
            if content is None or reason is not None:
                left_out[f"{'records' if file.kind else 'files'} that {reason}"] += 1
                continue
            read += len(content)
            for piece in cut(content, LARGEST_DOCUMENT if file.kind else limit):
                yield piece, before + min(read, file.size)
        before += file.size


def _batches(found: Source, text_key: str, left_out: Counter[str]) -> Iterator[tuple[list[bytes], int]]:
    """The documents, about `_BATCH_BYTES` of them at a time, and how far the reading is; the last may be empty."""
    batch: list[bytes] = []
    size = 0
    for document, done in _documents(found, text_key, left_out):
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch, done
            batch, size = [], 0
    yield batch, sum(file.size for file in found.files)


def _build(target: Path, source: str, found: Source, text_key: str, encoder: Encoder, progress: Progress) -> Corpus:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    total = sum(file.size for file in found.files)
    counts = np.zeros(encoder.vocab_size, dtype=np.int64)
    text_bytes = documents = 0
    left_out: Counter[str] = Counter()
    # Put in place in the order bin, json, idx: the dataset counts as there once its .idx is.
    with (
        atomic_path(target.with_name(target.name + ".idx")) as index_path,
        atomic_path(target.with_name(target.name + ".json")) as sidecar_path,
        atomic_path(target.with_name(target.name + ".bin")) as bin_path,
    ):
        builder = IndexedDatasetBuilder(str(bin_path), dtype=encoder.dtype)
        with contextlib.closing(builder.data_file):
            progress(0, total)
            for batch, done in _batches(found, text_key, left_out):
                for tokens in encoder.encode(batch):
                    document = np.append(tokens, encoder.dtype(encoder.eod))
                    builder.add_document(document, [len(document)])
                    counts += np.bincount(document, minlength=len(counts))
                documents += len(batch)
                text_bytes += sum(map(len, batch))
                progress(done, total)
            if documents == 0:
                reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
                raise DataError(
                    f"data: {source!r} holds no text: {reasons or 'its files hold no records'}; give plain text files "
                    f"or records with a {text_key!r}"
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
            left_out=dict(left_out),
        )
        _write_sidecar(sidecar_path, corpus, tokenizer=encoder.name, tokens_counted=corpus.tokens)
    return corpus


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


def _adopt(prefix: Path, source: str, encoder: Encoder | None, cache_dir: Path) -> Corpus:
    """Describe a dataset made elsewhere. What is found is kept in the cache folder, not beside the user's files."""
    dataset = open_dataset(prefix)
    dtype, tokens = dataset.index.dtype, int(dataset.sequence_lengths.sum(dtype=np.int64))
    stats = [prefix.with_name(prefix.name + suffix).stat() for suffix in (".bin", ".idx")]
    marks = [prefix.name, encoder.fingerprint if encoder else None, [[s.st_size, s.st_mtime_ns] for s in stats]]
    own = prefix.with_name(prefix.name + ".json")
    kept = cache_dir / f"{_slug(prefix.name)}-{_digest(marks)}.json"
    described = encoder is None and own.is_file() and is_description(own)
    if not described and kept.is_file():
        return _described(kept, prefix, source, dataset)

    counts, counted = count_tokens(prefix, dtype, tokens)
    if described:
        corpus = _described(own, prefix, source, dataset)
        _refuse_tokens_beyond(corpus.vocab_size, counts, source, f"'{own}'")
        return corpus
    if encoder is not None:
        vocab_size, eod = encoder.vocab_size, encoder.eod
        _refuse_tokens_beyond(vocab_size, counts, source, f"the tokenizer {encoder.name!r}")
    elif counted == tokens:
        # Without a tokenizer the tokens themselves are the best evidence; most sequences end with end-of-document.
        lengths = dataset.sequence_lengths[:1000]
        last = [dataset.get(i, offset=int(length) - 1, length=1)[0] for i, length in enumerate(lengths) if length]
        vocab_size, eod = 256 if dtype is np.uint8 else len(counts), int(np.bincount(last or [0]).argmax())
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


def _refuse_tokens_beyond(vocab_size: int, counts: np.ndarray, source: str, whose: str) -> None:
    if len(counts) > vocab_size:
        raise DataError(
            f"data: {source!r} holds token {len(counts) - 1}, but {whose} has only {vocab_size}; give the tokenizer "
            "that the dataset was made with"
        )


def _described(sidecar: Path, prefix: Path, source: str, dataset: Any) -> Corpus:
    found = read_description(sidecar)
    check_description(sidecar, found, dataset)
    return Corpus(prefix=prefix, source=source, **found.model_dump())


def _write_sidecar(path: Path, corpus: Corpus, **more: Any) -> None:
    names = ("megatron-core", "numpy", "tokenizers", "torch")
    record = asdict(corpus) | {"prefix": corpus.prefix.name} | more | {"versions": {n: _version(n) for n in names}}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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
