"""Megatron-core's GPT dataset over a small corpus, and the order in which batches come."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_plugin.core.errors import ConfigError, DataError
from launch_scripts.gpt.corpus import Corpus, prepare
from launch_scripts.gpt.data import KEYS, batches, build_datasets

LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """100 documents of 40 bytes and an end each (4100 tokens), every byte pair of which says where it stands."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "texts").mkdir()
    for number in range(100):
        text = "".join(chr(33 + number % 90) + chr(33 + place) for place in range(20))
        (root / "texts" / f"{number:03}.txt").write_text(text)
    return prepare(str(root / "texts"), tokenizer=None, cache_dir=root / "cache")


def build(corpus: Corpus, tmp_path: Path, **changes):
    settings: dict[str, Any] = {
        "sequence_length": LENGTH,
        "train_samples": 100,
        "valid_samples": 4,
        "seed": 1,
        "split": "90,10,0",
    }
    return build_datasets(corpus, cache_dir=tmp_path, **(settings | changes))


def stream(dataset, start: int = 0, count: int = 6, **changes) -> list[dict[str, torch.Tensor]]:
    settings = {"micro_batch": 2, "dp_rank": 0, "dp_size": 1}
    return list(islice(batches(dataset, start_sample=start, **(settings | changes)), count))


def same(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def numbers(count: int, start: int, batches: int, **changes) -> list[list[int]]:
    """The samples of the first batches of a stream, by their place in a dataset of ``count``."""
    dataset = [dict.fromkeys(KEYS, torch.tensor(place)) for place in range(count)]
    return [batch["tokens"].tolist() for batch in stream(dataset, start, batches, dp_size=2, **changes)]


@pytest.mark.parametrize(
    ("rank", "expected"),
    # start 5, 2 ranks of 3: micro-batch 0 is samples 5-10, micro-batch 1 is 11-16; 17-22 does not fit into 22
    [(0, [[5, 6, 7], [11, 12, 13]]), (1, [[8, 9, 10], [14, 15, 16]])],
)
def test_sample_numbers(rank: int, expected: list[list[int]]):
    assert numbers(22, start=5, batches=3, micro_batch=3, dp_rank=rank) == expected


@pytest.mark.parametrize(("rank", "expected"), [(0, [[3], [0], [2]]), (1, [[4], [1], [3]])])
def test_sample_numbers_of_a_loop(rank: int, expected: list[list[int]]):
    # 3 4 | 0 1 | 2 3: no gap, no end
    assert numbers(5, start=3, batches=3, micro_batch=1, dp_rank=rank, loop=True) == expected


def test_batch_contents(corpus: Corpus, tmp_path: Path):
    train, valid = build(corpus, tmp_path)
    (batch,) = stream(train, count=1)
    assert list(batch) == ["tokens", "labels", "loss_mask", "position_ids"]  # and no attention mask
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
    }
    assert all(value.shape == (2, LENGTH) for value in batch.values())
    assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    assert not torch.equal(batch["labels"], batch["tokens"])
    assert torch.equal(batch["position_ids"], torch.arange(LENGTH).expand(2, -1))
    assert batch["loss_mask"].all()  # the end of a document is predicted too
    assert len(train) >= 100 and len(valid) >= 4


def test_one_epoch_gives_every_token_once(corpus: Corpus, tmp_path: Path):
    train, valid = build(corpus, tmp_path)
    # 90 documents of 41 tokens are 3690: (3690 - 1) // 16 = 230 samples
    assert len(train) == 230
    labels = torch.cat([batch["labels"].flatten() for batch in stream(train, count=230, micro_batch=1)])
    counts = torch.bincount(labels, minlength=256)
    stored = np.fromfile(f"{corpus.prefix}.bin", dtype=np.uint8)[: 90 * 41]
    missing = torch.from_numpy(np.bincount(stored, minlength=256)) - counts
    assert missing.min() >= 0 and missing.sum() == 3690 - 230 * LENGTH  # only the ends that fill no sample
    # The first byte of the last ten documents, chr(33 + 0..9), also fills documents 0-9: look at whole samples instead.
    held_out = set(range(90, 100))
    assert {int(number) for number in np.unique(valid.document_index)} <= held_out
    assert not held_out & {int(number) for number in np.unique(train.document_index)}


