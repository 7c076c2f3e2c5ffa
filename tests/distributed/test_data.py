"""The data of a run on two ranks: made once, shared out, and failing together."""

import random
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from ds_plugin.core.errors import DataError
from launch_scripts.gpt.corpus import Corpus, prepare
from launch_scripts.gpt.data import batches, build_datasets

LENGTH, SAMPLES = 16, 60


def _write_texts(root: Path) -> Path:
    texts = root / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:02}.txt").write_text(random.Random(number).randbytes(40).hex())
    return texts


def _samples(corpus: Corpus, cache: Path, dp_rank: int, dp_size: int) -> list[list[int]]:
    """The token lists of one rank's samples, in order."""
    train, _ = build_datasets(
        corpus, sequence_length=LENGTH, train_samples=SAMPLES, valid_samples=2, seed=5, split="9,1", cache_dir=cache
    )
    stream = batches(train, start_sample=0, micro_batch=2, dp_rank=dp_rank, dp_size=dp_size)
    taken = islice(stream, SAMPLES // (2 * dp_size))
    return [row for batch in taken for row in batch["tokens"].tolist()]


def _on_a_rank(texts: Path, cache: Path) -> tuple[Corpus, list[list[int]]]:
    from megatron.core.datasets import gpt_dataset, indexed_dataset

    def forbidden(*args, **kwargs):
        raise AssertionError("only rank 0 builds")

    if dist.get_rank() > 0:
        gpt_dataset._build_document_index = forbidden
        indexed_dataset.IndexedDatasetBuilder = forbidden
    corpus = prepare(str(texts), tokenizer=None, cache_dir=cache)
    return corpus, _samples(corpus, cache, dist.get_rank(), dist.get_world_size())


def test_two_ranks_share_one_stream(workers, tmp_path: Path):
    texts = _write_texts(tmp_path)
    (corpus, first), (corpus_1, second) = workers(2).run(_on_a_rank, texts, tmp_path / "cache")
    assert corpus == corpus_1
    alone = _samples(prepare(str(texts), tokenizer=None, cache_dir=tmp_path / "alone"), tmp_path / "alone", 0, 1)
    assert len({tuple(row) for row in alone}) == SAMPLES  # all different, so that the next two lines say something
    assert not {tuple(row) for row in first} & {tuple(row) for row in second}
    interleaved = [row for i in range(0, SAMPLES // 2, 2) for row in first[i : i + 2] + second[i : i + 2]]
    assert interleaved == alone
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert kept == ["samples", "texts", "texts", "texts"]  # one set of indices; .bin, .idx, .json; nothing temporary


def _fail(path: Path, cache: Path) -> str:
    try:
        prepare(str(path), tokenizer=None, cache_dir=cache)
    except DataError as error:
        return str(error)
    return "no error"


def test_missing_text_fails_on_both_ranks(workers, tmp_path: Path):
    errors = workers(2).run(_fail, tmp_path / "nowhere", tmp_path / "cache")
    assert errors[0] == errors[1] and "does not exist" in errors[0]
