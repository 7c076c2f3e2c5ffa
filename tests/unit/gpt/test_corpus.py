"""Text into a Megatron indexed dataset: what is read, how it is counted, and what an interruption leaves."""

import json
import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ds_plugin.core.errors import ConfigError, DataError
from launch_scripts.gpt.corpus import Corpus, entropy, prepare
from launch_scripts.gpt.text import cut, document_limit, find_text_files


def make(source: object, tmp_path: Path, tokenizer: Path | None = None, **more) -> Corpus:
    return prepare(str(source), tokenizer=tokenizer, cache_dir=tmp_path / "cache", **more)


def documents(corpus: Corpus) -> list[list[int]]:
    dataset = IndexedDataset(str(corpus.prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts (of two names that sort against the order of writing), one empty file and two that are not text."""
    root = tmp_path / "texts"
    (root / "inner").mkdir(parents=True)
    (root / "z.txt").write_bytes(b"aab")
    (root / "inner" / "a.txt").write_bytes("é".encode())
    (root / "empty.txt").write_bytes(b"")
    (root / "nul.txt").write_bytes(b"a\0b")
    (root / "latin.txt").write_bytes(b"\xe9")
    (root / ".hidden").write_bytes(b"never")
    return root


def test_bytes_of_a_folder(folder: Path, tmp_path: Path):
    corpus = make(folder, tmp_path)
    assert documents(corpus) == [[97, 97, 98, 0], [0xC3, 0xA9, 0]]  # by the hash of the name, each ended by NUL
    assert (corpus.vocab_size, corpus.eod, corpus.tokens, corpus.documents) == (256, 0, 7, 2)
    assert (corpus.text_bytes, corpus.skipped) == (5, 3)
    assert IndexedDataset(str(corpus.prefix)).index.dtype is np.uint8


def test_unigram_entropy_of_aab(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(b"aab")
    # a 1/2, b 1/4, end of document 1/4: 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2
    assert make(tmp_path / "t.txt", tmp_path).unigram_entropy == pytest.approx(1.5 * math.log(2), abs=1e-15)


@pytest.mark.parametrize(
    ("counts", "expected"), [([5], 0.0), ([1, 1], math.log(2)), ([1, 0, 1, 0], math.log(2)), ([4] * 8, math.log(8))]
)
def test_entropy(counts: list[int], expected: float):
    assert entropy(np.array(counts)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        (b"ab", 4, [b"ab"]),
        (b"abcd", 4, [b"abcd"]),
        (b"ab\ncd\nef", 4, [b"ab\n", b"cd\n", b"ef"]),
        (b"a\nb\nc", 4, [b"a\nb\n", b"c"]),
        (b"abcdefghi", 4, [b"abcd", b"efgh", b"i"]),
        ("abcé".encode(), 4, [b"abc", "é".encode()]),  # the two bytes of é stay together
        ("abé".encode() + b"c", 4, ["abé".encode(), b"c"]),
        ("😀😀".encode(), 4, ["😀".encode(), "😀".encode()]),
    ],
)
def test_cut(text: bytes, limit: int, pieces: list[bytes]):
    assert cut(text, limit) == pieces


def test_one_long_file_becomes_many_documents(tmp_path: Path):
    line = b"x" * 63 + b"\n"
    (tmp_path / "t.txt").write_bytes(line * 6400)  # 400 KiB: 1/200 of it is 2048, exactly 32 lines
    corpus = make(tmp_path / "t.txt", tmp_path)
    assert corpus.documents == 200
    assert corpus.tokens == 64 * 6400 + 200
    assert documents(corpus)[0] == list(line * 32) + [0]


def test_document_limit_leaves_many_files_whole(tmp_path: Path):
    for number in range(200):
        (tmp_path / f"{number}.txt").write_bytes(b"x")
    files = find_text_files(str(tmp_path))
    assert document_limit(files) == 1 << 20
    assert document_limit(files[:199]) == 1 << 10


def test_second_start_reads_nothing(folder: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    first = make(folder, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 9), (9, 9)]
    seen.clear()
    assert make(folder, tmp_path, progress=lambda done, total: seen.append((done, total))) == first
    assert seen == []


def test_changed_text_makes_a_new_dataset(folder: Path, tmp_path: Path):
    first = make(folder, tmp_path)
    (folder / "z.txt").write_bytes(b"aabb")
    second = make(folder, tmp_path)
    assert second.prefix != first.prefix and second.tokens == first.tokens + 1


def test_interrupted_preparation_leaves_nothing(folder: Path, tmp_path: Path):
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path, progress=stop)
    assert list((tmp_path / "cache").iterdir()) == []
    assert make(folder, tmp_path).tokens == 7


def test_dataset_without_index_is_made_again(folder: Path, tmp_path: Path):
    """What a power cut between the renames leaves: .bin and .json, no .idx."""
    corpus = make(folder, tmp_path)
    Path(f"{corpus.prefix}.idx").unlink()
    assert make(folder, tmp_path) == corpus and Path(f"{corpus.prefix}.idx").is_file()


def test_sidecar(folder: Path, tmp_path: Path):
    corpus = make(folder, tmp_path)
    record = json.loads(Path(f"{corpus.prefix}.json").read_text())
    assert record["tokenizer"] == "bytes" and record["tokens_counted"] == record["tokens"] == 7
    assert record["unigram_entropy"] == corpus.unigram_entropy
    assert set(record["versions"]) == {"megatron-core", "numpy", "tokenizers", "torch"}


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_existing_prefix_without_sidecar(folder: Path, tmp_path: Path, suffix: str):
    made = make(folder, tmp_path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for kind in (".bin", ".idx"):
        (theirs / f"set{kind}").write_bytes(Path(f"{made.prefix}{kind}").read_bytes())
    for _ in range(2):  # counted, then read from the cache
        found = make(theirs / f"set{suffix}", tmp_path)
        assert found.prefix == theirs / "set"
        assert (found.vocab_size, found.eod, found.tokens, found.documents) == (256, 0, 7, 2)
        assert found.unigram_entropy == pytest.approx(made.unigram_entropy, abs=1e-15)
    assert sorted(p.name for p in theirs.iterdir()) == ["set.bin", "set.idx"]


def test_own_prefix_uses_its_sidecar(folder: Path, tmp_path: Path):
    made = make(folder, tmp_path)
    assert make(f"{made.prefix}.bin", tmp_path).text_bytes == made.text_bytes == 5


def test_large_prefix_is_counted_in_strides(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from launch_scripts.gpt import corpus as module

    (tmp_path / "t.txt").write_bytes(b"ab" * 50000)
    made = make(tmp_path / "t.txt", tmp_path)
    monkeypatch.setattr(module, "_COUNT_AT_MOST", 8000)
    monkeypatch.setattr(module, "_COUNT_BLOCK", 1000)
    counts, counted = module._count(made.prefix, np.uint8, made.tokens)
    assert counted == 8000 and abs(int(counts[97]) - 4000) <= 8 and abs(int(counts[98]) - 4000) <= 8
    Path(f"{made.prefix}.json").unlink()
    with pytest.raises(DataError, match="give the tokenizer file"):
        make(made.prefix, tmp_path)


def test_real_standard_library(tmp_path: Path):
    source = Path(sysconfig.get_path("stdlib")) / "json"
    corpus = make(source, tmp_path)
    files = sorted(p for p in source.rglob("*") if p.is_file())
    text = [p for p in files if b"\0" not in p.read_bytes()]  # byte code holds NULs
    assert corpus.text_bytes == sum(p.stat().st_size for p in text)
    assert corpus.skipped == len(files) - len(text)
    assert corpus.tokens == corpus.text_bytes + corpus.documents
    assert 2.5 < corpus.unigram_entropy < 4.0  # program text


def test_stdlib_is_the_librarys_own_text():
    names = [file.name for file in find_text_files("stdlib")]
    assert {"json/decoder.py", "os.py"} <= set(names)
    # the end of the list is the validation part: it must not be one corner of the alphabet
    last = names[-40:]
    assert len({name.split("/")[-1][:6] for name in last}) > 15 and last != sorted(last)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert {Path(name).suffix for name in names} <= {".py", ".txt", ".rst", ".html"}


# --------------------------------------------------------------------------------------------------- tokenizer files


def save_tokenizer(path: Path, *special: str, truncate: int | None = None) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2, "far": 70000}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(special))
    if truncate:
        tokenizer.enable_truncation(truncate)
    tokenizer.save(str(path))
    return path


def test_tokenizer_file(tmp_path: Path):
    (tmp_path / "t.txt").write_text("one two two three")
    tokenizer = save_tokenizer(tmp_path / "words.json", "[SEP]", "</s>", truncate=2)
    corpus = make(tmp_path / "t.txt", tmp_path, tokenizer)
    eod = corpus.eod
    assert documents(corpus) == [[1, 2, 2, 0, eod]]  # whole in spite of the file's truncation
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(tokenizer)).id_to_token(eod) == "</s>"  # named before [SEP]
    assert corpus.vocab_size == 70001  # the largest number, not the count of 6
    assert IndexedDataset(str(corpus.prefix)).index.dtype is np.int32
    assert corpus.prefix != make(tmp_path / "t.txt", tmp_path).prefix


def test_adopted_prefix_with_the_wrong_tokenizer(tmp_path: Path):
    (tmp_path / "t.txt").write_text("far far")
    made = make(tmp_path / "t.txt", tmp_path, save_tokenizer(tmp_path / "large.json", "</s>"))
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    small = Tokenizer(WordLevel({"</s>": 0}, unk_token="</s>"))
    small.save(str(tmp_path / "small.json"))
    with pytest.raises(DataError, match="holds token 70000, but the tokenizer .*small.json.* has only 1"):
        make(made.prefix, tmp_path, tmp_path / "small.json")


# ------------------------------------------------------------------------------------------------------------ errors


def test_nothing_there(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere' does not exist; give a text file"):
        make(tmp_path / "nowhere", tmp_path)


def test_folder_without_files(tmp_path: Path):
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="void' holds no files"):
        make(tmp_path / "void", tmp_path)


def test_file_that_is_not_text(tmp_path: Path):
    (tmp_path / "blob").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match="holds no text: 1 files are"):
        make(tmp_path / "blob", tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("there", "missing"), [(".bin", ".idx"), (".idx", ".bin")])
@pytest.mark.parametrize("given", ["", ".bin", ".idx"])
def test_half_a_dataset(tmp_path: Path, there: str, missing: str, given: str):
    (tmp_path / f"half{there}").write_bytes(b"x")
    with pytest.raises(DataError, match=f"has no half{missing}"):
        make(tmp_path / f"half{given}", tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the host's half-built reader
@pytest.mark.parametrize(
    ("damage", "message"),
    [(".idx", "is not a Megatron index"), (".bin", "its index needs at least 7")],
)
def test_damaged_dataset(folder: Path, tmp_path: Path, damage: str, message: str):
    made = make(folder, tmp_path)
    Path(f"{made.prefix}.json").unlink()
    Path(f"{made.prefix}{damage}").write_bytes(b"cut")
    with pytest.raises(DataError, match=message):
        make(f"{made.prefix}.bin", tmp_path)


def test_tokenizer_errors(tmp_path: Path):
    (tmp_path / "t.txt").write_text("one")
    with pytest.raises(ConfigError, match="none.json' does not exist"):
        make(tmp_path / "t.txt", tmp_path, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="bad.json' is not a Hugging Face tokenizers file"):
        make(tmp_path / "t.txt", tmp_path, tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="noend.json' has no end-of-document token; add one of"):
        make(tmp_path / "t.txt", tmp_path, save_tokenizer(tmp_path / "noend.json", "[CLS]"))