def test_seed_decides_the_order(corpus: Corpus, tmp_path: Path):
    first = stream(build(corpus, tmp_path)[0])
    assert same(first, stream(build(corpus, tmp_path)[0]))
    assert same(first, stream(build(corpus, tmp_path / "elsewhere")[0]))
    assert not same(first, stream(build(corpus, tmp_path, seed=2)[0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues(corpus: Corpus, tmp_path: Path, workers: int):
    train, _ = build(corpus, tmp_path)
    whole = stream(train, count=8, num_workers=workers)
    consumed = 3 * 2
    assert same(whole[3:], stream(build(corpus, tmp_path)[0], start=consumed, count=5))


def test_ranks_share_the_stream(corpus: Corpus, tmp_path: Path):
    train, _ = build(corpus, tmp_path)
    alone = stream(train, count=3, micro_batch=4)
    ranks = [stream(train, count=3, micro_batch=2, dp_rank=rank, dp_size=2) for rank in range(2)]
    joined = [{key: torch.cat([left[key], right[key]]) for key in left} for left, right in zip(*ranks, strict=True)]
    assert same(alone, joined)


def test_end_and_loop(corpus: Corpus, tmp_path: Path):
    train, _ = build(corpus, tmp_path)
    assert len(stream(train, start=220, count=100, micro_batch=3)) == 3  # 10 samples left, one of them unused
    looped = stream(train, start=228, count=2, loop=True)  # 228 229 | 0 1
    assert same(looped[1:], stream(train, count=1))


def test_small_text_is_read_again(corpus: Corpus, tmp_path: Path):
    train, _ = build(corpus, tmp_path, train_samples=1000)
    assert len(train) >= 1000
    assert len(stream(train, start=998, count=5)) >= 1


def test_global_random_stream_is_untouched(corpus: Corpus, tmp_path: Path):
    train, _ = build(corpus, tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    stream(train, count=2)
    stream(train, count=2, num_workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_indices_are_kept_and_whole(corpus: Corpus, tmp_path: Path):
    build(corpus, tmp_path)
    (folder,) = tmp_path.iterdir()  # nothing temporary beside it
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(times) == 8  # description, documents, samples, shuffle; for training and validation
    build(corpus, tmp_path)
    assert times == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    build(corpus, tmp_path, sequence_length=LENGTH + 1)
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_index_is_not_used(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("megatron.core.datasets.gpt_dataset._build_shuffle_index", stop)
        with pytest.raises(KeyboardInterrupt):
            build(corpus, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(build(corpus, tmp_path)[0]) == 230


def test_replaced_dataset_gets_new_indices(tmp_path: Path):
    """The same prefix with other documents: megatron-core alone would serve the old sample index."""
    source, cache = tmp_path / "t.txt", tmp_path / "cache"
    source.write_text("a" * 3000)
    first = prepare(str(source), tokenizer=None, cache_dir=cache)
    assert len(build(first, cache, split="1,0,0", valid_samples=0, train_samples=1)[0]) == (3000 + 3 - 1) // LENGTH
    source.write_text("a" * 5000)
    second = prepare(str(source), tokenizer=None, cache_dir=cache)
    for suffix in (".bin", ".idx"):
        Path(f"{first.prefix}{suffix}").write_bytes(Path(f"{second.prefix}{suffix}").read_bytes())
    assert len(build(first, cache, split="1,0,0", valid_samples=0, train_samples=1)[0]) == (5000 + 5 - 1) // LENGTH


def test_no_validation(corpus: Corpus, tmp_path: Path):
    train, valid = build(corpus, tmp_path, split="1,0", valid_samples=0)
    assert valid is None and len(train) == (4100 - 1) // LENGTH


# ------------------------------------------------------------------------------------------------------------ errors


def test_sequence_longer_than_a_part(corpus: Corpus, tmp_path: Path):
    build(corpus, tmp_path, sequence_length=409)  # ten documents of 41 tokens: 410, just enough
    message = (
        "the validation part has 410 tokens in 10 of 100 documents .* one sample needs 411 .*shorter sequence length"
    )
    with pytest.raises(DataError, match=message):
        build(corpus, tmp_path, sequence_length=410)
    with pytest.raises(DataError, match="the training part has 3690 tokens"):
        build(corpus, tmp_path, sequence_length=5000)


def test_part_without_documents(corpus: Corpus, tmp_path: Path):
    """Two thousandths of 100 documents round to none, on which megatron-core would count epochs for ever."""
    with pytest.raises(DataError, match="the test part has 0 tokens in 0 of 100 documents"):
        build(corpus, tmp_path, split="0.9,0.098,0.002")


@pytest.mark.parametrize("split", ["", "98", "98,2,0,0", "98,-2", "a,b", "98;2"])
def test_malformed_split(corpus: Corpus, tmp_path: Path, split: str):
    with pytest.raises(ConfigError, match="like '98,2,0'"):
        build(corpus, tmp_path, split=split)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "0,1"}, "leaves nothing for training"),
        ({"split": "1,0"}, "leaves nothing for the 4 validation samples"),
        ({"sequence_length": 0}, "sequence_length: 0 is not a positive number"),
        ({"train_samples": -1}, "train_samples: -1 is not a positive number"),
        ({"valid_samples": -1}, "valid_samples: -1 is negative"),
    ],
)
def test_bad_settings(corpus: Corpus, tmp_path: Path, change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build(corpus, tmp_path, **change)


def test_missing_files(corpus: Corpus, tmp_path: Path):
    from dataclasses import replace

    with pytest.raises(DataError, match="are not both there"):
        build(replace(corpus, prefix=tmp_path / "gone"), tmp_path)


def test_nothing_to_give(corpus: Corpus, tmp_path: Path):
    train, _ = build(corpus, tmp_path)
    with pytest.raises(DataError, match="from sample 229 on need 231 samples, the dataset has 230"):
        batches(train, start_sample=229, micro_batch=2, dp_rank=0, dp_size=1)
    with pytest.raises(DataError, match="need 232 samples"):
        batches(train, start_sample=0, micro_batch=116, dp_rank=0, dp_size=2, loop=True)
